"""The operations of graph nodes: their names, their functions, and what they give without values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from growfx.passes.connect.values import Ids, Named
from growfx.passes.operators.nests import leaves

__all__ = ["has_meta", "of_shapes", "on_meta", "operation", "paired"]


def has_meta(nest: Any) -> bool:
    """Whether a constant is without values, so that nothing can be indexed by it."""
    constants = (item.tensor if isinstance(item, Named) else item for item in leaves(nest))
    return any(isinstance(item, Tensor) and item.is_meta for item in constants)


def operation(node: fx.Node) -> Callable[..., Any]:
    """The node's function or method; views are copied where repeated elements are stored once."""
    if node.op == "call_function":
        return node.target  # type: ignore[return-value]
    name = {"view": "reshape", "view_as": "reshape_as"}.get(str(node.target), str(node.target))
    return lambda value, *args, **kwargs: getattr(value, name)(*args, **kwargs)


def on_meta(op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operation on tensors without values."""
    with torch.no_grad():
        return op(*args, **kwargs)


def paired(result: Any, slots: Any) -> Any:
    """Values of constants with the slots of their elements, where these are known."""
    if isinstance(result, Tensor):
        fits = isinstance(slots, Ids) and slots.tensor.shape == result.shape
        return Named(result, slots.tensor if fits else None)
    if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
        matches = isinstance(slots, (tuple, list)) and len(slots) == len(result)
        parts = [paired(item, slots[i] if matches else None) for i, item in enumerate(result)]
        return (
            type(result)(parts) if isinstance(result, list) or not hasattr(result, "_fields") else type(result)(*parts)
        )
    return result


def of_shapes(shapes: Any, make: Callable[[torch.Size], Any]) -> Any:
    """The results of an operation from their shapes."""
    if isinstance(shapes, torch.Size):  # before tuples: it is one itself
        return make(shapes)
    if isinstance(shapes, dict):
        return type(shapes)((key, of_shapes(shape, make)) for key, shape in shapes.items())
    if isinstance(shapes, (tuple, list)):
        items = [of_shapes(shape, make) for shape in shapes]
        return type(shapes)(*items) if hasattr(shapes, "_fields") else type(shapes)(items)
    return shapes
