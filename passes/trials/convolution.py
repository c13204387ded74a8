"""Convolutions in float64 that take a bounded amount of memory.

Where no library has a kernel for float64 they are computed as products with columns, into which every window of the
input is copied: for 96 channels of 96 x 96 x 96 places and a kernel of 3 x 3 x 3, 18 GB for each row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_large", "piecewise"]

# Elements of the columns that are made at once.
_MOST = 1 << 23


def is_large(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operator is a convolution in float64 whose columns have too many elements."""
    if func is not torch.ops.aten.convolution.default or len(args) < 9:
        return False
    x = args[0]
    return x.dtype == torch.float64 and x.device.type == "cpu" and len(x) * _columns(args) > _MOST


def piecewise(func: Any, args: tuple[Any, ...]) -> Tensor:
    """The same convolution, a few rows and channels at a time; the order of the sums is the same at every place.

    Args:
        func: ``torch.ops.aten.convolution.default``.
        args: all that it takes: x (rows, channels, *places), weight, bias or None, and its options.
    """
    x, *others = args
    columns = _columns(args)
    rows = x.split(max(1, _MOST // columns))
    if columns <= _MOST or args[8] > 1:
        return torch.cat([func(part, *others) for part in rows])
    pieces = math.ceil(columns / _MOST)
    one = _by_outputs if args[6] else _by_inputs
    return torch.cat([one(func, (part, *others), pieces) for part in rows])


def _columns(args: tuple[Any, ...]) -> int:
    """Elements of the columns of one row: a window per place of the output, of the input where it is transposed."""
    x, weight, _, stride, padding, dilation, transposed = args[:7]
    places = x.shape[2:]
    if not transposed:
        axes = zip(places, weight.shape[2:], *(_each(v, len(places)) for v in (stride, padding, dilation)), strict=True)
        places = [(size + 2 * pad - far * (kernel - 1) - 1) // step + 1 for size, kernel, step, pad, far in axes]
    return weight[0].numel() * math.prod(places)


def _each(option: list[int], axes: int) -> list[int]:
    return option if len(option) == axes else [*option] * axes


def _by_inputs(func: Any, args: tuple[Any, ...], pieces: int) -> Tensor:
    x, weight, bias, *options = args
    result: Tensor | None = None
    for some, part in zip(x.chunk(pieces, 1), weight.chunk(pieces, 1), strict=True):
        result = func(some, part, bias, *options) if result is None else result.add_(func(some, part, None, *options))
    assert result is not None
    return result


def _by_outputs(func: Any, args: tuple[Any, ...], pieces: int) -> Tensor:
    x, weight, bias, *options = args
    parts = weight.chunk(pieces, 1)
    biases = [None] * len(parts) if bias is None else bias.chunk(pieces)
    return torch.cat([func(x, part, own, *options) for part, own in zip(parts, biases, strict=True)], 1)
