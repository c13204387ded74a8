"""The active entries of a masked layer, as the kernels walk through them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from growfx.runtime.train.flow import is_inner

__all__ = ["LIMIT", "Entries", "Geometry", "geometry_of", "product"]

# Of what a tile reads: per channel and tap, and of a block at least and at most, around the size of a first cache.
_TILE_BYTES, _BLOCK_BYTES = 512, (24576, 57344)
# Entries of an output channel that a block should have, and must have to be worth it; rows and columns of images whose
# borders, where tiles are small, do not count.
_BLOCK_ENTRIES, _LEAST_ENTRIES, _WIDE = 18.0, 14.0, 8
# Offsets are 32-bit.
LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Geometry:
    """What a layer does besides its weights, for each axis of its images; a linear layer has none.

    Attributes:
        kernel, stride, dilation: sizes.
        front, back: zeros added before and after the images.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    front: tuple[int, ...]
    back: tuple[int, ...]

    def out_size(self, size: tuple[int, ...]) -> list[int]:
        """Sizes of the output for images of `size`; below 1 where the kernel does not fit."""
        axes = zip(size, self.kernel, self.stride, self.dilation, self.front, self.back, strict=True)
        return [(n + p + q - d * (k - 1) - 1) // s + 1 for n, k, s, d, p, q in axes]

    def is_wide(self, out_size: list[int]) -> bool:
        """Whether most places of an output of `out_size` are away from its borders, or there are none."""
        return all(k == 1 for k in self.kernel) or min(out_size) >= _WIDE


def geometry_of(layer: nn.Module) -> Geometry | str:
    """The geometry of a convolution or linear layer, or why no sparse kernel computes it."""
    if isinstance(layer, nn.Linear):
        return Geometry((), (), (), (), ())
    if not isinstance(layer, _ConvNd) or layer.transposed:
        return f"there is no sparse kernel for `{type(layer).__name__}`"
    if layer.groups != 1:
        return f"it has {layer.groups} groups"
    if layer.padding_mode != "zeros":
        return f"its padding is `{layer.padding_mode}`"
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        front = tuple(n // 2 for n in total)
        return Geometry(kernel, stride, dilation, front, tuple(n - p for n, p in zip(total, front, strict=True)))
    padding = (0,) * len(kernel) if layer.padding == "valid" else tuple(int(p) for p in layer.padding)
    return Geometry(kernel, stride, dilation, padding, padding)


@dataclass(frozen=True)
class Entries:
    """The entries of a mask, in the orders that `entries.h` gives; all int32.

    Attributes:
        index: (nnz), where each entry lies in the weight's memory.
        start, channel: (O * taps + 1) and (nnz), entries by output channel, tap, input channel.
        back_start, back_channel, back_order: (I * taps + 1) and (nnz) twice, entries by input channel.
        shape, strides: of the weight, and of the memory and mask they were made for.
        of_values: whether `index` is into the values of present edges (`growfx.masked.present`), not into the weight.
        wide: whether they are for images so large that blocks of channels are worth it.
    """

    index: Tensor
    start: Tensor
    channel: Tensor
    back_start: Tensor
    back_channel: Tensor
    back_order: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    wide: bool
    of_values: bool = False

    @classmethod
    def of(cls, mask: Tensor, strides: tuple[int, ...], geometry: Geometry, out_size: list[int]) -> Entries:
        """The entries of `mask` for a weight with these strides and outputs of `out_size`; a pass over the mask."""
        wide = geometry.is_wide(out_size)
        blocks = _blocks(mask) if wide else [max(size, 1) for size in mask.shape[1::-1]]
        found = torch.ops.growfx.index_mask(mask, strides, geometry.stride, geometry.dilation, blocks)
        start, channel, index, back_start, back_channel, back_order = found
        return cls(index, start, channel, back_start, back_channel, back_order, tuple(mask.shape), strides, wide)

    @classmethod
    def of_present(cls, mask: Tensor, geometry: Geometry, out_size: list[int]) -> Entries:
        """The entries of `mask` for the values of present edges, in the order of the mask."""
        whole = mask.contiguous()
        found = cls.of(whole, whole.stride(), geometry, out_size)
        places = whole.view(-1).cumsum(0, dtype=torch.int32)
        return replace(found, index=places[found.index].sub_(1), of_values=True)

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.index.numel()

    def are_of(self, mask: Tensor, strides: tuple[int, ...], *, wide: bool) -> bool:
        """Whether these are the entries of the current `mask`, whoever wrote to it; reads the mask once."""
        if self.of_values or self.strides != strides or self.wide != wide:
            return False
        if mask.stride() != strides:
            mask = torch.empty_strided(mask.shape, strides, dtype=mask.dtype).copy_(mask)
        return torch.ops.growfx.has_entries(mask, self.index)


def _blocks(mask: Tensor) -> list[int]:
    """How many input channels, and output channels, are worked on at a time.

    What a tile of outputs reads of them stays in the first cache then, or nearly, at the price of reading and writing
    the tile once for each block: worth it where a block has many entries of each output channel.
    """
    outputs, inputs = mask.shape[:2]
    entries = float(torch.count_nonzero(mask)) / max(outputs * inputs, 1)  # of a channel
    bytes_read = _TILE_BYTES * mask[0, 0].numel() if mask.numel() else 1
    least, most = (max(1, round(size / bytes_read)) for size in _BLOCK_BYTES)
    if entries * most < _LEAST_ENTRIES:
        return [max(inputs, 1), max(outputs, 1)]
    channels = min(max(least, math.ceil(_BLOCK_ENTRIES / entries)), most)
    return [min(channels, inputs), min(channels, outputs)]


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    entries: Entries,
    geometry: Geometry,
    out_size: list[int],
    *,
    inner: bool = False,
) -> Tensor:
    """A layer's output over its entries alone, differentiable.

    Args:
        x: (N, I, ...) of a convolution, (..., I) of a linear layer; float32 or bfloat16, as the output will be.
        weight: the whole parameter, or the values of present edges where the entries are of these; float32. Read, and
            given a gradient, at the entries.
        bias: (O), float32.
        entries, geometry: of the layer.
        out_size: sizes of the output's images.
        inner: leave the output with the batch innermost in memory (float32).
    """
    rows = x if geometry.kernel else x.reshape(-1, x.shape[-1])
    tables = (entries.start, entries.channel, entries.back_start, entries.back_channel, entries.back_order)
    steps = (geometry.stride, geometry.front, geometry.dilation)
    ops = torch.ops.growfx
    if entries.of_values:
        source = rows if is_inner(rows) and rows.dtype == torch.float32 else ops.batch_inner(rows)
        sizes = [rows.shape[0], entries.shape[0], *out_size]
        out: Tensor = ops.sparse_product(
            source, ops.gather_entries(weight, entries.index), bias, *tables, entries.shape[2:], *steps, sizes
        )
        out = out if inner else ops.batch_outer(out, x.dtype)
    else:
        out = ops.sparse_layer(rows, weight, bias, entries.index, *tables, *steps, out_size, inner)
    return out if geometry.kernel else out.view(*x.shape[:-1], out.shape[-1])
