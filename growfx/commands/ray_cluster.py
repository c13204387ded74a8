"""Execute tasks on a Ray cluster: connect, place, try again elsewhere when a node dies.

Everything about placing, retrying and noticing dead nodes is Ray's.
"""

from __future__ import annotations

import importlib
import socket
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from growfx.errors import ConfigError, one_line

__all__ = ["Cluster", "Outcome", "Progress"]

_PATIENCE = 30.0  # seconds until an address is given up
_ATTEMPTS = 10  # of a task whose node or process died
_POLL = 0.5  # seconds between two looks at the tasks
_GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What a task returned, or why the cluster lost it."""

    value: Any = None
    error: str | None = None


@dataclass(frozen=True)
class Progress:
    """The names of the tasks that run, and the outcomes of those that have ended since the last look."""

    running: frozenset[str] = frozenset()
    ended: Mapping[str, Outcome] = field(default_factory=dict)


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster, and what each task takes of it.

    Attributes:
        address: `HOST:PORT` of its head node, or "auto" for the one this machine belongs to.
        cpus, gpus: of each task; it has as many threads as `cpus`.
        memory: GiB that Ray sets aside for each task; None: none is counted.
    """

    address: str = "auto"
    cpus: int = 1
    gpus: float = 0.0
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.cpus < 1:
            raise ConfigError(f"`--cpus-per-run` is {self.cpus}; allowed are whole numbers from 1 up")
        if not 0 <= self.gpus < float("inf"):
            raise ConfigError(f"`--gpus-per-run` is {self.gpus}; allowed: [0, inf)")

    def connect(self) -> None:
        """Connect to the cluster.

        Raises:
            ConfigError: `ray` is not installed, or no cluster answers within 30 seconds; no node has what a task takes.
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
            raise ConfigError(f"no node of the cluster has {self._asked()}; runs would wait for ever")

    def execute(
        self, function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]], *, jobs: int | None = None
    ) -> Generator[Progress]:
        """Call `function` with the arguments of each task, as many at a time as the cluster has room for.

        Yields at least every half second. A task whose node or process dies is called again on another node, so it
        must be able to go on from what it has left, or begin anew. Closing the generator ends the tasks that run.

        Args:
            function: importable on the nodes by its name.
            tasks: name -> arguments.
            jobs: at most so many at the same time.
        """
        ray = _ray()
        memory = {} if self.memory is None else {"memory": self.memory * _GIB}
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=_ATTEMPTS, **memory)(function)
        waiting, running = list(tasks.items())[::-1], dict[Any, str]()
        try:
            while waiting or running:
                while waiting and (jobs is None or len(running) < jobs):
                    name, arguments = waiting.pop()
                    running[task.remote(*arguments)] = name
                references, _ = ray.wait(list(running), num_returns=1, timeout=_POLL)
                ended = {running.pop(reference): _outcome(reference) for reference in references}
                yield Progress(frozenset(running.values()), ended)
        finally:
            for reference in running:
                with suppress(Exception):  # the cluster may be what failed
                    ray.cancel(reference, force=True)

    def _fits(self, resources: Mapping[str, float]) -> bool:
        needed = {"CPU": self.cpus, "GPU": self.gpus, "memory": (self.memory or 0) * _GIB}
        return all(resources.get(kind, 0) >= amount for kind, amount in needed.items())

    def _asked(self) -> str:
        parts = [f"{self.cpus} CPUs (`--cpus-per-run`)"]
        parts += [f"{self.gpus:g} GPUs (`--gpus-per-run`)"] if self.gpus else []
        parts += [f"{self.memory:g} GiB (`--limit-memory`)"] if self.memory is not None else []
        return " and ".join(parts)


def _outcome(reference: Any) -> Outcome:
    try:
        return Outcome(_ray().get(reference))
    except Exception as error:  # its node died again and again, or the cluster did
        return Outcome(error=f"lost by the cluster: {one_line(error)[:300]}")


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
