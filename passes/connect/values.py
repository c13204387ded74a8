"""The values that connectivity is found on, and how tensors of signals combine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from growfx.passes.connect.signals import (
    LED,
    MIX,
    PRODUCT,
    SLOT,
    Ints,
    Signals,
    filled,
    narrowed,
    numbers,
    tidy,
    varies,
)
from growfx.passes.operators.nests import leaves, map_leaves

__all__ = [
    "Ids",
    "Named",
    "Pairs",
    "Token",
    "Unknown",
    "WeightPart",
    "aligned",
    "combine",
    "contract",
    "known",
    "moved",
    "raw_ids",
    "real",
    "reduce",
    "slots_in",
    "whole",
]  # fmt: skip


# Plain classes: `leaves` looks into dataclasses, which models may return.


class Ids:
    """A value that descends from the input: the signal of every element, batch 1."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Named:
    """A parameter or buffer that is not a layer's weight, or what became of it: its values, and a slot per element.

    `ids` is None where the elements can no longer be told apart.
    """

    __slots__ = ("ids", "tensor")

    def __init__(self, tensor: Tensor, ids: Tensor | None) -> None:
        self.tensor, self.ids = tensor, ids


class Token(Named):
    """Integer data from an input: units begin where it is embedded."""

    __slots__ = ()

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor, None)


class WeightPart:
    """A layer's weight used directly: for every element its place in the layer's own weight.

    `counted`: it was transformed as a whole (standardised) on the way.
    """

    __slots__ = ("counted", "layer", "places")

    def __init__(self, layer: str, places: Tensor, counted: bool = False) -> None:
        self.layer, self.places, self.counted = layer, places, counted


class Unknown:
    """The result of a selection by data: nothing is known of it, not even its shape."""


def real(nest: Any) -> Any:
    """Constants as what they are, activations as their signals (for shapes)."""
    return map_leaves(lambda item: item.tensor if isinstance(item, (Ids, Named)) else item, nest)


def raw_ids(nest: Any) -> Any:
    """Activations and parameters as signals, other constants as what they are."""

    def as_signals(item: Any) -> Any:
        if isinstance(item, Named):
            return item.tensor if item.ids is None else item.ids
        return item.tensor if isinstance(item, Ids) else item

    return map_leaves(as_signals, nest)


def known(item: Any) -> Tensor | None:
    """The signals of a value, None for what has none."""
    if isinstance(item, Ids):
        return item.tensor
    return item.ids if isinstance(item, Named) else None


def slots_in(nest: Any) -> list[Tensor]:
    """The slots of all parameters in a nest."""
    return [item.ids for item in leaves(nest) if isinstance(item, Named) and item.ids is not None]


def moved(result: Any) -> Any:
    """Tensors of signals as values."""
    return map_leaves(lambda item: Ids(tidy(item)) if isinstance(item, Tensor) else item, result)


