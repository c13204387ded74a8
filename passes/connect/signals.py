"""What flows through a network, by number: units, and what becomes of them when operators combine them.

A *signal* is a positive integer. Tensors of signals (`float64`, exact far beyond their number, so that every shape
operator accepts them) say for each element of an activation what it carries; 0 is nothing at all. A signal is

* a *unit*: an input channel, or an output channel or feature of a layer;
* a *slot*: one element of a parameter or buffer that is not a layer's weight;
* a *sum*: two signals at one place of an elementwise operation. They stand and fall together;
* *led*: a signal under the influence of another one that has no separate place beside it (a spatial gate);
* a *product*: an element of a matrix with one signal per row and another one per column;
* a *mix*: any number of signals, none of them leading (a mean over channels, an attention map).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["LED", "MIX", "NOTHING", "PRODUCT", "SLOT", "SUM", "UNIT", "Ints", "Signals", "narrowed", "tidy", "varies"]

NOTHING, UNIT, SLOT, SUM, LED, PRODUCT, MIX = range(7)
Ints = NDArray[np.int64]

_AT_ONCE = 2**17


def narrowed(tensor: Tensor) -> Tensor:
    """The tensor with one element along every axis that repeats one."""
    for axis, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and step == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def tidy(tensor: Tensor) -> Tensor:
    """The same elements, stored once along every axis where they are all alike: then its stride is zero."""
    if tensor.numel() == 0:
        return tensor
    small = narrowed(tensor)
    for axis in range(small.ndim):
        if small.shape[axis] > 1:
            first = small.narrow(axis, 0, 1)
            if bool((small == first).all()):
                small = first
    if small.shape == tensor.shape:
        return small.contiguous()
    return small.contiguous().expand(tensor.shape)


def varies(tensor: Tensor, axis: int) -> bool:
    """Whether the elements of a tidy tensor differ along an axis."""
    return tensor.shape[axis] > 1 and tensor.stride(axis) != 0


class _Growing:
    """An int64 array that grows at its end."""

    def __init__(self) -> None:
        self._data: Ints = np.zeros(1024, np.int64)
        self.size = 0

    def extend(self, values: Ints) -> None:
        needed = self.size + len(values)
        if needed > len(self._data):
            grown = np.zeros(max(needed, 2 * len(self._data)), np.int64)
            grown[: self.size] = self._data[: self.size]
            self._data = grown
        self._data[self.size : needed] = values
        self.size = needed

    @property
    def values(self) -> Ints:
        return self._data[: self.size]


class Signals:
    """All signals of one network, numbered as they arise.

    Attributes:
        members: signal -> the signals in a mix.
        pins: signals and the reason why no unit in them may be removed.
        counts: signals and what counts them: removing one changes the others (a mean, a norm, a softmax over them).
        ends: all signals that were pinned or counted, mixes of units included, which have no unit of their own to keep.
        summed: rows of signals that a product of two activations sums over: the dims of one head's queries or keys.
        scaled: those of them whose number divides the product.
        products: multiply-accumulates of products of activations, and the signals that share each equally.
    """

    def __init__(self) -> None:
        self._kind, self._left, self._right = _Growing(), _Growing(), _Growing()
        self._above = _Growing()
        self.members: dict[int, Ints] = {}
        self.pins: list[tuple[Ints, str]] = []
        self.counts: list[tuple[Ints, str]] = []
        self.ends: list[Ints] = []
        self.summed: list[Ints] = []
        self.scaled: list[Ints] = []
        self.products: list[tuple[float, Ints]] = []
        self._new(np.zeros(1, np.int64), NOTHING)

    @property
    def kind(self) -> Ints:
        """Kind of every signal."""
        return self._kind.values

    @property
    def left(self) -> Ints:
        """The first part of sums and products, the leading part of led signals; else 0."""
        return self._left.values

    @property
    def right(self) -> Ints:
        """The second part; else 0."""
        return self._right.values

    def _new(self, left: Ints, kind: int, right: Ints | None = None) -> Ints:
        start = self._kind.size
        self._kind.extend(np.full(len(left), kind, np.int64))
        self._left.extend(left)
        self._right.extend(np.zeros_like(left) if right is None else right)
        self._above.extend(np.arange(start, start + len(left)))
        return np.arange(start, start + len(left))

    def fresh(self, number: int, kind: int) -> Ints:
        """New units or slots."""
        return self._new(np.zeros(number, np.int64), kind)

    def couple(self, left: Ints, right: Ints) -> None:
        """What carries one of a pair cannot lose it without what carries the other. Mixes are not partners."""
        kind = self.kind
        real = (left != right) & (left > 0) & (right > 0) & (kind[left] != MIX) & (kind[right] != MIX)
        left, right = left[real], right[real]
        for start in range(0, len(left), _AT_ONCE):  # what the first pairs have coupled already is cheap to pass over
            first = self.groups(left[start : start + _AT_ONCE])
            second = self.groups(right[start : start + _AT_ONCE])
            apart = first != second
            pairs = np.sort(_distinct(first[apart], second[apart])[0], axis=0)
            roots, ends = np.unique(pairs, return_inverse=True)
            if len(roots) == pairs.size:  # every one is in one pair
                self._above.values[pairs[1]] = pairs[0]
            else:
                self._join(roots, ends.reshape(pairs.shape))

    def _join(self, roots: Ints, ends: Ints) -> None:
        """Couple the roots that pairs of their indices link, over any number of pairs."""
        from scipy.sparse import coo_array  # loaded where it is needed: it is slow to import
        from scipy.sparse.csgraph import connected_components

        links = coo_array((np.ones(ends.shape[1], np.int8), (ends[0], ends[1])), shape=(len(roots), len(roots)))
        label = connected_components(links, directed=False)[1]
        smallest = np.full(len(roots), np.iinfo(np.int64).max)
        np.minimum.at(smallest, label, roots)
        self._above.values[roots] = smallest[label]

    def groups(self, ids: Ints) -> Ints:
        """For each signal the smallest signal it is coupled with, directly or over others."""
        above, top = self._above.values, ids
        while True:
            higher = above[top]
            if (higher == top).all():
                break
            top = higher
        above[ids] = top
        return top

    def pin(self, ids: Ints, reason: str) -> None:
        """Forbid the removal of all units in these signals, and note that what they are made of is needed."""
        self.ends.append(np.unique(ids))
        found = self.leading(ids)
        if len(found):
            self.pins.append((found, reason))

    def count(self, ids: Ints, reason: str) -> None:
        """Note what depends on how many of these signals there are, and on all of them."""
        self.ends.append(np.unique(ids))
        found = self.leading(ids)
        if len(found):
            self.counts.append((found, reason))

    def leading(self, ids: Ints) -> Ints:
        """The units and slots, or sums of them, that have their own place in these signals."""
        waiting, found = np.unique(ids), []
        while len(waiting):
            kind = self.kind[waiting]
            found.append(waiting[(kind == UNIT) | (kind == SLOT) | (kind == SUM)])
            led, product = waiting[kind == LED], waiting[kind == PRODUCT]
            waiting = np.unique(np.concatenate([self.left[led], self.left[product], self.right[product]]))
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def plain(self, ids: Ints) -> Ints:
        """Signals without what merely influences them; 0 in place of mixes."""
        ids = ids.copy()
        while (led := self.kind[ids] == LED).any():
            ids[led] = self.left[ids[led]]
        ids[self.kind[ids] == MIX] = 0
        return ids

    # Combinations of pairs, one by one

    def add(self, left: Ints, right: Ints) -> Ints:
        """Elementwise operations: two signals at one place."""
        kind = self.kind
        result = np.where(left == 0, right, left)
        both = (left != right) & (left > 0) & (right > 0)
        mixes = (kind[left] == MIX, kind[right] == MIX)
        slots = (kind[left] == SLOT, kind[right] == SLOT)
        products = (kind[left] == PRODUCT) | (kind[right] == PRODUCT)
        for part in (left[both & products], right[both & products]):
            self.pin(part, "something is added to or multiplies products of units")
        known = both & ~products
        self.couple(left[known], right[known])
        result = np.where(both & slots[0], right, result)
        open_pairs = both & ~slots[0] & ~slots[1]
        result = self._combined(result, open_pairs & mixes[0] & mixes[1], left, right, MIX)
        result = self._combined(result, open_pairs & mixes[0] & ~mixes[1], right, left, LED)
        result = self._combined(result, open_pairs & ~mixes[0] & mixes[1], left, right, LED)
        return self._combined(result, open_pairs & ~mixes[0] & ~mixes[1], left, right, SUM)

    def lead(self, left: Ints, right: Ints) -> Ints:
        """`left` under the influence of `right`."""
        kind = self.kind
        influenced = (left != right) & (left > 0) & (right > 0) & (kind[right] != SLOT)
        return self._combined(np.where(left == 0, right, left), influenced, left, right, LED)

    def multiply(self, rows: Ints, columns: Ints) -> Ints:
        """Elements of matrices with a signal per row and one per column."""
        both = (rows > 0) & (columns > 0)
        return self._combined(np.where(rows == 0, columns, rows), both, rows, columns, PRODUCT)

    def _combined(self, result: Ints, where: NDArray[np.bool_], left: Ints, right: Ints, kind: int) -> Ints:
        if not where.any():
            return result
        pairs, inverse = _distinct(left[where], right[where])
        new = self._new(pairs[0], kind, pairs[1])
        if kind in (SUM, LED):
            self.couple(new, pairs[0])
        if kind == SUM:
            self.couple(new, pairs[1])
        result = result.copy()
        result[where] = new[inverse]
        return result

    # Combinations of many

    def gathered(self, rows: Ints) -> tuple[Ints, bool]:
        """One signal per row of a matrix of signals, zeros ignored; and whether all are more than mixes.

        Where all rows are alike (a mean over all channels) that is a mix. Different rows (a sum over branches) are
        what remains of an axis: members of a row can only leave together, so they are coupled and the row is a sum.
        """
        if not rows.size:
            return np.zeros(len(rows), np.int64), True
        unique, inverse = np.unique(rows, axis=0, return_inverse=True)
        first, last = np.where(unique > 0, unique, np.iinfo(np.int64).max).min(1), unique.max(1)
        result = np.where((first == last) | (last == 0), last, -1)
        several, clear = len(unique) > 1, True
        for row in np.flatnonzero(result < 0):
            members = np.unique(unique[row][unique[row] > 0])
            groups = self.groups(members)
            together = several or bool((groups == groups[0]).all())
            known = self._new(np.zeros(1, np.int64), SUM if together and (self.plain(members) > 0).any() else MIX)
            self.members[int(known[0])] = members
            if together:
                self.couple(np.repeat(known, len(members)), self.plain(members))
            clear = clear and together
            result[row] = known[0]
        return result[inverse.reshape(-1)], clear

    def mixed(self, ids: Ints) -> int:
        """One mix of all these signals; 0 when there are none."""
        members = np.unique(ids[ids > 0])
        if not len(members):
            return 0
        new = int(self._new(np.zeros(1, np.int64), MIX)[0])
        self.members[new] = members
        return new

    def first_units(self) -> Ints:
        """For every signal the smallest unit it is coupled with, 0 where there is none."""
        groups = self.groups(np.arange(self._kind.size))
        none = np.iinfo(np.int64).max
        best = np.full(len(groups), none, np.int64)
        own = np.flatnonzero(self.kind == UNIT)
        np.minimum.at(best, groups[own], own)
        found = best[groups]
        return np.where(found == none, 0, found)


def _distinct(left: Ints, right: Ints) -> tuple[Ints, Ints]:
    """The different pairs, as two rows, and which of them each pair is."""
    keys, inverse = np.unique((left << 32) | right, return_inverse=True)
    return np.stack([keys >> 32, keys & 0xFFFFFFFF]), inverse.reshape(-1)


def numbers(tensor: Tensor) -> Ints:
    """Signals of a tensor as a flat array."""
    return tensor.reshape(-1).to(torch.int64).numpy()


def filled(values: Ints, shape: Sequence[int]) -> Tensor:
    """Signals as a tensor."""
    return torch.from_numpy(values.astype(np.float64)).reshape(tuple(shape))
