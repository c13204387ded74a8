"""Grow the width of a network: whole units, by the paths they would carry, until accuracy stops paying for them.

Edges grow in `pwmpr`; here channels, hidden units and heads do, so that the network is an ordinary dense one of another
width (`growfx.save(..., compact=True)`). Rounds, stop and final training are those of all growth methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from growfx.analysis.channel_plan import unit_masks
from growfx.analysis.paths import PathProducts
from growfx.analysis.weight_layout import by_unit, from_units
from growfx.errors import ConfigError
from growfx.masked.optimizers import clear_state, optimizers_of
from growfx.methods.growth.rounds import Growing
from growfx.methods.growth.snapshots import Origin, counted_where_zero
from growfx.methods.growth.state import Growth
from growfx.methods.scope import listed
from growfx.options import option
from growfx.passes.path_products.products import path_gradients
from growfx.passes.plan_channels.gain import magnitudes, path_masses, unit_visits
from growfx.passes.plan_channels.options import PlanOptions, read_patterns
from growfx.passes.plan_channels.planner import ChannelPlanner
from growfx.selection.budget import largest_within
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["ChannelGrowth"]

_AUTOMATIC = (0.01, 0.02, 0.05, 0.10)


@dataclass(frozen=True)
class ChannelGrowth(Growing):
    """Growth of width in whole groups of coupled units; options as in `Growing`, and

    Attributes:
        exclude: glob patterns, between commas, of layers that have all of their units from the start.

    The seed has at least one group of every kind of units that can be absent, and further ones as `seed_density`
    allows: "drawn" in proportion to how often a path visits them, or those of largest "magnitude". None takes the
    smallest of 1, 2, 5 and 10 % that has one group of each. Each round adds groups drawn in proportion to the path mass
    they would carry: for an absent group the sum, over the edges that lead from it to units that are present, of the
    mass that reaches it over its initial incoming weights, times the initial weight, times the paths from there to the
    outputs; over the group's multiply-accumulates with `price` = "flops". A round adds as many groups, in the order of
    the draw, as its number of edges (or its cost) allows, and one at least.

    New groups start with their initial incoming weights, biases and norms, and with outgoing weights of zero: a round
    changes no output. Units that a norm, a softmax or a mean counts would change it; they are there from the start and
    stay, as all units do that cannot leave (`growfx.plan_channels` lists them with the reason).
    """

    name: ClassVar[str] = "channel-growth"
    needs_whole: ClassVar[str] = "it scores whole units"
    reads_gradient: ClassVar[bool] = False

    exclude: str = option("", unset="none")

    def __post_init__(self) -> None:
        given: Any = self.exclude
        if isinstance(given, (list, tuple)):
            object.__setattr__(self, "exclude", ",".join(map(str, given)))
        super().__post_init__()

    # -- the seed -------------------------------------------------------------------------------------------

    def _seed_masks(self, growth: Growth) -> Mapping[str, Tensor]:
        net = growth.net
        stays = {name: f"`{name}` is not trained" for name in net.layers if name not in growth.scope.names}
        stays |= {name: f"`{name}` is on no path" for name in growth.scope.left}
        planner = ChannelPlanner(net, PlanOptions(floor=0.0, exclude=read_patterns(self.exclude)), stays=stays)
        growth.tools["planner"] = planner
        growth.initial = Origin.take(net)
        planner.forget_values()
        if self.masks == "given":
            return super()._seed_masks(growth)
        gains = path_masses(planner.units, unit_visits(net))
        if self.masks == "magnitude":
            order = _within_families(planner, -magnitudes(net, planner.units).numpy())
        else:
            keys = EdgeKeys(self.seed, "seed")
            order = _within_families(planner, _arrivals(keys, gains.numpy()))
        return self._seed_of(growth, planner, order)

    def _seed_of(self, growth: Growth, planner: ChannelPlanner, order: list[int]) -> Mapping[str, Tensor]:
        """Return masks with as many units, in this order, as the seed's density allows."""
        open_families = [family for family in planner.units.families if not family.reason]
        first = len(open_families)  # one of each family comes first

        def share(count: int) -> float:
            masks = _masks(growth, planner, order[count:])
            return growth.price.spent(growth.scope, masks) / growth.price.total(growth.scope)

        least, alone = share(first), _share_off_path(growth)
        wanted = self.seed_density
        if wanted is None:
            steps = [*_AUTOMATIC, *(alone + (1 - alone) * step for step in _AUTOMATIC if alone > _AUTOMATIC[-1])]
            wanted = next((value for value in steps if least <= value <= self.max_density), least)
        if wanted < least or least > self.max_density:
            raise ConfigError(self._too_narrow(growth, planner, least))
        more = largest_within(lambda count: share(first + count), wanted, len(order) - first)
        return _masks(growth, planner, order[first + more :])

    def _too_narrow(self, growth: Growth, planner: ChannelPlanner, least: float) -> str:
        off_path = (
            f"; {listed(growth.scope.left)} are on no path and stay as they are: wrap the model with `exclude` "
            "(`--exclude` on the command line) for these, which are then not counted"
        )
        return (
            f"`seed_density` is {self.seed_density}, and at most {self.max_density}; the narrowest network, with one "
            f"unit wherever units can be absent, has {least:.4g}, so allowed are values from there up. "
            f"{planner.held_up()}{off_path if growth.scope.left else ''}"
        )

    # -- rounds ---------------------------------------------------------------------------------------------

    def _paths(self, net: MaskedGraph) -> PathProducts:
        return counted_where_zero(net, path_gradients(net))

    def _grown(self, growth: Growth, paths: PathProducts, count: int, keys: EdgeKeys) -> Mapping[str, Tensor]:
        planner = _planner(growth)
        number = len(growth.trace)
        known = growth.tools.get("order")
        if known is None or known[0] != number:  # a budget is looked for by bisection over counts
            known = growth.tools["order"] = number, self._order(growth, planner, keys)
        order: list[int] = known[1]
        absent = planner.absent()
        present, rates = planner.kept(absent), planner.table.costs["weights"].rates
        before = planner.table.pairs(present)
        family_of = {unit: i for i, family in enumerate(planner.units.families) for unit in family.units}
        families = np.array([family_of[unit] for unit in order], np.int64)

        def edges(units: int) -> float:
            more = np.bincount(families[:units], minlength=len(present))
            return float(rates @ (planner.table.pairs(present + more) - before))

        units = largest_within(edges, count + 0.5, len(order))
        if not units and order and growth.scope.nnz + edges(1) <= self.max_density * growth.scope.numel + 0.5:
            units = 1
        return _more(growth, planner, order[:units])

    def _order(self, growth: Growth, planner: ChannelPlanner, keys: EdgeKeys) -> list[int]:
        """Return the absent units that some path would cross, in the order of the draw."""
        self._restart_vectors(growth, planner, planner.absent())  # their norms have seen nothing but zeros
        mass = would_carry(growth, planner)
        if not growth.price.counts_weights:
            cost = planner.table.of_one("flops")
            for family, price in zip(planner.units.families, cost, strict=True):
                mass[list(family.units)] /= max(float(price), 1.0)
        times = _arrivals(keys, mass)
        return [int(unit) for unit in np.argsort(times, kind="stable") if mass[unit] > 0]

    def _has_room(self) -> bool:
        """Whether a whole unit more is within `max_density`."""
        growth = self._attached()
        planner, kind = _planner(growth), "weights" if growth.price.counts_weights else "flops"
        limit = self.max_density * growth.price.total(growth.scope) - growth.price.spent(growth.scope)
        present, rates = planner.kept(planner.absent()), planner.table.costs[kind].rates
        before = planner.table.pairs(present)
        for i in np.flatnonzero(present < planner.table.sizes):
            more = present.copy()
            more[i] += 1
            if float(rates @ (planner.table.pairs(more) - before)) <= limit + 0.5:
                return True
        return False

    def _start_new_edges(self, growth: Growth, before: Mapping[str, Tensor]) -> None:
        assert growth.initial is not None
        planner = _planner(growth)
        names = {id(value): name for name, value in growth.net.state_dict(keep_vars=True).items()}
        fresh = torch.zeros(planner.units.count, dtype=torch.bool, device="cpu")
        before = {name: old for name, old in before.items() if name in planner.units.outputs}
        for name, old in before.items():
            owner, layer = planner.units.outputs[name], growth.net.layers[name]
            had = by_unit(layer, old, by_output=True).any(1).cpu()
            has = by_unit(layer, layer.mask, by_output=True).any(1).cpu()
            fresh[owner[has & ~had & (owner >= 0)]] = True
        with torch.no_grad():
            for name, old in before.items():
                layer = growth.net.layers[name]
                into = _rows(layer, fresh, planner.units.outputs[name]) & layer.mask & ~old.to(layer.mask.device)
                values = growth.initial.tensors[names[id(layer.parameter)]].to(layer.parameter)
                layer.parameter.copy_(torch.where(into, values, layer.parameter))
            self._restart_vectors(growth, planner, fresh)

    @torch.no_grad()
    def _restart_vectors(self, growth: Growth, planner: ChannelPlanner, fresh: Tensor) -> None:
        """Give biases, norms and other parameters of new units their initial values."""
        assert growth.initial is not None
        state = growth.net.state_dict(keep_vars=True)
        padded = torch.cat([fresh, torch.zeros(1, dtype=torch.bool, device="cpu")])  # -1 is none
        for name, (axis, new) in planner.vectors(padded).items():
            value = state.get(name)
            if value is None or not new.any() or name not in growth.initial.tensors:
                continue
            shape = [-1 if i == axis else 1 for i in range(value.ndim)]
            where = new.reshape(shape).expand(value.shape).to(value.device)
            value.copy_(torch.where(where, growth.initial.tensors[name].to(value), value))
            if isinstance(value, torch.nn.Parameter):
                for each in {growth.optimizer, *optimizers_of(value)}:
                    clear_state(each, value, where)


