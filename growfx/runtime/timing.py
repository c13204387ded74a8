"""Times of several calls on a machine whose speed drifts: measured in turn, compared round by round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Timing", "in_turn", "interleaved_minima", "thread_count"]

_HOPELESS = 3.0


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, one entry a round."""

    seconds: tuple[float, ...]

    @property
    def minimum(self) -> float:
        """The fastest round, in seconds."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The median round, in seconds."""
        return statistics.median(self.seconds)

    def speedup_over(self, other: Timing) -> float:
        """How many times as long the other takes: the median of the rounds' ratios, so that drift does not decide.

        Raises:
            ValueError: the two were not measured in the same rounds.
        """
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(theirs / own for own, theirs in pairs)


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Timing], dict[str, Exception]]:
    """Time every call once a round, in an order drawn anew for every round.

    Before it is timed a call runs once untimed: the caches are its own then, as in a process that runs nothing else,
    and the threads of the one before it have gone to sleep.

    Args:
        calls: name -> what to time.
        rounds: how many times each is timed.
        seed: of the orders.
        clock: what each call is timed by, in seconds.

    Returns:
        the times, and the errors of calls that raised one; those are left out from then on.
    """
    draw = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, Exception] = {}
    for _ in range(rounds):
        for name in draw.sample(list(calls), len(calls)):
            if name in errors:
                continue
            try:
                calls[name]()
                start = clock()
                calls[name]()
                seconds[name].append(clock() - start)
            except Exception as error:  # of any library: one that fails must not end the others
                errors[name] = error
    return {name: Timing(tuple(spent)) for name, spent in seconds.items() if name not in errors}, errors


def interleaved_minima(
    calls: Mapping[str, Callable[[], object]],
    *,
    least_rounds: int,
    seconds: float,
    spreads: list[float] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """The least time of each call in microseconds.

    They take turns, so that whatever slows the machine down slows all of them; the least of many times is what a
    call takes when nothing does. A call that is three times as slow as the best after two rounds is left out of the
    others.

    Args:
        calls: name -> what to time; called once before any time is taken.
        least_rounds: at least so many turns.
        seconds: further turns until so much time is spent.
        spreads: gets, for each call that ran to the end, how far its median is above its least time, over the least:
            near 0 on a quiet machine, and large where something else was running.
        clock: what each call is timed by, in seconds.
    """
    if len(calls) < 2:
        least_rounds = min(least_rounds, 3)
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    running, rounds, end = dict(calls), 0, time.perf_counter() + seconds
    while rounds < least_rounds or (len(running) > 1 and time.perf_counter() < end):
        for name, call in running.items():
            start = clock()
            call()
            taken[name].append(clock() - start)
        rounds += 1
        if rounds == 2:
            limit = _HOPELESS * min(map(min, taken.values()))
            running = {name: call for name, call in running.items() if min(taken[name]) <= limit}
    if spreads is not None:
        spreads += [statistics.median(taken[name]) / min(taken[name]) - 1 for name in running]
    return {name: min(values) * 1e6 for name, values in taken.items()}


@contextmanager
def thread_count(threads: int) -> Generator[None]:
    """`threads` threads for torch's operators; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
