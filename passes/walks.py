"""Masks of random walks through a network: PHEW, Patil & Dovrolis, "PHEW: Constructing Sparse Networks that Learn Fast
and Generalize Well without Training Data" (ICML 2021).

Walks run in turn from the inputs to the outputs and back, and start at every input (output) unit equally often. A step
chooses among the edges of a unit with probability proportional to the magnitude of their weights, and every edge
that a walk steps on is kept, until there are as many as wanted. Walks follow the *connectivity* of the graph
(`growfx.passes.connect`): through residual sums, concatenations, shuffles and gates.

Where a step is more than a choice among weights:

* A value that is used in several places: each layer is as likely as any other. A sum that the value goes into is one
  such place, behind which the choice is made again; so a residual block is entered with probability one half.
* The other way round, an input column that a sum feeds: the last summand or all those before, and so on.
* A unit that feeds several columns of a layer (feature maps that are flattened) chooses one evenly.
* Products (gates, attention) are passed through any of their factors, as sums are.
* A layer without a mask is crossed at random, whatever its weights. A unit whose weights are all zero chooses evenly.
* A layer over positions has no units that walks could follow: every walk makes one separate step in each, from (to)
  a position that is chosen in turn.

Deviations from the released code: 1. the last walk is cut where the number of edges is reached; 2. edges still missing
when walks hardly find new ones are drawn in proportion to the walks' expected visits (`growfx.passes.seed`), which is
the order in which endless walks would come by; and all edges are, where the connectivity cannot be found; 3. the
released code knows the shortcuts of one architecture, and never takes those without a layer. As there, positions are
not followed: the tap of a convolution and the place in a flattened map are chosen apart, and a walk may miss every
attention of a network that reads a single token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growfx.analysis.connectivity import Connectivity, LayerUnits
from growfx.analysis.weight_layout import by_unit, canonical
from growfx.errors import TraceError
from growfx.masked.layers import MaskedLayer
from growfx.masked.present.storage import on_whole_weights
from growfx.passes.connect.interpreter import connect
from growfx.passes.seed import expected_visits
from growfx.selection.choose import draw
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Walks", "walk_masks", "walk_visits"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_FIRST_BATCH, _LONGEST_DOUBT, _LARGEST_BATCH = 1 << 9, 1 << 12, 1 << 16
_PATIENCE = 20  # of the largest batches: when more would be needed, the rest is drawn
_MOST_SWEEPS = 3  # over all layers, for one batch: networks that use a layer again walk in circles
_KEY = 1 << 20  # more than the steps of any walk


@dataclass(frozen=True)
class Walks:
    """Masks of walks.

    Attributes:
        masks: bool of the weight's shape, on its device, for the layers asked for.
        walks: how many walks there were, the last one cut short.
        drawn: edges that were drawn at the end, since walks found hardly any new ones.
    """

    masks: dict[str, Tensor]
    walks: int
    drawn: int


@on_whole_weights
def walk_masks(
    net: MaskedGraph, edges: int, *, layers: Iterable[str] | None = None, through: Iterable[str] = (), seed: int = 0
) -> Walks:
    """Mark exactly `edges` edges (all, where there are no more) by walks over the magnitudes of the weights.

    Args:
        net: a masked graph; nothing of it is changed. Weights outside their masks count as zero.
        edges: how many to mark.
        layers: masked layers to mark edges in; default: all that walks can reach. Walks enter no other masked layer but
            those in `through`.
        through: masked layers that walks run through by their weights, without marking anything (frozen ones).
        seed: of the walks.

    Raises:
        TraceError: the network was not recorded faithfully.
    """
    chosen = [name for name in net.layers if name in (net.layers if layers is None else set(layers))]
    try:
        walker = _Walker(net, chosen, seed, through)
    except TraceError:
        none = {name: torch.zeros_like(net.layers[name].mask, device="cpu") for name in chosen}
        return _completed(net, none, edges, 0, EdgeKeys(seed, "after walks"), expected_visits(net))
    found = np.zeros(walker.edges, bool)
    count, walks, size = min(edges, walker.edges), 0, _FIRST_BATCH
    have = 0
    while have < count:
        visited, walk = walker.batch(walks, size)
        fresh = ~found[visited]
        visited, walk = visited[fresh], walk[fresh]
        _, first = np.unique(visited, return_index=True)
        first = np.sort(first)[: count - have]
        found[visited[first]] = True
        have += len(first)
        walks = int(walk[first[-1]]) + 1 if have == count else walks + size
        if size >= _LONGEST_DOUBT and len(first) * (_LARGEST_BATCH // size) * _PATIENCE < count - have:
            break
        size = min(2 * size, _LARGEST_BATCH)
    return _completed(net, walker.split(found), count - have, walks, EdgeKeys(seed, "after walks"))


@on_whole_weights
def walk_visits(net: MaskedGraph, walks: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return how often each edge is stepped on, per walk: float64 of the weight's shape, half of the walks each way."""
    walker = _Walker(net, list(net.layers), seed)
    counts = np.zeros(walker.edges)
    for start in range(0, walks, _LARGEST_BATCH):
        visited, _ = walker.batch(start, min(_LARGEST_BATCH, walks - start))
        counts += np.bincount(visited, minlength=walker.edges)
    return walker.split(counts / walks)


