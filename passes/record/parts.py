"""Which tensors of a run are parts of which others, so that a write into a part can be carried back to the whole."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["MovedAxes", "Parts", "are_apart"]

# Views that hold all elements of a tensor in their order.
_RESHAPES = {"flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view", "view_as"}


_EXCHANGES = {"swapaxes", "swapdims", "transpose"}


@dataclass(frozen=True)
class MovedAxes:
    """How a view with its axes in another order is put back: a tensor method and its arguments."""

    method: str
    args: tuple[Any, ...]


def _index(name: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The index that takes what `select` and `narrow` take; None for others, or for unusual arguments."""
    if name not in ("select", "narrow") or not all(isinstance(arg, int) for arg in args[1:]):
        return None
    before = (slice(None),) * (int(args[1]) % args[0].ndim)
    if name == "select" and len(args) == 3:
        return *before, args[2]
    return (*before, slice(args[2], args[2] + args[3])) if len(args) == 4 and args[2] >= 0 else None


def _moved_back(name: str, dims: tuple[Any, ...]) -> MovedAxes | None:
    """What undoes a change of the order of axes; None where `name` does not change it, or its arguments are unusual."""
    if (name in _EXCHANGES and len(dims) == 2) or name == "t":
        return MovedAxes(name, dims)
    if name == "permute" and dims:
        order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
        order = [dim % len(order) for dim in order]
        return MovedAxes("permute", tuple(map(order.index, range(len(order)))))
    if name in ("movedim", "moveaxis") and len(dims) == 2:
        return MovedAxes(name, dims[::-1])
    return None


def are_apart(one: Tensor, other: Tensor) -> bool:
    """Whether two views of a tensor have no element in common; False where that would be long to find out."""
    with torch._C.DisableTorchFunction():
        if one.numel() == 0 or other.numel() == 0:
            return True
        (first, last), (low, high) = _extent(one), _extent(other)
        if last < low or high < first:
            return True
        if max(last, high) > _LONGEST:
            return False
        seen = torch.zeros(max(last, high) + 1, dtype=torch.bool, device="cpu")
        _places(seen, one).fill_(True)
        return not bool(_places(seen, other).any())


_LONGEST = 2**24  # elements of a tensor whose parts are compared


def _extent(view: Tensor) -> tuple[int, int]:
    """The first and the last place of a view's elements in its storage; strides of tensors are never negative."""
    first = int(view.storage_offset())
    return first, first + sum((n - 1) * int(step) for n, step in zip(view.shape, view.stride(), strict=True))


def _places(storage: Tensor, view: Tensor) -> Tensor:
    return storage.as_strided(tuple(view.shape), view.stride(), view.storage_offset())


class Parts:
    """The views made in a run by indexing, reshaping and moving axes."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], Tensor | weakref.ref[Tensor], Any]] = {}

    def note(self, name: str, args: tuple[Any, ...], part: Tensor) -> None:
        """Remember that the tensor method `name` made `part`, a view, of ``args[0]``."""
        index = args[1] if name == "__getitem__" else _index(name, args) or _moved_back(name, args[1:])
        if index is None and name != "__getitem__" and name not in _RESHAPES:
            return
        key = id(part)
        # A part of a part keeps it; the tensor that owns the memory need not live on for a write nobody would see.
        whole = args[0] if id(args[0]) in self._found else weakref.ref(args[0])
        self._found[key] = weakref.ref(part, lambda _: self._found.pop(key, None)), whole, index

    def whole_of(self, part: Tensor) -> tuple[Tensor, Any] | None:
        """The tensor that `part` was taken from, and the index, or how its axes were moved; None: only reshaped."""
        found = self._found.get(id(part))
        if found is None or found[0]() is not part:
            return None
        whole = found[1]() if isinstance(found[1], weakref.ref) else found[1]
        return None if whole is None else (whole, found[2])

    def chain(self, part: Tensor) -> list[Tensor]:
        """`part`, what it was taken from, what that was taken from, and so on."""
        seen = [part]
        while (link := self.whole_of(seen[-1])) is not None:
            seen.append(link[0])
        return seen
