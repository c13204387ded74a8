"""Where data decides what is looked at next: paths end there, as a detector's do at its raw head outputs.

The path graph's values are sums of path products, so a selection by them (top-k, non-maximum suppression, indexing by
a comparison) would take something else than the network does. Instead the values selected from and selected by become
outputs, and the selection's result is carried on as a placeholder of the shape it had in the recording.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from growfx.passes.operators.constants import execute
from growfx.passes.operators.names import operator_name
from growfx.passes.operators.nests import leaves, map_leaves
from growfx.passes.path_products.values import ComparedValue, Ended, PathValue

__all__ = ["ended_by", "is_selection", "placeholder", "without_ends"]

# What these return is chosen by the values they are given.
_SELECTIONS: frozenset[Any] = frozenset(
    {
        *("topk", "sort", "msort", "kthvalue", "nonzero", "unique", "unique_consecutive", "mode"),
        *("multinomial", "bincount", "histc"),
        *(torch.topk, torch.sort, torch.msort, torch.kthvalue, torch.nonzero, torch.argwhere),
        *(torch.unique, torch.unique_consecutive, torch.functional.unique, torch.functional.unique_consecutive),
        *(torch.mode, torch.multinomial, torch.bincount, torch.searchsorted, torch.bucketize, torch.histc),
        "torchvision.nms",
    }
)
# These take parts of their first argument, named by the others.
_BY_INDEX: frozenset[Any] = frozenset(
    {
        *("__getitem__", "gather", "index_select", "masked_select", "take", "take_along_dim", "repeat_interleave"),
        *(operator.getitem, torch.gather, torch.index_select, torch.masked_select, torch.take),
        *(torch.take_along_dim, torch.repeat_interleave),
    }
)
_WHERE = (torch.where, torch.Tensor.where)


def ended_by(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[PathValue]:
    """The path values that a selection takes from or decides by: paths end there.

    A comparison decides where it is the index, not where a part of it is taken.
    """
    ends: list[PathValue] = []
    parts = operator_name(node.target) in _BY_INDEX
    for item in leaves((args[1:] if parts and args and isinstance(args[0], ComparedValue) else args, kwargs)):
        found = item.sources if isinstance(item, ComparedValue) else (item,)
        ends += [value for value in found if isinstance(value, PathValue)]
    return ends


def is_selection(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the node selects by data."""
    if node.op not in ("call_function", "call_method"):
        return False
    target = operator_name(node.target)
    if target in _BY_INDEX:
        return _from_data(args[1:], kwargs)
    if target in _WHERE:
        return len(args) + len(kwargs) == 1 and _from_data(args, kwargs)
    return target in _SELECTIONS and _from_data(args, kwargs)


def _from_data(*nests: Any) -> bool:
    return any(isinstance(item, (PathValue, ComparedValue, Ended)) for item in leaves(nests))


def placeholder(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype) -> Any:
    """What stands for the node's result when its arguments, or what is selected from them, have no known values.

    Its shapes follow from those of the arguments where they can; where they depend on data they are as recorded.
    """
    try:
        with torch.no_grad():
            result = execute(node, _without_values(args, dtype), _without_values(kwargs, dtype))
    except Exception:  # it depends on values, or on a tuple that stands for nothing
        shape = node.meta.get("shape")
        return Ended(None if shape is None else torch.empty(shape, dtype=dtype, device="meta"))
    return map_leaves(lambda item: Ended(item) if isinstance(item, Tensor) else item, result)


def _without_values(nest: Any, dtype: torch.dtype) -> Any:
    """The nest with tensors on the meta device, path values in the network's own dtype."""

    def stripped(item: Any) -> Any:
        if isinstance(item, torch.device):
            return torch.device("meta")
        if isinstance(item, PathValue):
            return torch.empty_like(item.tensor, dtype=dtype, device="meta", requires_grad=False)
        tensor = getattr(item, "tensor", item)
        if tensor is None and isinstance(item, Ended):
            raise ValueError("a tuple of unknown results")
        return tensor.to("meta") if isinstance(tensor, Tensor) else item

    return map_leaves(stripped, nest)


def without_ends(nest: Any, device: torch.device) -> Any:
    """The nest with constants: compared values unchanged, and ones in place of what data selected, of unknown size."""

    def constant(item: Any) -> Any:
        if isinstance(item, ComparedValue):
            return item.tensor
        if not isinstance(item, Ended) or item.tensor is None:
            return item
        return torch.ones((), device=device).expand(item.tensor.shape)

    return map_leaves(constant, nest)
