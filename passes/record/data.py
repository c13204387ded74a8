"""Where Python would have to know values: what stops a recording there, and sizes that depend on data."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from growfx.errors import TraceError

__all__ = ["DataDependentError", "DataSizes", "NeedsValuesError", "has_input"]

# How many rows their results have depends on values; `where` and indexing only in the forms that select by a mask.
_SIZED_BY_DATA = {
    "argwhere", "bincount", "masked_select", "nms", "nonzero", "unique", "unique_consecutive",
}  # fmt: skip


def has_input(node: fx.Node) -> bool:
    """Whether a value was computed from an input, and not from random numbers alone."""
    seen, waiting = set[fx.Node](), [node]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return True
        if node not in seen:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


class DataDependentError(BaseException):
    """Python took a value out of data inside `module`. A BaseException, so that the model's own code lets it pass."""

    def __init__(self, module: str, reason: str):
        super().__init__(module, reason)
        self.module, self.reason = module, reason


class RefusedInputsError(TraceError):
    """A model fails on the inputs that it is recorded on.

    Attributes:
        fact: what happened, without what to do: whoever chose the inputs knows that better.
    """

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(fact, advice)
        self.fact, self.advice = fact, advice

    def __str__(self) -> str:
        return f"{self.fact}. {self.advice}"


class NeedsValuesError(RuntimeError):
    """A recording on the meta device met a tensor whose values it would have to know."""


class DataSizes:
    """Tensors of a run whose shape depends on data."""

    def __init__(self) -> None:
        self._found: dict[int, weakref.ref[Tensor]] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        found = self._found.get(id(tensor))
        return found is not None and found() is tensor

    def note(self, name: str, given: tuple[Any, Any], value: Any, from_data: bool) -> None:
        """Remember the results of an operator whose shape depends on data.

        Args:
            name: of the operator.
            given: its arguments and keyword arguments.
            value: what it returned.
            from_data: whether it was given what was computed from the input.
        """
        args, kwargs = given
        if not self._found and name not in (*_SIZED_BY_DATA, "where", "repeat_interleave", "__getitem__"):
            return
        tensors = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Tensor)]
        selects = name in _SIZED_BY_DATA or (name == "where" and len(tensors) == len(args) + len(kwargs) == 1)
        if name == "repeat_interleave":
            selects = len(tensors) > 1 or len(args) + len(kwargs) == 1
        if name == "__getitem__":
            selects = any(v.dtype in (torch.bool, torch.uint8) for v in tensors[1:])
        selects = selects and from_data
        if selects or (self._found and any(tensor in self for tensor in tensors)):
            for item in pytree.tree_leaves(value):
                if isinstance(item, Tensor) and item.ndim:
                    self._found[id(item)] = weakref.ref(item)
