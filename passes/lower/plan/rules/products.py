"""Rules of convolutions, linear layers, matrix products and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from growfx.passes.lower.plan.builder import Arguments, Builder, NoKernelError, Rule, numbers, view_ops
from growfx.passes.lower.plan.calls import Reference
from growfx.passes.lower.plan.graph import Chained, Node, Operand
from growfx.passes.lower.plan.rules.windows import computed_convolution
from growfx.runtime.native.plan import Constant, Shape, Size

__all__ = ["RULES"]


def _constant(b: Builder, reference: Reference, what: str) -> Constant:
    operand = b.operand(reference)
    if isinstance(operand, Constant):
        return operand
    raise NoKernelError(f"with a {what} that is computed")


def _convolution(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    if not b.is_constant(a["weight"]):
        return computed_convolution(b, a, shapes[0])
    axes = b.rank(a["weight"]) - 2
    stride, padding, dilation = (numbers(a[key], axes) for key in ("stride", "padding", "dilation"))
    bias = None if a["bias"] is None else _constant(b, a["bias"], "bias")
    if b.rank(a["input"]) != axes + 2:
        raise NoKernelError("of an input without a batch")
    kernel = "deconvolution" if a["transposed"] else "convolution"
    ints = [axes, *stride, *padding, *dilation, a["groups"]]
    return b.add(kernel, [b.node(a["input"]), b.operand(a["weight"]), bias], shapes[0], ints)


def _matrix(b: Builder, x: Operand, weight: Constant, bias: Operand | None, shape: Shape) -> Node:
    """x @ weight (I, O), which the kernel wants as (O, I)."""
    turned = Constant(weight.tensor.t().contiguous(), None if weight.mask is None else weight.mask.t().contiguous())
    if not isinstance(bias, Node) and (bias is None or bias.tensor.numel() == shape[-1].fixed):
        return b.add("linear", [x, turned, bias], shape)
    return _added(b, b.add("linear", [x, turned], shape), bias, shape)


def _added(b: Builder, x: Node, other: Operand, shape: Shape) -> Node:
    return b.add("binary", [x, other], shape, [0])


def _product(b: Builder, first: Reference, second: Reference, shape: Shape) -> Node:
    repeated = b.repeated_matrix(second)
    if repeated is not None:
        return _matrix(b, b.node(first), repeated, None, shape)
    left, right = b.operand(first), b.operand(second)
    if isinstance(right, Constant) and right.tensor.dim() == 2:
        return _matrix(b, b.node(first), right, None, shape)
    if isinstance(left, Constant) and left.mask is not None and left.tensor.dim() == 2:
        # weight @ x = (x^T @ weight^T)^T
        turned = b.permute(b.node(second), b.shape(second), (1, 0))
        made = b.add("linear", [turned, left], (shape[1], shape[0]))
        return b.permute(made, made.shape, (1, 0))
    return b.add("product", [left, right], shape, [0, 0], [1.0])


def _mm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    return _product(b, a["self"], a["mat2"], shapes[0])


def _addmm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    if a["beta"] != 1 or a["alpha"] != 1:
        raise NoKernelError("with factors other than 1")
    bias, right = b.operand(a["self"]), b.operand(a["mat2"])
    if isinstance(right, Constant):
        return _matrix(b, b.node(a["mat1"]), right, bias, shapes[0])
    return _added(b, _product(b, a["mat1"], a["mat2"], shapes[0]), bias, shapes[0])


def _baddbmm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    made = b.add("product", [b.operand(a["batch1"]), b.operand(a["batch2"])], shapes[0], [0, 0], [float(a["alpha"])])
    if a["beta"] == 0:
        return made
    other = b.operand(a["self"])
    if a["beta"] != 1:
        other = b.pointwise(other, b.shape(a["self"]), Chained("scale", a=float(a["beta"])))
    return _added(b, made, other, shapes[0])


def _attention(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Sequence[Operand | None]:
    heads, queries = shapes[0][:-2], b.shape(a["query"])[-2]
    depth = b.shape(a["query"])[-1].fixed
    operands = [_repeated(b, a[name], (*heads, *b.shape(a[name])[-2:])) for name in ("query", "key", "value")]
    given = a.get("attn_mask", a.get("attn_bias"))
    if given is not None:
        own = b.shape(given)
        keys = b.shape(a["key"])[-2]
        operands.append(_repeated(b, given, (*own[:-2], queries, keys)))
    scale = 1 / math.sqrt(depth) if a["scale"] is None else float(a["scale"])
    node = b.add("attention", operands, shapes[0], [int(a["is_causal"])], [scale])
    return [node, *[None] * (len(shapes) - 1)]


def _repeated(b: Builder, given: Any, shape: Shape) -> Operand:
    """An operand of attention in the shape that the kernel takes: torch repeats axes of size 1."""
    own = b.shape(given)
    if any(have not in (want, Size(0, 1)) for have, want in zip(own[::-1], shape[::-1], strict=False)):
        raise NoKernelError("with groups of heads that share keys and values")
    ops = view_ops.broadcast(own, shape)
    return b.view(b.operand(given), ops, shape) if ops else b.operand(given)


RULES: Final[dict[str, Rule]] = {
    "aten._scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten.addmm": _addmm,
    "aten.baddbmm": _baddbmm,
    "aten.bmm": _mm,
    "aten.convolution": _convolution,
    "aten.mm": _mm,
}
