"""Check models in separate processes, so that a hang, a crash or lack of memory costs one row alone."""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Generator, Iterable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from growfx.commands.children import end_with_parent, fork_context
from growfx.commands.zoo.facts import REAL_BELOW, Facts, scrubbed
from growfx.errors import ConfigError

__all__ = ["Limits", "check_all", "resident_bytes"]

_POLL = 0.1  # seconds between looks at time and memory
_GOODBYE = 5.0  # seconds for a process to end that has sent its facts
_PRELOAD = [
    "torch",
    "timm",
    "torchvision",
    "growfx.commands.zoo.check",
    "growfx.artifact.writer",
    "growfx.passes.mask.swap",
]
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the check of one model may take.

    Attributes:
        seconds: wall time.
        memory: GiB of resident memory, looked at ten times a second; None: no limit.
        jobs: models checked at the same time; None: one per core.
        threads: of each.
    """

    seconds: float = 300.0
    memory: float | None = None
    jobs: int | None = None
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("seconds", "memory", "jobs", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"the limit of {name} is {value}; allowed are numbers above 0")
        if self.memory is not None and resident_bytes(os.getpid()) is None:
            raise ConfigError("memory can only be limited where /proc tells how much a process has (Linux)")

    @property
    def processes(self) -> int:
        """How many models are checked at the same time."""
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        return self.jobs or cores or 1


def check_all(specs: Iterable[str], limits: Limits, real_below: float = REAL_BELOW) -> Generator[Facts]:
    """Check every model, as many at once as `limits` says; yields their facts as they come in.

    Models with `real_below` parameters or more are checked without values.

    A model that goes over its limits, or whose process dies, ends as "timeout", "memory" or "crash", with the facts
    that were known by then. Closing the generator ends all processes.
    """
    waiting = list(specs)[::-1]
    running: list[_Job] = []
    context = fork_context(_PRELOAD)
    with tempfile.TemporaryDirectory(prefix="growfx-zoo-") as folder:
        try:
            while waiting or running:
                while waiting and len(running) < limits.processes:
                    running.append(_Job(context, waiting.pop(), Path(folder), limits.threads, real_below))
                connection.wait([job.results for job in running], _POLL)
                for job in list(running):
                    facts = job.look(limits)
                    if facts is not None:
                        running.remove(job)
                        yield facts
        finally:
            for job in running:
                job.kill()


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process; None when it cannot be told."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


class _Job:
    """One model being checked."""

    def __init__(self, context: Any, spec: str, folder: Path, threads: int, real_below: float):
        self.facts = Facts(spec, stage="start")
        self.begun = time.monotonic()
        self.results, sender = context.Pipe(duplex=False)
        listener, self._lifeline = context.Pipe(duplex=False)
        self.log = folder / f"{id(self)}.log"
        args = (spec, sender, listener, str(self.log), threads, real_below)
        self.process = context.Process(target=_check_in_child, args=args, daemon=True)
        self.process.start()
        sender.close()
        listener.close()

    def look(self, limits: Limits) -> Facts | None:
        """Take in what the process sent; the facts when it has ended or must end."""
        gone = False
        try:
            while self.results.poll():
                self.facts = Facts.from_json(json.loads(self.results.recv_bytes()))
        except (EOFError, OSError):
            gone = True
        if self.facts.ended:
            self.process.join(_GOODBYE)  # what it holds of the system it gives back itself
            return self._over()
        if gone:
            self.process.join()
            return self._over("crash", self._cause())
        spent = time.monotonic() - self.begun
        if spent > limits.seconds:
            return self._over("timeout", f"not done after {limits.seconds:g} s")
        memory = resident_bytes(self.process.pid) if limits.memory is not None else None
        if memory is not None and limits.memory is not None and memory > limits.memory * _GIB:
            return self._over("memory", f"{memory / _GIB:.2f} GiB in use, {limits.memory:g} GiB allowed")
        return None

    def kill(self) -> None:
        """End the process, even a hanging one."""
        self.process.kill()
        self.process.join()
        self.results.close()
        self._lifeline.close()
        self.process.close()
        self.log.unlink(missing_ok=True)

    def _over(self, ended: str = "", cause: str = "") -> Facts:
        if ended:
            self.facts.ended, self.facts.cause = ended, scrubbed(cause)
            self.facts.seconds["whole"] = round(time.monotonic() - self.begun, 3)
        self.kill()
        return self.facts

    def _cause(self) -> str:
        code = self.process.exitcode or 0
        if code < 0:
            name = signal.Signals(-code).name
            cause = f"killed by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"
        else:
            cause = f"the process ended with status {code}"
        said = self.log.read_text(encoding="utf-8", errors="replace").split("\n") if self.log.exists() else []
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return f"{cause}; its last words: {last}" if last else cause


def _check_in_child(spec: str, results: Any, lifeline: Any, log: str, threads: int, real_below: float) -> None:
    """What a process does: check one model and send the facts, after each stage and at the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C, for all
    end_with_parent(lifeline)
    # Models print, and so do crashing libraries; neither belongs between the lines of a progress bar.
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError:
        return  # the run was over before this process had begun
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from growfx.commands.zoo.check import check_model

    gc.freeze()  # the libraries stay: no collection need look at them, or copy their pages
    torch.set_num_threads(threads)

    def tell(facts: Facts) -> None:
        results.send_bytes(json.dumps(dataclasses.asdict(facts)).encode())

    tell(check_model(spec, tell, real_below))
