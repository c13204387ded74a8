"""Train under fixed masks: the method of `growfx.train` when none is given; all ones is dense training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from growfx.methods.stepwise.course import Course, Stepwise

__all__ = ["Fixed"]


@dataclass(frozen=True)
class Fixed(Stepwise):
    """Trains a network under the masks it has."""

    name: ClassVar[str] = "fixed"
    needs_whole: ClassVar[str] = ""
    changes_masks: ClassVar[bool] = False

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        return {}

    def _update(self, course: Course) -> None:
        return None

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False
