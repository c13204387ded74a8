"""Comparing the time of several calls on a machine that does other things too."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

__all__ = ["interleaved_minima"]

_HOPELESS = 3.0


def interleaved_minima(
    calls: Mapping[str, Callable[[], object]], *, least_rounds: int, seconds: float
) -> dict[str, float]:
    """The least time of each call in microseconds.

    They take turns, so that whatever slows the machine down slows all of them; the least of many times is what a
    call takes when nothing does. A call that is three times as slow as the best after two rounds is left out of the
    others.

    Args:
        calls: name -> what to time; called once before any time is taken.
        least_rounds: at least so many turns.
        seconds: further turns until so much time is spent.
    """
    if len(calls) < 2:
        least_rounds = min(least_rounds, 3)
    for call in calls.values():
        call()
    least = dict.fromkeys(calls, float("inf"))
    running, rounds, end = dict(calls), 0, time.perf_counter() + seconds
    while rounds < least_rounds or (len(running) > 1 and time.perf_counter() < end):
        for name, call in running.items():
            start = time.perf_counter()
            call()
            least[name] = min(least[name], time.perf_counter() - start)
        rounds += 1
        if rounds == 2:
            limit = _HOPELESS * min(least.values())
            running = {name: call for name, call in running.items() if least[name] <= limit}
    return {name: value * 1e6 for name, value in least.items()}
