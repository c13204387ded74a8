"""A sparse seed in which every unit is alive: edges drawn by the expected visits of random walks.

PHEW (Patil & Dovrolis, ICML 2021) builds a seed from random walks biased by weight magnitude: forward walks
step from a unit to the next with probability proportional to the magnitude of the connecting weights,
backward walks likewise towards the input, in turn, each starting at every input (output) unit equally often.
This pass, *expected-visits*, walks infinitely often instead of one walk at a time:

1. The expected visits of an edge by a forward walk are the path products of the network whose magnitudes are
   normalised to one over each unit's outgoing edges, times the edge's own magnitude; by a backward walk, with
   incoming edges. Both are carried through residuals, concatenations and gates by the path rules of the
   graph. Half of the weight goes to each direction.
2. Edges are drawn without replacement in proportion to their expected visits (an exponential race).
3. Every unit keeps the edge that arrives first among its incoming ones, and among its outgoing ones, whatever
   the count. With one edge in and one out at every unit of every layer, every unit is on a path.

Deviations from PHEW: single walks are not followed, so an edge may be drawn whose walk would need another
edge that is not; step 3 repairs it. All units of a layer with several consumers get an edge in each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from growfx.analysis.weight_layout import by_unit, from_units
from growfx.errors import ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.masked.present.storage import on_whole_weights
from growfx.passes.path_products.products import path_gradients
from growfx.selection.budget import largest_within
from growfx.selection.choose import draw, top
from growfx.selection.density import check_density
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Seed", "dead_units", "expected_visits", "seed_masks"]

_AUTOMATIC = (0.01, 0.02, 0.05, 0.10)
_NEVER_VISITED = 1e-9  # times the mean visits: the last choice where a unit has no visited edge


@dataclass(frozen=True)
class Seed:
    """Starting masks.

    `masks`: bool per masked layer but those that keep theirs, layers off path all active. `density`: over these layers.
    `dead_units`: output units of layers on a path that no path crosses.
    """

    masks: dict[str, Tensor]
    density: float
    dead_units: int


@on_whole_weights
def expected_visits(net: MaskedGraph) -> dict[str, Tensor]:
    """Return the expected visits of every edge by a forward and a backward walk, half each.

    Per layer on a path, float64 of the weight's shape; the same unit everywhere. Weights outside their mask
    count as they are stored (zero). A unit whose weights are all zero steps to its neighbours with equal
    probability.
    """
    visits: dict[str, Tensor] = {}
    for outgoing in (True, False):
        steps = {name: _step_probabilities(layer, outgoing) for name, layer in net.layers.items()}
        paths = path_gradients(net, steps, norm="identity", unit_scales=True)
        # one unit of path mass is one walk, so both directions count alike whatever their scale
        per_walk = math.exp(paths.log_scale - paths.log_total) if paths.log_total > -math.inf else 1.0
        for name, score in paths.scores.items():
            part = 0.5 * per_walk * score * steps[name]
            visits[name] = part if outgoing else visits[name] + part
    return visits


@on_whole_weights
def seed_masks(
    net: MaskedGraph,
    density: float | None = None,
    *,
    seed: int = 0,
    largest: float = 1.0,
    layers: Iterable[str] | None = None,
    frozen: Iterable[str] = (),
    by_magnitude: bool = False,
    price: Mapping[str, float] | None = None,
) -> Seed:
    """Draw starting masks of exactly `density`, off-path layers dense and counted.

    `density` None takes the smallest of 1, 2, 5 and 10 % (none above `largest`) at which every unit is alive; where
    off-path layers alone are more than that, 1, 2, 5 and 10 % of the other edges on top of them. At a density too small
    for that (or if none is enough) units stay dead: `dead_units` counts them.

    Args:
        net: a masked graph; nothing of it is changed.
        density: of all layers but the `frozen` ones.
        seed: of the draw.
        largest: the most that None may come to.
        layers: those to draw in; default: all on a path.
        frozen: layers that keep their masks and are not counted; paths run through them.
        by_magnitude: take the weights of largest magnitude, over all these layers, instead of drawing.
        price: of an edge, by layer. Densities are then shares of what all edges cost, edges are drawn in proportion to
            expected visits over price, and the seed has as many in the order of the draw as `density` pays for.

    Raises:
        ConfigError: off-path layers alone need more than the density allows.
    """
    visits = expected_visits(net)
    kept, allowed = set(frozen), set(visits if layers is None else layers)
    chosen = {name: value for name, value in visits.items() if name in allowed - kept}
    counted = [name for name in net.layers if name not in kept]
    total = sum(net.layers[name].numel for name in counted)
    dense = [name for name in counted if name not in chosen]
    alone = sum(net.layers[name].numel for name in dense)
    if price is not None:
        total, alone = (sum(price[n] * net.layers[n].numel for n in names) for names in (counted, dense))
        chosen = {name: value / price[name] for name, value in chosen.items()}
    best = None
    for candidate in (check_density(density, "seed_density"),) if density is not None else _automatic(alone / total):
        if density is None and candidate > largest:
            continue
        choose = partial(_largest if by_magnitude else _draw, net, chosen, EdgeKeys(seed, "seed"))
        count = round(candidate * total) - alone
        if price is not None:
            count = _paid(choose, chosen, price, candidate * total - alone)
        if count <= 0:
            continue
        masks = {name: torch.ones_like(net.layers[name].mask) for name in dense} | choose(count)
        spent = sum(int(mask.sum()) * (1 if price is None else price[name]) for name, mask in masks.items())
        best = Seed(masks, spent / total, dead_units(net, masks))
        if not best.dead_units:
            return best
    if best is None:
        what = "edges" if price is None else "multiply-accumulates"
        raise ConfigError(_no_room(dense, alone, total, density, largest, what))
    return best


def _paid(
    choose: Callable[[int], Mapping[str, Tensor]],
    layers: Mapping[str, Tensor],
    price: Mapping[str, float],
    budget: float,
) -> int:
    """Return how many edges, in the order of the choice, `budget` pays for."""

    def cost_of(count: int) -> float:
        return sum(price[name] * int(mask.sum()) for name, mask in choose(count).items())

    return largest_within(cost_of, budget, sum(value.numel() for value in layers.values()))


def _automatic(off_path: float) -> list[float]:
    """Return the densities to try, from the smallest; `off_path` is the share of layers that stay dense."""
    above = [off_path + (1 - off_path) * step for step in _AUTOMATIC] if off_path else []
    return [*_AUTOMATIC, *(density for density in above if density > _AUTOMATIC[-1])]


@on_whole_weights
def dead_units(net: MaskedGraph, masks: Mapping[str, Tensor]) -> int:
    """Count output units that active edges connect to no path from input to output, whatever the weights."""
    paths = path_gradients(net, masks, norm="identity", unit_scales=True)
    return sum(int((~alive).sum()) for alive in paths.alive_out.values())


def _no_room(dense: Sequence[str], alone: float, total: float, density: float | None, largest: float, what: str) -> str:
    asked = f"{density}" if density is not None else f"None, and at most {largest}"
    if not alone:
        least = 1 / total
        allowed = f"allowed are densities from {least:.4g} up"
        return f"`seed_density` is {asked}, of {total} {what}, which leaves none; {allowed}"
    shown = ", ".join(f"`{name}`" for name in dense[:4]) + (f" and {len(dense) - 4} more" if len(dense) > 4 else "")
    return (
        f"`seed_density` is {asked}, of {total} {what}; {alone} of them are in layers no path crosses ({shown}) and "
        f"stay dense, so allowed are densities above {alone / total:.4g} that leave at least one edge; or wrap the "
        "model with `exclude` (`--exclude` on the command line) for these layers, which are then not counted"
    )


def _largest(net: MaskedGraph, visits: Mapping[str, Tensor], keys: EdgeKeys, count: int) -> dict[str, Tensor]:
    """Mark the `count` edges of largest magnitude; absent edges are zero, whatever is stored."""
    layers = {name: net.layers[name] for name in visits}
    sizes = {name: layer.parameter.detach().abs().where(layer.mask, 0) for name, layer in layers.items()}
    return top(sizes, count, keys).masks


def _draw(net: MaskedGraph, visits: Mapping[str, Tensor], keys: EdgeKeys, count: int) -> dict[str, Tensor]:
    kept = {name: _first_arrivals(net.layers[name], name, value, keys) for name, value in visits.items()}
    reserved = sum(int(mask.sum()) for mask in kept.values())
    if reserved > count:  # too few edges to keep every unit alive: the likeliest ones
        kept = {name: torch.zeros_like(mask) for name, mask in kept.items()}
        reserved = 0
    drawn = draw(visits, count - reserved, keys, {name: ~mask for name, mask in kept.items()})
    missing = count - reserved - drawn.count
    masks = {name: kept[name] | drawn.masks[name] for name in visits}
    if missing:  # more edges wanted than are ever visited: any of the others
        others = {name: (~masks[name]).double() for name in visits}
        rest = draw(others, missing, keys)
        masks |= {name: masks[name] | rest.masks[name] for name in visits}
    return masks


def _first_arrivals(layer: MaskedLayer, name: str, visits: Tensor, keys: EdgeKeys) -> Tensor:
    """Mark, for each output and each input unit, the edge that the race would draw first."""
    weights = visits.reshape(-1).cpu().numpy()
    floor = _NEVER_VISITED * float(weights.mean()) or 1.0
    uniform = keys.uniform(name, 0, len(weights))
    times = torch.from_numpy(-np.log1p(-uniform) / np.maximum(weights, floor)).reshape(visits.shape)
    marks = torch.zeros(visits.shape, dtype=torch.bool, device="cpu")
    for by_output in (True, False):
        rows = by_unit(layer, torch.arange(visits.numel(), device="cpu").reshape(visits.shape), by_output)
        marks.view(-1)[rows.gather(1, times.view(-1)[rows].argmin(1, keepdim=True))] = True
    return marks.to(visits.device)


def _step_probabilities(layer: MaskedLayer, outgoing: bool) -> Tensor:
    """Return float64 magnitudes normalised to sum to one over each unit's outgoing (or incoming) edges."""
    size = layer.parameter.detach().double().abs() * layer.mask
    rows = by_unit(layer, size, by_output=not outgoing)
    totals = rows.sum(1, keepdim=True)
    shares = torch.where(totals > 0, rows / totals, 1.0 / rows.shape[1])
    return from_units(layer, shares, by_output=not outgoing)
