"""Start a Ray cluster, run a comparison on it, and kill a node on the way: `ray_nodes.py FOLDER compare ...`.

To be run in a network namespace, as Ray listens on all addresses of a machine: a head without processors at 127.0.0.2,
and two nodes of one processor each. Prints one line of JSON.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HEAD = "127.0.0.2:6379"
_PATIENCE = 180  # seconds, on a busy machine
_ATTEMPTS = 4
START = ["start", "--block", "--disable-usage-stats", "--object-store-memory=80000000"]


class Node:
    """A node of the cluster: its processes are one session, so that they end together."""

    def __init__(self, folder: Path, address: str, *more: str) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", *START, f"--node-ip-address={address}", *more]
        self.log = folder / f"{address}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def has_started(self) -> bool:
        """Wait until it runs; False where it has given up, as it does after 30 seconds of a busy machine."""
        deadline = time.monotonic() + _PATIENCE
        while "Ray runtime started" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.3)
        return True

    def kill(self) -> None:
        """End all of it at once, as a failing machine would."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def started(folder: Path, address: str, *more: str) -> Node:
    """A node that runs."""
    for _ in range(_ATTEMPTS):
        node = Node(folder, address, *more)
        if node.has_started():
            return node
        node.kill()
    sys.exit(f"a node did not start: {(folder / f'{address}.log').read_text()[-2000:]}")


def compared(folder: Path, arguments: list[str], victim: Node) -> dict[str, object]:
    """Run the comparison, and kill the node once a run has written a checkpoint."""
    command = [sys.executable, "-m", "growfx", *arguments, "--launcher", "ray", "--address", HEAD]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killed = False
    while process.poll() is None:
        if not killed and any((folder / "out" / "runs").glob("*/checkpoint/latest.pt")):
            victim.kill()
            killed = True
        time.sleep(0.2)
    return {"status": process.returncode, "killed": killed, "errors": process.communicate()[1][-2000:]}


def main() -> None:
    """Start the nodes, run, and end them."""
    folder = Path(sys.argv[1])
    for name in ("initial_delay", "period", "timeout"):
        os.environ[f"RAY_health_check_{name}_ms"] = "500"
    os.environ |= {"RAY_health_check_failure_threshold": "3"}
    # Paths of sockets may have 107 characters, and Ray's own part takes 60 of them.
    short = tempfile.mkdtemp(prefix="ray-")
    head = ["--head", "--include-dashboard=false", "--port=6379", "--num-cpus=0", f"--temp-dir={short}"]
    nodes = list[Node]()
    try:
        nodes.append(started(folder, "127.0.0.2", *head))
        for address in ("127.0.0.3", "127.0.0.4"):
            nodes.append(started(folder, address, f"--address={HEAD}", "--num-cpus=1"))
        print(json.dumps(compared(folder, sys.argv[2:], nodes[-1])))
    finally:
        for node in nodes[::-1]:
            node.kill()
        shutil.rmtree(short, ignore_errors=True)


if __name__ == "__main__":
    main()
