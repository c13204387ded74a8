"""Prune whole units (channels, hidden units, heads) to a budget, at once or gradually, through their masks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from growfx.analysis.channel_plan import Budget, ChannelPlan
from growfx.distributed import ranks
from growfx.errors import ConfigError
from growfx.masked.agreement import share_buffers
from growfx.masked.shared import is_shared
from growfx.methods.starting import MASKS_OF_PRUNING, all_edges, given_masks
from growfx.methods.stepwise.course import Course, Stepwise
from growfx.methods.stepwise.schedules import Ramp, step_at
from growfx.notices import warn_once
from growfx.options import Unused, option
from growfx.passes.plan_channels.gain import SCORES, magnitudes, path_masses, taylor, unit_visits
from growfx.passes.plan_channels.options import PlanOptions, read_floors, read_patterns
from growfx.passes.plan_channels.planner import ChannelPlanner

__all__ = ["ChannelPrune"]

_DEFAULT = "flops=0.5"
_SCHEDULES = ("cubic", "once")
_AT_ONCE = 'with `schedule` = "once", which prunes after `start`'
_PLANNING = ("score", "floor", "floors", "round_to", "exclude")  # what a plan that is given was made with, or without


@dataclass(frozen=True)
class ChannelPrune(Stepwise):
    """Removes whole units until the network costs a fraction of the dense one; they leave as in `growfx.plan_channels`.

    Every edge into and out of a removed unit is masked, so that the network can be made smaller afterwards and its
    outputs stay: `growfx.save(..., compact=True)`, `growfx.unwrap(net, compact=True)`. Removed units do not come back.

    Attributes:
        budget: KIND=FRACTION of the dense network: params, flops or time (measured on this machine) and a fraction in
            (0, 1]. None is flops=0.5, or the budget of `plan`.
        score: what a unit is worth. "paths": how often a path visits it; "magnitude": of the weights of its group (Fang
            et al., DepGraph, CVPR 2023); "taylor": weight times gradient, summed over the steps since the last update
            (Molchanov et al., CVPR 2019).
        schedule: "cubic" lets the cost fall along a cubic (Zhu & Gupta, 2017) from step `start` to step `end`; "once"
            prunes after `start`, before the first step where that is 0 and no gradient is needed.
        start, end: of pruning, as fractions of all steps.
        update_every: optimizer steps from update to update.
        masks: "drawn" starts with all edges, ignoring the network's masks; "given" prunes units out of those present.
        floor: the fraction of like units that stays at least, and one.
        floors: PATTERN=FRACTION between commas: another such fraction for the layers that a glob pattern matches.
        round_to: layers that lose units keep a multiple of this many.
        exclude: glob patterns, between commas, of layers that keep all of their units.
        plan: a plan to carry out exactly, instead of one of its own: what `growfx.plan_channels` returned, its JSON, or
            the name of a file with that. `score`, floors, `round_to` and `exclude` are then those it was made with.

    Deviations: 1. costs and gains are of groups of coupled units, in the order of gain over cost. 2. a budget of time
    follows the multiply-accumulates of a measured plan until the last update, which is measured itself.
    """

    name: ClassVar[str] = "channel-prune"
    needs_whole: ClassVar[str] = "it scores whole units"
    off_path: ClassVar[str] = "left"
    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(("end",), lambda use: _AT_ONCE if use.method.schedule == "once" else ""),
        Unused(
            ("update_every",),
            lambda use: _AT_ONCE if use.method.schedule == "once" and use.method.score != "taylor" else "",
        ),
    )

    budget: str | None = option(None, unset=f"{_DEFAULT}, or the budget of `plan`")
    score: str = option("paths", choices=SCORES)
    schedule: str = option("cubic", choices=_SCHEDULES)
    start: float = option(0.0, low=0, high=1, open_high=True)
    end: float = option(0.5, low=0, high=1, open_low=True)
    update_every: int = option(100, low=1)
    masks: str = option("drawn", choices=MASKS_OF_PRUNING)
    floor: float = option(0.1, low=0, high=1)
    floors: str = option("", unset="none")
    round_to: int = option(1, low=1)
    exclude: str = option("", unset="none")
    plan: str | None = option(None, unset="none")

    def __post_init__(self) -> None:
        given: Any = self.exclude
        if isinstance(given, (list, tuple)):
            object.__setattr__(self, "exclude", ",".join(map(str, given)))
        plan: Any = self.plan
        if isinstance(plan, (ChannelPlan, Mapping)):
            values = plan.to_json() if isinstance(plan, ChannelPlan) else dict(plan)
            object.__setattr__(self, "plan", json.dumps(values))
        if isinstance(self.budget, Budget):
            object.__setattr__(self, "budget", str(self.budget))
        super().__post_init__()

    def _check(self) -> None:
        if self.start >= self.end and self.schedule == "cubic":
            raise ConfigError(f"`start` = {self.start} is not before `end` = {self.end}; allowed are smaller ones")
        read_floors(self.floors)
        wanted = None if self.budget is None else Budget.parse(self.budget)
        if self.plan is not None:
            planned = _read_plan(self.plan)
            if wanted is not None and wanted != planned.budget:
                raise ConfigError(f"`budget` is {wanted}, but `plan` is one for {planned.budget}; give the plan alone")
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in _PLANNING:
                if (value := getattr(self, name)) != defaults[name]:
                    raise ConfigError(
                        f"`{name}` = {value!r} decides which units leave, and `plan` has decided that; give it to "
                        f"`growfx.plan_channels`, or leave `{name}` or `plan` out"
                    )

    # -- starting -------------------------------------------------------------------------------------------

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        planner = self._planner(course)
        masks = given_masks(course.layers) if self.masks == "given" else all_edges(course.layers)
        gone = planner.absent() if self.masks == "given" else None
        if self.plan is not None:
            plan = _read_plan(self.plan)
            planner.planned(plan)
        else:  # a budget that cannot be reached is refused before anything changes
            plan = self._planned(course, planner, self._budget, self._first_gains(course, planner), gone)
        # what was at the start decides when the cost falls to what, however a run is continued
        course.start |= {"first": self._share(planner, self._budget, gone), "flops": plan.share("flops")}
        planner.forget_values()
        if self._update_before_training:
            masks |= plan.masks(course.net, masks)
        return masks

    @property
    def _budget(self) -> Budget:
        if self.budget is None and self.plan is not None:
            return _read_plan(self.plan).budget
        return Budget.parse(_DEFAULT if self.budget is None else self.budget)

    @property
    def _update_before_training(self) -> bool:
        return self.schedule == "once" and self.start == 0 and (self.score != "taylor" or self.plan is not None)

    def _planner(self, course: Course) -> ChannelPlanner:
        """What is known of the network's whole units; found anew where layers were frozen meanwhile."""
        names = tuple(course.layers)
        known = course.tools.get("planner")
        if known is None or known[0] != names:
            stays = {n: f"`{n}` is not trained" for n in course.net.layers if n not in names}
            stays |= {n: f"`{n}` is on no path" for n in course.scope.left}
            options = PlanOptions(self.floor, read_floors(self.floors), self.round_to, read_patterns(self.exclude))
            timed = self._budget.kind == "time"
            known = course.tools["planner"] = names, ChannelPlanner(course.net, options, stays=stays, timed=timed)
        return known[1]

    def _share(self, planner: ChannelPlanner, budget: Budget, gone: Tensor | None) -> float:
        """What the network costs when training starts, over the dense one's, times counted as multiply-accumulates."""
        kind = "flops" if budget.kind == "time" else budget.kind
        return planner.share(kind, gone)

    # -- updates --------------------------------------------------------------------------------------------

    def _update(self, course: Course) -> Mapping[str, Tensor] | None:
        if self._update_before_training:
            return None
        if self.score == "taylor" and self.plan is None:
            self._sum_gains(course)
        first, last = round(self.start * course.total_steps), step_at(self.end, course.total_steps)
        if self.schedule == "once":
            last = first = max(first, self.update_every if self.score == "taylor" else 1)
            due = course.steps == min(last, course.total_steps)
            return self._pruned(course, 1.0) if due else None
        ramp = Ramp(first, last, self.update_every)
        if not ramp.due(course.steps):
            return None
        return self._pruned(course, 1.0 - ramp.density(course.steps, 1.0, 0.0))

    def _pruned(self, course: Course, done: float) -> Mapping[str, Tensor] | None:
        """Return masks after the fraction `done` of all pruning; None where frozen layers leave too little to prune."""
        try:
            planner = self._planner(course)
            if self.plan is not None:
                return self._by_plan(course, planner, done)
            if is_shared(course.net):
                share_buffers(course.net)  # norms count in paths
            gains = self._gains(course, planner)
            return self._planned(course, planner, self._step(course, done), gains, planner.absent()).masks(course.net)
        except ConfigError as error:
            if len(course.layers) == len(course.scope.names):
                raise
            warn_once(f"no units were pruned after layers were frozen: {error}", course.net.trace_report.notes)
            return None

    def _step(self, course: Course, done: float) -> Budget:
        """The budget after the fraction `done` of all pruning; of a time the last one alone."""
        budget, first = self._budget, float(course.start["first"])
        if done >= 1:
            return budget
        last = float(course.start["flops"]) if budget.kind == "time" else budget.fraction
        kind = "flops" if budget.kind == "time" else budget.kind
        return Budget(kind, min(1.0, max(last, first + (last - first) * done)))

    def _planned(
        self, course: Course, planner: ChannelPlanner, budget: Budget, gains: Tensor, gone: Tensor | None
    ) -> ChannelPlan:
        """A plan; where it depends on times and ranks train together, that of the first."""
        if budget.kind == "time" and is_shared(course.net):
            values = ranks.from_first(lambda: planner.plan(budget, gains, self.score, gone).to_json())
            return ChannelPlan.from_json(values)
        return planner.plan(budget, gains, self.score, gone)

    def _by_plan(self, course: Course, planner: ChannelPlanner, done: float) -> Mapping[str, Tensor]:
        """The masks after the fraction `done` of a plan's groups has left, those of least gain over cost first."""
        assert self.plan is not None
        plan = _read_plan(self.plan)
        if done >= 1:
            return plan.masks(course.net)
        return planner.part_of(plan, done).masks(course.net)

    # -- gains ----------------------------------------------------------------------------------------------

    def _first_gains(self, course: Course, planner: ChannelPlanner) -> Tensor:
        """Gains to try a plan by before training: with no gradients yet, magnitudes."""
        return self._scored(course, planner) if self.score == "paths" else magnitudes(course.net, planner.units)

    def _gains(self, course: Course, planner: ChannelPlanner) -> Tensor:
        if self.score != "taylor":
            return self._scored(course, planner)
        gains = course.memory.pop("gains", None)
        if gains is None or len(gains) != planner.units.count:
            raise ConfigError(
                '`score` = "taylor" found no gradients of masked weights; call `method.step()` after '
                "`optimizer.step()` and before `optimizer.zero_grad()`"
            )
        return gains.cpu()

    def _scored(self, course: Course, planner: ChannelPlanner) -> Tensor:
        if self.score == "paths":
            return path_masses(planner.units, unit_visits(course.net))
        return magnitudes(course.net, planner.units)

    def _sum_gains(self, course: Course) -> None:
        found = {name: gradient for name, x in course.layers.items() if (gradient := x.gradient) is not None}
        if found:
            gains = taylor(course.net, self._planner(course).units, found)
            before = course.memory.get("gains")
            course.memory["gains"] = gains if before is None or len(before) != len(gains) else before.cpu() + gains

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False


def _read_plan(text: str) -> ChannelPlan:
    """Read a plan from its JSON, or from a file.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    if not text.lstrip().startswith("{"):
        try:
            text = Path(text).read_text()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(f"`plan` is `{text[:200]}`, which cannot be read as a file: {error}") from error
    return ChannelPlan.from_json(text)
