"""When masks are chosen anew, and how much changes then; everything in optimizer steps, counted from 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

__all__ = ["DECAYS", "Clock", "Ramp", "anneal", "step_at"]

# What is left of a value after the fraction `done` of its time; from Evci et al., ICML 2020, app. G.
DECAYS: Final[Mapping[str, Callable[[float], float]]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
}


def anneal(decay: str, first: float, done: float, last: float = 0.0) -> float:
    """Return a value that goes from `first` to `last` by one of `DECAYS`, after the fraction `done` of its time.

    "constant" stays at `first`. `done` outside [0, 1] counts as the nearer end.
    """
    return last + (first - last) * DECAYS[decay](min(max(done, 0.0), 1.0))


def step_at(fraction: float, total_steps: int) -> int:
    """Return the step number, 1 to `total_steps`, that is nearest to a fraction of all steps."""
    return min(max(round(fraction * total_steps), 1), total_steps)


@dataclass(frozen=True)
class Clock:
    """Updates after every `every`-th step before step `end`, which itself has none.

    With `end` = number of steps the last step of a training has no update, so that nothing is evaluated just after one
    that no training follows.
    """

    every: int
    end: int

    @classmethod
    def until(cls, fraction: float, total_steps: int, every: int) -> Clock:
        """Return the clock whose steps t satisfy ``t < fraction * total_steps``."""
        # 0.7 * 10 is a little above 7 in floating point
        return cls(every, math.ceil(round(fraction * total_steps, 6)))

    def due(self, step: int) -> bool:
        """Whether an update follows step number `step`."""
        return 0 < step < self.end and step % self.every == 0

    @property
    def last(self) -> int:
        """Number of the last step with an update; 0 when there is none."""
        return max(self.end - 1, 0) // self.every * self.every


@dataclass(frozen=True)
class Ramp:
    """Gradual pruning from after step `start` to step `end`, every `every` steps and at `end`, which is its last.

    The density follows the cubic of Zhu & Gupta (To Prune or Not To Prune, 2017):
    ``last + (first - last) * (1 - progress) ** 3``.
    """

    start: int
    end: int
    every: int

    def due(self, step: int) -> bool:
        """Whether step number `step` is followed by pruning."""
        return step == self.end or (self.start < step < self.end and step % self.every == 0)

    def density(self, step: int, first: float, last: float) -> float:
        """Return the density after step number `step`: `first` up to `start`, exactly `last` from `end` on."""
        if step >= self.end:
            return last
        if step <= self.start:
            return first
        progress = (step - self.start) / (self.end - self.start)
        return last + (first - last) * (1 - progress) ** 3
