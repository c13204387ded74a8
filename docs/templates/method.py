"""Template of a stepwise method: exchange the smallest weights of each layer for random absent ones (after SET).

Copy it to `growfx/methods/stepwise/<name>.py`, add a row to `_METHODS` in `growfx/methods/registry.py`, and the
contract test `tests/methods/test_conformance.py` runs it. Cite the paper and number what is decided differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from growfx.methods.stepwise.course import Course
from growfx.methods.stepwise.exchange import exchange
from growfx.methods.stepwise.sparse_start import SparseStart
from growfx.options import option

__all__ = ["RandomExchange"]


@dataclass(frozen=True)
class RandomExchange(SparseStart):
    """Drop the edges of smallest magnitude and grow as many at random, layer by layer (Mocanu et al., SET, 2018).

    Attributes:
        update_every: optimizer steps between exchanges.
        drop_fraction: of each layer's edges, dropped at an exchange.
    """

    name: ClassVar[str] = "random-exchange"
    update_every: int = option(100, low=1)
    drop_fraction: float = option(0.3, low=0, high=1)

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        return self._start_masks(course, self.density)

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        if course.steps % self.update_every:
            return None
        edges = {name: layer.nnz for name, layer in course.layers.items()}
        keep = {name: count - int(self.drop_fraction * count) for name, count in edges.items()}
        stream = f"after step {course.steps}"  # tells the random draws of one seed apart
        return exchange(course.masks, keep, edges, course.magnitudes, None, self.seed, stream)

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False  # True where `_update` reads the gradient of absent edges
