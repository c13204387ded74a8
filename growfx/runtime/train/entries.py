"""The active entries of a masked layer, as the kernels walk through them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from growfx.runtime.train.flow import is_inner
from growfx.runtime.train.rows import rows_are_inner

__all__ = ["LIMIT", "Entries", "Geometry", "geometry_of", "product"]

# Of what a tile reads: per channel and tap, and of a block at least and at most, around the size of a first cache.
_TILE_BYTES, _BLOCK_BYTES = 512, (24576, 57344)
# Entries of an output channel that a block should have, and must have to be worth it.
_BLOCK_ENTRIES, _LEAST_ENTRIES = 18.0, 14.0
# Of all weights: to look up one entry takes about as long as to compare ten values of a mask.
_MANY = 0.1
# Offsets are 32-bit.
LIMIT = 2**31 - 1


@dataclass(frozen=True)
class Geometry:
    """What a layer does besides its weights, for each axis of its images; a linear layer has none.

    Attributes:
        kernel, stride, dilation: sizes.
        front, back: zeros added before and after the images.
        groups: of channels; the entries alone know them.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    front: tuple[int, ...]
    back: tuple[int, ...]
    groups: int = 1

    def out_size(self, size: tuple[int, ...]) -> list[int]:
        """Sizes of the output for images of `size`; below 1 where the kernel does not fit."""
        axes = zip(size, self.kernel, self.stride, self.dilation, self.front, self.back, strict=True)
        return [(n + p + q - d * (k - 1) - 1) // s + 1 for n, k, s, d, p, q in axes]

    def taps_read(self, out_size: list[int]) -> int:
        """How many positions of the kernel lie within the image, on the mean of all places of an output; rounded."""
        return _taps_read(self, tuple(out_size))


@functools.lru_cache(maxsize=1024)
def _taps_read(geometry: Geometry, out_size: tuple[int, ...]) -> int:
    mean = 1.0
    for axis, places in enumerate(out_size):
        step, spread, front = geometry.stride[axis], geometry.dilation[axis], geometry.front[axis]
        reach = range(0, spread * geometry.kernel[axis], spread)
        size = (places - 1) * step + reach[-1] + 1 - front - geometry.back[axis]
        seen = sum(0 <= place * step - front + tap < size for place in range(places) for tap in reach)
        mean *= seen / places
    return max(1, round(mean))


def geometry_of(layer: nn.Module) -> Geometry | str:
    """The geometry of a convolution or linear layer, or why no sparse kernel computes it."""
    if isinstance(layer, nn.Linear):
        return Geometry((), (), (), (), ())
    if not isinstance(layer, _ConvNd) or layer.transposed:
        return f"there is no sparse kernel for `{type(layer).__name__}`"
    if layer.padding_mode != "zeros":
        return f"its padding is `{layer.padding_mode}`"
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if layer.padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        front = tuple(n // 2 for n in total)
        back = tuple(n - p for n, p in zip(total, front, strict=True))
        return Geometry(kernel, stride, dilation, front, back, layer.groups)
    padding = (0,) * len(kernel) if layer.padding == "valid" else tuple(int(p) for p in layer.padding)
    return Geometry(kernel, stride, dilation, padding, padding, layer.groups)


@dataclass(frozen=True)
class Entries:
    """The entries of a mask, in the orders that `entries.h` gives; tables are int32.

    Attributes:
        index: (nnz), where each entry lies in the weight's memory.
        start, source: (O * taps + 1) and (nnz), entries by output channel, and what each reads.
        back_start, back_source, back_order: (I * taps + 1) and (nnz) twice, the same by input channel.
        shape, strides: of the weight, and of the memory and mask they were made for.
        taps_read: of the images they are for; blocks of channels are made for it.
        of_values: whether `index` is into the values of present edges (`growfx.masked.present`), not into the weight.
        mask: a copy of the mask, where it is so dense that to compare all of it is faster than to look up its entries.
    """

    index: Tensor
    start: Tensor
    source: Tensor
    back_start: Tensor
    back_source: Tensor
    back_order: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    taps_read: int
    of_values: bool = False
    mask: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, strides: tuple[int, ...], geometry: Geometry, out_size: list[int]) -> Entries:
        """The entries of `mask` for a weight with these strides and outputs of `out_size`; a pass over the mask."""
        taps_read = geometry.taps_read(out_size)
        blocks = _blocks(mask, taps_read, geometry.groups)
        found = torch.ops.growfx.index_mask(
            mask, strides, geometry.stride, geometry.dilation, blocks, groups=geometry.groups
        )
        start, source, index, back_start, back_source, back_order = found
        shape, kept = tuple(mask.shape), mask.clone() if index.numel() > _MANY * mask.numel() else None
        return cls(index, start, source, back_start, back_source, back_order, shape, strides, taps_read, mask=kept)

    @classmethod
    def of_present(cls, mask: Tensor, geometry: Geometry, out_size: list[int]) -> Entries:
        """The entries of `mask` for the values of present edges, in the order of the mask."""
        whole = mask.contiguous()
        found = cls.of(whole, whole.stride(), geometry, out_size)
        places = whole.view(-1).cumsum(0, dtype=torch.int32)
        return replace(found, index=places[found.index].sub_(1), of_values=True, mask=None)

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.index.numel()

    @functools.cached_property
    def places(self) -> Tensor:
        """`index` in the order of memory, for what needs no other: reading on is faster than reading to and fro."""
        marks = torch.zeros(int(self.index.max()) + 1 if self.nnz else 0, dtype=torch.bool)
        marks[self.index.long()] = True
        return marks.nonzero().view(-1).to(torch.int32)

    def are_of(self, mask: Tensor, strides: tuple[int, ...], *, taps_read: int) -> bool:
        """Whether these are the entries of the current `mask`, whoever wrote to it; reads the mask once."""
        if self.of_values or self.strides != strides or self.taps_read != taps_read:
            return False
        if self.mask is not None:
            return torch.equal(mask, self.mask)
        if mask.stride() != strides:
            mask = torch.empty_strided(mask.shape, strides, dtype=mask.dtype).copy_(mask)
        return torch.ops.growfx.has_entries(mask, self.index)


def _blocks(mask: Tensor, taps_read: int, groups: int) -> list[int]:
    """How many input channels, and output channels, are worked on at a time.

    What a tile of outputs reads of them stays in the first cache then, or nearly, at the price of reading and writing
    the tile once for each block: worth it where a block has many entries of each output channel.
    """
    outputs, inputs = mask.shape[0], mask.shape[1] * groups
    if groups > 1:  # an output channel reads few as it is
        return [max(inputs, 1), max(outputs, 1)]
    entries = float(torch.count_nonzero(mask)) / max(mask.numel(), 1) * taps_read  # of a channel, for one place
    bytes_read = _TILE_BYTES * taps_read
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
    panels: bool = False,
) -> Tensor:
    """A layer's output over its entries alone, differentiable.

    Args:
        x: (N, I, ...) of a convolution, (..., I) of a linear layer; float32 or bfloat16, as the output will be.
        weight: the whole parameter, or the values of present edges where the entries are of these; float32. Read, and
            given a gradient, at the entries.
        bias: (O), float32.
        entries, geometry: of the layer.
        out_size: sizes of the output's images.
        inner: leave the output with the batch, of a linear layer all rows, innermost in memory (float32).
        panels: multiply by all weights, absent ones as zeros, several output channels at a time: faster where most are
            present. NaN and infinities spread as in a dense product then.
    """
    rows = x if geometry.kernel else x.reshape(-1, x.shape[-1])
    tables = (entries.start, entries.source, entries.back_start, entries.back_source, entries.back_order)
    steps = (geometry.stride, geometry.front, geometry.dilation)
    ops = torch.ops.growfx
    if entries.of_values:
        lies_inner = is_inner(rows) or (not geometry.kernel and rows_are_inner(rows))
        source = rows if lies_inner and rows.dtype == torch.float32 else ops.batch_inner(rows)
        sizes = [rows.shape[0], entries.shape[0], *out_size]
        out: Tensor = ops.sparse_product(
            source, ops.gather_entries(weight, entries.index), bias, *tables, entries.shape[2:], *steps, sizes, panels
        )
        out = out if inner else ops.batch_outer(out, x.dtype)
    else:
        out = ops.sparse_layer(rows, weight, bias, entries.index, *tables, *steps, out_size, inner, panels)
    # As of torch's linear layers, no view of another tensor.
    return out if geometry.kernel or x.dim() == 2 else torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))
