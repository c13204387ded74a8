"""Path rules of what looks at data, and of parts of tensors: comparisons, indexing, filling, writing.

Selection by data has no rule: see `path_products.endings`.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.passes.operators.nests import map_leaves
from growfx.passes.path_products.rules.arithmetic import add
from growfx.passes.path_products.rules.shape import zeros_for_constants
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import (
    ComparedValue,
    Ended,
    NoPathRuleError,
    PathValue,
    broadcast,
    move,
    paths_in,
    raw,
)
from growfx.recorded.graph_ops import set_item

__all__ = ["FAMILIES", "FUNCTIONS", "METHODS", "SEES_ENDS"]


def judging(function: Callable[..., Any], /, run: PathRun, *args: Any, **kwargs: Any) -> Any:
    """A result that carries no path: a constant, executed on the path graph's values."""
    sources = tuple(paths_in(args, kwargs))
    with torch.no_grad():
        result = function(*raw(args), **raw(kwargs))
    return map_leaves(lambda item: ComparedValue(item, sources) if isinstance(item, Tensor) else item, result)


def get_item(run: PathRun, value: Any, index: Any) -> Any:
    """An element of a tuple or dict, or a part of a tensor."""
    return move(operator.getitem, value, index) if isinstance(value, PathValue) else value[raw(index)]


def write_item(run: PathRun, base: Any, index: Any, value: Any) -> Any:
    """`base[index] = value` in functional form; constants on either side count as zeros."""
    if isinstance(base, dict):
        return {**base, index: value}
    if paths_in(index):
        raise NoPathRuleError("indexing by data has no path rule")
    values = [item for item in (base, value) if isinstance(item, PathValue)]
    if any(isinstance(item, (ComparedValue, Ended)) for item in (index if isinstance(index, tuple) else (index,))):
        return _scattered(base, index, value)
    base, value = zeros_for_constants(run, (base, value))
    if isinstance(value, (int, float, complex)):
        value = 0
    return PathValue(set_item(base, raw(index), value), all(item.bounded for item in values))


def _scattered(base: Any, index: Any, value: Any) -> Any:
    """A write to places that data chose: what is written is spread evenly over all of them.

    Rows written to rows stay apart in the trailing dimensions. What was there before stays.
    """
    if not isinstance(value, PathValue):
        return base
    shape, tensor = raw(base).shape, value.tensor
    if not isinstance(index, tuple) and tensor.shape[1:] == shape[1:]:
        spread = tensor.sum(0, keepdim=True) / max(shape[0], 1)
    else:
        spread = tensor.sum() / max(shape.numel(), 1)
    spread = spread.expand(shape)
    return PathValue(base.tensor + spread if isinstance(base, PathValue) else spread)


