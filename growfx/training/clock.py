"""How long training and evaluation take, over all the processes that a run was continued in."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Clock"]


@dataclass
class Clock:
    """Seconds of a run; start-up, the writing of checkpoints and of results are in none of them.

    Attributes:
        train_seconds: wall time of training: batches, steps, changes of masks.
        train_cpu_seconds: processor time of this process meanwhile, summed over its threads; loader processes aside.
        eval_seconds: wall time of validation and test.
    """

    train_seconds: float = 0.0
    train_cpu_seconds: float = 0.0
    eval_seconds: float = 0.0
    _since: tuple[float, float] | None = None

    @contextmanager
    def training(self) -> Generator[None]:
        """Count what happens meanwhile as training."""
        self._since = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            self._read()
            self._since = None

    @contextmanager
    def evaluating(self) -> Generator[None]:
        """Count what happens meanwhile as evaluation."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.eval_seconds += time.perf_counter() - begun

    def _read(self) -> None:
        if self._since is not None:
            now = time.perf_counter(), time.process_time()
            self.train_seconds += now[0] - self._since[0]
            self.train_cpu_seconds += now[1] - self._since[1]
            self._since = now

    def seconds(self) -> dict[str, float]:
        """Return the three, by name, rounded to a millisecond."""
        self._read()
        names = ("train_seconds", "train_cpu_seconds", "eval_seconds")
        return {name: round(getattr(self, name), 3) for name in names}

    def load(self, seconds: Mapping[str, Any]) -> None:
        """Go on from what `seconds` returned."""
        for name in self.seconds():
            setattr(self, name, float(seconds[name]))
