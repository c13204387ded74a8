"""What a network's whole units are and cost, found once; plans for any budget and any gains are made of it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from growfx.analysis.channel_plan import Budget, ChannelPlan, UnitFamily, unit_masks
from growfx.analysis.cost import ONE_AT_A_TIME, forward_cost
from growfx.analysis.weight_layout import by_unit
from growfx.compaction.apply import sharing_copy
from growfx.errors import ConfigError, TraceError
from growfx.masked.gradients import mask_in_place
from growfx.masked.isolation import undisturbed
from growfx.passes.connect.interpreter import connect
from growfx.passes.mask.swap import unwrap
from growfx.passes.plan_channels.choose import Limits, choose, least_kept
from growfx.passes.plan_channels.cost import CostTable, cost_table
from growfx.passes.plan_channels.options import PlanOptions
from growfx.passes.plan_channels.timing import measured_share, time_cost
from growfx.passes.plan_channels.trial import Cutter
from growfx.passes.plan_channels.units import Family, find_units
from growfx.passes.trials.halving import largest_fitting

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["ChannelPlanner"]

_COSTS = {"params": ("params", "weights"), "flops": ("flops",), "time": ("time",)}
_SHOWN = 3
_TIMED = 6  # networks that are measured for a budget of time
_TURNS = 3  # plans whose outputs were compared, each without the families that failed in the one before


class ChannelPlanner:
    """Plans for one network.

    Attributes:
        net: the network, which is not changed.
        units: its whole units; those that cannot leave have a reason.
        table: what they cost.

    Raises:
        ConfigError: options that do not fit the network, or a network without units that can leave.
        TraceError: a network without values, or one that could not be followed.
    """

    def __init__(
        self,
        net: MaskedGraph,
        options: PlanOptions,
        *,
        example_inputs: Any = None,
        stays: Mapping[str, str] | None = None,
        timed: bool = False,
    ) -> None:
        self.net, self.options = net, options
        if any(tensor.is_meta for tensor in net.parameters()):
            raise TraceError("the network is on the meta device, so nothing is known of its values; load them first")
        excluded = _matching(net, options.exclude, "exclude")
        _matching(net, options.floors, "floors")
        model = unwrap(net).eval()
        self._model: nn.Module | None = model
        with ONE_AT_A_TIME, undisturbed(net):
            self._example = net.inputs_like(example_inputs)
            found = connect(net, self._example)
            counted = forward_cost(net, cast(Any, self._example))
            self._cutter = Cutter(model, found, self._example)
        refused = {**self._cutter.refused}
        for name in excluded:
            _refuse(refused, found.coupled(name) if name in found.layers else (), f"`{name}` is excluded")
        for name, reason in {**_unmasked(net, found.layers), **(stays or {})}.items():
            if name in found.layers:
                _refuse(refused, [*found.coupled(name).tolist(), *self._cutter.leads[name].tolist()], reason)
        self.units = find_units(found, self._cutter.leads, refused)
        self._refuse_what_fails()
        self._require_something()
        self._check_rounding()
        self.table: CostTable = cost_table(net, self.units, counted.layers, counted.rest)
        if timed:
            timing = time_cost(model, self._example, self.units, self.table)
            self.table = replace(self.table, costs={**self.table.costs, "time": timing})
        self._limits = self._limited()

    # -- what can leave -------------------------------------------------------------------------------------

    def _refuse_what_fails(self) -> None:
        """Refuse families that the model's code cannot do with fewer units of, tried at half of them each."""
        families = self.units.families
        open_ones = [[i] for i, family in enumerate(families) if not family.reason and len(family.units) > 1]

        def problem(chosen: list[int]) -> str:
            return self._cutter.problem(self.units, self._mark((i, _second_half(families[i])) for i in chosen))

        with torch.no_grad(), undisturbed(self.net):
            _, wrong = largest_fitting(_by_kind(open_ones, families), problem)
        alone = {i: "there is one unit alone" for i, f in enumerate(families) if not f.reason and len(f.units) == 1}
        self._refuse_families({**alone, **wrong})

    def _refuse_families(self, reasons: Mapping[int, str]) -> None:
        families = tuple(
            replace(family, reason=reasons[i]) if i in reasons else family
            for i, family in enumerate(self.units.families)
        )
        self.units = replace(self.units, families=families)

    def _mark(self, chosen: Iterable[tuple[int, Sequence[int]]]) -> Tensor:
        """A bool of every whole unit, given families and units of theirs."""
        gone = torch.zeros(self.units.count, dtype=torch.bool, device="cpu")
        for _, units in chosen:
            gone[list(units)] = True
        return gone

    def _gone(self, removed: Sequence[Sequence[int]]) -> Tensor:
        """A bool of every whole unit, given the places in each family that leave."""
        families = enumerate(self.units.families)
        return self._mark((i, [family.units[place] for place in removed[i]]) for i, family in families)

    def _require_something(self) -> None:
        if any(not family.reason for family in self.units.families):
            return
        reasons = list(dict.fromkeys(family.reason for family in self.units.families))
        raise ConfigError(
            f"the network has no units that can leave: {'; '.join(reasons[:_SHOWN]) or 'no layer was followed'}; use a "
            "method of single weights"
        )

    def _check_rounding(self) -> None:
        wanted = self.options.round_to
        sizes = {
            name: len(self.units.found.layers[name].outputs)
            for family in self.units.families
            if not family.reason
            for name in family.outputs
        }
        small = next((name for name, size in sizes.items() if size < wanted), None)
        if small is not None:
            raise ConfigError(
                f"`round_to` is {wanted}, but layer `{small}` has only {sizes[small]} units; allowed is at most "
                f"{min(sizes.values())}, or `exclude` for the smaller layers"
            )

    def _limited(self) -> Limits:
        floors = np.array([max(map(self._floor, family.outputs)) for family in self.units.families])
        wanted = self.options.round_to
        steps = [math.lcm(*(wanted // math.gcd(wanted, n) for n in f.outputs.values())) for f in self.units.families]
        return Limits(least_kept(self.table.sizes, floors), np.array(steps, np.int64))

    def _floor(self, name: str) -> float:
        found = [value for pattern, value in self.options.floors.items() if fnmatch.fnmatchcase(name, pattern)]
        return max(found, default=self.options.floor)

    # -- plans ----------------------------------------------------------------------------------------------

    def plan(self, budget: Budget, gains: Tensor, score: str, gone: Tensor | None = None) -> ChannelPlan:
        """Choose what leaves.

        Args:
            budget: what the network may cost.
            gains: of every whole unit, float64, 0 or more.
            score: what these are.
            gone: bool of every whole unit: those that have left before.

        Raises:
            ConfigError: the budget cannot be reached.
        """
        values = gains.clone() if gone is None else torch.where(gone, -1.0, gains)
        removed = self._sound(budget, budget.fraction, values)
        if budget.kind != "time" or budget.fraction == 1:
            return self._written(budget, gains, score, removed)
        return self._timed(budget, values, gains, score, removed)

    def _sound(self, budget: Budget, fraction: float, values: Tensor) -> list[list[int]]:
        """Units of each family that leave, as places in it, such that outputs are those of the zeroed network."""
        for _ in range(_TURNS):
            removed = self._chosen(budget, fraction, values)
            wrong = self._wrong(removed)
            if not wrong:
                return removed
            self._refuse_families(wrong)
            self._require_something()
        return self._chosen(budget, fraction, values)

    def _timed(
        self, budget: Budget, values: Tensor, gains: Tensor, score: str, removed: list[list[int]]
    ) -> ChannelPlan:
        """The plan whose network is as fast as the budget says when it is measured; layers do not get faster evenly."""
        model = self._model or unwrap(self.net).eval()
        fraction, share, least = budget.fraction, 1.0, self._least("time")
        for _ in range(_TIMED):
            with torch.no_grad(), undisturbed(self.net):
                small = self._cutter.cut(model, self.units, self._gone(removed))
                dense, seconds = measured_share(model, small, self._example)
            share = seconds / dense
            if share <= budget.fraction:
                plan = self._written(budget, gains, score, removed)
                return replace(plan, dense={**plan.dense, "time": dense}, planned={**plan.planned, "time": seconds})
            if fraction <= least:
                break
            fraction = max(0.98 * fraction * budget.fraction / share, least)
            removed = self._sound(budget, fraction, values)
        raise ConfigError(
            f"`budget` is {budget}, which was not reached on this machine: the smallest network that was tried takes "
            f"{share:.3g} of the dense one's time; allow more, a lower `floor`, or use `flops`"
        )

    def _least(self, kind: str) -> float:
        """The least share of the dense network's cost that can be reached."""
        gains = [np.zeros(0 if family.reason else len(family.units)) for family in self.units.families]
        kept = choose(self.table, (kind,), 0.0, gains, self._limits).kept
        return self.table.cost(kind, kept) / self.table.cost(kind, self.table.sizes)

    def _chosen(self, budget: Budget, fraction: float, values: Tensor) -> list[list[int]]:
        """Units of each family that leave, as places in it."""
        empty = np.zeros(0)
        orders = [values[list(family.units)].argsort(stable=True) for family in self.units.families]
        sorted_gains = [
            empty if family.reason else values[list(family.units)][order].numpy()
            for family, order in zip(self.units.families, orders, strict=True)
        ]
        kinds = _COSTS[budget.kind]
        choice = choose(self.table, kinds, fraction, sorted_gains, self._limits)
        if not choice.reached:
            raise ConfigError(self._unreachable(budget, choice.kept))
        lost = self.table.sizes - choice.kept
        return [sorted(order[:count].tolist()) for order, count in zip(orders, lost.tolist(), strict=True)]

    def _unreachable(self, budget: Budget, kept: np.ndarray) -> str:
        kinds = _COSTS[budget.kind]
        least = max(self.table.cost(kind, kept) / self.table.cost(kind, self.table.sizes) for kind in kinds)
        shares: dict[str, float] = {}
        price = self.table.of_one(kinds[0])
        for i, family in enumerate(self.units.families):
            if family.reason:
                shares[family.reason] = shares.get(family.reason, 0.0) + float(price[i]) * len(family.units)
        largest = sorted(shares, key=lambda reason: -shares[reason])[:_SHOWN]
        floors = f"`floor` = {self.options.floor:g}" + (" and `floors`" if self.options.floors else "")
        held = "; ".join([f"units that stay because {reason}" for reason in largest] + [f"the least widths ({floors})"])
        return (
            f"`budget` is {budget}, which cannot be reached: the least reachable is {budget.kind}="
            f"{math.ceil(least * 1e4) / 1e4:g}; it is held up by {held}"
        )

    def _wrong(self, removed: Sequence[Sequence[int]]) -> dict[int, str]:
        """Families whose removal changes the outputs of the network in which their weights are zero -> how."""
        if self._model is None:
            return {}
        model, families = self._model, self.units.families
        clusters = [[i] for i, places in enumerate(removed) if places]

        def problem(chosen: list[int]) -> str:
            gone = self._mark((i, [families[i].units[place] for place in removed[i]]) for i in chosen)
            zeroed = self._zeroed(model, gone)
            return self._cutter.difference(zeroed, self.units, gone)

        with torch.no_grad(), undisturbed(self.net):
            return largest_fitting(_by_kind(clusters, families), problem)[1] if clusters else {}

    def _zeroed(self, model: nn.Module, gone: Tensor) -> nn.Module:
        """A copy of the plain model without the weights into and out of whole units."""
        model = sharing_copy(model)
        layers = self.net.layers
        for name, (outputs, columns) in self.cuts(gone).items():
            layer = layers[name]
            weight = getattr(model.get_submodule(name), layer.weight_name)
            weight.data = mask_in_place(weight.data.clone(), unit_masks(layer, outputs, columns).to(weight.device))
        return model

    def absent(self) -> Tensor:
        """A bool of every whole unit: none of its edges in is there, in any of its layers."""
        absent, layers = torch.zeros(self.units.count, dtype=torch.bool, device="cpu"), self.net.layers
        for owner in self.units.outputs.values():
            absent[owner[owner >= 0]] = True
        for name, owner in self.units.outputs.items():
            there = torch.ones(len(owner), dtype=torch.bool, device="cpu")
            if name in layers:
                there = by_unit(layers[name], layers[name].mask, by_output=True).any(1).cpu()
            absent[owner[there & (owner >= 0)]] = False
        return absent

    def planned(self, plan: ChannelPlan) -> Tensor:
        """A bool of every whole unit: a plan for this network removes it.

        Raises:
            ConfigError: the plan is of another network, or takes units apart that can only leave together.
        """
        plan.check(self.net)
        gone = torch.zeros(self.units.count, dtype=torch.bool, device="cpu")
        for name, outputs in plan.outputs.items():
            owner = self.units.outputs[name]
            if max(outputs) >= len(owner):
                raise ConfigError(f"the plan removes unit {max(outputs)} of `{name}`, which has {len(owner)}")
            gone[owner[list(outputs)]] = True
        cuts = self.cuts(gone)
        if {n: (plan.outputs.get(n, ()), plan.columns.get(n, ())) for n in plan.shapes} != cuts:
            raise ConfigError(
                "the plan takes units apart that can only leave together in this network; plan anew with "
                "`growfx.plan_channels`"
            )
        return gone

    def kept(self, gone: Tensor | None) -> np.ndarray:
        """How many units of each family are left without some whole units."""
        if gone is None:
            return self.table.sizes
        return np.array([int((~gone[list(family.units)]).sum()) for family in self.units.families], np.int64)

    def share(self, kind: str, gone: Tensor | None) -> float:
        """What the network costs without some whole units, over the dense one's cost."""
        return self.table.cost(kind, self.kept(gone)) / self.table.cost(kind, self.table.sizes)

    def part_of(self, plan: ChannelPlan, fraction: float) -> ChannelPlan:
        """A plan that removes a fraction of the groups that `plan` does, those of least gain over cost first."""
        whole, price = self.planned(plan), self.table.of_one("flops")
        gains = torch.zeros(self.units.count, dtype=torch.float64, device="cpu")
        for group in plan.groups:
            name, outputs = next(iter(group.layers.items()))
            gains[self.units.outputs[name][outputs[0]]] = group.gain or 0.0
        values = [
            (float(gains[unit]) / max(float(price[i]), 1e-300), i, place)
            for i, family in enumerate(self.units.families)
            for place, unit in enumerate(family.units)
            if whole[unit]
        ]
        removed: list[list[int]] = [[] for _ in self.units.families]
        for _, i, place in sorted(values)[: int(fraction * len(values))]:
            removed[i].append(place)
        return self._written(plan.budget, gains, plan.score, [sorted(places) for places in removed])

    def vectors(self, chosen: Tensor) -> dict[str, tuple[int, Tensor]]:
        """Which indices of parameters and buffers beside weights some whole units have.

        Args:
            chosen: bool of every whole unit, and one more for none.

        Returns:
            Name -> axis, and a bool of every index along it.
        """
        found, layers = self.units.found, self.net.layers
        result = {name: (axis, chosen[self.units.of_group[units]]) for name, (axis, units) in found.parameters.items()}
        for name, owner in self.units.outputs.items():
            if name in layers:
                for own, tensor in layers[name].named_parameters(recurse=False):
                    if own != "weight" and tensor.shape == owner.shape:
                        result.setdefault(f"{name}.{own}", (0, chosen[owner]))
        return result

    def held_up(self) -> str:
        """What keeps the network from being narrower, in words."""
        price = self.table.of_one("weights")
        shares: dict[str, float] = {}
        for i, family in enumerate(self.units.families):
            if family.reason:
                shares[family.reason] = shares.get(family.reason, 0.0) + float(price[i]) * len(family.units)
        largest = sorted(shares, key=lambda reason: -shares[reason])[:_SHOWN]
        return "; ".join(f"units stay because {reason}" for reason in largest)

    def forget_values(self) -> None:
        """Drop the copy of the weights; plans made from now on are not compared with the network they are for."""
        self._model = None
        self._cutter.forget_values()

    def cuts(self, gone: Tensor) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Output units and columns that layers lose with whole units; layers that lose none are left out."""
        found: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        padded, layers = (
            torch.cat([gone, torch.zeros(1, dtype=torch.bool, device="cpu")]),
            self.net.layers,
        )  # -1 is none
        for name in self.units.outputs:
            sides = [padded[side].nonzero().flatten() for side in (self.units.outputs[name], self.units.columns[name])]
            if name in layers and any(len(side) for side in sides):
                found[name] = tuple(sides[0].tolist()), tuple(sides[1].tolist())
        return found

    def _written(self, budget: Budget, gains: Tensor, score: str, removed: Sequence[Sequence[int]]) -> ChannelPlan:
        cuts, layers = self.cuts(self._gone(removed)), self.net.layers
        kept = self.table.sizes - np.array([len(places) for places in removed], np.int64)
        params, macs = self.table.of_one("params"), self.table.of_one("flops")
        places = {name: _places(side) for name, side in self.units.outputs.items()}
        families = tuple(
            _facts(family, places, float(params[i]), float(macs[i]), gains, removed[i])
            for i, family in enumerate(self.units.families)
        )
        return ChannelPlan(
            budget,
            score,
            families,
            {name: outputs for name, (outputs, _) in cuts.items() if outputs},
            {name: columns for name, (_, columns) in cuts.items() if columns},
            {name: tuple(layers[name].parameter.shape) for name in cuts},
            {kind: self.table.cost(kind, self.table.sizes) for kind in self.table.costs},
            {kind: self.table.cost(kind, kept) for kind in self.table.costs},
        )


def _facts(
    family: Family,
    places: Mapping[str, Mapping[int, tuple[int, ...]]],
    params: float,
    macs: float,
    gains: Tensor,
    removed: Sequence[int],
) -> UnitFamily:
    outputs = {name: tuple(places[name][unit] for unit in family.units) for name in family.outputs}
    values = () if family.reason else tuple(gains[list(family.units)].tolist())
    return UnitFamily(outputs, dict(family.columns), params, macs, values, tuple(removed), family.reason)


def _places(side: Tensor) -> dict[int, tuple[int, ...]]:
    """Whole unit -> its places in a layer."""
    found: dict[int, list[int]] = {}
    for place, unit in enumerate(side.tolist()):
        found.setdefault(unit, []).append(place)
    return {unit: tuple(where) for unit, where in found.items()}


def _second_half(family: Family) -> tuple[int, ...]:
    return family.units[(len(family.units) + 1) // 2 :]


def _by_kind(clusters: list[list[int]], families: Sequence[Family]) -> list[list[int]]:
    """Clusters ordered so that families of like shape stand beside each other: they mostly fail together."""
    return sorted(clusters, key=lambda cluster: max(families[cluster[0]].outputs.values()))


def _matching(net: MaskedGraph, patterns: Iterable[str], option: str) -> list[str]:
    """The masked layers that the patterns of an option match.

    Raises:
        ConfigError: one of them matches none.
    """
    found: list[str] = []
    for pattern in patterns:
        hits = [name for name in net.layers if fnmatch.fnmatchcase(name, pattern)]
        if not hits:
            names = ", ".join(f"`{name}`" for name in list(net.layers)[:_SHOWN])
            raise ConfigError(f"`{option}` has `{pattern}`, which matches no masked layer; there are {names}, ...")
        found += hits
    return found


def _unmasked(net: MaskedGraph, layers: Iterable[str]) -> dict[str, str]:
    masked = net.layers
    return {name: f"`{name}` has no mask" for name in layers if name not in masked}


def _refuse(refused: dict[int, str], groups: Any, reason: str) -> None:
    for group in dict.fromkeys(groups.tolist() if isinstance(groups, Tensor) else groups):
        if group:
            refused.setdefault(int(group), reason)
