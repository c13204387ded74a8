"""Convolution and linear layers with an unstructured-sparse weight on a CPU, by a C++ kernel.

The kernel (`sparse_kernel.cpp`) is compiled on first use, see `kernel_status`; without it `conv2d` and `linear` raise.
It is for inference: nothing here has a gradient. Sums run in an order that depends on shapes alone, so the number of
threads does not change a bit of the result.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from growfx.errors import ConfigError
from growfx.runtime.kernel_build import kernel_status

__all__ = ["SparseWeight", "conv2d", "kernel_status", "linear"]

_DIRECT, _COPIED, _FOLDED, _ROWS = 0, 1, 2, 3
# Positions that a folded block has at most, where images are small: the kernel's widest tile.
_BLOCK_POSITIONS = 128
# Values in the widest register.
_REGISTER = 16
# Below these a plane is folded: at any batch size, and where a batch shares the work.
_MIN_POSITIONS, _MIN_POSITIONS_OF_BATCH = 16, 32
# Input shapes whose layout a weight remembers.
_REMEMBERED = 8
_LIMIT = 2**31 - 1


class _Layout(NamedTuple):
    """The C++ struct `Plan`: the same numbers in the same order."""

    layout: int
    images: int
    channels: int
    height: int
    width: int
    out_channels: int
    out_height: int
    out_width: int
    stride_h: int
    stride_w: int
    padding_h: int
    padding_w: int
    dilation_w: int
    block: int
    phases: int
    rows: int
    plane_size: int
    positions: int


class Plan(NamedTuple):
    """What a call needs to know about one input shape.

    Attributes:
        out_shape: (N, O, OH, OW).
        layout: int64, the kernel's description of the shapes.
        offset: int32 (nnz), where each entry reads, relative to the output position.
    """

    out_shape: tuple[int, int, int, int]
    layout: Tensor
    offset: Tensor


@dataclass(eq=False)
class SparseWeight:
    """A masked weight in the kernel's order: the entries of an output channel stand together.

    Attributes:
        shape: of the weight it was packed from, (O, I, kh, kw) or (O, I).
        dtype: torch.float32 or torch.bfloat16, that of inputs and outputs; values are kept as float32.
        start: int32 (O + 1), where the entries of each output channel begin.
        position: int32 (nnz), plane * kh + kernel row.
        value: float32 (nnz).
        planes: int32 (planes, 2), input channel and kernel column of each plane that has an entry.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    start: Tensor
    position: Tensor
    value: Tensor
    planes: Tensor
    _plans: dict[tuple[int, ...], Plan] = field(default_factory=dict, repr=False)

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        mask: Tensor,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
    ) -> Self:
        """Packs the entries of `weight` where `mask` is true; an entry that is zero stays one.

        Args:
            weight: (O, I, kh, kw) of a convolution or (O, I) of a linear layer, float32 or bfloat16, on the CPU.
            mask: bool, of the weight's shape.
            stride, padding, dilation: of the convolution, (height, width); padding on both sides.

        Raises:
            ConfigError: another dtype, device, shape or geometry, or more than 2**31 - 1 weights.
        """
        _check_weight(weight, mask)
        _status()  # what traces a network later cannot load anything
        geometry = [_pair("stride", stride, 1), _pair("padding", padding, 0), _pair("dilation", dilation, 1)]
        if weight.dim() == 2 and geometry != [(1, 1), (0, 0), (1, 1)]:
            raise ConfigError("a linear weight (O, I) has no `stride`, `padding` or `dilation`; leave them out")
        # Row by row of each plane of each output channel: the order in which entries are found is the kernel's.
        grid, values = ((t if t.dim() == 4 else t[:, :, None, None]).transpose(2, 3) for t in (mask, weight.detach()))
        out_channels, _, kernel_w, kernel_h = grid.shape
        channel, inputs, column, row = grid.nonzero(as_tuple=True)
        # What a linear layer does not read is transposed with the rest of its rows.
        is_used = grid.any(3).any(0).flatten() if weight.dim() == 4 else torch.ones(weight.shape[1], dtype=torch.bool)
        used = is_used.nonzero().flatten()
        plane = (is_used.cumsum(0) - 1)[inputs * kernel_w + column]
        start = torch.zeros(out_channels + 1, dtype=torch.int32)
        start[1:] = torch.bincount(channel, minlength=out_channels).cumsum(0)
        return cls(
            tuple(weight.shape),
            weight.dtype,
            *geometry,
            start=start,
            position=(plane * kernel_h + row).int(),
            value=values[grid].float(),
            planes=torch.stack([used // kernel_w, used % kernel_w], dim=1).int(),
        )

    @property
    def nnz(self) -> int:
        """Number of entries."""
        return self.value.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, with those remembered for the input shapes seen so far."""
        remembered = [t for plan in self._plans.values() for t in (plan.layout, plan.offset)]
        return sum(t.nbytes for t in (self.start, self.position, self.value, self.planes, *remembered))

    def plan(self, shape: tuple[int, ...]) -> Plan:
        """The plan for inputs (N, I, H, W), worked out the first time.

        Raises:
            ConfigError: the shape does not fit the weight, or one image is too large for 32-bit offsets.
        """
        found = self._plans.get(shape)
        if found is None:
            layout = _layout(self, tuple(shape))
            _check_offsets(layout, self.planes.shape[0])
            out_shape = (layout.images, layout.out_channels, layout.out_height, layout.out_width)
            from torch._subclasses.fake_tensor import unset_fake_temporarily  # slow to import

            # What is kept has values, whether or not somebody traces the network without any.
            with nullcontext() if torch.compiler.is_dynamo_compiling() else unset_fake_temporarily():
                found = Plan(out_shape, torch.tensor(layout, dtype=torch.int64), _offsets(self, layout))
            while len(self._plans) >= _REMEMBERED:
                self._plans.pop(next(iter(self._plans)), None)
            self._plans[shape] = found
        return found


def conv2d(
    x: Tensor, weight: SparseWeight, bias: Tensor | None = None, *, residual: Tensor | None = None, relu: bool = False
) -> Tensor:
    """`relu(conv2d(x, weight, bias) + residual)` over the active entries alone.

    Args:
        x: (N, I, H, W), of the weight's dtype, on the CPU; any strides.
        weight: packed from (O, I, kh, kw).
        bias: (O,), added first.
        residual: (N, O, OH, OW), added before the rectification.
        relu: whether negative results become zero; NaN stays.

    Returns:
        (N, O, OH, OW), contiguous. bfloat16 is summed in float32 and rounded once.

    Raises:
        ConfigError: a wrong shape, dtype or device; an input that requires a gradient; no kernel.
    """
    if len(weight.shape) != 4:
        raise ConfigError(f"`conv2d` needs a weight packed from (O, I, kh, kw), got {weight.shape}; use `linear`")
    return _run(x, weight, bias, residual, relu)


def linear(x: Tensor, weight: SparseWeight, bias: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """`linear(x, weight, bias)` over the active entries alone, rectified if asked.

    Args:
        x: (..., I), of the weight's dtype, on the CPU.
        weight: packed from (O, I).
        bias: (O,).
        relu: whether negative results become zero.

    Returns:
        (..., O), contiguous.

    Raises:
        ConfigError: as for `conv2d`.
    """
    if len(weight.shape) != 2:
        raise ConfigError(f"`linear` needs a weight packed from (O, I), got {weight.shape}; use `conv2d`")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ConfigError(f"got an input {tuple(x.shape)}, the weight takes (..., {inputs})")
    out = _run(x.reshape(-1, inputs, 1, 1), weight, bias, None, relu)
    return out.view(*x.shape[:-1], outputs)


def _run(x: Tensor, weight: SparseWeight, bias: Tensor | None, residual: Tensor | None, relu: bool) -> Tensor:
    if not torch.compiler.is_dynamo_compiling() and (reason := _status()):
        raise ConfigError(f"the sparse kernel is not available: {reason}; run the layer dense")
    plan = weight.plan(x.shape)
    out_shape, dtype = plan.out_shape, weight.dtype
    _check_tensor("x", x, x.shape, dtype)
    if bias is not None:
        _check_tensor("bias", bias, out_shape[1:2], dtype)
        bias = bias if dtype == torch.float32 and bias.is_contiguous() else bias.float().contiguous()
    if residual is not None:
        _check_tensor("residual", residual, out_shape, dtype)
        residual = residual.contiguous()
    if x.numel() == 0 or 0 in out_shape:
        return x.new_empty(out_shape)
    run = torch.ops.growfx.sparse_conv2d.default
    tables = plan.layout, weight.start, plan.offset, weight.value, weight.planes
    return run(x.contiguous(), *tables, bias, residual, relu, out_shape)


def _status() -> str:
    reason = kernel_status()
    if not reason:
        _register()
    return reason


@functools.cache
def _register() -> None:
    """Tell torch what the kernel returns without running it, so that networks can be exported and compiled."""
    torch.library.register_fake("growfx::sparse_conv2d", _shaped)
    torch.library.register_vmap("growfx::sparse_conv2d", _mapped)


def _shaped(x: Tensor, *tables: Any) -> Tensor:
    return x.new_empty(tables[-1])


def _mapped(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
    """One after the other: a layout is made for a number of images."""
    run = torch.ops.growfx.sparse_conv2d.default

    def part(item: Any, axis: int | None, index: int) -> Any:
        return item if axis is None else item.select(axis, index).contiguous()

    results = [
        run(*(part(item, axis if isinstance(item, Tensor) else None, i) for item, axis in zip(args, in_dims)))  # noqa: B905
        for i in range(info.batch_size)
    ]
    return torch.stack(results), 0


def _check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape:
        raise ConfigError(f"`{name}` has shape {tuple(tensor.shape)}, it must be {shape}")
    if tensor.dtype != dtype:
        raise ConfigError(f"`{name}` is {tensor.dtype}, the weight was packed as {dtype}; convert one of them")
    if not tensor.is_cpu:
        raise ConfigError(f"`{name}` is on {tensor.device}, the kernel runs on the CPU; use `{name}.cpu()`")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ConfigError(f"`{name}` requires a gradient, the kernel has none; run under `torch.inference_mode()`")


def _check_weight(weight: Tensor, mask: Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"the weight is {weight.dtype}; the kernel takes torch.float32 and torch.bfloat16")
    if weight.dim() not in (2, 4):
        raise ConfigError(f"the weight has shape {tuple(weight.shape)}; the kernel takes (O, I, kh, kw) and (O, I)")
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ConfigError(
            f"the mask is {mask.dtype} of shape {tuple(mask.shape)}; it must be torch.bool of the weight's shape "
            f"{tuple(weight.shape)}"
        )
    if not (weight.is_cpu and mask.is_cpu):
        raise ConfigError(f"weight on {weight.device}, mask on {mask.device}; the kernel runs on the CPU, use `.cpu()`")
    if weight.numel() > _LIMIT:
        raise ConfigError(f"the weight has {weight.numel()} values, the kernel takes up to {_LIMIT}; run it dense")


def _pair(name: str, value: tuple[int, int], least: int) -> tuple[int, int]:
    if len(value) != 2 or any(not isinstance(v, int) or v < least for v in value):
        raise ConfigError(f"`{name}`={value!r}; it must be two integers (height, width) of at least {least}")
    return (value[0], value[1])


def _output_size(weight: SparseWeight, *size: int) -> tuple[int, int]:
    kernel = weight.shape[2:] or (1, 1)
    geometry = zip(size, kernel, weight.stride, weight.padding, weight.dilation, strict=True)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in geometry)
    return height, width


def _layout(weight: SparseWeight, shape: tuple[int, ...]) -> _Layout:
    """How the kernel lays out inputs of `shape`; see `sparse_kernel.cpp`."""
    out_channels, channels = weight.shape[:2]
    if len(shape) != 4 or shape[1] != channels:
        raise ConfigError(f"got an input {shape}, the weight takes (N, {channels}, H, W)")
    images, _, height, width = shape
    out_height, out_width = _output_size(weight, height, width)
    if images > 0 and min(out_height, out_width) < 1:
        raise ConfigError(f"an input {shape} is too small for the kernel {weight.shape[2:]} with its padding")
    kernel = weight.shape[2:] or (1, 1)
    reach = (kernel[0] - 1) * weight.dilation[0]
    phases, rows = min(weight.stride[0], reach + 1), out_height + reach // weight.stride[0]
    layout, block = _kind(weight, shape, out_height * out_width)
    plane_size = height * width if layout == _DIRECT else phases * rows * block * out_width
    if layout == _COPIED:
        plane_size = _padded(plane_size)
    return _Layout(
        layout,
        *(images, channels, height, width, out_channels, out_height, out_width),
        *(*weight.stride, *weight.padding, weight.dilation[1]),
        *(block, phases, rows, plane_size, out_height * out_width * block),
    )


def _kind(weight: SparseWeight, shape: tuple[int, ...], positions: int) -> tuple[int, int]:
    """The layout for images of `positions` output positions, and how many images it takes at a time."""
    images, channels, height, width = shape
    pointwise = (weight.shape[2:] or (1, 1), weight.padding) == ((1, 1), (0, 0))
    if positions >= (_MIN_POSITIONS if images == 1 else _MIN_POSITIONS_OF_BATCH):
        direct = pointwise and weight.stride == (1, 1) and weight.dtype == torch.float32
        return (_DIRECT if direct else _COPIED), 1
    units = -(-images * positions // _BLOCK_POSITIONS)
    block = -(-images // max(units, 1)) or 1
    whole = pointwise and height * width == 1 and weight.planes.shape[0] == channels
    if whole and min(channels, block) >= _REGISTER:
        return _ROWS, -(-block // _REGISTER) * _REGISTER
    return _FOLDED, block


def _padded(size: int) -> int:
    """Room for a register past the end, aligned to cache lines, and no half page: planes would share cache lines."""
    size = -(-(size + _REGISTER) // _REGISTER) * _REGISTER
    return size + _REGISTER if size % 512 == 0 else size


def _check_offsets(layout: _Layout, planes: int) -> None:
    if max(planes, layout.channels) * layout.plane_size + layout.positions > _LIMIT:
        raise ConfigError(
            f"an image of {layout.channels} x {layout.height} x {layout.width} is too large for the kernel's 32-bit "
            "offsets; run the layer dense"
        )


def _offsets(weight: SparseWeight, layout: _Layout) -> Tensor:
    kernel_h = (weight.shape[2:] or (1, 1))[0]
    plane, kernel_row = weight.position // kernel_h, weight.position % kernel_h
    if layout.layout == _DIRECT:
        return weight.planes[:, 0][plane] * layout.plane_size
    reach = kernel_row * weight.dilation[0]
    row = reach % layout.stride_h * layout.rows + reach // layout.stride_h
    return plane * layout.plane_size + row * (layout.block * layout.out_width)
