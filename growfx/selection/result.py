"""Chosen edges, and the check of how many are asked for."""

import numbers
from dataclasses import dataclass

from torch import Tensor

from growfx.errors import ConfigError

__all__ = ["Selection", "check_count"]


@dataclass(frozen=True)
class Selection:
    """Chosen edges.

    `masks`: bool per layer, the shape and device of its scores. `count`: how many were chosen; fewer than
    `asked` only where there were not enough candidates.
    """

    masks: dict[str, Tensor]
    count: int
    asked: int


def check_count(k: int) -> None:
    """Raise `ConfigError` for what is not a number of edges to choose."""
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 0:
        raise ConfigError(f"the number of edges to choose is {k!r}; allowed is 0 or more, a whole number")
