"""Which tensors of a run are parts of which others, so that a write into a part can be carried back to the whole."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

__all__ = ["Parts"]

# Views that hold all elements of a tensor in their order.
_RESHAPES = {"flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view", "view_as"}


class Parts:
    """The views made in a run by indexing and reshaping."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], Tensor | weakref.ref[Tensor], Any]] = {}

    def note(self, name: str, args: tuple[Any, ...], part: Tensor) -> None:
        """Remember that the tensor method `name` made `part`, a view, of ``args[0]``."""
        if name != "__getitem__" and name not in _RESHAPES:
            return
        key, index = id(part), args[1] if name == "__getitem__" else None
        # A part of a part keeps it; the tensor that owns the memory need not live on for a write nobody would see.
        whole = args[0] if id(args[0]) in self._found else weakref.ref(args[0])
        self._found[key] = weakref.ref(part, lambda _: self._found.pop(key, None)), whole, index

    def whole_of(self, part: Tensor) -> tuple[Tensor, Any] | None:
        """The tensor that `part` was taken from, and the index; None as index where it was only reshaped."""
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
