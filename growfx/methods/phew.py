"""PHEW: a sparse network of random walks biased by weight magnitude, found without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from growfx.methods.sparse_start import StaticMasks
from growfx.methods.stepwise import Course
from growfx.passes.walks import walk_masks

__all__ = ["PHEW"]


@dataclass(frozen=True)
class PHEW(StaticMasks):
    """Keeps the edges that random walks step on, forward and backward in turn (Patil & Dovrolis, PHEW, ICML 2021).

    There are as many walks as the density takes. How they run through a network, and deviations: `growfx.passes.walks`.
    """

    name: ClassVar[str] = "phew"

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        walks = walk_masks(course.net, course.edges_at(self.density), layers=course.layers, seed=self.seed)
        return self._initialised(course, walks.masks)
