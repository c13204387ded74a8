"""Path rules of sums, products, quotients, powers and identities."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import (
    Combined,
    Learned,
    NoPathRuleError,
    PathValue,
    Weight,
    broadcast,
    mean_of,
    raw,
)

__all__ = ["FAMILIES", "FUNCTIONS", "METHODS", "add", "balanced", "bounded", "identity", "multiply"]


def identity(run: PathRun, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Every path passes unchanged; further arguments (rates, slopes, limits, dtypes) carry no path."""
    if not isinstance(value, PathValue):
        raise NoPathRuleError("a constant is combined with an activation in a way that has no path rule")
    return value


def bounded(run: PathRun, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Identity that marks the value as bounded: as a gate it shares paths without adding magnitude."""
    if not isinstance(value, PathValue):
        raise NoPathRuleError("a constant is combined with an activation in a way that has no path rule")
    return value.same(bounded=True)


def cast(run: PathRun, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Identity; a constant cast to the type of an activation stays a constant, of the network's type."""
    if isinstance(value, PathValue):
        return value
    tensor = raw(value).to(run.device, run.model_dtype)
    return Learned(tensor) if isinstance(value, Learned) else tensor


def add(run: PathRun, left: Any, right: Any, *, alpha: float = 1) -> Any:
    """Sum of the path operands; a constant operand is dropped, its shape is not."""
    paths = [item for item in (left, right) if isinstance(item, PathValue) and not item.divisor]
    if not paths:  # divisors stay divisors, whatever is added to the data they divide by
        return broadcast(left, right) if isinstance(left, PathValue) else broadcast(right, left)
    factor = abs(float(alpha))
    if len(paths) == 2:
        return PathValue(left.tensor + (right.tensor if factor == 1.0 else factor * right.tensor))
    if paths[0] is left:
        return broadcast(left, right)
    value = broadcast(right, left)
    return value if factor == 1.0 else PathValue(value.tensor * factor, value.bounded)


def reverse_add(run: PathRun, left: Any, right: Any, *, alpha: float = 1) -> Any:
    """`rsub`: right - alpha * left."""
    return add(run, right, left, alpha=alpha)


def balanced(left: Tensor, right: Tensor, left_bounded: bool, right_bounded: bool) -> Tensor:
    """M/2 (a/n_a + b/n_b): both factors of a product count equally, whatever their fan-in.

    n_a and n_b are the factors' means, held fixed. M is the mean of the unbounded factor when exactly one is bounded,
    else the geometric mean. When a factor has no mass the result is the plain sum.
    """
    mean_left, mean_right = mean_of(left), mean_of(right)
    if mean_left == 0 or mean_right == 0:
        return left + right
    ratio = mean_right / mean_left
    if left_bounded == right_bounded:
        factor_left, factor_right = math.sqrt(ratio), math.sqrt(1 / ratio)
    elif right_bounded:
        factor_left, factor_right = 1.0, 1 / ratio
    else:
        factor_left, factor_right = ratio, 1.0
    return left * (factor_left / 2) + right * (factor_right / 2)


def multiply(run: PathRun, left: Any, right: Any) -> Any:
    """Path times constant: magnitude. Path times path: balanced product; a value times itself is itself."""
    if not isinstance(left, PathValue):
        left, right = right, left
    if not isinstance(right, PathValue):
        factor = run.magnitude(right)
        if isinstance(factor, float) and factor == 1.0:
            return left
        return PathValue(left.tensor * factor, left.bounded, left.divisor)
    if left.divisor or right.divisor:
        value, divisor = (left, right) if right.divisor else (right, left)
        return PathValue(value.tensor * divisor.tensor, value.bounded, value.divisor)
    both = left.bounded and right.bounded
    if left.tensor is right.tensor:
        return left.same(bounded=both)
    return PathValue(balanced(left.tensor, right.tensor, left.bounded, right.bounded), both)


def divide(run: PathRun, left: Any, right: Any, *, rounding_mode: str | None = None) -> Any:
    """Path / constant: by its magnitude. Path / path: the numerator. Constant / path: a divisor."""
    if not isinstance(right, PathValue):
        divisor = run.magnitude(right)
        if isinstance(divisor, float) and divisor == 1.0:
            return left
        if isinstance(divisor, Tensor):
            divisor = divisor.detach()  # a weight that divides is not an edge of a path
        return PathValue(left.tensor / divisor, left.bounded, left.divisor)
    if isinstance(left, PathValue):
        if right.divisor:
            return PathValue(left.tensor / right.tensor, left.bounded, left.divisor)
        return broadcast(left, right)
    if right.divisor:
        raise NoPathRuleError("a constant is divided by a reciprocal of data")
    return as_divisor(run, right, run.magnitude(left))


def as_divisor(run: PathRun, value: PathValue, numerator: float | Tensor = 1.0) -> PathValue:
    """numerator / value: multiplying by it multiplies by the numerator's magnitude alone."""
    return PathValue(torch.ones_like(value.tensor, requires_grad=False) * numerator, divisor=True)


def reciprocal(run: PathRun, value: Any) -> Any:
    """`rsqrt` and `reciprocal`."""
    return as_divisor(run, value)


def power(run: PathRun, base: Any, exponent: Any) -> Any:
    """Positive powers and exponentials: identity. Negative powers: a divisor. Power zero: the path ends."""
    if not isinstance(base, PathValue):
        return broadcast(exponent, base)
    if isinstance(exponent, PathValue):
        return add(run, base, exponent)
    if isinstance(exponent, (Learned, Weight, Combined)):
        exponent = exponent.tensor
    if isinstance(exponent, Tensor):
        low, high = (1.0, 1.0) if exponent.is_meta else (float(exponent.min()), float(exponent.max()))
    else:
        low = high = exponent
    if low > 0:
        return broadcast(base, exponent)
    if high < 0:
        return as_divisor(run, broadcast(base, exponent))
    if low == high == 0:
        return torch.ones_like(base.tensor, requires_grad=False)
    raise NoPathRuleError(f"powers from {low:g} to {high:g} mix factors and divisors")


def reverse_power(run: PathRun, exponent: Any, base: Any) -> Any:
    """`__rpow__`: base ** exponent."""
    return power(run, base, exponent)


def reverse_divide(run: PathRun, right: Any, left: Any) -> Any:
    """`__rtruediv__`: left / right."""
    return divide(run, left, right)


def addcmul(run: PathRun, base: Any, left: Any, right: Any, *, value: float = 1) -> Any:
    """base + value * left * right."""
    if not isinstance(left, PathValue) and not isinstance(right, PathValue):
        return broadcast(base, torch.empty(torch.broadcast_shapes(shape_of(left), shape_of(right))))
    return add(run, base, multiply(run, multiply(run, left, right), value))


def shape_of(item: Any) -> torch.Size:
    """Shape of a tensor-like operand, empty for a number."""
    if isinstance(item, (PathValue, Learned, Weight, Combined)):
        item = item.tensor
    return item.shape if isinstance(item, Tensor) else torch.Size()


def gated(run: PathRun, value: PathValue, dim: int = -1) -> Any:
    """Gated linear unit: the first half times the sigmoid of the second."""
    first, second = value.tensor.chunk(2, dim)
    return PathValue(balanced(first, second, False, True))


def maximum(run: PathRun, left: Any, right: Any) -> Any:
    """Maximum and minimum of two tensors: either may pass, so both sum."""
    return add(run, left, right)


def interpolated(run: PathRun, start: Any, end: Any, weight: Any) -> Any:
    """`lerp`: start times (1 - weight), end times weight."""
    if isinstance(weight, PathValue):
        raise NoPathRuleError("a mixture by data has no path rule; write it as a sum of products")
    share = raw(weight)
    parts = [
        multiply(run, item, factor) if isinstance(item, PathValue) else item
        for item, factor in ((start, 1 - share), (end, share))
    ]
    return add(run, *parts)


def clamp(run: PathRun, value: Any, min: Any = None, max: Any = None) -> Any:  # noqa: A002 - torch's names
    """Clamping by constants; limits that carry paths themselves have no rule."""
    if isinstance(min, PathValue) or isinstance(max, PathValue) or not isinstance(value, PathValue):
        raise NoPathRuleError("clamping by data has no path rule")
    return value


_ADD = (operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.subtract)
_MULTIPLY = (operator.mul, operator.imul, torch.mul, torch.multiply)
_DIVIDE = (operator.truediv, operator.itruediv, torch.div, torch.divide, torch.true_divide)
_IDENTITY_FUNCTIONS = (
    torch.as_tensor,
    operator.neg, operator.pos, abs, torch.neg, torch.negative, torch.abs, torch.exp, torch.expm1, torch.log,
    torch.log1p, torch.log2, torch.sqrt, torch.square, torch.clone, torch.detach, torch.relu, torch.relu_,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.celu, torch.selu, torch.prelu, torch.rrelu,
    torch.erf, torch.log_softmax, torch.nan_to_num, torch.floor, torch.ceil, torch.round, torch.trunc,
    torch.log10, F.relu, F.relu_, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu,
    F.mish, F.hardswish, F.softplus, F.softsign, F.celu, F.selu, F.prelu, F.rrelu, F.hardtanh, F.threshold,
    F.logsigmoid, F.log_softmax, F.hardshrink, F.softshrink, F.tanhshrink, F.dropout, F.dropout1d, F.dropout2d,
    F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.selu_, torch.celu_, torch.rrelu_, torch.threshold_, F.elu_, F.leaky_relu_, F.hardtanh_, torch.exp_,
    torch.abs_, torch.sqrt_, torch.neg_, torch.square_, torch.log_, torch.sin, torch.sin_, torch.cos, torch.cos_,
    torch.tan, torch.asin, torch.acos, torch.atan, torch.sinh, torch.cosh, torch.asinh, torch.acosh, torch.atanh,
    torch.sinc, torch.erfc, torch.erfinv, torch.exp2, torch.logit, torch.frac, torch.deg2rad, torch.rad2deg,
    torch.positive, torch.absolute, torch.i0, torch.lgamma, torch.digamma, torch.fmod, torch.remainder, operator.mod,
    torch.fake_quantize_per_tensor_affine, torch.fake_quantize_per_channel_affine,
)  # fmt: skip
_BOUNDED_FUNCTIONS = (
    torch.sigmoid, torch.tanh, torch.softmax, F.sigmoid, F.tanh, F.softmax, F.softmin, F.hardsigmoid, F.normalize,
    torch.sigmoid_, torch.tanh_, torch.special.expit, F.gumbel_softmax,
)  # fmt: skip
_IDENTITY_METHODS = [
    "neg",
    "neg_",
    "__neg__",
    "abs",
    "abs_",
    "__abs__",
    "exp",
    "exp_",
    "log",
    "log_",
    "log1p",
    "log2",
    "sqrt",
    "sqrt_",
    "square",
    "square_",
    "clone",
    "detach",
    "contiguous",
    "relu",
    "relu_",
    "float",
    "double",
    "half",
    "bfloat16",
    "cpu",
    "cuda",
    "log_softmax",
    "floor",
    "ceil",
    "round",
    "trunc",
    "nan_to_num",
    "erf",
    "requires_grad_",
    "dropout",
    "__pos__",
    "prelu",
    "hardshrink",
    *("sin", "sin_", "cos", "cos_", "tan", "asin", "acos", "atan", "arctan", "sinh", "cosh", "asinh", "acosh"),
    *("atanh", "sinc", "erfc", "erfinv", "exp2", "expm1", "log10", "logit", "frac", "deg2rad", "rad2deg", "absolute"),
    *("positive", "negative", "fmod", "remainder", "__mod__", "floor_", "ceil_", "round_", "trunc_", "nan_to_num_"),
]
_BOUNDED_METHODS = ["sigmoid", "sigmoid_", "tanh", "tanh_", "softmax"]

FAMILIES: dict[str, tuple[Any, ...]] = {
    "pairwise": (add, reverse_add, multiply, divide, reverse_divide, power, reverse_power, maximum),
    "same": (identity, bounded, cast, reciprocal),
    "addcmul": (addcmul,),
    "gated": (gated,),
    "clamp": (clamp,),
}

FUNCTIONS: dict[Any, Any] = {
    **dict.fromkeys(_ADD, add),
    **dict.fromkeys(_MULTIPLY, multiply),
    **dict.fromkeys(_DIVIDE, divide),
    **dict.fromkeys(_IDENTITY_FUNCTIONS, identity),
    **dict.fromkeys(_BOUNDED_FUNCTIONS, bounded),
    **dict.fromkeys((torch.clamp, torch.clip, torch.clamp_min, torch.clamp_max), clamp),
    **dict.fromkeys((operator.pow, operator.ipow, torch.pow, torch.float_power), power),
    **dict.fromkeys((torch.rsqrt, torch.reciprocal), reciprocal),
    **dict.fromkeys((torch.maximum, torch.minimum, torch.fmax, torch.fmin, torch.logaddexp, torch.hypot), maximum),
    torch.lerp: interpolated,
    torch.rsub: reverse_add,
    torch.addcmul: addcmul,
    F.glu: gated,
}  # fmt: skip

METHODS: dict[str, Any] = {
    **dict.fromkeys(["add", "add_", "__add__", "__radd__", "__iadd__", "sub", "sub_", "__sub__", "__isub__"], add),
    **dict.fromkeys(["__rsub__", "rsub"], reverse_add),
    **dict.fromkeys(["mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply", "multiply_"], multiply),
    **dict.fromkeys(["div", "div_", "__truediv__", "__itruediv__", "divide", "true_divide"], divide),
    **dict.fromkeys(["__rtruediv__", "__rdiv__"], reverse_divide),
    **dict.fromkeys(_IDENTITY_METHODS, identity),
    **dict.fromkeys(_BOUNDED_METHODS, bounded),
    **dict.fromkeys(["to", "type", "type_as"], cast),
    **dict.fromkeys(["clamp", "clamp_", "clip", "clip_", "clamp_min", "clamp_min_", "clamp_max", "clamp_max_"], clamp),
    **dict.fromkeys(["pow", "pow_", "__pow__", "float_power"], power),
    "__rpow__": reverse_power,
    **dict.fromkeys(["rsqrt", "rsqrt_", "reciprocal", "reciprocal_"], reciprocal),
    **dict.fromkeys(["maximum", "minimum", "fmax", "fmin", "logaddexp", "hypot"], maximum),
    **dict.fromkeys(["lerp", "lerp_"], interpolated),
    "addcmul": addcmul,
    "addcmul_": addcmul,
}  # fmt: skip
