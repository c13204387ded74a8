"""The result of a selection of edges, and the check of the number asked for."""

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
    """Raise `ConfigError` unless `k` is a number of edges."""
    if not isinstance(k, numbers.Integral) or isinstance(k, bool) or k < 0:
        raise ConfigError(f"the number of edges to choose is {k!r}; allowed is 0 or more, a whole number")
