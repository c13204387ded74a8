"""Start a Ray cluster, run a command on it, and kill a node on the way: `ray_nodes.py FOLDER compare|zoo ...`.

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
from contextlib import suppress
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


def trains(folder: Path) -> bool:
    """Whether a run of a comparison has written a checkpoint."""
    return any((folder / "out" / "runs").glob("*/checkpoint/latest.pt"))


def checks(node: Node) -> bool:
    """Whether a node checks a model, for which it starts processes forked from one that has imported everything."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"multiprocessing.forkserver" in (process / "cmdline").read_bytes():
                parent = int(process.name)
                while parent > 1 and parent != node.process.pid:
                    parent = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[1])
                if parent == node.process.pid:
                    return True
    return False


def executed(folder: Path, arguments: list[str], victim: Node) -> dict[str, object]:
    """Execute the command, and kill the node once it has work to lose."""
    command = [sys.executable, "-m", "growfx", *arguments, "--launcher", "ray", "--address", HEAD]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    killed = False
    while process.poll() is None:
        if not killed and (checks(victim) if arguments[0] == "zoo" else trains(folder)):
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
        print(json.dumps(executed(folder, sys.argv[2:], nodes[-1])))
    finally:
        for node in nodes[::-1]:
            node.kill()
        shutil.rmtree(short, ignore_errors=True)


if __name__ == "__main__":
    main()
