"""Alternating compressed and decompressed training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from growfx.errors import ConfigError
from growfx.masked.mask_bits import pack, unpack
from growfx.masked.optimizers import forget_state
from growfx.methods.starting import MASKS_OF_PRUNING, all_edges
from growfx.methods.stepwise.course import Course, Stepwise
from growfx.methods.stepwise.exchange import finite_magnitudes, keep_largest
from growfx.methods.stepwise.gradual import SPREADS, start_to_prune
from growfx.methods.stepwise.schedules import step_at
from growfx.methods.stepwise.sparse_start import settle_density
from growfx.options import option
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["ACDC"]


@dataclass(frozen=True)
class ACDC(Stepwise):
    """AC/DC: dense and sparse phases in turn, the last one sparse (Peste et al., NeurIPS 2021).

    Training is dense for `warmup`; then `cycles` sparse phases alternate with dense ones. A sparse phase starts by
    keeping the edges of largest magnitude, and keeps that mask; a dense phase has all edges back, those pruned at zero.
    The optimizer's state of every parameter, momentum among it, is forgotten at the start of a dense phase, as in the
    released ImageNet runs. The default fractions are the 100 epochs of those: sparse phases start at 10, 20, ... 70 and
    are 5 long, the last dense phase is from 75 to 85, the final sparse one from 85.

    Attributes:
        density: of sparse phases, of all masked layers together that are trained; None is that of given masks.
        masks: "drawn" has all edges in dense phases, ignoring the network's masks; "given" has those of the masks the
            network starts with, and no others.
        scope: "global" compares magnitudes over the whole network; "uniform", "erk" and "er" give each layer its share
            of the edges (`growfx.selection.density`) and compare within it.
        warmup: first dense phase, as a fraction of all steps.
        cycles: sparse phases before the last dense phase; they and the dense phases between them are of one length.
        last_dense, last_sparse: length of the last two phases, as fractions of all steps.
        reset_optimizer: whether the optimizer's state is forgotten at the start of dense phases.
        seed: of ties.

    Deviations: 1. the state is dropped rather than filled with zeros, so that Adam's correction for its start begins
    anew too. 2. every masked layer takes part, with "uniform" too. 3. phases shorter than a step are left out, but not
    the final sparse one; the last optimizer step may be all that comes before it.
    """

    name: ClassVar[str] = "acdc"
    needs_whole: ClassVar[str] = ""

    density: float | None = option(0.1, low=0, high=1, open_low=True)
    masks: str = option("drawn", choices=MASKS_OF_PRUNING)
    scope: str = option("global", choices=SPREADS)
    warmup: float = option(0.1, low=0, high=1, open_low=True, open_high=True)
    cycles: int = option(7, low=1)
    last_dense: float = option(0.1, low=0, high=1, open_low=True, open_high=True)
    last_sparse: float = option(0.15, low=0, high=1, open_low=True, open_high=True)
    reset_optimizer: bool = True
    seed: int = option(0, low=0, high=2**63 - 1)

    def _check(self) -> None:
        settle_density(self)
        taken = self.warmup + self.last_dense + self.last_sparse
        if taken >= 1:
            raise ConfigError(
                f"`warmup` + `last_dense` + `last_sparse` = {taken:.4g}; allowed are sums below 1, which leave time "
                "for the cycles between them"
            )

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        masks = start_to_prune(course, self.masks, self.density)
        if self.masks == "given":
            course.start["given"] = {name: pack(mask) for name, mask in masks.items()}
        return masks

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        sparse = self._begins(course.total_steps).get(course.steps)
        if sparse is None:
            return None
        if sparse:
            edges = min(course.edges_at(course.start.get("density", self.density)), course.nnz)
            weights = finite_magnitudes(course.weights, "weights") or {}
            return keep_largest(
                course.masks, edges, weights, self.scope, EdgeKeys(self.seed, f"prune after step {course.steps}")
            )
        masks = _dense(course)
        if self.reset_optimizer and course.nnz < sum(int(mask.count_nonzero()) for mask in masks.values()):
            forget_state(course.optimizer, course.layers.values())
        return masks

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False

    def _begins(self, total_steps: int) -> dict[int, bool]:
        """Return the steps that phases follow, and whether they are sparse; of phases at one step the last."""
        end = 1 - self.last_dense - self.last_sparse
        length = (end - self.warmup) / (2 * self.cycles - 1)
        begins = [(self.warmup + number * length, number % 2 == 0) for number in range(2 * self.cycles - 1)]
        begins += [(end, False), (1 - self.last_sparse, True)]
        return {step_at(fraction, total_steps): sparse for fraction, sparse in begins}


def _dense(course: Course) -> dict[str, Tensor]:
    """Return the masks of a dense phase: all edges, or all of the masks given at the start."""
    given = course.start.get("given")
    if given is None:
        return all_edges(course.layers)
    return {name: unpack(given[name], mask) for name, mask in course.masks.items()}
