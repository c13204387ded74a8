"""Which of many cases `make test` runs; `make test-all` runs the others."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def some(cases: Iterable[Any], kept: Callable[[Any], bool]) -> list[Any]:
    """Return parameters of a test: those that are `kept` as they are, the others marked slow.

    A case of several arguments is a tuple.
    """
    found = [(case, kept(case)) for case in cases]
    assert any(stays for _, stays in found), "nothing of this would run in `make test`"
    return [case if stays else _slow(case) for case, stays in found]


def _slow(case: Any) -> Any:
    if isinstance(case, tuple):
        return pytest.param(*case, marks=pytest.mark.slow)
    return pytest.param(case, marks=pytest.mark.slow)


# A method of each kind: masks that stay, scores before training, edges exchanged, pruning, phases, rounds of growth,
# whole units, several trainings.
_METHODS = {"acdc", "channel-growth", "granet", "imp", "mest", "pwmpr", "rigl", "snip", "static"}


def representative(name: str) -> bool:
    """Whether `make test` runs a test of all methods with this one."""
    return name in _METHODS