def would_carry(growth: Growth, planner: ChannelPlanner) -> np.ndarray:
    """Return the path mass that each absent unit would carry, 0 for those that are present.

    Paths are followed through the network with the initial weights on edges into absent units, and none out of them:
    the score of an edge out of such a unit is then what reaches the unit, times what leads on from the edge's end.
    Times the edge's initial weight, and summed over edges to units that are present.
    """
    assert growth.initial is not None
    net, absent = growth.net, planner.absent()
    names = {id(value): name for name, value in net.state_dict(keep_vars=True).items()}
    initial, sizes = {}, {}
    for name, layer in net.layers.items():
        if name not in planner.units.outputs:
            continue
        w0 = growth.initial.tensors[names[id(layer.parameter)]].to(layer.parameter).double().abs()
        rows = _rows(layer, absent, planner.units.outputs[name])
        columns = _columns(layer, absent, planner.units.columns[name])
        own = _same(layer, planner.units.outputs[name], planner.units.columns[name])
        own_weight = layer.parameter.detach().double().abs() * layer.mask
        # within a group of coupled units (a depthwise convolution) an edge leads from the group to itself
        sizes[name] = torch.where(rows & (~columns | own), w0, own_weight)
        initial[name] = torch.where(columns & ~rows, w0, 0.0)
    paths = path_gradients(net, sizes, zeros_as_one=True)
    mass = torch.zeros(planner.units.count, dtype=torch.float64, device="cpu")
    for name, score in paths.scores.items():
        if name in initial:
            owner = planner.units.columns[name]
            carried = by_unit(net.layers[name], initial[name] * score, by_output=False).sum(1).cpu()
            inside = owner >= 0
            mass.index_add_(0, owner[inside], carried[inside])
    return torch.where(absent, mass, 0.0).numpy()


