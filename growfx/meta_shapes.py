"""Shapes of results on the meta device, for what torch itself computes slowly there (in Python, step by step)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["function_shapes", "module_shapes"]

_SHAPE_KEEPING = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def module_shapes(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """What ``module(*args)`` gives, as empty meta tensors; None where torch's own way is no slower."""
    if len(args) != 1 or not isinstance(args[0], Tensor):
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
    """What ``function(*args)`` gives, as an empty meta tensor; None where torch's own way is no slower."""
    if function is F.grid_sample and len(args) > 1 and args[0].is_meta:
        image, grid = args[:2]
        return image.new_empty(*image.shape[:2], *grid.shape[1:-1])
    return None
