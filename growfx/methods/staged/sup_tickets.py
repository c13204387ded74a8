"""Superposing tickets: the average of several sparse networks that one training passes through."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growfx.distributed import ranks
from growfx.errors import ConfigError
from growfx.masked.shared import is_shared
from growfx.methods.base import Method
from growfx.methods.masks import collect_gradients
from growfx.methods.registry import kind_of, names
from growfx.methods.session import Stage
from growfx.methods.staged.campaign import Campaign, Staged, trace_entry
from growfx.methods.staged.norm_statistics import reestimate_norms
from growfx.methods.starting import MASKS
from growfx.methods.stepwise.course import Stepwise
from growfx.methods.stepwise.sparse_start import settle_density
from growfx.options import DefaultFloat, option
from growfx.selection.choose import top
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["SupTickets", "join"]

# How a method of this kind explores: one update, the last of a training of two steps, at a constant rate and density.
_EXPLORING: dict[str, Any] = {"update_every": 1, "update_until": 1.0, "decay": "constant"}
_OF_BASE = ("masks", "distribution", "update_every", "drop_fraction")


@dataclass(frozen=True)
class SupTickets(Staged):
    """Sup-tickets: a stepwise method, then cycles whose ends are averaged (Yin et al., Superposing Many Tickets into
    One, UAI 2022).

    The method `base` has the run's epochs but for those of the cycles, and the run's schedule over them. Then each of
    `tickets` cycles trains under a rate that climbs from `cycle_low` to `cycle_peak` and falls back, after one large
    exchange of edges by the base's own rule. The network at the end of the first phase and of each cycle is a ticket.
    All tickets are averaged with equal weights; after each joins, the average keeps the edges of largest magnitude that
    `density` leaves, over all layers that paths cross. Training goes on from the ticket, never from the average. In
    the end the network becomes the average, and its norm statistics are estimated over one pass of the training data.

    The trace has one entry a ticket: accuracy and edges of the ticket, and how many edges were active at any time
    (exploration). The run's accuracy is that of the average.

    Attributes:
        base: a method that works step by step and has a density.
        density: of all masked layers together that are trained, of tickets and of their average; None is that of given
            masks.
        masks: that the base starts from, as its own option; None takes its default, "drawn".
        tickets: number of cycles.
        cycle_epochs: length of a cycle; None gives all cycles together a tenth of the run, each at least one epoch.
        cycle_low, cycle_peak: learning rates, as fractions of the run's.
        explore_fraction: of each layer's edges, exchanged at the start of a cycle; 0 leaves the masks. None is 0.5,
            and 0 for a base without `drop_fraction`.
        distribution, update_every, drop_fraction: options of the base; None takes its default.
        seed: of the base, of exploration and of ties.

    Deviations from the released code:
        1. edges are exchanged after the first step of a cycle, as growth by gradient needs one; masks are fixed in the
           rest of the cycle (its `--no_maskupdates`). A base that averages gradients has those of that step alone: its
           own memory ends with its last update.
        2. norm statistics are estimated once, for the last average: the estimates before have no influence on it.
        3. whole-number buffers (counters of norms) are those of the last ticket, not averaged.
        4. counts are exact, and among equal magnitudes only edges that some ticket has are kept.
        5. the schedule of the first phase is the run's, not two drops by ten.
        6. the ImageNet code trains on from the average with an optimizer that does not see it; this one does not.
    """

    name: ClassVar[str] = "sup-tickets"
    stages: ClassVar[tuple[str, ...] | None] = ("base", "cycle", "final")

    base: str = "rigl"
    density: float | None = option(DefaultFloat(0.1), low=0, high=1, open_low=True)
    masks: str | None = option(None, choices=MASKS, unset="that of the base")
    tickets: int = option(3, low=1)
    cycle_epochs: int | None = option(None, low=1, unset="a tenth of the run for all cycles together")
    cycle_low: float = option(0.01, low=0, high=1)
    cycle_peak: float = option(0.05, low=0, high=1, open_low=True)
    explore_fraction: float | None = option(None, low=0, high=1, unset="0.5; 0 for a base without drop_fraction")
    distribution: str | None = option(None, unset="that of the base")
    update_every: int | None = option(None, low=1, unset="that of the base")
    drop_fraction: float | None = option(None, low=0, high=1, unset="that of the base")
    seed: int = option(0, low=0, high=2**63 - 1)

    def __post_init__(self) -> None:
        settle_density(self)
        super().__post_init__()

    def _check(self) -> None:
        if not _can_be_base(kind_of(self.base)):
            allowed = ", ".join(f"`{name}`" for name in names() if _can_be_base(kind_of(name)))
            raise ConfigError(
                f"`base` = '{self.base}' does not work step by step towards a density; allowed: {allowed}"
            )
        for name in _OF_BASE:
            if getattr(self, name) is not None and not self._base_has(name):
                raise ConfigError(f"`{name}` has no effect with `base` = '{self.base}', which has no such option")
        if self.explore_fraction and not self._base_has("drop_fraction"):
            raise ConfigError(
                f"`explore_fraction` = {self.explore_fraction} has no effect with `base` = '{self.base}', which "
                "exchanges no edges; leave it at None, or set it to 0"
            )
        if self.cycle_low > self.cycle_peak:
            raise ConfigError(
                f"`cycle_low` = {self.cycle_low} is above `cycle_peak` = {self.cycle_peak}; allowed is at most that"
            )
        self._make_base()

    @property
    def _why_staged(self) -> str:
        return "trains in cycles at the end and averages them"

    # -- the base -------------------------------------------------------------------------------------------

    def _base_has(self, name: str) -> bool:
        return name in _options_of(kind_of(self.base))

    def _density(self, course: Campaign) -> float:
        """Return `density`, or that of the given masks."""
        if self.density is not None:
            return self.density
        return course.start.setdefault("density", course.scope.density)

    @property
    def _chooser(self) -> Method:
        """The base."""
        return self._make_base()

    def _make_base(self) -> Stepwise:
        given = {name: getattr(self, name) for name in _OF_BASE if getattr(self, name) is not None}
        if self._base_has("seed"):
            given["seed"] = self.seed
        kind: Any = kind_of(self.base)
        return kind(density=self.density, **given)

    def _explorer(self, course: Campaign) -> Stepwise | None:
        """Return the base that is about to exchange many edges once; None where masks stay."""
        rate = self.explore_fraction
        if rate is None:
            rate = 0.5 if self._base_has("drop_fraction") else 0.0
        if not rate:
            return None
        base: Stepwise = course.memory["base"]
        number = course.stages_done - 1
        wanted = {
            **_EXPLORING,
            "drop_fraction": rate,
            "last_drop_fraction": rate,
            "seed": (self.seed + 1 + number) % 2**63,
        }
        own = base._attachment.state
        assert own is not None
        explorer = dataclasses.replace(base, **{k: v for k, v in wanted.items() if self._base_has(k)})
        memory = copy.deepcopy(own.memory)
        explorer._attachment.state = dataclasses.replace(own, total_steps=2, steps=0, memory=memory)
        return explorer

    def _set_explorer(self, course: Campaign) -> None:
        """Let the first step of a cycle be followed by an exchange, and no other."""
        explorer = self._explorer(course) if course.steps == 0 else None
        course.memory["explorer"] = explorer
        collect_gradients(course.layers.values(), explorer is not None and explorer.needs_dense_gradient)

    # -- stages ---------------------------------------------------------------------------------------------

    def _plan(self, course: Campaign) -> list[Stage]:
        course.edges_at(self._density(course))
        epochs = course.run.options.epochs
        length = self.cycle_epochs or max(1, epochs // (10 * self.tickets))
        left = epochs - self.tickets * length
        if left < 1:
            raise ConfigError(
                f"`tickets` = {self.tickets} cycles of `cycle_epochs` = {length} are {self.tickets * length} of the "
                f"run's {epochs} epochs; allowed are fewer, so that the base method has one at least"
            )
        shape: dict[str, Any] = {"peak": self.cycle_peak, "low": self.cycle_low}
        cycles = [Stage("cycle", length, number, **shape) for number in range(self.tickets - 1)]
        return [Stage("base", left), *cycles, Stage("final", length, **shape)]

    def _start(self, course: Campaign) -> None:
        base = self._make_base()
        base.begin(
            dataclasses.replace(
                course.run, options=dataclasses.replace(course.run.options, epochs=course.stages[0].epochs)
            )
        )
        course.memory["base"] = base

    def _after_step(self, course: Campaign) -> bool:
        if course.stages_done == 0:
            return course.memory["base"].step()
        explorer: Stepwise | None = course.memory["explorer"]
        if explorer is None:
            return False
        changed = explorer.step()
        self._set_explorer(course)
        return changed

    def _after_stage(self, course: Campaign, stage: Stage) -> None:
        base: Stepwise = course.memory["base"]
        first = course.stages_done == 1
        if first:
            base.end_stage(stage)
        phase = "base" if first else "cycle"
        course.trace.append(trace_entry(course, phase=phase, exploration=base.exploration))
        ticket = _copy(course)
        if first:
            course.memory["average"] = ticket
        else:
            self._superpose(course, ticket)
        if course.stages:
            self._set_explorer(course)
        else:
            self._become_average(course)

    def _superpose(self, course: Campaign, ticket: dict[str, Tensor]) -> None:
        """Let `ticket` join the average, and prune that to the density."""
        before = course.memory["average"]
        average = join(before, ticket, course.stages_done)
        keys = _keys(course)
        magnitudes = {name: average[weight].abs() for name, (weight, _) in keys.items()}
        present = {name: before[mask] | ticket[mask] for name, (_, mask) in keys.items()}
        ties = EdgeKeys(self.seed, f"ticket {course.stages_done}")
        masks = top(magnitudes, course.edges_at(self._density(course)), ties, present).masks
        for name, (weight, mask) in keys.items():
            average[mask] = masks[name]
            average[weight] = torch.where(masks[name], average[weight], 0)
        course.memory["average"] = average

    def _become_average(self, course: Campaign) -> None:
        course.memory["explorer"] = None
        average: dict[str, Tensor] = course.memory.pop("average")
        with torch.no_grad():
            for name, value in _live(course).items():
                value.copy_(average[name])
        course.net.settle()
        course.restart_optimizer()  # its state belongs to the last ticket
        reestimate_norms(course.net, course.run.batches())
        if is_shared(course.net):
            ranks.average(buffer for buffer in course.net.buffers() if buffer.is_floating_point())

    def _wants_gradient(self, course: Campaign) -> bool:
        method: Stepwise | None = course.memory["base"] if course.stages_done == 0 else course.memory["explorer"]
        return method is not None and method.needs_dense_gradient

    # -- state ----------------------------------------------------------------------------------------------

    def _memory(self, course: Campaign) -> dict[str, Any]:
        return {"base": course.memory["base"].state_dict(), "average": course.memory.get("average")}

    def _recall(self, course: Campaign, memory: Mapping[str, Any]) -> None:
        base: Stepwise = course.memory["base"]
        base.load_state_dict(memory["base"])
        course.memory = {"base": base, "explorer": None}
        if memory["average"] is not None:
            course.memory["average"] = {name: value.cpu() for name, value in memory["average"].items()}
            self._set_explorer(course)


# -- averages -------------------------------------------------------------------------------------------------


def join(average: Mapping[str, Tensor], ticket: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """Return the average after the ticket `number` (from 1) in it; both are state dicts of one network.

    Floating-point tensors are averaged, in float32 at least: ``average + (ticket - average) / number``, so that each
    of `number` tickets weighs the same, and equal ones stay bit for bit. Others (counters, masks) are those
    of `ticket`. The result shares no memory with `average` or `ticket`.
    """
    joined = {}
    for name, new in ticket.items():
        if not new.is_floating_point():
            joined[name] = new.clone()
            continue
        wide = torch.promote_types(new.dtype, torch.float32)
        old, new = average[name].to(wide), new.to(wide)
        # equal infinite values, in a buffer of attention biases say, have no difference
        joined[name] = torch.where(old == new, old, old + (new - old) / number)
    return joined


def _live(course: Campaign) -> dict[str, Tensor]:
    """Return the tensors of the state dict themselves, each once, under the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in course.net.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            found.setdefault(id(value), (name, value))
    return dict(found.values())


def _copy(course: Campaign) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in _live(course).items()}


def _keys(course: Campaign) -> dict[str, tuple[str, str]]:
    """Return the names of weight and mask in `_live`, by layer."""
    names_of = {id(value): name for name, value in _live(course).items()}
    return {name: (names_of[id(layer.parameter)], names_of[id(layer.mask)]) for name, layer in course.layers.items()}


# -- bases ----------------------------------------------------------------------------------------------------


def _options_of(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


def _can_be_base(kind: type[Method]) -> bool:
    return issubclass(kind, Stepwise) and "density" in _options_of(kind)
