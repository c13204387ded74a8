"""Maxima over windows of contiguous images: rows first, then columns, each by whole-tensor maxima."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["max_pool2d"]

Pair = tuple[int, int]


def max_pool2d(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil_mode: bool) -> Tensor:
    """What `torch.nn.functional.max_pool2d` gives, bit for bit: (..., H, W) -> (..., H', W').

    torch's own compares one by one on a CPU unless channels come last. Without gradients.
    """
    if not x.is_contiguous() or not x.is_floating_point() or not x.numel() or not x.is_cpu:
        return F.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)
    for axis in (0, 1):
        x = _along(x, axis - 2, kernel_size[axis], stride[axis], padding[axis], dilation[axis], ceil_mode)
    return x


def _along(x: Tensor, dim: int, size: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> Tensor:
    """Maxima over windows along one axis."""
    length = x.shape[dim]
    count = (length + 2 * padding - dilation * (size - 1) - 1 + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= length + padding:
        count -= 1  # a window must begin inside the image or the padding before it
    # Of each place in a window: where the first output with a pixel there reads, which outputs those are.
    places: list[tuple[int, int, int]] = []
    for shift in range(-padding, dilation * size - padding, dilation):
        low, high = max(0, -(shift // stride)), min(count, (length - 1 - shift) // stride + 1)
        places += [(low * stride + shift, low, high)] if low < high else []
    whole = next((place for place in places if place[1:] == (0, count)), None)
    if whole is None:
        shape = list(x.shape)
        shape[dim] = count
        y = x.new_full(shape, -torch.inf)
    else:
        places.remove(whole)
        y = _taken(x, dim, whole[0], count, stride).contiguous()
        y = y.clone() if y.data_ptr() == x.data_ptr() else y
    for start, low, high in places:
        part = y.narrow(dim, low, high - low)
        torch.maximum(part, _taken(x, dim, start, high - low, stride), out=part)
    return y


def _taken(x: Tensor, dim: int, start: int, count: int, stride: int) -> Tensor:
    """Every `stride`-th entry along an axis, a view."""
    stop = start + (count - 1) * stride + 1
    return x[..., start:stop:stride] if dim == -1 else x[..., start:stop:stride, :]
