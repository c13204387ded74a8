"""What a run on unit numbers found, as facts without a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from growfx.analysis.connectivity import Connectivity, LayerUnits
from growfx.analysis.signal_graph import SignalGraph
from growfx.passes.connect.heads import find_heads
from growfx.passes.connect.signals import MIX, SLOT, SUM, UNIT, Ints, Signals, numbers

__all__ = ["LayerInputs", "found"]


@dataclass(eq=False)
class LayerInputs:
    """A layer during the run: its units as signals, and which signals stand `at` which of its columns."""

    units: Ints
    columns: int
    groups: int
    mixes_positions: bool = False
    at: list[Ints] = field(default_factory=list)
    signals: list[Ints] = field(default_factory=list)


def found(
    signals: Signals,
    layers: Mapping[str, LayerInputs],
    inputs: Mapping[str, Ints],
    parameters: Mapping[str, Tensor],
    frames: Iterable[Tensor],
) -> Connectivity:
    """What a run found, units numbered anew.

    Args:
        signals: all signals of the run.
        layers: name -> units and what feeds them, in data-flow order.
        inputs: name -> units.
        parameters: name -> slot of every element.
        frames: signals that stand along several axes.
    """
    cut = _sliced(signals, parameters)
    number = np.where(signals.kind == UNIT, np.cumsum(signals.kind == UNIT), 0)
    of_group = number[signals.first_units()]
    group = torch.zeros(int(number.max()) + 1, dtype=torch.int64, device="cpu")
    units = np.flatnonzero(signals.kind == UNIT)
    group[torch.from_numpy(number[units])] = torch.from_numpy(of_group[units])
    reasons: list[dict[int, str]] = []
    for notes in (signals.pins, signals.counts):
        table: dict[int, str] = {}
        for ids, reason in notes:
            for key in np.unique(of_group[ids]).tolist():
                table.setdefault(key, reason)
        table.pop(0, None)
        reasons.append(table)
    first = number[_first_fed(signals)]
    known = {name: _layer_units(layer, signals, number, first, of_group) for name, layer in layers.items()}
    columns = {
        name: (np.concatenate(layer.at), np.concatenate(layer.signals)) for name, layer in layers.items() if layer.at
    }
    ends = np.unique(np.concatenate([np.zeros(0, np.int64), *signals.ends]))
    dag = SignalGraph(number, signals.left.copy(), signals.right.copy(), dict(signals.members), columns, ends[ends > 0])
    return Connectivity(
        layers=known,
        inputs={name: torch.from_numpy(number[units]) for name, units in inputs.items()},
        group=group,
        pinned=reasons[0],
        counted=reasons[1],
        parameters={name: (axis, torch.from_numpy(of_group[ids])) for name, (axis, ids) in cut.items()},
        frames=tuple(torch.from_numpy(of_group[frame.numpy()]) for frame in frames),
        signals=dag,
        heads=tuple(torch.from_numpy(head) for head in find_heads(signals, of_group)),
        scaled=tuple(torch.from_numpy(row) for row in _scaled(signals, of_group)),
        products=tuple((cost, torch.from_numpy(of_group[ids])) for cost, ids in signals.products),
    )


def _scaled(signals: Signals, of_group: Ints) -> list[Ints]:
    """The groups in each row of signals whose number scales a product."""
    rows = [np.unique(of_group[signals.plain(row)]) for block in signals.scaled for row in block]
    return [row[row > 0] for row in rows if (row > 0).any()]


def _sliced(signals: Signals, parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, Ints]]:
    """Along which axis parameters have units, as signals of their groups; pins where it is no single one."""
    first = signals.first_units()
    result: dict[str, tuple[int, Ints]] = {}
    for name, ids in parameters.items():
        slots = numbers(ids)
        units = first[slots].reshape(ids.shape)
        if not units.any():
            continue
        lines = [(axis, _line(units, axis)) for axis in range(units.ndim)]
        fitting = [(axis, line) for axis, line in lines if line is not None]
        best = max(fitting, key=lambda found: len(np.unique(found[1])), default=None)
        if best is not None:
            result[name] = best
        else:
            signals.pin(slots, f"`{name}` has units along several axes")
    return result


def _line(units: Ints, axis: int) -> Ints | None:
    """The unit of every index along an axis, where there is no more than one at each."""
    rows = np.moveaxis(units, axis, 0).reshape(units.shape[axis], -1)
    highest = rows.max(1)
    return highest if ((rows == 0) | (rows == highest[:, None])).all() else None


def _first_fed(signals: Signals) -> Ints:
    """For every signal the first unit in it, the largest number where there is none (a mix)."""
    none = len(signals.kind)
    first = np.where(signals.kind == UNIT, np.arange(none), none)
    first = np.append(first, none)
    summed = signals.kind == SUM
    several = {signal: members for signal, members in signals.members.items() if summed[signal]}
    left, right = (
        np.where(signals.left > 0, signals.left, none),
        np.where(summed & (signals.right > 0), signals.right, none),
    )
    left[(signals.kind == MIX) | (signals.kind == SLOT)] = none
    while True:
        for signal, members in several.items():  # in every turn: members may be sums themselves
            first[signal] = min(first[signal], first[members].min())
        better = np.minimum(first[:-1], np.minimum(first[left], first[right]))
        if (better == first[:-1]).all():
            return np.where(better == none, 0, better)
        first[:-1] = better


def _layer_units(layer: LayerInputs, signals: Signals, number: Ints, first: Ints, of_group: Ints) -> LayerUnits:
    """Outputs and sources of a layer."""
    sources = np.zeros(layer.columns, np.int64)
    if layer.at:
        at, fed = np.concatenate(layer.at), np.concatenate(layer.signals)
        lowest, highest = np.full(layer.columns, np.iinfo(np.int64).max), np.full(layer.columns, -1)
        np.minimum.at(lowest, at, of_group[fed])
        np.maximum.at(highest, at, of_group[fed])
        source = np.full(layer.columns, np.iinfo(np.int64).max)
        np.minimum.at(source, at, np.where(first[fed] == 0, np.iinfo(np.int64).max, first[fed]))
        slots = np.ones(layer.columns, bool)
        slots[at[signals.kind[fed] != SLOT]] = False
        sources = np.where((lowest == highest) & (lowest > 0), source, -1)
        sources[(highest == -1) | slots] = 0
    if layer.mixes_positions:
        sources[:] = -1
    return LayerUnits(
        torch.from_numpy(number[layer.units]), torch.from_numpy(sources), layer.groups, layer.mixes_positions
    )
