"""A random mask of fixed density, drawn once: the control for every method that chooses edges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from growfx.methods.stepwise.course import Course
from growfx.methods.stepwise.sparse_start import SparseStart

__all__ = ["Static"]


@dataclass(frozen=True)
class Static(SparseStart):
    """Masks that never change, at `density`: random ones, or as `masks` says; options as in `SparseStart`."""

    name: ClassVar[str] = "static"
    needs_whole: ClassVar[str] = ""

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        return self._start_masks(course, self.density)

    def _update(self, course: Course) -> None:
        return None

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False
