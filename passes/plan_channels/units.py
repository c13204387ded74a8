"""Whole units: what a network can only lose together, and what of it can be lost at all.

Connectivity says which units are coupled: a tensor can only lose all of them or none. A network that stays a plain
dense one needs more: of units that stand along several axes a full rectangle has to stay, so that heads of an attention
leave whole, and the groups of a grouped convolution keep equally many channels, so that it loses whole groups, or the
same number of each. What is tied together so is one whole unit here. Whole units that the same layers make and the
same layers read are alike in all but their weights, and form a family: which ones stay is a matter of their gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from growfx.analysis.connectivity import Connectivity

__all__ = ["Family", "WholeUnits", "find_units"]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Family:
    """Whole units that are alike.

    Attributes:
        outputs: layer -> how many of its output units one of them has.
        columns: layer -> how many of its input columns one of them feeds.
        parameters: parameter that is not a layer's weight -> how many indices along its axis are one's.
        units: numbers of the whole units, in the order of the data.
        reason: why all of them stay; "" where they may leave.
    """

    outputs: Mapping[str, int]
    columns: Mapping[str, int]
    parameters: Mapping[str, int]
    units: tuple[int, ...]
    reason: str = ""

    @property
    def name(self) -> str:
        """The layers that have units in it."""
        return " + ".join(self.outputs)


@dataclass(frozen=True, eq=False)
class WholeUnits:
    """The whole units of a network, numbered from 0.

    Attributes:
        found: the connectivity they were made of.
        of_group: group -> whole unit, -1 for group 0.
        outputs, columns: layer -> the whole unit of every output unit, and of what feeds every column; -1 where a
            column is fed by none, or by a mix.
        families: all of them.
        in_groups: grouped convolutions that lose whole groups; others lose as many channels of each group.
    """

    found: Connectivity
    of_group: Tensor
    outputs: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    families: tuple[Family, ...]
    in_groups: frozenset[str]
    count: int = 0

    def groups(self, units: Tensor) -> list[int]:
        """The groups in whole units, given a bool of every whole unit."""
        inside = units[self.of_group.clamp(min=0)] & (self.of_group >= 0)
        return inside.nonzero().flatten().tolist()


@dataclass(eq=False)
class _Ties:
    """Sets of groups that can only leave together."""

    label: Ints
    pairs: list[tuple[Ints, Ints]] = field(default_factory=list)

    def tie(self, rows: Tensor) -> None:
        """Note that the groups in each row of a matrix leave together; 0 is none."""
        groups = rows.reshape(len(rows), -1).numpy()
        if groups.size:
            first = np.broadcast_to(groups.max(1, keepdims=True), groups.shape)
            real = (groups > 0) & (groups != first)
            self.pairs.append((first[real], groups[real]))

    def settle(self) -> None:
        """Join what was tied."""
        from scipy.sparse import coo_array  # loaded where it is needed: it is slow to import
        from scipy.sparse.csgraph import connected_components

        if not self.pairs:
            return
        left, right = (np.concatenate(side) for side in zip(*self.pairs, strict=True))
        left, right = self.label[left], self.label[right]
        size = len(self.label)
        links = coo_array((np.ones(len(left), np.int32), (left, right)), shape=(size, size))
        joined = connected_components(links, directed=False)[1]
        smallest = np.full(size, size)
        np.minimum.at(smallest, joined, np.arange(size))
        self.label = smallest[joined][self.label]
        self.pairs.clear()


def find_units(found: Connectivity, leads: Mapping[str, Tensor], refused: Mapping[int, str]) -> WholeUnits:
    """Tie together what can only leave together, and sort it into families.

    Args:
        found: the connectivity of a network.
        leads: layer -> the group that feeds every column, 0 for none.
        refused: group -> why no unit of it may leave.
    """
    ties = _Ties(found.group.numpy().copy())
    for head in found.heads:
        ties.tie(head.reshape(1, -1))
    in_groups = frozenset(_tie_grouped(ties, found, leads))
    ties.settle()
    _tie_frames(ties, found)
    ties.settle()
    own = np.flatnonzero(found.group.numpy() == np.arange(len(found.group)))[1:]  # groups; 0 is none
    labels, numbers = np.unique(ties.label[own], return_inverse=True)
    of_group = torch.full((len(found.group),), -1, device="cpu")
    of_group[torch.from_numpy(own)] = torch.from_numpy(numbers.reshape(-1))
    reasons: dict[int, str] = {}
    for group, reason in refused.items():
        reasons.setdefault(int(of_group[group]), reason)
    outputs = {name: of_group[found.coupled(name)] for name in found.layers}
    columns = {name: of_group[lead] for name, lead in leads.items()}
    families = tuple(_families(found, outputs, columns, of_group, reasons, len(labels)))
    return WholeUnits(found, of_group, outputs, columns, families, in_groups, len(labels))


def _tie_grouped(ties: _Ties, found: Connectivity, leads: Mapping[str, Tensor]) -> Iterable[str]:
    """Tie what grouped convolutions need; yields those that lose whole groups."""
    for name, layer in found.layers.items():
        if layer.groups == 1:
            continue
        sides = [side.reshape(layer.groups, -1) for side in (found.coupled(name), leads[name])]
        if layer.groups >= min(side.shape[1] for side in sides):
            ties.tie(torch.cat(sides, 1))
            yield name
        else:
            for side in sides:
                ties.tie(side.T)


def _tie_frames(ties: _Ties, found: Connectivity) -> None:
    """Tie the slabs of each frame along the axis that leaves most of them apart."""
    for frame in found.frames:
        label = ties.label[frame.numpy()]
        best: tuple[int, Tensor] = (0, torch.zeros(0, 1, dtype=torch.int64, device="cpu"))
        for axis in range(frame.ndim):
            slabs = frame.movedim(axis, 0).reshape(frame.shape[axis], -1)
            lines = np.moveaxis(label, axis, 0).reshape(frame.shape[axis], -1)
            # labels that slabs share would join these
            apart = len(np.unique(lines.min(1))) if _disjoint(lines) else 0
            if apart >= best[0]:
                best = apart, slabs
        if best[0]:
            ties.tie(best[1])
        else:
            ties.tie(frame.reshape(1, -1))


def _disjoint(lines: Ints) -> bool:
    """Whether no label is in two of the rows."""
    rows = [np.unique(line) for line in lines]
    return len(np.unique(np.concatenate(rows))) == sum(map(len, rows))


def _families(
    found: Connectivity,
    outputs: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    of_group: Tensor,
    reasons: Mapping[int, str],
    count: int,
) -> Iterable[Family]:
    """Whole units with the same layers around them, as many outputs and columns in each, and the same reason."""
    of_parameters = {name: of_group[units] for name, (_, units) in found.parameters.items()}
    tables = [*outputs.values(), *columns.values(), *of_parameters.values()]
    generator = np.random.default_rng(0)
    key = np.zeros(count, np.uint64)
    for table in tables:
        units, times = table[table >= 0].unique(return_counts=True)
        weight = generator.integers(1, 1 << 62, dtype=np.uint64)
        key[units.numpy()] += weight * times.numpy().astype(np.uint64)
    texts = {reason: number for number, reason in enumerate(dict.fromkeys(reasons.values()), start=1)}
    why = np.zeros(count, np.int64)
    for unit, reason in reasons.items():
        why[unit] = texts[reason]
    names = {number: reason for reason, number in texts.items()}
    _, first, which = np.unique(np.stack([key, why.astype(np.uint64)]), axis=1, return_index=True, return_inverse=True)
    members = np.split(np.argsort(which.reshape(-1), kind="stable"), np.cumsum(np.bincount(which.reshape(-1)))[:-1])
    counts = [{name: _counted(table) for name, table in kind.items()} for kind in (outputs, columns, of_parameters)]
    for family in np.argsort(first, kind="stable"):
        unit = int(first[family])
        makes, feeds, has = ({name: n[unit] for name, n in kind.items() if unit in n} for kind in counts)
        if makes:
            yield Family(makes, feeds, has, tuple(members[family].tolist()), names.get(int(why[unit]), ""))


def _counted(table: Tensor) -> dict[int, int]:
    units, times = table[table >= 0].unique(return_counts=True)
    return dict(zip(units.tolist(), times.tolist(), strict=True))