def _planner(growth: Growth) -> ChannelPlanner:
    return growth.tools["planner"]


def _share_off_path(growth: Growth) -> float:
    """The share of layers that no path crosses, which stay as they are."""
    layers = growth.net.layers
    spent = sum(growth.price.of(name) * layers[name].nnz for name in growth.scope.left)
    return spent / growth.price.total(growth.scope)


def _arrivals(keys: EdgeKeys, weights: np.ndarray) -> np.ndarray:
    """Return the times of an exponential race: sorted, a draw without replacement in proportion to the weights."""
    uniform = keys.uniform("whole units", 0, len(weights))
    with np.errstate(divide="ignore"):
        return -np.log1p(-uniform) / weights


def _within_families(planner: ChannelPlanner, times: np.ndarray) -> list[int]:
    """Return the units that may be absent: the first of every family, then all others, by their times."""
    families = [sorted(f.units, key=lambda unit: times[unit]) for f in planner.units.families if not f.reason]
    firsts = [family[0] for family in families]
    others = [unit for family in families for unit in family[1:]]
    return [*firsts, *sorted(others, key=lambda unit: times[unit])]


def _masks(growth: Growth, planner: ChannelPlanner, absent: list[int]) -> dict[str, Tensor]:
    """Return masks of the layers in scope with every edge but those of absent units."""
    gone = torch.zeros(planner.units.count, dtype=torch.bool, device="cpu")
    gone[absent] = True
    cuts = planner.cuts(gone)
    layers = growth.scope.layers
    return {name: unit_masks(layer, *cuts.get(name, ((), ()))) for name, layer in layers.items()}


