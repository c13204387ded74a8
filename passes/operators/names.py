"""Operators of graph nodes by name, and which of them only move elements."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

__all__ = [
    "CASTS", "MOVING_FUNCTIONS", "MOVING_METHODS", "changes_in_place", "describe", "is_moving", "operator_name",
    "short_name", "writes_in_place",
]  # fmt: skip

_COPIES = frozenset({"to", "type_as", "float", "double", "contiguous", "clone", "detach", "type"})
# Methods that hand on all elements in their places; their type and device may change.
CASTS = _COPIES | {"half", "bfloat16", "cpu", "cuda"}
_SUMS = {"sum", "cumsum", "nansum", torch.sum, torch.cumsum, F.fold}

_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
}
_IN_PLACE_FUNCTIONS = {operator.setitem, *(vars(operator)[name.strip("_")] for name in _IN_PLACE_OPERATORS)}

MOVING_METHODS: dict[str, Callable[..., Any]] = {
    name: getattr(Tensor, name)
    for name in (
        "reshape", "reshape_as", "permute", "transpose", "transpose_", "swapaxes", "swapdims", "movedim",
        "moveaxis", "flatten", "unflatten", "squeeze", "squeeze_", "unsqueeze", "unsqueeze_", "expand", "expand_as",
        "repeat", "tile", "repeat_interleave", "chunk", "split", "split_with_sizes", "tensor_split", "unbind",
        "index_select", "select", "narrow", "roll", "flip", "fliplr", "flipud", "rot90", "unfold", "gather",
        "masked_select", "take", "take_along_dim", "broadcast_to", "diagonal", "t", "adjoint", "tril", "triu",
        "sum", "cumsum", "nansum", "ravel", "diag_embed",
    )
}  # fmt: skip
MOVING_METHODS["view"] = Tensor.reshape
MOVING_METHODS["view_as"] = Tensor.reshape_as

MOVING_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    torch.reshape, torch.permute, torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim, torch.moveaxis,
    torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.tile, torch.chunk, torch.split,
    torch.functional.split,
    torch.tensor_split, torch.unbind, torch.index_select, torch.select, torch.narrow, torch.roll,
    torch.flip, torch.fliplr, torch.flipud, torch.rot90, torch.gather, torch.take, torch.take_along_dim,
    torch.broadcast_to, torch.diagonal, torch.t, torch.sum, torch.cumsum, torch.tril, torch.triu, torch.adjoint,
    torch.ravel, torch.channel_shuffle, torch.pixel_shuffle, torch.pixel_unshuffle, F.unfold, F.fold, F.pixel_shuffle,
    F.pixel_unshuffle, F.channel_shuffle, torch.repeat_interleave, torch.masked_select, torch.diag_embed,
)  # fmt: skip


def operator_name(target: Any) -> Any:
    """The key of a function in the table: itself, or the dotted name of an operator that a library registered."""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return str(target) if isinstance(target, torch._ops.OpOverloadPacket) else target


def short_name(node: fx.Node) -> str:
    """The name of a node's function or method, without its module."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def describe(node: fx.Node) -> str:
    """Operator, node and source line, for messages."""
    source = node.meta.get("source")
    return f"`{short_name(node)}` (node `{node.name}`{f', {source}' if source else ''})"


def is_moving(operation: str, target: Any) -> bool:
    """Whether an operator only moves elements or changes their type."""
    if operation == "call_method":
        return target in _COPIES or (target in MOVING_METHODS and target not in _SUMS)
    return target is operator.getitem or (target in MOVING_FUNCTIONS and target not in _SUMS)


def changes_in_place(name: str) -> bool:
    """Whether a tensor method of this name writes into its first argument."""
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node changes a tensor that was there before."""
    if node.op == "call_function":
        return node.target in _IN_PLACE_FUNCTIONS
    return node.op == "call_method" and changes_in_place(str(node.target))
