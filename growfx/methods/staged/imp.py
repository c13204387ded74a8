"""Iterative magnitude pruning: train, prune, go back, train again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from growfx.methods.masks import change_masks
from growfx.methods.session import Stage
from growfx.methods.staged.campaign import (
    Campaign,
    Staged,
    keep_point,
    make_dense,
    refuse_unused,
    return_to,
    step_of,
    trace_entry,
)
from growfx.methods.starting import MASKS_OF_PRUNING, start_density
from growfx.methods.stepwise.sparse_start import settle_density
from growfx.options import option
from growfx.selection.choose import top
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["IMP", "REWINDS"]

REWINDS = ("weights", "learning-rate", "continued")


@dataclass(frozen=True)
class IMP(Staged):
    """Lottery tickets by iterative magnitude pruning (Frankle & Carbin, ICLR 2019; Frankle et al., ICML 2020).

    Level 0 trains the network with all edges of the layers it may change (others keep their masks). After each level
    the present edges of smallest magnitude, over all these layers at once, are pruned, the optimizer's state is
    forgotten, and the next level is trained; the last one has exactly `density`. The cost is that of one training a
    level.

    `rewind` says what a level starts from:
        "weights": everything (weights, biases, norm statistics) as it was after `rewind_epochs` of level 0, and the
            schedule from there (open_lth; Frankle et al., Linear Mode Connectivity and the Lottery Ticket Hypothesis).
        "learning-rate": the weights the level before ended with, and the schedule from `rewind_epochs` (Renda et al.,
            Comparing Rewinding and Fine-tuning, ICLR 2020).
        "continued": those weights, and the whole schedule again.

    The trace has one entry a level, with its density and the last accuracy reported in it.

    Attributes:
        density: at the last level, of all masked layers together that are trained; None is that of given masks.
        masks: "drawn" starts with all edges, ignoring the network's masks; "given" prunes on from those it has.
        prune_fraction: of the present edges, pruned after each level; the last pruning stops at `density`.
        levels: how many times to prune, the same fraction each time; 1 prunes once, to `density`. None prunes
            `prune_fraction` as often as needed.
        rewind: as above.
        rewind_epochs: of level 0 or of the schedule, as above; may be a fraction. 0 goes back to the initial network.
        seed: of ties.

    Deviations from open_lth:
        1. batches are drawn from the number of the epoch in the whole run, so each level sees them in another order.
        2. counts are exact: the released threshold prunes one edge more, and all that tie with it.
        3. the fraction is one of the layers that paths cross; open_lth counts what it leaves alone in it too.
        4. the last pruning prunes less than the others where `density` is not a power of the fraction a level keeps.
    """

    name: ClassVar[str] = "imp"
    stages: ClassVar[tuple[str, ...] | None] = ("level", "final")

    density: float | None = option(0.1, low=0, high=1, open_low=True)
    masks: str = option("drawn", choices=MASKS_OF_PRUNING)
    prune_fraction: float = option(0.2, low=0.01, high=1, open_high=True)
    levels: int | None = option(None, low=1, high=1000, unset="as many as prune_fraction needs")
    rewind: str = option("weights", choices=REWINDS)
    rewind_epochs: float = option(1.0, low=0)
    seed: int = option(0, low=0, high=2**63 - 1)

    def _check(self) -> None:
        settle_density(self)
        if self.levels is not None:
            refuse_unused(self, "prune_fraction", "`levels` given")
        if self.rewind == "continued":
            refuse_unused(self, "rewind_epochs", "`rewind` = 'continued'")

    # -- levels ---------------------------------------------------------------------------------------------

    def _counts(self, course: Campaign) -> list[int]:
        """Return how many edges of `course.layers` each level has, from those it starts with to the target."""
        full, target = self._ends(course)
        if self.levels is not None:
            keep = (target / full) ** (1 / self.levels)
            return [*(max(round(full * keep**level), target) for level in range(self.levels)), target]
        counts = [full]
        while counts[-1] > target:
            # a level prunes at least one edge, however few there are
            next_count = min(round(full * (1 - self.prune_fraction) ** len(counts)), counts[-1] - 1)
            counts.append(max(next_count, target))
        return counts

    def _ends(self, course: Campaign) -> tuple[int, int]:
        """Return with how many edges of `course.layers` level 0 starts, and how many the last level has."""
        if self.masks != "given":
            assert self.density is not None
            return course.numel, course.edges_at(self.density)
        if not course.start:
            last = start_density(course.scope, self.density, "density", at_most=True)
            course.start = {"first": {name: layer.nnz for name, layer in course.layers.items()}, "density": last}
        first = sum(course.start["first"][name] for name in course.layers)
        return first, min(course.edges_at(course.start["density"]), first)

    def _plan(self, course: Campaign) -> list[Stage]:
        epochs, first = course.run.options.epochs, self._rewind_step(course)
        last = len(self._counts(course)) - 1
        starts = [0, *[first] * last]
        levels = [Stage("level", epochs, level, first_step=starts[level]) for level in range(last)]
        return [*levels, Stage("final", epochs, first_step=starts[last])]

    def _rewind_step(self, course: Campaign) -> int:
        if self.rewind == "continued":
            return 0
        return step_of(course, "rewind_epochs", self.rewind_epochs, course.run.options.epochs)

    def _start(self, course: Campaign) -> None:
        if self.masks != "given":
            make_dense(course, self)
        self._keep_rewind_point(course)

    def _keep_rewind_point(self, course: Campaign) -> None:
        # later levels start there, so their steps are beyond it
        due = course.steps == self._rewind_step(course)
        if self.rewind == "weights" and due and len(course.plan) > 1:
            course.memory["rewind"] = keep_point(course)

    def _after_step(self, course: Campaign) -> bool:
        self._keep_rewind_point(course)
        return False

    def _after_stage(self, course: Campaign, stage: Stage) -> None:
        level = len(course.trace)
        course.trace.append(trace_entry(course, level=level))
        if not course.stages:
            return
        counts = self._counts(course)  # of other layers than the plan's, where some were frozen since
        edges = counts[-1] if not course.stages[1:] else counts[min(level + 1, len(counts) - 1)]
        keys = EdgeKeys(self.seed, f"imp level {level}")
        masks = top(course.magnitudes, edges, keys, course.masks).masks
        if self.rewind == "weights":
            return_to(course, course.memory["rewind"])
        course.restart_optimizer()
        change_masks(course.net, course.optimizer, masks)

    def _wants_gradient(self, course: Campaign) -> bool:
        return False

    # -- state ----------------------------------------------------------------------------------------------

    def _memory(self, course: Campaign) -> dict[str, Any]:
        return course.memory

    def _recall(self, course: Campaign, memory: Mapping[str, Any]) -> None:
        course.memory = dict(memory)