def _more(growth: Growth, planner: ChannelPlanner, units: list[int]) -> dict[str, Tensor]:
    """Return the masks of the layers in scope with all edges of these units to units that are present."""
    absent = planner.absent()
    new = torch.zeros(planner.units.count, dtype=torch.bool, device="cpu")
    new[units] = True
    after = planner.cuts(absent & ~new)
    masks: dict[str, Tensor] = {}
    for name, layer in growth.scope.layers.items():
        if name not in planner.units.outputs:
            masks[name] = layer.mask
            continue
        touched = _rows(layer, new, planner.units.outputs[name]) | _columns(layer, new, planner.units.columns[name])
        masks[name] = layer.mask | (touched & unit_masks(layer, *after.get(name, ((), ()))))
    return masks


def _rows(layer: Any, units: Tensor, owner: Tensor) -> Tensor:
    """Mark the weights into some whole units, given which one owns every output unit of a layer."""
    return _spread(layer, units, owner, True)


def _columns(layer: Any, units: Tensor, owner: Tensor) -> Tensor:
    """Mark the weights out of some whole units, given which one feeds every column of a layer."""
    return _spread(layer, units, owner, False)


def _spread(layer: Any, units: Tensor, owner: Tensor, by_output: bool) -> Tensor:
    chosen = torch.cat([units, torch.zeros(1, dtype=torch.bool, device="cpu")])[owner]  # -1 is none
    places = by_unit(layer, layer.mask, by_output=by_output)
    return from_units(layer, chosen.to(places.device)[:, None].expand(places.shape), by_output=by_output)


def _same(layer: Any, outputs: Tensor, columns: Tensor) -> Tensor:
    """Mark the weights that lead from a whole unit to itself."""
    shape = by_unit(layer, layer.mask, by_output=True).shape
    rows = from_units(layer, outputs.to(layer.mask.device)[:, None].expand(shape), by_output=True)
    shape = by_unit(layer, layer.mask, by_output=False).shape
    into = from_units(layer, columns.to(layer.mask.device)[:, None].expand(shape), by_output=False)
    return (rows == into) & (rows >= 0)
