"""PHEW: a sparse network of random walks biased by weight magnitude, found without data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from growfx.methods.scope import is_frozen
from growfx.methods.stepwise.course import Course
from growfx.methods.stepwise.sparse_start import StaticMasks
from growfx.passes.walks import walk_masks

__all__ = ["PHEW"]


@dataclass(frozen=True)
class PHEW(StaticMasks):
    """Keeps the edges that random walks step on, forward and backward in turn (Patil & Dovrolis, PHEW, ICML 2021).

    There are as many walks as the density takes. How they run through a network, and deviations: `growfx.passes.walks`.
    """

    name: ClassVar[str] = "phew"
    off_path: ClassVar[str] = "left"
    warns_of_loss: ClassVar[bool] = False

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        frozen = [name for name, layer in course.net.layers.items() if is_frozen(layer)]
        edges = course.edges_at(self.density)
        walks = walk_masks(course.net, edges, layers=course.layers, through=frozen, seed=self.seed)
        return self._initialised(course, walks.masks)
