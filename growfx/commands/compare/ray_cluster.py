"""Execute runs on a Ray cluster: one task for each, in the folders of the comparison, which all nodes share.

A task continues its run from the last checkpoint. So a node that dies costs what it did since then: Ray gives its
tasks to other nodes. Everything about placing, retrying and noticing dead nodes is Ray's.
"""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from growfx.commands.compare.pool import POLL, PRELOAD, Report, RunSpec
from growfx.commands.compare.progress import LogTail, finished
from growfx.errors import ConfigError, GrowfxError, one_line

__all__ = ["Cluster"]

_PATIENCE = 30.0  # seconds until an address is given up
_ATTEMPTS = 10  # of a run whose node or process died


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each run takes of it.

    Attributes:
        address: `HOST:PORT` of its head node, or "auto" for the one this machine belongs to.
        cpus, gpus: of each run; a run has as many threads as `cpus`.
    """

    address: str = "auto"
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise ConfigError(f"`--cpus-per-run` is {self.cpus}; allowed are whole numbers from 1 up")
        if not 0 <= self.gpus < float("inf"):
            raise ConfigError(f"`--gpus-per-run` is {self.gpus}; allowed: [0, inf)")

    def connect(self) -> None:
        """Connect to the cluster.

        Raises:
            ConfigError: `ray` is not installed, or no cluster answers within 30 seconds; no node has what a run takes.
        """
        ray = _ray()
        _probe(self.address)
        failed = list[BaseException]()

        def connect() -> None:
            try:
                ray.init(address=self.address, log_to_driver=False, logging_level="ERROR", ignore_reinit_error=True)
            except Exception as error:  # of whatever layer meets it first
                failed.append(error)

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        if thread.is_alive() or failed:
            reason = one_line(failed[0])[:200] if failed else f"no answer within {_PATIENCE:.0f} s"
            raise _unreachable(self.address, reason)
        if not any(self._fits(node["Resources"]) for node in ray.nodes() if node["Alive"]):
            ray.shutdown()
            raise ConfigError(
                f"no node of the cluster has {self.cpus} CPUs and {self.gpus:g} GPUs, which `--cpus-per-run` and "
                "`--gpus-per-run` ask for each run; runs would wait for ever"
            )

    def run_all(self, runs: Sequence[tuple[str, RunSpec, Path]], *, jobs: int | None = None) -> Generator[Report]:
        """Continue or start runs, as many at a time as the cluster has room for; reports as `pool.run_all` does.

        Args:
            runs: name, options and folder of each; the folders are on storage that all nodes share.
            jobs: at most so many at the same time.
        """
        ray = _ray()
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_ATTEMPTS)(_run_on_node)
        waiting, running = list(runs)[::-1], dict[Any, _Remote]()
        try:
            while waiting or running:
                while waiting and (jobs is None or len(running) < jobs):
                    name, spec, out = waiting.pop()
                    running[task.remote(spec, str(out.resolve()), self.cpus)] = _Remote(name, out.resolve())
                ended, _ = ray.wait(list(running), num_returns=1, timeout=POLL)
                for reference, remote in list(running.items()):
                    report = remote.look(_outcome(reference) if reference in ended else None)
                    if report is None:
                        continue
                    if report.ended:
                        del running[reference]
                    yield report
        finally:
            for reference in running:
                with suppress(Exception):  # the cluster may be what failed
                    ray.cancel(reference, force=True)

    def _fits(self, resources: Mapping[str, float]) -> bool:
        return resources.get("CPU", 0) >= self.cpus and resources.get("GPU", 0) >= self.gpus


class _Remote:
    """A run on some node, as far as the shared folder tells of it."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out = name, out
        self.epochs, self._tail = 0, LogTail(out)

    def look(self, outcome: tuple[str | None] | None) -> Report | None:
        """Return what is new, None when nothing is; `outcome` has the error of a run that has ended."""
        before, self.epochs = self.epochs, self._tail.epochs()
        if outcome is None:
            return Report(self.name, self.epochs, ended=False) if self.epochs != before else None
        (error,) = outcome
        if error is None and finished(self.out) is None:
            error = f"the run has ended on its node, but `{self.out}` has no result; all nodes must share that folder"
        return Report(self.name, self.epochs, ended=True, error=error)


def _run_on_node(spec: RunSpec, out: str, threads: int) -> str | None:
    """What a task does: one run; returns its error, None when there is none."""
    for name in PRELOAD:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(threads)
    try:
        spec.run(Path(out), resume=True, progress=False)
    except GrowfxError as error:
        return one_line(error)
    except Exception as error:  # of a library, or a fault of ours: the other runs go on
        return one_line(error)[:300]
    return None


def _outcome(reference: Any) -> tuple[str | None]:
    try:
        return (_ray().get(reference),)
    except Exception as error:  # its node died again and again, or the cluster did
        return (f"lost by the cluster: {one_line(error)[:300]}",)


def _probe(address: str) -> None:
    """Try whether anybody listens at `HOST:PORT`; Ray itself waits for minutes."""
    host, colon, port = address.rpartition(":")
    if address == "auto":
        return
    if not colon or not port.isdigit():
        raise ConfigError(f"`--address {address}` is not an address; write HOST:PORT of the head node, or `auto`")
    try:
        socket.create_connection((host, int(port)), timeout=_PATIENCE / 3).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> ConfigError:
    return ConfigError(
        f"no Ray cluster answers at `{address}` ({reason}); start one with `ray start --head` on a machine and "
        "`ray start --address HOST:PORT` on the others"
    )


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError("`--launcher ray` needs the package `ray`: pip install 'ray>=2.60'") from error