def fill(run: PathRun, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
    """`masked_fill`: positions filled by a constant mask carry no path; a mask made from data may fill none."""
    if not isinstance(value, PathValue) or isinstance(mask, PathValue):
        raise NoPathRuleError("filling by data has no path rule")
    if isinstance(mask, (ComparedValue, Ended)):
        return broadcast(value, mask)
    return PathValue(value.tensor.masked_fill(raw(mask), 0.0), value.bounded, value.divisor, value.peak)


def where(run: PathRun, condition: Any, left: Any = None, right: Any = None, **kwargs: Any) -> Any:
    """A constant condition: the path operand where it is selected, zero elsewhere. Decided by data: either may pass."""
    left, right = kwargs.get("input", left), kwargs.get("other", right)
    if isinstance(condition, PathValue):
        raise NoPathRuleError("selection by data has no path rule; compare the activation with something")
    if isinstance(condition, (ComparedValue, Ended)):
        if left is right:
            return broadcast(left, condition)
        return broadcast(add(run, left, right), condition)
    values = [item for item in (left, right) if isinstance(item, PathValue)]
    if all(item.divisor for item in values):
        return move(torch.where, condition, left, right)
    zero = values[0].tensor.new_zeros(())
    sides = [zero if not isinstance(item, PathValue) else item.tensor for item in (left, right)]
    shapes = [raw(item).shape if isinstance(raw(item), Tensor) else () for item in (condition, left, right)]
    chosen = torch.where(raw(condition), *sides).expand(torch.broadcast_shapes(*shapes))
    return PathValue(chosen, all(item.bounded for item in values))


def method_where(run: PathRun, value: Any, condition: Any, other: Any) -> Any:
    """`value.where(condition, other)`."""
    return where(run, condition, value, other)


def new_tensor_like(function: Callable[..., Any], /, run: PathRun, value: PathValue, *args: Any, **kwargs: Any) -> Any:
    """`zeros_like`, `new_ones`, ...: a constant of the network's dtype."""
    with torch.no_grad():
        made = function(value.tensor.to(run.model_dtype), *raw(args), **raw(kwargs))
    return made


def zero_in_place(run: PathRun, value: PathValue) -> Any:
    """`zero_`: a constant from here on."""
    return torch.zeros_like(value.tensor, dtype=run.model_dtype, requires_grad=False)


def copy_in_place(run: PathRun, base: Any, source: Any, *args: Any) -> Any:
    """`copy_` onto a whole tensor: the source, in the base's shape."""
    shape = raw(base).shape
    return move(Tensor.expand, source, shape) if isinstance(source, PathValue) else raw(source).expand(shape)


_JUDGING_METHODS = [
    *("size", "dim", "numel", "nelement", "ndimension", "stride", "storage_offset", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_contiguous", "__len__", "__bool__", "item", "tolist"),
    *("eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__", "isclose"),
    *(
        "isnan",
        "isinf",
        "isfinite",
        "sign",
        "sgn",
        "heaviside",
        "aminmax",
        "argmax",
        "argmin",
        "argsort",
        "count_nonzero",
    ),
    *("long", "int", "short", "byte", "bool", "any", "all", "logical_not", "__invert__"),
]
_JUDGING_FUNCTIONS = (
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.is_, operator.is_not,
    operator.not_, operator.contains, torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge, torch.isnan,
    torch.isinf, torch.isfinite, torch.isclose, torch.argmax, torch.argmin, torch.argsort, torch.any, torch.all,
    torch.count_nonzero, F.one_hot, torch.numel, torch.is_tensor, torch.is_floating_point, torch.is_complex,
    torch.logical_not, torch.logical_and, torch.logical_or, torch.logical_xor, torch.sign, torch._assert, len, bool,
    builtins.isinstance, builtins.type, torch.is_grad_enabled, torch.aminmax,
)  # fmt: skip


def _step(value: Tensor, values: Tensor) -> Tensor:
    """`heaviside`, whatever the types."""
    return (value > 0).to(value.dtype)


_LIKE_METHODS = ["new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"]
_LIKE_FUNCTIONS = (
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like,
)  # fmt: skip

FAMILIES: dict[str, tuple[Any, ...]] = {
    "judging": (judging,),
    "get_item": (get_item,),
    "write_item": (write_item,),
    "fill": (fill,),
    "where": (where,),
    "method_where": (method_where,),
    "like": (new_tensor_like,),
    "zero_in_place": (zero_in_place,),
    "copy_in_place": (copy_in_place,),
}

FUNCTIONS: dict[Any, Any] = {
    **{function: partial(judging, function) for function in _JUDGING_FUNCTIONS},
    **{function: partial(new_tensor_like, function) for function in _LIKE_FUNCTIONS},
    torch.heaviside: partial(judging, _step),
    operator.getitem: get_item,
    set_item: write_item,
    torch.masked_fill: fill,
    torch.where: where,
}

METHODS: dict[str, Any] = {
    **{name: partial(judging, getattr(Tensor, name)) for name in _JUDGING_METHODS},
    **{name: partial(new_tensor_like, getattr(Tensor, name)) for name in _LIKE_METHODS},
    "heaviside": partial(judging, _step),
    "__getitem__": get_item,
    "masked_fill": fill,
    "masked_fill_": fill,
    "where": method_where,
    "zero_": zero_in_place,
    "copy_": copy_in_place,
}

# Rules that handle compared or selected values specially; the others see a compared value as a constant, and
# a factor of one in place of what was selected.
SEES_ENDS: frozenset[Callable[..., Any]] = frozenset({get_item, write_item, fill, where, method_where})
