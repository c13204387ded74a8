"""Rules of norms, reductions, pooling and resizing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from growfx.passes.lower.plan.builder import Arguments, Builder, NoKernelError, Rule, axis_of, numbers
from growfx.passes.lower.plan.graph import Chained, Node, Operand
from growfx.runtime.native.plan import OPERATIONS, Constant, Shape, Size

__all__ = ["RULES"]

_KINDS = {"sum": 0, "mean": 1, "max": 2, "min": 3, "var": 4, "norm": 5}
_LONGEST_SUM = 1024  # of `cumsum`, for its matrix is in the file
_ADD, _MUL = OPERATIONS.index("add"), OPERATIONS.index("mul")


# -- norms ------------------------------------------------------------------------------------------------------------


def _batch_norm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
    """One factor and one summand for each channel."""
    if a.get("training", False):
        return [_one_row_norm(b, a, shapes[0]), *[None] * (len(shapes) - 1)]
    mean, variance = b.value(a["running_mean"]).double(), b.value(a["running_var"]).double()
    scale = (variance + a["eps"]).rsqrt()
    if a["weight"] is not None:
        scale = scale * b.value(a["weight"]).double()
    shift = -mean * scale
    if a["bias"] is not None:
        shift = shift + b.value(a["bias"]).double()
    shape = (-1, *[1] * (len(shapes[0]) - 2))
    factor, summand = (b.constant(part.reshape(shape)) for part in (scale, shift))
    scaled = b.add("binary", [b.operand(a["input"]), factor], shapes[0], [_MUL])
    return [b.add("binary", [scaled, summand], shapes[0], [_ADD]), *[None] * (len(shapes) - 1)]


def _one_row_norm(b: Builder, a: Arguments, shape: Shape) -> Operand:
    """Normalise the channels of one row: so weights are standardised, and instances, whose rows are channels then."""
    one, channels, *rest = shape
    if one != (0, 1) or not rest or (channels.per_batch and channels.fixed):
        raise NoKernelError("with the statistics of the batch")
    rows = (Size(1, 0), Size(0, channels.per_batch)) if channels.per_batch else (one, channels)
    x = b.reshape(b.operand(a["input"]), (*rows, *rest))
    made = b.reshape(b.add("group_norm", [x], (*rows, *rest), [rows[1].fixed, 0, 0], [float(a["eps"])]), shape)
    for name, operation in (("weight", _MUL), ("bias", _ADD)):
        if a[name] is not None:
            by_channel = b.reshape(b.operand(a[name]), (one, channels, *[one] * len(rest)))
            made = b.add("binary", [made, by_channel], shape, [operation])
    return made


def _affine(b: Builder, a: Arguments) -> tuple[list[Operand], list[int]]:
    parts = [None if a.get(name) is None else b.operand(a[name]) for name in ("weight", "bias")]
    return [part for part in parts if part is not None], [int(part is not None) for part in parts]


def _layer_norm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
    affine, flags = _affine(b, a)
    ints = [len(a["normalized_shape"]), 1, *flags]
    node = b.add("layer_norm", [b.operand(a["input"]), *affine], shapes[0], ints, [float(a["eps"])])
    return [node, *[None] * (len(shapes) - 1)]


def _rms_norm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
    affine, flags = _affine(b, {"weight": a["weight"]})
    epsilon = torch.finfo(torch.float32).eps if a["eps"] is None else float(a["eps"])
    ints = [len(a["normalized_shape"]), 0, *flags]
    node = b.add("layer_norm", [b.operand(a["input"]), *affine], shapes[0], ints, [epsilon])
    return [node, *[None] * (len(shapes) - 1)]


def _group_norm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
    affine, flags = _affine(b, a)
    node = b.add("group_norm", [b.operand(a["input"]), *affine], shapes[0], [a["group"], *flags], [float(a["eps"])])
    return [node, *[None] * (len(shapes) - 1)]


# -- reductions -------------------------------------------------------------------------------------------------------


def _reduced(b: Builder, x: Operand, given: Shape, axes: Sequence[int], shape: Shape, kind: str, extra: float) -> Node:
    """Reduce some axes; those that are apart are brought together first."""
    axes = sorted(axes)
    if any(given[axis].per_batch for axis in axes):
        raise NoKernelError("over the batch")
    if axes != list(range(axes[0], axes[0] + len(axes))):
        order = [i for i in range(len(given)) if i not in axes] + axes
        x, given = b.permute(x, given, order), tuple(given[i] for i in order)
        axes = list(range(len(given) - len(axes), len(given)))
    return b.add("reduce", [x], shape, [_KINDS[kind], axes[0], len(axes)], [extra])


def _axes(a: Arguments, rank: int) -> list[int]:
    given = a.get("dim")
    if given is None or given == []:
        return list(range(rank))
    return [axis_of(i, rank) for i in (given if isinstance(given, (list, tuple)) else [given])]


def _reduction(kind: str) -> Rule:
    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Any:
        if a.get("dtype") not in (None, torch.float32):
            raise NoKernelError(f"in {a['dtype']}")
        shape = b.shape(a["self"])
        correction = a.get("correction", 1)
        extra = 1.0 if correction is None else float(correction)
        node = _reduced(b, b.operand(a["self"]), shape, _axes(a, len(shape)), shapes[0], kind, extra)
        return [node, *[None] * (len(shapes) - 1)]

    return rule


def _truth_of(kind: str) -> Rule:
    """Whether any number along some axes is another than 0, or all are."""

    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
        shape = b.shape(a["self"])
        return _reduced(b, b.truth(a["self"]), shape, _axes(a, len(shape)), shapes[0], kind, 0.0)

    return rule


def _variance_and_mean(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
    variance = _reduction("var")(b, a, shapes[:1])
    mean = _reduction("mean")(b, a, shapes[1:])
    assert isinstance(variance, list)
    assert isinstance(mean, list)
    return [variance[0], mean[0]]


def _deviation(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    variance = _reduction("var")(b, a, shapes)
    assert isinstance(variance, list)
    made = variance[0]
    assert isinstance(made, Node)
    return b.pointwise(made, shapes[0], Chained("sqrt"))


def _vector_norm(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    if a["ord"] != 2:
        raise NoKernelError(f"of order {a['ord']}")
    shape = b.shape(a["self"])
    return _reduced(b, b.operand(a["self"]), shape, _axes(a, len(shape)), shapes[0], "norm", 0.0)


def _cumsum(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    """A product with the matrix that has ones up to the diagonal."""
    shape = shapes[0]
    axis = axis_of(a["dim"], len(shape))
    if shape[axis].per_batch or shape[axis].fixed > _LONGEST_SUM:
        raise NoKernelError(f"along an axis that is longer than {_LONGEST_SUM}, or grows with the batch")
    order = [i for i in range(len(shape)) if i != axis] + [axis]
    turned = tuple(shape[i] for i in order)
    ones = torch.ones(shape[axis].fixed, shape[axis].fixed).tril()
    x = b.permute(b.operand(a["self"]), shape, order)
    made = b.add("linear", [x, b.constant(ones, ones != 0)], turned)
    return b.permute(made, turned, [order.index(i) for i in range(len(shape))])


def _softmax(*, logarithm: bool = False, safe: bool = False) -> Rule:
    """`safe`: where all numbers are minus infinity it gives zeros, as attention does for a query that sees no key."""

    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
        axis = axis_of(a["dim"], len(shapes[0]))
        if shapes[0][axis].per_batch:
            raise NoKernelError("over the batch")
        return b.add("softmax", [b.operand(a["self"])], shapes[0], [axis, int(logarithm), int(safe)])

    return rule


# -- pooling and resizing ---------------------------------------------------------------------------------------------


def _pool(axes: int, maximum: bool) -> Rule:
    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
        window = numbers(a["kernel_size"], axes)
        stride = numbers(a["stride"], axes) if a["stride"] else window
        padding = numbers(a["padding"], axes)
        dilation = numbers(a.get("dilation", 1), axes)
        flags = [int(maximum), int(bool(a.get("count_include_pad", False))), 0]
        ints = [axes, *window, *stride, *padding, *dilation, *flags]
        divisor = float(a.get("divisor_override") or 0)
        node = b.add("pool", [b.operand(a["self"])], shapes[0], ints, [divisor])
        return [node, *[None] * (len(shapes) - 1)]

    return rule


def _adaptive_pool(axes: int, maximum: bool) -> Rule:
    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> list[Operand | None]:
        given = b.shape(a["self"])
        if all(size == (0, 1) for size in shapes[0][-axes:]):  # one window over all
            over = range(len(given) - axes, len(given))
            node = _reduced(b, b.operand(a["self"]), given, over, shapes[0], "max" if maximum else "mean", 0.0)
            return [node, *[None] * (len(shapes) - 1)]
        ints = [axes, *[1] * axes, *[1] * axes, *[0] * axes, *[1] * axes, int(maximum), 0, 1]
        node = b.add("pool", [b.operand(a["self"])], shapes[0], ints, [0.0])
        return [node, *[None] * (len(shapes) - 1)]

    return rule


def _resize(mode: int, axes: int) -> Rule:
    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
        corners = bool(a.get("align_corners", False))
        given, factors = b.shape(a["self"]), a.get("scale_factors")
        scales: list[float] = []
        for i in range(axes):
            size, out = given[len(given) - axes + i].fixed, shapes[0][len(given) - axes + i].fixed
            factor = factors[i] if factors else a.get("scales" if axes == 1 else f"scales_{'dhw'[3 - axes + i]}")
            if corners:
                scales.append((size - 1) / (out - 1) if out > 1 else 0.0)
            else:
                scales.append(1 / factor if factor else size / out)
        return b.add("resize", [b.operand(a["self"])], shapes[0], [mode, axes, int(corners)], scales)

    return rule


def _fill_scalar(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Constant:
    if any(size != Size(0, 1) for size in shapes[0]):
        raise NoKernelError("of a size that grows with the batch")
    return b.constant(torch.full([1] * len(shapes[0]), float(a["s"])))


RULES: Final[dict[str, Rule]] = {
    "aten._adaptive_avg_pool2d": _adaptive_pool(2, False),
    "aten._adaptive_avg_pool3d": _adaptive_pool(3, False),
    "aten._fused_rms_norm": _rms_norm,
    "aten._log_softmax": _softmax(logarithm=True),
    "aten._native_batch_norm_legit_no_training": _batch_norm,
    "aten._safe_softmax": _softmax(safe=True),
    "aten._softmax": _softmax(),
    "aten.adaptive_avg_pool1d": _adaptive_pool(1, False),
    "aten.adaptive_max_pool2d": _adaptive_pool(2, True),
    "aten.adaptive_max_pool3d": _adaptive_pool(3, True),
    "aten.all": _truth_of("min"),
    "aten.amax": _reduction("max"),
    "aten.amin": _reduction("min"),
    "aten.any": _truth_of("max"),
    "aten.avg_pool1d": _pool(1, False),
    "aten.avg_pool2d": _pool(2, False),
    "aten.avg_pool3d": _pool(3, False),
    "aten.cumsum": _cumsum,
    "aten.linalg_vector_norm": _vector_norm,
    "aten.max": _reduction("max"),
    "aten.max_pool2d_with_indices": _pool(2, True),
    "aten.max_pool3d_with_indices": _pool(3, True),
    "aten.mean": _reduction("mean"),
    "aten.min": _reduction("min"),
    "aten.native_batch_norm": _batch_norm,
    "aten.native_group_norm": _group_norm,
    "aten.native_layer_norm": _layer_norm,
    "aten.rms_norm": _rms_norm,
    "aten.scalar_tensor": _fill_scalar,
    "aten.std": _deviation,
    "aten.sum": _reduction("sum"),
    "aten.upsample_bicubic2d": _resize(2, 2),
    "aten.upsample_bilinear2d": _resize(1, 2),
    "aten.upsample_linear1d": _resize(1, 1),
    "aten.upsample_nearest1d": _resize(0, 1),
    "aten.upsample_nearest2d": _resize(0, 2),
    "aten.upsample_nearest3d": _resize(0, 3),
    "aten.upsample_trilinear3d": _resize(1, 3),
    "aten._upsample_nearest_exact2d": _resize(3, 2),
    "aten.var": _reduction("var"),
    "aten.var_mean": _variance_and_mean,
}
