"""Rules of operators on single numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from growfx.passes.lower.plan.builder import Arguments, Builder, NoKernelError, Rule, as_number, view_ops
from growfx.passes.lower.plan.calls import Reference
from growfx.passes.lower.plan.graph import Chained, Node, Operand
from growfx.runtime.native.plan import OPERATIONS, Shape, Size

__all__ = ["RULES"]


def _one(*operations: str) -> Rule:
    """Operations of a tensor and nothing else; an overload with more arguments is another operation."""

    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
        x, *more = a.values()
        if more:
            raise NoKernelError(f"with `{list(a)[1]}`")
        return b.pointwise(b.operand(x), shapes[0], *(Chained(name) for name in operations))

    return rule


def _with(made: Callable[[Arguments], Sequence[Chained]]) -> Rule:
    """Operations made of the call's numbers."""

    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
        return b.pointwise(b.operand(a["self"]), shapes[0], *made(a))

    return rule


def _bound(value: Any, otherwise: float) -> float:
    return otherwise if value is None else float(value)


def _clamped(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    """Between bounds that are numbers or tensors."""
    x, rest = b.operand(a["self"]), dict(a)
    for name, operation in (("min", "maximum"), ("max", "minimum")):
        if isinstance(bound := a.get(name), Reference):
            x, rest[name] = b.add("binary", [x, b.operand(bound)], shapes[0], [OPERATIONS.index(operation)]), None
    if rest.get("min", rest.get("min_val")) is None and rest.get("max", rest.get("max_val")) is None:
        return x
    return b.pointwise(x, shapes[0], *_clamp(rest))


def _clamp(a: Arguments) -> list[Chained]:
    low = _bound(a.get("min", a.get("min_val")), -math.inf)
    high = _bound(a.get("max", a.get("max_val")), math.inf)
    return [Chained("relu")] if (low, high) == (0, math.inf) else [Chained("clamp", a=low, b=high)]


def _gelu(a: Arguments) -> list[Chained]:
    return [Chained("gelu_tanh" if a["approximate"] == "tanh" else "gelu")]


def _softplus(a: Arguments) -> list[Chained]:
    beta = float(a["beta"])
    if a["threshold"] != 20:
        raise NoKernelError("with another threshold than 20")
    if beta == 1:
        return [Chained("softplus")]
    return [Chained("scale", a=beta), Chained("softplus"), Chained("scale", a=1 / beta)]


def _round(a: Arguments) -> list[Chained]:
    decimals = int(a.get("decimals") or 0)
    if not decimals:
        return [Chained("round")]
    power = 10.0 ** abs(decimals)
    there, back = (power, 1 / power) if decimals > 0 else (1 / power, power)
    return [Chained("scale", a=there), Chained("round"), Chained("scale", a=back)]


def _elu(a: Arguments) -> list[Chained]:
    if a["input_scale"] != 1:
        raise NoKernelError("with an `input_scale`")
    return [Chained("elu", a=float(a["alpha"]) * float(a["scale"]), b=float(a["scale"]))]


def _celu(a: Arguments) -> list[Chained]:
    alpha = float(a["alpha"])
    return [Chained("scale", a=1 / alpha), Chained("elu", a=alpha, b=alpha)]


def _power(a: Arguments) -> list[Chained]:
    exponent = float(a["exponent"])
    known = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
    return [Chained(known[exponent])] if exponent in known else [Chained("power", a=exponent)]


def _compare(operation: str, of_numbers: str | None = None) -> Rule:
    """A comparison; `of_numbers` is what compares with a number at the end of a step, where there is one."""

    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
        x, other = b.operand(a["self"]), a["other"]
        if isinstance(other, Size):
            raise NoKernelError("with a number that grows with the batch")
        if isinstance(other, Reference):
            return b.add("binary", [x, b.operand(other)], shapes[0], [OPERATIONS.index(operation)])
        if of_numbers:
            return b.pointwise(x, shapes[0], Chained(of_numbers, a=float(other)))
        return b.add("binary", [x, b.constant(torch.tensor(float(other)))], shapes[0], [OPERATIONS.index(operation)])

    return rule


# Of a truth value.
_NOT: Final = Chained("scale", a=-1.0, b=1.0)


def _unequal(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    equal = _compare("equal_to", "equal")(b, a, shapes)
    assert isinstance(equal, Node)
    return b.pointwise(equal, shapes[0], _NOT)


def _logical_not(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    return b.pointwise(b.operand(a["self"]), shapes[0], Chained("equal", a=0.0))


def _logical(operation: str, *, bitwise: bool = False) -> Callable[[Builder, Arguments, Sequence[Shape]], Node]:
    """An operation of two truth values; bits of numbers are not to be had from their values."""

    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
        sides = a["self"], a["other"]
        if bitwise and not all(map(b.is_bool, sides)):
            raise NoKernelError("of integers")
        found = [
            b.truth(side) if isinstance(side, Reference) else b.constant(torch.tensor(bool(side))) for side in sides
        ]
        made = b.add("binary", found, shapes[0], [OPERATIONS.index(operation)])
        return b.pointwise(made, shapes[0], _NOT) if operation == "equal_to" else made

    return rule


def _bitwise_not(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    if not b.is_bool(a["self"]):
        raise NoKernelError("of integers")
    return _logical_not(b, a, shapes)


def _binary(operation: str, turned: str) -> Rule:
    """An operation of two tensors, or a tensor and a number; `turned` is the one with its operands exchanged."""

    def rule(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
        first, second = a["self"], a["other"]
        alpha = _alpha(a)
        if a.get("rounding_mode") is not None:
            raise NoKernelError("with a `rounding_mode`")
        if isinstance(second, Size):
            raise NoKernelError("with a number that grows with the batch")
        if operation == "add" and b.is_bool(first) and b.is_bool(second):
            if alpha != 1:
                raise NoKernelError("of truth values with an `alpha`")
            return _logical("maximum")(b, a, shapes)  # a sum of truth values is one
        if not isinstance(second, Reference):
            return b.pointwise(b.operand(first), shapes[0], _scalar(operation, float(second) * alpha))
        if _is_number(b, second) and not _is_number(b, first):
            value = float(b.value(second)) * alpha
            return b.pointwise(b.operand(first), shapes[0], _scalar(operation, value))
        if _is_number(b, first) and alpha == 1 and not _is_number(b, second):
            return b.pointwise(b.operand(second), shapes[0], _scalar(turned, float(b.value(first))))
        right = b.operand(second)
        if alpha != 1:
            right = b.pointwise(right, b.shape(second), Chained("scale", a=alpha))
        return b.add("binary", [b.operand(first), right], shapes[0], [OPERATIONS.index(operation)])

    return rule


def _alpha(a: Arguments) -> float:
    return 1.0 if a.get("alpha") is None else float(a["alpha"])


def _is_number(b: Builder, reference: Reference) -> bool:
    return b.is_constant(reference) and all(size == (0, 1) for size in b.shape(reference))


def _scalar(operation: str, value: float) -> Chained:
    """An operation with one number, which for the common ones is a factor and a summand."""
    factors = {
        "add": (1.0, value),
        "sub": (1.0, -value),
        "rsub": (-1.0, value),
        "mul": (value, 0.0),
    }
    if operation == "div" and value != 0:
        factors["div"] = (1 / value, 0.0)
    if operation in factors:
        return Chained("scale", a=factors[operation][0], b=factors[operation][1])
    if operation in ("maximum", "minimum"):
        low, high = (value, math.inf) if operation == "maximum" else (-math.inf, value)
        return Chained("clamp", a=low, b=high)
    raise NoKernelError(f"of a tensor and the number {value}")


def _rsub(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Operand:
    if isinstance(a["other"], Reference):
        raise NoKernelError("of two tensors")
    return b.pointwise(b.operand(a["self"]), shapes[0], Chained("scale", a=-_alpha(a), b=float(a["other"])))


def _power_of_tensors(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    if isinstance(a["exponent"], Reference) or not isinstance(a["self"], Reference):
        raise NoKernelError("of an exponent that is a tensor")
    return b.pointwise(b.operand(a["self"]), shapes[0], *_power(a))


def _select(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    return b.add("select", [b.operand(a[name]) for name in ("condition", "self", "other")], shapes[0])


def _masked_fill(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    value, dtype = a["value"], b.dtype(a["self"])
    if isinstance(value, Reference):
        filled = b.converted(value, dtype)
    else:
        filled = b.constant(torch.tensor(as_number(value, dtype)))
    return b.add("select", [b.operand(a["mask"]), filled, b.operand(a["self"])], shapes[0])


def _prelu(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    """relu(x) - weight * relu(-x)."""
    x, shape = b.operand(a["self"]), shapes[0]
    above = b.pointwise(x, shape, Chained("relu"))
    below = b.pointwise(x, shape, Chained("scale", a=-1.0), Chained("relu"))
    scaled = b.add("binary", [below, b.operand(a["weight"])], shape, [OPERATIONS.index("mul")])
    return b.add("binary", [above, scaled], shape, [OPERATIONS.index("sub")])


def _addcmul(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    product = b.add("binary", [b.operand(a["tensor1"]), b.operand(a["tensor2"])], shapes[0], [1])
    if float(a["value"]) != 1:
        product = b.pointwise(product, shapes[0], Chained("scale", a=float(a["value"])))
    return b.add("binary", [b.operand(a["self"]), product], shapes[0], [0])


def _lerp(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    start, end, weight = b.operand(a["self"]), b.operand(a["end"]), a["weight"]
    difference = b.add("binary", [end, start], shapes[0], [OPERATIONS.index("sub")])
    if isinstance(weight, Reference):
        part = b.add("binary", [difference, b.operand(weight)], shapes[0], [1])
    else:
        part = b.pointwise(difference, shapes[0], Chained("scale", a=float(weight)))
    return b.add("binary", [start, part], shapes[0], [0])


def _glu(b: Builder, a: Arguments, shapes: Sequence[Shape]) -> Node:
    shape = b.shape(a["self"])
    axis = a["dim"] % len(shape)
    x, half = b.operand(a["self"]), shapes[0][axis]
    value = b.view(x, view_ops.slice(axis, 0, 1, half), shapes[0])
    gate = b.view(x, view_ops.slice(axis, half.fixed, 1, half), shapes[0])
    return b.add("binary", [value, b.pointwise(gate, shapes[0], Chained("sigmoid"))], shapes[0], [1])


RULES: Final[dict[str, Rule]] = {
    "aten._prelu_kernel": _prelu,
    "aten.abs": _one("abs"),
    "aten.add": _binary("add", "add"),
    "aten.addcmul": _addcmul,
    **dict.fromkeys(("aten.clamp", "aten.clamp_min", "aten.clamp_max", "aten.hardtanh"), _clamped),
    "aten.bitwise_and": _logical("mul", bitwise=True),
    "aten.bitwise_not": _bitwise_not,
    "aten.bitwise_or": _logical("maximum", bitwise=True),
    "aten.bitwise_xor": _logical("equal_to", bitwise=True),
    "aten.celu": _with(_celu),
    "aten.cos": _one("cos"),
    "aten.div": _binary("div", "rdiv"),
    "aten.elu": _with(_elu),
    "aten.eq": _compare("equal_to", "equal"),
    "aten.erf": _one("erf"),
    "aten.exp": _one("exp"),
    "aten.floor": _one("floor"),
    "aten.ge": _compare("at_least"),
    "aten.gelu": _with(_gelu),
    "aten.glu": _glu,
    "aten.gt": _compare("greater_than", "greater"),
    "aten.hardsigmoid": _one("hard_sigmoid"),
    "aten.hardswish": _one("hard_swish"),
    "aten.le": _compare("at_most"),
    "aten.leaky_relu": _with(lambda a: [Chained("leaky", a=float(a["negative_slope"]))]),
    "aten.lerp": _lerp,
    "aten.log": _one("log"),
    "aten.logical_and": _logical("mul"),
    "aten.logical_not": _logical_not,
    "aten.logical_or": _logical("maximum"),
    "aten.logical_xor": _logical("equal_to"),
    "aten.lt": _compare("less_than", "less"),
    "aten.masked_fill": _masked_fill,
    "aten.maximum": _binary("maximum", "maximum"),
    "aten.minimum": _binary("minimum", "minimum"),
    "aten.mish": _one("mish"),
    "aten.mul": _binary("mul", "mul"),
    "aten.ne": _unequal,
    "aten.neg": _with(lambda a: [Chained("scale", a=-1.0)]),
    "aten.pow": _power_of_tensors,
    "aten.reciprocal": _one("reciprocal"),
    "aten.relu": _one("relu"),
    "aten.relu6": _with(lambda a: [Chained("clamp", a=0.0, b=6.0)]),
    "aten.round": _with(_round),
    "aten.rsqrt": _one("rsqrt"),
    "aten.rsub": _rsub,
    "aten.sigmoid": _one("sigmoid"),
    "aten.silu": _one("silu"),
    "aten.sin": _one("sin"),
    "aten.softplus": _with(_softplus),
    "aten.sqrt": _one("sqrt"),
    "aten.square": _one("square"),
    "aten.sub": _binary("sub", "rsub"),
    "aten.tanh": _one("tanh"),
    "aten.where": _select,
}
