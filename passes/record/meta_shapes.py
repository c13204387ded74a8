"""Shapes of results on the meta device, for what torch itself computes slowly there (in Python, step by step)."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["function_shapes", "module_shapes", "short_shapes"]

_SHAPE_KEEPING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def module_shapes(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """What ``module(*args)`` gives, as empty meta tensors; None where torch's own way is no slower."""
    if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].is_meta:
        return None
    if isinstance(module, _SHAPE_KEEPING):
        return torch.empty_like(args[0])
    return _recurrent(module, args[0]) if isinstance(module, nn.RNNBase) else None


def _recurrent(module: nn.RNNBase, sequence: Tensor) -> Any:
    """(outputs, last state), the state of an LSTM being a pair."""
    directions = 2 if module.bidirectional else 1
    width = getattr(module, "proj_size", 0) or module.hidden_size
    batch = () if sequence.ndim == 2 else (sequence.shape[0 if module.batch_first else 1],)
    state = sequence.new_empty(directions * module.num_layers, *batch, width)
    outputs = sequence.new_empty(*sequence.shape[:-1], directions * width)
    if isinstance(module, nn.LSTM):
        return outputs, (state, sequence.new_empty(*state.shape[:-1], module.hidden_size))
    return outputs, state


def function_shapes(function: Any, args: tuple[Any, ...]) -> Tensor | None:
    """What ``function(*args, ...)`` gives, as an empty meta tensor; None where torch's own way is no slower."""
    rule = _FUNCTIONS.get(function)
    if rule is None or not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
        return None
    return rule(*args)


def _sampled(image: Tensor, grid: Any = None, *_: Any) -> Tensor | None:
    if not isinstance(grid, Tensor):
        return None
    return image.new_empty(*image.shape[:2], *grid.shape[1:-1])


def _linear(value: Tensor, weight: Any = None, *_: Any) -> Tensor | None:
    # What does not fit is left to torch, which says so.
    if not isinstance(weight, Tensor) or weight.ndim != 2 or value.shape[-1] != weight.shape[1]:
        return None
    if value.dtype != weight.dtype or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return None
    return value.new_empty(*value.shape[:-1], weight.shape[0])


def _attention(query: Tensor, key: Any = None, value: Any = None, *_: Any) -> Tensor | None:
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        return None
    if not query.shape[:-2] == key.shape[:-2] == value.shape[:-2] or query.shape[-1] != key.shape[-1]:
        return None
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _layer_norm(value: Tensor, normalized_shape: Any = (), *_: Any) -> Tensor | None:
    shape = tuple(normalized_shape)
    return torch.empty_like(value) if shape and tuple(value.shape[-len(shape) :]) == shape else None


_FUNCTIONS: dict[Any, Callable[..., Tensor | None]] = {
    F.grid_sample: _sampled,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    F.scaled_dot_product_attention: _attention,
}


class _ShortFunctions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        value = function_shapes(func, args)
        return func(*args, **(kwargs or {})) if value is None else value


@contextmanager
def short_shapes() -> Generator[None]:
    """Any model's forward on the meta device by these shapes."""
    original = nn.Module.__call__

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        value = None if kwargs else module_shapes(module, args)
        return original(module, *args, **kwargs) if value is None else value

    nn.Module.__call__ = call
    try:
        with _ShortFunctions():
            yield
    finally:
        nn.Module.__call__ = original
