"""Functions that recorded graphs call where the recorded program did something a graph cannot say as it stands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

from growfx.errors import TraceError

__all__ = ["affine", "applied", "require_shape", "require_value", "set_item", "swap_grad_enabled"]


def set_item(base: Tensor, index: Any, value: Any) -> Tensor:
    """A copy of `base` with ``copy[index] = value``: the functional form of an assignment to a part of a tensor."""
    changed = base.clone()
    changed[index] = value
    return changed


def swap_grad_enabled(enabled: bool) -> bool:
    """Switch the recording of gradients and return what it was, for the matching switch back."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return before


@functools.cache
def applied(kind: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The application of an autograd function, under a name that generated code can have; the same for each kind."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    apply.__name__, apply.__qualname__, apply.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return apply


def affine(size: int, slope: float, offset: float) -> float:
    """``slope * size + offset``: a number that a model computed from its batch size."""
    return slope * size + offset


def require_shape(value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise `TraceError` unless a tensor has the shape that a graph was recorded for."""
    if tuple(value.shape) != shape:
        raise TraceError(
            f"the graph was recorded for an input of shape {shape} and holds for no other, got {tuple(value.shape)}; "
            "wrap the model with such an input, or call the net itself"
        )


@has_side_effect
def require_value(value: Any, expected: Any, read: str) -> None:
    """Raise `TraceError` unless a value that the model takes out of its data is the one that a graph was recorded with.

    Args:
        value: what the graph reads.
        expected: what the recording saw.
        read: the operator that reads it and the model's line.
    """
    if value != expected:
        raise TraceError(
            f"the graph was recorded where {read}, gave {expected!r}, and holds for no other value, got {value!r}; "
            "record it for these inputs (`net.graph_at`), or call the net itself"
        )
