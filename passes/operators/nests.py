"""Nests: arguments and results of operators, in tuples, lists, dicts and slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["Leaf", "leaves", "map_leaves"]


class Leaf:
    """An element of a nest that is not looked into, though it may be a dataclass."""

    __slots__ = ()


def map_leaves(function: Callable[[Any], Any], nest: Any) -> Any:
    """Apply `function` to every element of a nest of tuples, lists, dicts and slices, keeping their classes."""
    if isinstance(nest, tuple):
        items = [map_leaves(function, item) for item in nest]
        if hasattr(nest, "_fields"):
            return type(nest)(*items)
        return torch.Size(items) if isinstance(nest, torch.Size) else tuple(items)
    if isinstance(nest, list):
        return [map_leaves(function, item) for item in nest]
    if isinstance(nest, dict):
        copy = {key: map_leaves(function, item) for key, item in nest.items()}
        return copy if type(nest) is dict else type(nest)(copy)
    if isinstance(nest, slice):
        return slice(*(map_leaves(function, item) for item in (nest.start, nest.stop, nest.step)))
    return function(nest)


def leaves(nest: Any) -> Iterator[Any]:
    """The elements of a nest, also of objects that hold values as attributes (model outputs)."""
    if isinstance(nest, (tuple, list)):
        for item in nest:
            yield from leaves(item)
    elif isinstance(nest, dict):
        for item in nest.values():
            yield from leaves(item)
    elif isinstance(nest, slice):
        yield from (nest.start, nest.stop, nest.step)
    elif hasattr(nest, "__dataclass_fields__") and not isinstance(nest, (Leaf, type)):
        for name in nest.__dataclass_fields__:
            yield from leaves(getattr(nest, name, None))
    else:
        yield nest
