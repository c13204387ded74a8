"""Rules of windows that are cut out of an image or put back: im2col, col2im, convolutions with a computed weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from growfx.passes.lower.plan.builder import Arguments, Builder, NoKernelError, Rule, numbers, view_ops
from growfx.passes.lower.plan.graph import Operand
from growfx.runtime.native.plan import OPERATIONS, Shape, Size

__all__ = ["RULES", "computed_convolution"]

_GEOMETRY = ("kernel_size", "dilation", "padding", "stride")


def _windows(b: Builder, x: Operand, given: Shape, geometry: Sequence[Sequence[int]], out: Sequence[Size]) -> Operand:
    """The numbers under each window of images (N, C, H, W), as (N, C, kernel height, kernel width, *out)."""
    kernel, dilation, padding, stride = geometry
    if any(size.per_batch for size in given[2:]):
        raise NoKernelError("of an image that grows with the batch")
    if any(padding):
        sizes = [Size(0, size.fixed + 2 * p) for size, p in zip(given[2:], padding, strict=True)]
        given = (*given[:2], *sizes)
        x = b.add("pad", [x], given, [0, *[0] * 4, padding[0], padding[0], padding[1], padding[1]], [0.0])
    ops: list[int] = []
    for i in range(2):
        ops += view_ops.unfold(2 + i, (kernel[i] - 1) * dilation[i] + 1, stride[i])
    for i in range(2):
        if dilation[i] != 1:
            ops += view_ops.slice(4 + i, 0, dilation[i], Size(0, kernel[i]))
    ops += view_ops.permute([0, 1, 4, 5, 2, 3])
    return b.view(x, ops, (*given[:2], *(Size(0, k) for k in kernel), *out))


def _places(given: Shape, geometry: Sequence[Sequence[int]]) -> list[Size]:
    """How many windows there are along each axis of an image."""
    return [
        Size(0, (size.fixed + 2 * p - d * (k - 1) - 1) // s + 1)
        for size, k, d, p, s in zip(given[-2:], *geometry, strict=True)
    ]


def _im2col(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    given, geometry = b.shape(a["self"]), [numbers(a[key], 2) for key in _GEOMETRY]
    if len(given) != 4:
        raise NoKernelError("of an image without a batch")
    return b.reshape(_windows(b, b.operand(a["self"]), given, geometry, _places(given, geometry)), shapes[0])


def _col2im(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    """A transposed convolution whose weight puts each number of a window in its place."""
    shape, geometry = shapes[0], [numbers(a[key], 2) for key in _GEOMETRY]
    if len(shape) != 4 or shape[1].per_batch:
        raise NoKernelError("of an image without a batch")
    kernel, dilation, padding, stride = geometry
    channels, taps = shape[1].fixed, kernel[0] * kernel[1]
    weight = torch.eye(taps).reshape(taps, 1, *kernel).repeat(channels, 1, 1, 1)
    windows = b.reshape(b.node(a["self"]), (shape[0], Size(0, channels * taps), *_places(shape, geometry)))
    ints = [2, *stride, *padding, *dilation, channels]
    return b.add("deconvolution", [windows, b.constant(weight, weight != 0)], shape, ints)


def computed_convolution(b: Builder, a: Arguments, shape: Shape) -> Operand:
    """A convolution whose weight is computed: a product with the windows of the image.

    The images of a batch stand side by side as channels of one, each with its own weight, so the groups grow with the
    batch.
    """
    given, weight = b.shape(a["input"]), b.shape(a["weight"])
    if a["transposed"] or len(given) != 4 or len(weight) != 4 or given[0] != (0, 1):
        raise NoKernelError("with a weight that is computed")
    groups = a["groups"] if isinstance(a["groups"], Size) else Size(0, a["groups"])
    rows = _divided(weight[0], groups)
    columns = weight[1].fixed * weight[2].fixed * weight[3].fixed
    kernel = [size.fixed for size in weight[2:]]
    geometry = [kernel, *(numbers(a[key], 2) for key in ("dilation", "padding", "stride"))]
    windows = _windows(b, b.operand(a["input"]), given, geometry, shape[2:])
    left = b.reshape(b.node(a["weight"]), (groups, Size(0, rows), Size(0, columns)))
    places = Size(0, shape[2].fixed * shape[3].fixed)
    right = b.reshape(windows, (groups, Size(0, columns), places))
    made = b.reshape(b.add("product", [left, right], (groups, Size(0, rows), places), [0, 0], [1.0]), shape)
    if a["bias"] is None:
        return made
    bias = b.reshape(b.operand(a["bias"]), (Size(0, 1), shape[1], Size(0, 1), Size(0, 1)))
    return b.add("binary", [made, bias], shape, [OPERATIONS.index("add")])


def _divided(total: Size, groups: Size) -> int:
    """Rows of each group."""
    grows = groups.per_batch > 0
    count, parts = (total.per_batch, groups.per_batch) if grows else (total.fixed, groups.fixed)
    if total != ((count, 0) if grows else (0, count)) or groups != ((parts, 0) if grows else (0, parts)):
        raise NoKernelError("with groups that grow with the batch in another way than the weight")
    return count // parts


RULES: Final[dict[str, Rule]] = {
    "aten.col2im": _col2im,
    "aten.im2col": _im2col,
}