def _completed(
    net: MaskedGraph,
    masks: dict[str, Tensor],
    missing: int,
    walks: int,
    keys: EdgeKeys,
    visits: Mapping[str, Tensor] | None = None,
) -> Walks:
    """Draw what is missing in proportion to expected visits, and evenly where these are unknown or do not suffice."""
    drawn = min(missing, sum(int((~mask).sum()) for mask in masks.values()))
    if drawn and visits is None:
        try:
            visits = expected_visits(net)
        except TraceError:
            visits = {}
    left = drawn
    even = {name: torch.ones(mask.shape, dtype=torch.float64, device="cpu") for name, mask in masks.items()}
    for scores in ({name: value.cpu() for name, value in (visits or {}).items() if name in masks}, even):
        more = draw(scores, left, keys, {name: ~masks[name] for name in scores})
        left -= more.count
        masks = masks | {name: masks[name] | mask for name, mask in more.masks.items()}
    return Walks({name: mask.to(net.layers[name].mask.device) for name, mask in masks.items()}, walks, drawn)


# -- one batch of walks -------------------------------------------------------------------------------------------


class _Walker:
    """Takes many walks at once, layer by layer.

    Attributes:
        edges: number of all edges that may be marked; they are numbered layer after layer.
    """

    def __init__(self, net: MaskedGraph, chosen: list[str], seed: int, through: Iterable[str] = ()) -> None:
        self.connected = connect(net)
        self.marked: Mapping[str, MaskedLayer] = {name: net.layers[name] for name in chosen}
        self.weighed: Mapping[str, MaskedLayer] = {**{name: net.layers[name] for name in through}, **self.marked}
        offsets = np.cumsum([0, *(layer.numel for layer in self.marked.values())])
        self.offset = dict(zip(chosen, offsets.tolist(), strict=False))
        self.edges = int(offsets[-1])
        # layers that walks run through, in data-flow order: those to mark, those frozen, and those without a mask
        self.names = [n for n in self.connected.layers if n in self.weighed or n not in net.layers]
        self.names = [n for n in self.names if self._has_units(n)]
        self.beside = [name for name in chosen if name not in self.names]
        self.units = [self.connected.layers[name] for name in self.names]
        self.routes = _Routes(self.connected, self.names)
        self.random = EdgeKeys(seed, "walks").generator("all layers")

    def _has_units(self, name: str) -> bool:
        """Whether the layer's units can be followed."""
        units, layer = self.connected.layers[name], self.weighed.get(name)
        if units.mixes_positions:
            return False
        if layer is None:
            even = len(units.outputs) % units.groups == len(units.sources) % units.groups == 0
            return even and len(units.outputs) > 0 < len(units.sources)
        groups, outputs, inputs, _ = canonical(layer, layer.mask).shape
        return (len(units.outputs), len(units.sources)) == (groups * outputs, groups * inputs)

    def split(self, flat: NDArray[Any]) -> dict[str, Tensor]:
        """Values of all edges by layer."""
        return {
            name: torch.from_numpy(flat[start : start + self.marked[name].numel].copy()).view(
                self.marked[name].mask.shape
            )
            for name, start in self.offset.items()
        }

    def batch(self, first: int, size: int) -> tuple[Ints, Ints]:
        """Take walks number `first` to `first + size`: even ones forward, odd ones backward.

        Returns the edges they step on, in the order of the walks, and the walk of each.
        """
        walks = np.arange(first, first + size)
        steps = [self._forward(walks[walks % 2 == 0]), self._backward(walks[walks % 2 == 1]), self._beside(walks)]
        edges, keys = (np.concatenate(part) for part in zip(*steps, strict=True))
        order = np.argsort(keys, kind="stable")
        return edges[order], keys[order] // _KEY

    def _forward(self, walks: Ints) -> tuple[Ints, Ints]:
        trail = _Trail()
        starts = self.routes.inputs
        if not len(starts):
            return trail.joined()
        layer, column = self.routes.forward(starts[walks // 2 % len(starts)], self.random)
        for _ in range(_MOST_SWEEPS):
            for at, name in enumerate(self.names):
                here = np.flatnonzero(layer == at)
                if len(here):
                    output, edge = self._step(name, self.units[at], column[here], forward=True)
                    trail.add(edge, walks[here])
                    unit = self.units[at].outputs.numpy()[output]
                    layer[here], column[here] = self.routes.forward(unit, self.random)
            if (layer < 0).all():
                break
        return trail.joined()

    def _backward(self, walks: Ints) -> tuple[Ints, Ints]:
        trail = _Trail()
        starts = self.routes.outputs
        if not len(starts):
            return trail.joined()
        unit = starts[walks // 2 % len(starts)]
        for _ in range(_MOST_SWEEPS):
            for at, name in reversed(list(enumerate(self.names))):
                here = np.flatnonzero(self.routes.owner[unit] == at)
                if len(here):
                    output = self.routes.place[unit[here]]
                    column, edge = self._step(name, self.units[at], output, forward=False)
                    trail.add(edge, walks[here])
                    unit[here] = self.routes.backward(at, column, self.random)
            if (self.routes.owner[unit] < 0).all():
                break
        return trail.joined()

    def _beside(self, walks: Ints) -> tuple[Ints, Ints]:
        """One step in every layer that walks cannot follow."""
        trail = _Trail()
        for name in self.beside:
            for forward in (True, False):
                own = walks[walks % 2 == (0 if forward else 1)]
                rows = by_unit(self.marked[name], self.marked[name].mask, not forward).shape[0]
                trail.add(self._step(name, None, own // 2 % rows, forward)[1], own)
        return trail.joined()

    def _step(self, name: str, units: LayerUnits | None, rows: Ints, forward: bool) -> tuple[Ints, Ints]:
        """From input units (backward: output units) of a layer to its other side.

        Returns the units there and the edges taken, -1 where none is to be marked.
        """
        layer = self.weighed.get(name)
        if layer is None:
            assert units is not None
            here, there = (units.sources, units.outputs) if forward else (units.outputs, units.sources)
            size = len(there) // units.groups
            group = rows // max(1, len(here) // units.groups)
            return group * size + self.random.integers(0, size, len(rows)), np.full(len(rows), -1)
        _, outputs, inputs, taps = canonical(layer, layer.mask).shape
        used, which = np.unique(rows, return_inverse=True)
        weights = layer.parameter.detach() * layer.mask
        sizes = by_unit(layer, weights, by_output=not forward)[torch.from_numpy(used).to(weights.device)]
        along = _chosen(sizes.abs().double().cpu().numpy(), which.reshape(-1), self.random)
        here, there = (inputs, outputs) if forward else (outputs, inputs)
        group, own, other, tap = rows // here, rows % here, along // taps, along % taps
        numbers = canonical(layer, torch.arange(layer.numel, device="cpu").view(layer.mask.shape)).numpy()
        edge = numbers[group, other, own, tap] if forward else numbers[group, own, other, tap]
        return group * there + other, edge + self.offset[name] if name in self.offset else np.full(len(rows), -1)


def _chosen(weights: Floats, rows: Ints, random: np.random.Generator) -> Ints:
    """For each of `rows` an index along the row, with probability proportional to its weight; evenly if all are 0."""
    weights[~weights.any(1)] = 1.0
    ends = weights.cumsum().reshape(weights.shape)
    begins = np.concatenate([[0.0], ends[:-1, -1]])
    target = begins[rows] + random.random(len(rows)) * (ends[rows, -1] - begins[rows])
    flat = np.searchsorted(ends.reshape(-1), target, side="right")
    return np.clip(flat - rows * weights.shape[1], 0, weights.shape[1] - 1)


class _Trail:
    """Edges that walks step on, with a key that orders them by walk and step."""

    def __init__(self) -> None:
        self.edges: list[Ints] = []
        self.keys: list[Ints] = []

    def add(self, edges: Ints, walks: Ints) -> None:
        """Note one step of each of `walks`; later steps of a walk come later. Edges below 0 are nobody's."""
        self.keys.append((walks * _KEY + len(self.keys))[edges >= 0])
        self.edges.append(edges[edges >= 0])

    def joined(self) -> tuple[Ints, Ints]:
        """All edges and their keys."""
        none = np.zeros(0, np.int64)
        return np.concatenate([none, *self.edges]), np.concatenate([none, *self.keys])


# -- from layer to layer ------------------------------------------------------------------------------------------


class _Routes:
    """Which layer a unit's value goes to next, and whose value stands at a column, each with its probability.

    Attributes:
        inputs: input units that some layer reads; outputs: units that no layer reads.
        owner: for every unit the number of its layer, -1 for inputs and units of no layer.
        place: for every unit its place among the outputs of its layer.
    """

    def __init__(self, connected: Connectivity, names: list[str]) -> None:
        total = len(connected.group)
        self.owner, self.place = np.full(total, -1), np.zeros(total, np.int64)
        widths = []
        for number, name in enumerate(names):
            outputs = connected.layers[name].outputs.numpy()
            self.owner[outputs], self.place[outputs] = number, np.arange(len(outputs))
            widths.append(len(connected.layers[name].sources))
        self._first_column = np.cumsum([0, *widths])
        known = self.owner >= 0
        given = np.concatenate([np.zeros(0, np.int64), *(units.numpy() for units in connected.inputs.values())])
        known[given] = True
        columns, units = self._pairs(connected, names, known)
        layers = np.searchsorted(self._first_column, columns, side="right") - 1
        mark = np.random.default_rng(0).integers(0, 2**63, max(total, self._first_column[-1] + 1), dtype=np.uint64)
        at_column, of_unit = _sums(columns, mark[units]), _sums(units, mark[columns])
        self._next = _Choices(units, _sums(units * len(names) + layers, at_column), layers, layers, columns)
        # of two values from the same layer the one that is read in fewer places comes first
        spread = np.bincount(units, minlength=total)[units] / (len(columns) + 1)
        self._last = _Choices(columns, of_unit, self.owner[units], spread - self.owner[units], units)
        fed = np.bincount(units, minlength=total) > 0
        self.inputs = given[fed[given]]
        self.outputs = np.flatnonzero((self.owner >= 0) & ~fed)

    def _pairs(self, connected: Connectivity, names: list[str], known: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """All pairs of a column (numbered layer after layer) and a unit that feeds it."""
        columns, units = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for first, name in zip(self._first_column.tolist(), names, strict=False):
            own, fed_by = (side.numpy() for side in connected.feeding(name))
            columns.append(own[known[fed_by]] + first)
            units.append(fed_by[known[fed_by]])
        return np.concatenate(columns), np.concatenate(units)

    def forward(self, units: Ints, random: np.random.Generator) -> tuple[Ints, Ints]:
        """Layer and column that each unit's value goes to; layer -1 where it ends."""
        columns = self._next.choose(units, random)
        layers = np.searchsorted(self._first_column, columns, side="right") - 1
        return np.where(columns < 0, -1, layers), columns - self._first_column[np.maximum(layers, 0)]

    def backward(self, layer: int, columns: Ints, random: np.random.Generator) -> Ints:
        """Unit whose value stands at each of a layer's columns; 0 where none does."""
        return np.maximum(self._last.choose(columns + self._first_column[layer], random), 0)


def _sums(keys: Ints, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The sum (modulo 2^64) of all values of the same key, beside each of them."""
    _, which = np.unique(keys, return_inverse=True)
    totals = np.zeros(int(which.max(initial=-1)) + 1, np.uint64)
    np.add.at(totals, which.reshape(-1), values)
    return totals[which.reshape(-1)]


class _Choices:
    """For each row some results, chosen one alternative after the other.

    Results of a row with the same `alternative` are equally likely. The alternatives of a row come in turn, by their
    lowest `turn`: one of n layers is taken instead of all later alternatives with probability n / (n + 1), the last one
    for certain.

    Args: one entry a result each: its row, its alternative, its layer, its turn, the result.
    """

    def __init__(
        self, rows: Ints, alternatives: NDArray[np.uint64], layers: Ints, turns: NDArray[Any], results: Ints
    ) -> None:
        order = np.lexsort((results, layers, alternatives, rows))
        rows, alternatives, layers, turns = rows[order], alternatives[order], layers[order], turns[order]
        self.rows, begins = np.unique(rows, return_index=True)
        new = np.ones(len(rows), bool)
        new[1:] = (rows[1:] != rows[:-1]) | (alternatives[1:] != alternatives[:-1])
        starts = np.flatnonzero(new)
        group = np.cumsum(new) - 1
        other = new.copy()
        other[1:] |= layers[1:] != layers[:-1]
        kinds, members = np.bincount(group[other]), np.bincount(group)
        turn = np.minimum.reduceat(turns, starts) if len(starts) else turns
        share = _in_turn(rows[starts], turn, kinds)
        self.ends = np.cumsum(share[group] / members[group])
        self.begins, self.stops = begins, np.append(begins[1:], len(rows))
        self.results = results[order]

    def choose(self, rows: Ints, random: np.random.Generator) -> Ints:
        """Choose a result for each row; -1 where the row has none."""
        found = np.full(len(rows), -1)
        at = np.minimum(np.searchsorted(self.rows, rows), max(len(self.rows) - 1, 0))
        known = self.rows[at] == rows if len(self.rows) else np.zeros(len(rows), bool)
        begin, stop = self.begins[at[known]], self.stops[at[known]]
        low = np.where(begin > 0, self.ends[begin - 1], 0.0)
        target = low + random.random(len(begin)) * (self.ends[stop - 1] - low)
        found[known] = self.results[np.clip(np.searchsorted(self.ends, target, side="right"), begin, stop - 1)]
        return found


def _in_turn(rows: Ints, turns: NDArray[Any], kinds: Ints) -> Floats:
    """Probability of each alternative, within its row."""
    order = np.lexsort((turns, rows))
    rows, kinds = rows[order], kinds[order]
    last = np.ones(len(rows), bool)
    last[:-1] = rows[1:] != rows[:-1]
    passed = np.where(last, 0.0, -np.log1p(kinds))
    before = np.concatenate([[0.0], np.cumsum(passed)[:-1]]) if len(rows) else passed
    first = np.concatenate([[True], last[:-1]]) if len(rows) else last
    start = np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))
    share = np.exp(before - before[start]) * kinds / (kinds + ~last)
    result = np.empty_like(share)
    result[order] = share
    return result
