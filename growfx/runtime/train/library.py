"""The C++ library of training kernels, and what tracers are told of its operators."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from growfx.runtime import kernel_build
from growfx.runtime.kernel_build import Library

__all__ = ["TRAINING", "training_status"]

_FOLDER = Path(__file__).parent
_SOURCES = ("autograd.cpp", "products.cpp", "operators.cpp")
_HEADERS = (
    *("entries.h", "geometry.h", "layout.h", "norm.h", "norm_operators.h", "operators.h", "panels.h", "pool.h"),
    *("product.h", "products.h"),
)
TRAINING = Library(
    "growfx_training",
    tuple(_FOLDER / name for name in _SOURCES),
    (*(_FOLDER / name for name in _HEADERS), _FOLDER.parent / "sparse_vectors.h"),
)


def training_status() -> str:
    """Load the training kernels: "" when they are there, else the reason why not (see `kernel_status`)."""
    reason = kernel_build.kernel_status(TRAINING)
    if not reason:
        _register()
    return reason


@functools.cache
def _register() -> None:
    fakes = {
        "batch_inner": lambda x: _inner(x, x.shape),
        "batch_outer": lambda x, dtype: x.new_empty(x.shape, dtype=dtype),
        "gather_entries": lambda weight, index: weight.new_empty(index.shape),
        "scatter_entries": lambda values, index, sizes, strides: values.new_empty_strided(sizes, strides),
        "sparse_product": _product,
        "sparse_product_backward": _product_backward,
        "norm": _norm,
        "norm_backward": _norm_backward,
        "max_pool": _max_pool,
        "max_pool_backward": lambda grad, which, in_sizes, *_: _inner(grad, in_sizes),
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"growfx::{name}", fake)


def padded_plane(values: int) -> int:
    """Values from one channel's plane to the next, as `layout.h` lays them out."""
    line = 16
    if values % (8 * line):
        return values
    lines = values // line
    return values + line * (1 if lines < 64 else 9 - lines % 16)


def _inner(like: Tensor, sizes: Any) -> Tensor:
    strides, size = [1] * len(sizes), sizes[0]
    for axis in range(len(sizes) - 1, 1, -1):
        strides[axis] = size
        size *= sizes[axis]
    strides[1] = padded_plane(size)
    return like.new_empty_strided(sizes, strides, dtype=torch.float32)


def _product(x: Tensor, values: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    out_sizes = args[9]  # after five tables and four sizes of the geometry
    return _inner(x, out_sizes)


def _product_backward(grad: Tensor, x: Tensor, values: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _inner(x, x.shape), torch.empty_like(values), values.new_empty(grad.shape[1])


def _norm(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _inner(x, x.shape), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _norm_backward(grad: Tensor, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels = x.shape[1]
    return _inner(x, x.shape), x.new_empty(channels), x.new_empty(channels), _inner(x, x.shape)


def _max_pool(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    height, width = args[-1]
    out = _inner(x, (x.shape[0], x.shape[1], height, width))
    return out, x.new_empty((x.shape[1], height * width * x.shape[0]), dtype=torch.uint8)