def _together(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the same number of axes."""
    axes = max(left.ndim, right.ndim)
    return tuple(side.reshape((1,) * (axes - side.ndim) + side.shape) for side in (left, right))  # type: ignore[return-value]


def _runs(tensor: Tensor, axis: int) -> Tensor:
    """Along one axis, where elements differ from those before."""
    size = tensor.shape[axis]
    changes = torch.ones(size, dtype=torch.bool, device="cpu")
    if varies(tensor, axis):
        later, before = (narrowed(tensor.narrow(axis, start, size - 1)) for start in (1, 0))
        changes[1:] = (later != before).movedim(axis, 0).reshape(size - 1, -1).any(1)
    elif size > 1:
        changes[1:] = False
    return changes


class Pairs:
    """What meets what under broadcasting, once for each run of equal slices: `left` and `right`, flat."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.shape = torch.broadcast_shapes(left.shape, right.shape)
        (left, right), self._places = _compacted((left, right), self.shape)
        self._small = torch.broadcast_shapes(left.shape, right.shape)
        self.left, self.right = (numbers(side.expand(self._small)) for side in (left, right))

    def restored(self, values: Ints) -> Tensor:
        """Results for the pairs in the shape of the whole."""
        return _restored(filled(values, self._small), self._places)


def _compacted(tensors: Sequence[Tensor], shape: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors with each run of equal slices once, and for every axis where the slices of the whole went."""
    places, sides = [], list(tensors)
    for axis, size in enumerate(shape):
        changes = torch.zeros(size, dtype=torch.bool, device="cpu")
        changes[:1] = True
        for side in sides:
            if side.shape[axis] > 1:
                changes |= _runs(side, axis)
        first = changes.nonzero().flatten()
        sides = [side if side.shape[axis] == 1 else narrowed_select(side, axis, first) for side in sides]
        places.append(changes.cumsum(0) - 1)
    return sides, places


def _restored(tensor: Tensor, places: list[Tensor]) -> Tensor:
    """The whole, from its slices and where they went; axes of one element are repeated."""
    for axis, where in enumerate(places):
        if tensor.shape[axis] == 1:
            tensor = tensor.expand(*tensor.shape[:axis], len(where), *tensor.shape[axis + 1 :])
        elif tensor.shape[axis] < len(where):
            tensor = tensor.index_select(axis, where)
    return tidy(tensor)


def narrowed_select(tensor: Tensor, axis: int, indices: Tensor) -> Tensor:
    """The slices at some indices, a view where one is enough."""
    return tensor.narrow(axis, 0, 1) if len(indices) == 1 else tensor.index_select(axis, indices)


def _spread(signals: Signals, one: Tensor, many: Tensor) -> bool:
    """Whether elements of `one` are repeated by broadcasting over units of `many` that are not one anyway."""
    for axis in range(one.ndim):
        if one.shape[axis] == 1 and varies(many, axis):
            small = narrowed(many)
            groups = filled(signals.groups(numbers(small)), small.shape)
            groups = torch.where(small == 0, groups.amax(axis, keepdim=True), groups)
            if varies(tidy(groups), axis):
                return True
    return False


def combine(signals: Signals, left: Tensor, right: Tensor) -> Tensor:
    """Signals of an elementwise operation of two values under broadcasting."""
    left, right = _together(left, right)
    over = _acts_whole(signals, left, right), _acts_whole(signals, right, left)
    pairs = Pairs(left, right)
    first, second = pairs.left, pairs.right
    if over == (False, False):
        result = signals.add(first, second)
    elif over == (True, True):
        mixes = signals.kind[first] == MIX, signals.kind[second] == MIX
        result = signals.multiply(np.where(mixes[0] | mixes[1], 0, first), second)
        result = signals.lead(
            np.where(mixes[1], first, result), np.where(mixes[1], second, np.where(mixes[0], first, 0))
        )
    else:
        one, many = (left, right) if over[0] else (right, left)
        result = signals.lead(*((second, first) if over[0] else (first, second)))
        _note_spread(signals, one, many)
    return pairs.restored(result)


def _acts_whole(signals: Signals, one: Tensor, many: Tensor) -> bool:
    """Whether elements of `one` act on several units each, without standing and falling with them.

    A parameter with an element per block of units, or per place in a block, is cut where they are: it is coupled.
    """
    if not _spread(signals, one, many):
        return False
    beside = any(varies(one, axis) and varies(many, axis) for axis in range(one.ndim))
    return not (beside and (_are_slots(signals, one) or _are_slots(signals, many)))


def _note_spread(signals: Signals, one: Tensor, many: Tensor) -> None:
    acting = numbers(narrowed(one))
    if not len(signals.leading(acting)):
        return
    signals.pin(acting, "it acts on several units at once")
    if any(varies(one, axis) and varies(many, axis) for axis in range(one.ndim)):
        signals.pin(numbers(narrowed(many)), "a factor that differs between blocks of units acts on them")


def aligned(signals: Signals, tensor: Tensor, axes: Sequence[int]) -> Tensor | None:
    """The tensor with one element along `axes`, zeros ignored; None where different units stand along them."""
    if not any(varies(tensor, axis) for axis in axes):
        for axis in axes:
            tensor = tensor.narrow(axis, 0, 1)
        return tensor
    rows, restore = _rows(tensor, axes)
    highest = rows.max(1, keepdims=True)
    if ((rows == 0) | (rows == highest)).all():
        return restore(highest[:, 0])
    groups = signals.groups(rows.reshape(-1)).reshape(rows.shape).copy()
    groups[rows == 0] = -1
    if ((groups < 0) | (groups == groups.max(1, keepdims=True))).all():
        return restore(signals.gathered(rows)[0])
    return None


def _rows(tensor: Tensor, axes: Sequence[int]) -> tuple[Ints, Callable[[Ints], Tensor]]:
    """Different elements along `axes` as rows; and how a result per row becomes a tensor with ones there."""
    (small,), places = _compacted([tensor], tensor.shape)
    inner = [axis % tensor.ndim for axis in axes]
    shape = [1 if axis in inner else size for axis, size in enumerate(small.shape)]
    outer = [axis for axis in range(tensor.ndim) if axis not in inner]
    rows = small.permute(*outer, *inner).reshape(int(np.prod([small.shape[axis] for axis in outer])), -1)
    places = [
        torch.zeros(1, dtype=torch.int64, device="cpu") if axis in inner else where for axis, where in enumerate(places)
    ]
    return rows.to(torch.int64).numpy(), lambda values: _restored(filled(values, shape), places)


def _expanded(small: Tensor, like: Sequence[int], axes: Sequence[int]) -> Tensor:
    """`small` in the shape of `like` with ones along `axes`."""
    inner = [axis % len(like) for axis in axes]
    return small.expand([1 if axis in inner else size for axis, size in enumerate(like)])


def reduce(signals: Signals, tensor: Tensor, axes: Sequence[int], reason: str | None) -> Tensor:
    """Signals after a statistic over `axes`, kept with size one; `reason`: units are counted by it."""
    parts = _parts(signals, tensor)
    if len(parts) == 2 and any(any(varies(part, axis) for axis in axes) for part in parts):
        left, right = (reduce(signals, part, axes, reason) for part in parts)
        return combine(signals, left, right)
    found = aligned(signals, tensor, axes)
    if found is None:
        rows, restore = _rows(tensor, axes)
        found = restore(signals.gathered(rows)[0])
        if reason is not None:
            signals.count(rows.reshape(-1), reason)
    return tidy(_expanded(found, tensor.shape, axes))


def _blended(signals: Signals, tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """One mix per row of elements along `axes`."""
    rows, restore = _rows(tensor, axes)
    unique, inverse = np.unique(rows, axis=0, return_inverse=True)
    mixes = np.array([signals.mixed(row) for row in unique], np.int64)
    return tidy(_expanded(restore(mixes[inverse.reshape(-1)]), tensor.shape, axes))


def _parts(signals: Signals, tensor: Tensor) -> list[Tensor]:
    """Row and column signals of a tensor of products, or the tensor itself."""
    small = narrowed(tensor)
    ids = numbers(small)
    if not (signals.kind[ids] == PRODUCT).any():
        plain = ids
        while (led := signals.kind[plain] == LED).any():
            plain = np.where(led, signals.left[plain], plain)
        if not (signals.kind[plain] == PRODUCT).any():
            return [tensor]
        ids = plain
    if not ((signals.kind[ids] == PRODUCT) | (ids == 0)).all():
        signals.pin(ids, "products of units are combined with others")
        return [tensor]
    return [tidy(filled(side[ids], small.shape).expand(tensor.shape)) for side in (signals.left, signals.right)]


def contract(signals: Signals, left: Tensor, right: Tensor, axes: Sequence[int]) -> Tensor:
    """Signals of the sum over `axes` of the product of two values that broadcast against each other.

    Units that meet along the contracted axes are coupled; a signal that is the same all along them passes.
    """
    shape = torch.broadcast_shapes(left.shape, right.shape)
    meeting: list[list[Tensor]] = [[], []]
    passing: list[Tensor] = []
    for side, tensor in enumerate((left, right)):
        parts = [_levelled(signals, part, axes) for part in _parts(signals, tensor)]
        changing = [part for part in parts if any(varies(part, axis) for axis in axes)]
        meeting[side] = changing
        rest = [part for part in parts if not any(part is other for other in changing)]
        rest = [tensor] if len(rest) == 2 else rest
        for part in rest:
            for axis in axes:
                part = part.narrow(axis, 0, 1) if part.shape[axis] else part
            passing.append(part)
    _note_product(signals, (left, right), shape)
    for one in meeting[0]:
        for other in meeting[1]:
            pairs = Pairs(one, other)
            signals.couple(pairs.left, pairs.right)
            signals.summed += [_rows(part, axes)[0] for part in (one, other)]
    for own, others in (meeting, reversed(meeting)):
        if own and not others:
            for part in own:
                signals.pin(numbers(narrowed(part)), "it is combined with others by weights computed from data")
    acting = [part for part in (*meeting[0], *meeting[1]) if not _are_slots(signals, part)]
    mixes = [_blended(signals, part, axes) for part in acting]
    result = (
        passing[0]
        if passing
        else mixes.pop()
        if mixes
        else torch.zeros((1,) * len(shape), dtype=torch.float64, device="cpu")
    )
    for part in passing[1:]:
        result = combine(signals, result, part)
    for part in mixes:
        pairs = Pairs(*_together(result, part))
        joined = signals.lead if passing else signals.add
        result = pairs.restored(joined(pairs.left, pairs.right))
    inner = [axis % len(shape) for axis in axes]
    return tidy(result.expand([1 if axis in inner else size for axis, size in enumerate(shape)]))


def _note_product(signals: Signals, sides: Sequence[Tensor], shape: Sequence[int]) -> None:
    """Note what a product costs; the units of the side that has most of them share it."""
    plain = [signals.plain(numbers(narrowed(side))) for side in sides]
    signals.products.append((float(np.prod(shape)), max(plain, key=lambda ids: len(np.unique(ids[ids > 0])))))


def _levelled(signals: Signals, tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """The tensor without differences along `axes` between signals that are one unit anyway."""
    found = aligned(signals, tensor, axes) if any(varies(tensor, axis) for axis in axes) else None
    return tensor if found is None else tidy(found.expand(tensor.shape))


def _are_slots(signals: Signals, tensor: Tensor) -> bool:
    return bool((signals.kind[numbers(narrowed(tensor))] == SLOT).all())


def whole(signals: Signals, values: Sequence[Tensor]) -> int:
    """One mix of everything in the values."""
    ids = [numbers(narrowed(value)) for value in values]
    return signals.mixed(np.concatenate(ids)) if ids else 0
