"""How the values in a network are made of units: which units reach a layer's column, and which columns a unit reaches.

Every question is answered by walking along the edges of one graph, each edge once: lists of all pairs of units and
columns grow with the square of the depth where residual sums carry every unit to the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Origin", "Reach", "SignalGraph"]

Ints = NDArray[np.int64]
_Edges = tuple[Ints, Ints]


@dataclass(frozen=True)
class SignalGraph:
    """How values are made of units. Signals are numbered from 1, so that parts come before what is made of them.

    Attributes:
        unit: the unit that a signal is, or 0. Units have the order of their signals.
        left: the signal's first part, or 0.
        right: its second part, or 0.
        members: further parts of signals that have more.
        columns: layer name -> pairs of column and signal.
        ends: signals that something else than a layer reads as they are: outputs, selections, statistics.
    """

    unit: Ints
    left: Ints
    right: Ints
    members: Mapping[int, Ints]
    columns: Mapping[str, tuple[Ints, Ints]]
    ends: Ints = field(default_factory=lambda: np.zeros(0, np.int64))

    @cached_property
    def of_unit(self) -> Ints:
        """The signal of every unit; that of number 0 is 0."""
        return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(self.unit)])

    @cached_property
    def parts(self) -> _Edges:
        """Where the parts of every signal begin in a list of all, and that list."""
        made, part = self._edges()
        return _listed(made, part, len(self.unit))

    @cached_property
    def users(self) -> _Edges:
        """Where the signals made of every signal begin in a list of all, and that list."""
        made, part = self._edges()
        return _listed(part, made, len(self.unit))

    def _edges(self) -> _Edges:
        made, part = [], []
        for side in (self.left, self.right):
            made.append(np.flatnonzero(side))
            part.append(side[made[-1]])
        for signal, members in self.members.items():
            made.append(np.full(len(members), signal))
            part.append(members)
        return np.concatenate(made), np.concatenate(part)

    def pairs(self, layer: str) -> _Edges:
        """All pairs of an input column of a layer and a unit in it, sorted; as many as there are, not fewer."""
        columns, signals = self.columns.get(layer, (np.zeros(0, np.int64),) * 2)
        different, which = np.unique(signals, return_inverse=True)
        begins, parts = self.parts
        at, waiting = np.arange(len(different)), different
        known = np.zeros(0, np.int64)
        while len(waiting):
            keys = np.unique((at << 32) | waiting)
            keys = keys[~np.isin(keys, known, assume_unique=True)]
            known = np.union1d(known, keys)
            at, waiting = keys >> 32, keys & 0xFFFFFFFF
            numbers = begins[waiting + 1] - begins[waiting]
            at, waiting = np.repeat(at, numbers), parts[_ranges(begins[waiting], numbers)]
        at, units = known >> 32, self.unit[known & 0xFFFFFFFF]
        at, units = at[units > 0], units[units > 0]
        begins = np.searchsorted(at, np.arange(len(different) + 1))
        which = which.reshape(-1)
        numbers = begins[which + 1] - begins[which]
        keys = np.unique((np.repeat(columns, numbers) << 32) | units[_ranges(begins[which], numbers)])
        return keys >> 32, keys & 0xFFFFFFFF


def _listed(keys: Ints, values: Ints, size: int) -> _Edges:
    order = np.argsort(keys, kind="stable")
    return np.searchsorted(keys[order], np.arange(size + 1)), values[order]


def _ranges(begins: Ints, numbers: Ints) -> Ints:
    """The indices in ranges of these begins and lengths, one range after the other."""
    if not len(numbers):
        return np.zeros(0, np.int64)
    ends = np.cumsum(numbers)
    return np.arange(ends[-1]) + np.repeat(begins - ends + numbers, numbers)


def _spread(marks: NDArray[np.bool_], edges: _Edges, signals: Ints) -> Iterator[Ints]:
    """Mark signals and all that edges lead to from them; yields what was not marked before."""
    begins, ends = edges
    fresh = np.unique(signals)
    fresh = fresh[~marks[fresh]]
    while len(fresh):
        marks[fresh] = True
        yield fresh
        beyond = ends[_ranges(begins[fresh], begins[fresh + 1] - begins[fresh])]
        fresh = np.unique(beyond[~marks[beyond]])


class Reach:
    """The columns that the values of some units reach without crossing another layer. Units can be added."""

    def __init__(self, graph: SignalGraph, units: Tensor) -> None:
        self._graph = graph
        self._marks = np.zeros(len(graph.unit), np.bool_)
        self.add(units)

    def add(self, units: Tensor) -> None:
        """Add units, by number or as a bool of every unit."""
        numbers = units.nonzero().flatten() if units.dtype == torch.bool else units
        for _ in _spread(self._marks, self._graph.users, self._graph.of_unit[numbers.numpy()]):
            pass

    def at(self, layer: str, columns: int) -> Tensor:
        """Whether each of the columns of a layer is reached."""
        reached = np.zeros(columns, np.bool_)
        if layer in self._graph.columns:
            at, signals = self._graph.columns[layer]
            reached[at[self._marks[signals]]] = True
        return torch.from_numpy(reached)


class Origin:
    """The units whose values reach some columns without crossing another layer. Columns can be added."""

    def __init__(self, graph: SignalGraph) -> None:
        self._graph = graph
        self._marks = np.zeros(len(graph.unit), np.bool_)

    def add(self, layer: str, columns: Tensor) -> Tensor:
        """Add columns of a layer, a bool of each; returns the units that are new, by number."""
        if layer not in self._graph.columns:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        at, signals = self._graph.columns[layer]
        return self._add(signals[columns.numpy()[at]])

    def add_ends(self) -> Tensor:
        """Add what is read by something else than a layer; returns the units that are new, by number."""
        return self._add(self._graph.ends)

    def _add(self, signals: Ints) -> Tensor:
        fresh = list(_spread(self._marks, self._graph.parts, signals))
        units = self._graph.unit[np.concatenate([np.zeros(0, np.int64), *fresh])]
        return torch.from_numpy(units[units > 0])

    def units(self) -> Tensor:
        """A bool of every unit."""
        return torch.from_numpy(self._marks[self._graph.of_unit] & (self._graph.of_unit > 0))
