"""Gradual pruning: training starts with more edges than it ends with, by the cubic schedule of Zhu & Gupta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from growfx.density import DISTRIBUTIONS
from growfx.edge_keys import EdgeKeys
from growfx.errors import ConfigError
from growfx.methods.base import dense_gradients
from growfx.methods.exchange import exchange, finite_magnitudes, keep_largest
from growfx.methods.schedules import Clock, Ramp, anneal, step_at
from growfx.methods.sparse_start import SparseStart
from growfx.methods.stepwise import Course, Stepwise
from growfx.options import option

__all__ = ["GMP", "SPREADS", "GraNet"]

SPREADS = ("global", *DISTRIBUTIONS)


@dataclass(frozen=True)
class GMP(Stepwise):
    """Gradual magnitude pruning from dense (Zhu & Gupta, To Prune or Not To Prune, 2017).

    From after `start` to `end` the density falls from 1 to `density` along a cubic; at every update the present edges
    of smallest magnitude go, and none comes back. The step at `end` is always an update, the last, and hits `density`
    exactly, whatever the number of updates before it.

    Attributes:
        density: at the end, of all masked layers together.
        scope: "global" compares magnitudes over the whole network; "uniform", "erk" and "er" give each layer its share
            of the edges (`growfx.density`) and compare within it.
        start, end: of pruning, as fractions of all steps.
        update_every: optimizer steps from update to update.
        seed: of ties.

    Deviations: 1. "global" is the default; the paper prunes every layer alike, "uniform". 2. every masked layer takes
    part, first and last ones too. 3. the window is a fraction of the training, by default that of Sundar & Dwaraknath
    (ReScience C 2021), who prune in the first three quarters.
    """

    name: ClassVar[str] = "gmp"
    needs_whole: ClassVar[str] = ""

    density: float = option(0.1, low=0, high=1, open_low=True)
    scope: str = option("global", choices=SPREADS)
    start: float = option(0.0, low=0, high=1, open_high=True)
    end: float = option(0.75, low=0, high=1, open_low=True)
    update_every: int = option(100, low=1)
    seed: int = option(0, low=0, high=2**63 - 1)

    def _check(self) -> None:
        if self.start >= self.end:
            raise ConfigError(f"`start` = {self.start} is not before `end` = {self.end}; allowed are smaller ones")

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        course.edges_at(self.density)
        return {name: torch.ones_like(mask) for name, mask in course.masks.items()}

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        ramp = Ramp(round(self.start * course.total_steps), step_at(self.end, course.total_steps), self.update_every)
        if not ramp.due(course.steps):
            return None
        return _pruned(course, ramp.density(course.steps, 1.0, self.density), self.scope, self.seed)

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False


def _pruned(course: Course, density: float, spread: str, seed: int) -> dict[str, Tensor]:
    """Return masks with the edges of largest magnitude, of those present, that `density` leaves."""
    edges = min(course.edges_at(density), course.nnz)
    weights = finite_magnitudes(course.weights, "weights") or {}
    return keep_largest(course.masks, edges, weights, spread, EdgeKeys(seed, f"prune after step {course.steps}"))


@dataclass(frozen=True)
class GraNet(SparseStart):
    """Gradual pruning with zero-cost neuroregeneration (Liu et al., GraNet, NeurIPS 2021).

    At every update the density falls along the cubic, by global magnitude; then every layer drops its worst edges by
    magnitude and grows as many where the gradient is largest. Edges that go in either way may grow again at once, and
    then keep their value and the optimizer's state. `initial_density` 1 is the paper's dense-to-sparse training, 0.5
    its sparse-to-sparse. A step whose gradients are not finite has no regeneration.

    Attributes:
        density: at the end, of all masked layers together.
        initial_density: at the start; below 1 at random by `distribution`, and initialised by `init`.
        prune_until: fraction of all steps at which `density` is reached, exactly and at an update of its own.
        update_every: optimizer steps from update to update.
        drop_fraction, last_drop_fraction: of a layer's edges, exchanged by an update at the start and at the end of
            training; between them by a cosine.

    Deviations: 1. `density` is reached exactly at `prune_until`; the released code stops one update short of it. 2.
    starting masks and all counts are exact. 3. the last step of a training has no regeneration, as nothing would train
    it. 4. no update before the first step; update_every is a number of steps and not scaled with the training.
    """

    name: ClassVar[str] = "granet"
    needs_whole: ClassVar[str] = ""

    initial_density: float = option(1.0, low=0, high=1, open_low=True)
    prune_until: float = option(0.5, low=0, high=1, open_low=True)
    update_every: int = option(100, low=1)
    drop_fraction: float = option(0.5, low=0, high=1)
    last_drop_fraction: float = option(0.005, low=0, high=1)

    def _check(self) -> None:
        if self.initial_density < self.density:
            raise ConfigError(
                f"`initial_density` = {self.initial_density} is below `density` = {self.density}; "
                "allowed is at least that"
            )
        if self.last_drop_fraction > self.drop_fraction:
            raise ConfigError(
                f"`last_drop_fraction` = {self.last_drop_fraction} is above `drop_fraction` = {self.drop_fraction}; "
                "allowed is at most that"
            )

        if self.initial_density == 1 and self.init != "dense":
            raise ConfigError(
                f"`init` = `{self.init}` has no effect at `initial_density` = 1, where nothing is sparse yet; allowed "
                "is `dense`, or a lower `initial_density`"
            )

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        course.edges_at(self.density)
        return self._random_start(course, self.initial_density)

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        ramp = self._ramp(course)
        masks = None
        if ramp.due(course.steps):
            density = ramp.density(course.steps, self.initial_density, self.density)
            masks = _pruned(course, density, "global", self.seed)
        if self._regenerates(course, course.steps):
            masks = self._regenerated(course, masks or course.masks) or masks
        return masks

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return self._regenerates(course, step)

    def _ramp(self, course: Course) -> Ramp:
        return Ramp(0, step_at(self.prune_until, course.total_steps), self.update_every)

    def _regenerates(self, course: Course, step: int) -> bool:
        due = Clock(self.update_every, course.total_steps).due(step) or step == self._ramp(course).end
        return due and step < course.total_steps and self.drop_fraction > 0

    def _regenerated(self, course: Course, masks: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        grow = finite_magnitudes(dense_gradients(course.layers))
        if grow is None:
            return None
        rate = anneal("cosine", self.drop_fraction, course.done, self.last_drop_fraction)
        counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        keep = {name: count - math.ceil(rate * count) for name, count in counts.items()}
        weights = finite_magnitudes(course.weights, "weights") or {}
        return exchange(masks, keep, counts, weights, grow, self.seed, f"after step {course.steps}")
