"""Gradual pruning: training starts with more edges than it ends with, by the cubic schedule of Zhu & Gupta."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from growfx.errors import ConfigError
from growfx.methods.masks import dense_gradients
from growfx.methods.starting import MASKS_OF_PRUNING, all_edges, given_masks, start_density
from growfx.methods.stepwise.course import Course, Stepwise
from growfx.methods.stepwise.exchange import exchange, finite_magnitudes, keep_largest
from growfx.methods.stepwise.schedules import Clock, Ramp, anneal, step_at
from growfx.methods.stepwise.sparse_start import SparseStart, settle_density
from growfx.options import Unused, option
from growfx.selection.density import DISTRIBUTIONS
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["GMP", "SPREADS", "GraNet", "start_to_prune"]

SPREADS = ("global", *DISTRIBUTIONS)


@dataclass(frozen=True)
class GMP(Stepwise):
    """Gradual magnitude pruning from dense (Zhu & Gupta, To Prune or Not To Prune, 2017).

    From after `start` to `end` the density falls from 1 to `density` along a cubic; at every update the present edges
    of smallest magnitude go, and none comes back. The step at `end` is always an update, the last, and hits `density`
    exactly, for any number of updates before it.

    Attributes:
        density: at the end, of all masked layers together that are trained; None is that of given masks.
        masks: "drawn" starts with all edges, ignoring the network's masks; "given" prunes on from those it has, and
            none of the edges absent there comes back.
        scope: "global" compares magnitudes over the whole network; "uniform", "erk" and "er" give each layer its share
            of the edges (`growfx.selection.density`) and compare within it.
        start, end: of pruning, as fractions of all steps.
        update_every: optimizer steps from update to update.
        seed: of ties.

    Deviations: 1. "global" is the default; the paper prunes every layer alike, "uniform". 2. every masked layer takes
    part, first and last ones too. 3. the window is a fraction of the training, by default that of Sundar & Dwaraknath
    (ReScience C 2021), who prune in the first three quarters.
    """

    name: ClassVar[str] = "gmp"
    needs_whole: ClassVar[str] = ""

    density: float | None = option(0.1, low=0, high=1, open_low=True)
    masks: str = option("drawn", choices=MASKS_OF_PRUNING)
    scope: str = option("global", choices=SPREADS)
    start: float = option(0.0, low=0, high=1, open_high=True)
    end: float = option(0.75, low=0, high=1, open_low=True)
    update_every: int = option(100, low=1)
    seed: int = option(0, low=0, high=2**63 - 1)

    def _check(self) -> None:
        if self.start >= self.end:
            raise ConfigError(f"`start` = {self.start} is not before `end` = {self.end}; allowed are smaller ones")
        settle_density(self)

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        return start_to_prune(course, self.masks, self.density)

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        ramp = Ramp(round(self.start * course.total_steps), step_at(self.end, course.total_steps), self.update_every)
        if not ramp.due(course.steps):
            return None
        first, last = course.start.get("first", 1.0), course.start.get("density", self.density)
        return _pruned(course, ramp.density(course.steps, first, last), self.scope, self.seed)

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False


def start_to_prune(course: Course, masks: str, density: float | None) -> dict[str, Tensor]:
    """Return the masks that pruning to `density` starts from: all edges, or those given.

    Notes the density of these as `course.start["first"]`, and the one to prune to as `course.start["density"]`.
    """
    if masks == "given":
        last = start_density(course.scope, density, "density", at_most=True)
        course.start |= {"first": course.scope.density, "density": last}
        course.edges_at(last)
        return given_masks(course.layers)
    assert density is not None
    course.edges_at(density)
    course.start |= {"first": 1.0, "density": density}
    return all_edges(course.layers)


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
        density: at the end, of all masked layers together that are trained; None is that of given masks.
        initial_density: at the start; below 1 as `masks` says (see `SparseStart`), and initialised by `init`. With
            given masks it is theirs, so there it stays at 1.
        prune_until: fraction of all steps at which `density` is reached, exactly and at a separate update.
        update_every: optimizer steps from update to update.
        drop_fraction, last_drop_fraction: of a layer's edges, exchanged by an update at the start and at the end of
            training; between them by a cosine.

    Deviations: 1. `density` is reached exactly at `prune_until`; the released code stops one update short of it. 2.
    starting masks and all counts are exact. 3. the last step of a training has no regeneration, as nothing would train
    it. 4. no update before the first step; update_every is a number of steps and not scaled with the training.
    """

    name: ClassVar[str] = "granet"
    needs_whole: ClassVar[str] = ""
    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            ("masks", "distribution"),
            lambda use: (
                "at `initial_density` = 1, where all edges are present"
                if use.method.initial_density == 1 and use.method.masks != "given"
                else ""
            ),
        ),
    )

    density: float | None = option(0.1, low=0, high=1, open_low=True)
    initial_density: float = option(1.0, low=0, high=1, open_low=True)
    prune_until: float = option(0.5, low=0, high=1, open_low=True)
    update_every: int = option(100, low=1)
    drop_fraction: float = option(0.5, low=0, high=1)
    last_drop_fraction: float = option(0.005, low=0, high=1)

    def _check(self) -> None:
        if self.density is not None and self.initial_density < self.density:
            raise ConfigError(
                f"`initial_density` = {self.initial_density} is below `density` = {self.density}; "
                "allowed is at least that"
            )
        if self.last_drop_fraction > self.drop_fraction:
            raise ConfigError(
                f"`last_drop_fraction` = {self.last_drop_fraction} is above `drop_fraction` = {self.drop_fraction}; "
                "allowed is at most that"
            )

        if self.sign_in and self.initial_density == 1 and self.masks != "given":
            raise ConfigError(
                f"`sign_in` = {self.sign_in} is for networks that start sparse, but `initial_density` is 1; set it "
                "below 1 (0.5 is the paper's sparse-to-sparse training), or `sign_in` to 0"
            )
        if self.initial_density == 1 and self.init != "dense" and self.masks != "given":
            raise ConfigError(
                f"`init` = `{self.init}` has no effect at `initial_density` = 1, where nothing is sparse yet; allowed "
                "is `dense`, or a lower `initial_density`"
            )

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        if self.masks == "given":
            masks = start_to_prune(course, self.masks, self.density)
            if self.initial_density not in (1.0, course.start["first"]):
                start_density(course.scope, self.initial_density, "initial_density")
            return self._initialised(course, masks)
        course.edges_at(self._density(course))
        masks = self._start_masks(course, self.initial_density)
        course.start |= {"first": self.initial_density, "density": self.density}
        return masks

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        ramp = self._ramp(course)
        masks = None
        if ramp.due(course.steps):
            first, last = course.start.get("first", self.initial_density), course.start.get("density", self.density)
            masks = _pruned(course, ramp.density(course.steps, first, last), "global", self.seed)
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
        grow = finite_magnitudes(dense_gradients(course.net, course.layers))
        if grow is None:
            return None
        rate = anneal("cosine", self.drop_fraction, course.done, self.last_drop_fraction)
        counts = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
        keep = {name: count - math.ceil(rate * count) for name, count in counts.items()}
        weights = finite_magnitudes(course.weights, "weights") or {}
        return exchange(masks, keep, counts, weights, grow, self.seed, f"after step {course.steps}")
