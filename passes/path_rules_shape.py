"""Path rules of data movement: reshaping, joining, splitting, indexing, padding; and of where paths end."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.graph_ops import set_item
from growfx.passes.path_values import (
    Learned,
    NoPathRuleError,
    PathValue,
    Weight,
    map_leaves,
    move,
    paths_in,
    raw,
)

if TYPE_CHECKING:
    from growfx.passes.path_graph import PathGraph

__all__ = ["FUNCTIONS", "METHODS", "MOVING_FUNCTIONS", "MOVING_METHODS"]


def moving(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function that is executed as it is."""

    def rule(run: PathGraph, *args: Any, **kwargs: Any) -> Any:
        return move(function, *args, **kwargs)

    return rule


def ending(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function whose result carries no path: the result is a constant."""

    def rule(run: PathGraph, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*raw(args), **raw(kwargs))

    return rule


def zeros_for_constants(run: PathGraph, nest: Any) -> Any:
    """The nest with zeros in place of constant tensors: joined to path values they carry no path."""
    dtype = paths_in(nest)[0].tensor.dtype

    def replace(item: Any) -> Any:
        if isinstance(item, PathValue):
            return torch.zeros_like(item.tensor) if item.divisor else item.tensor
        tensor = item.tensor if isinstance(item, (Learned, Weight)) else item
        return torch.zeros_like(tensor, dtype=dtype) if isinstance(tensor, Tensor) else item

    return map_leaves(replace, nest)


def joining(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of `cat`, `stack` and their like: executed, constants replaced by zeros."""

    def rule(run: PathGraph, tensors: Any, *args: Any, **kwargs: Any) -> Any:
        sources = [source for source in paths_in(tensors) if not source.divisor]
        if not sources:
            return move(function, tensors, *args, **kwargs)
        joined = function(zeros_for_constants(run, tensors), *raw(args), **raw(kwargs))
        return PathValue(joined, all(source.bounded for source in sources), peak=None)

    return rule


def get_item(run: PathGraph, value: Any, index: Any) -> Any:
    """An element of a tuple or dict, or a part of a tensor."""
    if isinstance(value, PathValue):
        return move(operator.getitem, value, index)
    if paths_in(index):
        raise NoPathRuleError("indexing by data has no path rule")
    return value[raw(index)]


def write_item(run: PathGraph, base: Any, index: Any, value: Any) -> Any:
    """`base[index] = value` in functional form; constants on either side count as zeros."""
    if isinstance(base, dict):
        return {**base, index: value}
    if paths_in(index):
        raise NoPathRuleError("indexing by data has no path rule")
    values = [item for item in (base, value) if isinstance(item, PathValue)]
    base, value = zeros_for_constants(run, (base, value))
    if isinstance(value, (int, float, complex)):
        value = 0
    return PathValue(set_item(base, raw(index), value), all(item.bounded for item in values))


def padding(run: PathGraph, input: PathValue, pad: Any, mode: str = "constant", value: Any = None) -> Any:  # noqa: A002
    """Padding; a constant is written as zero, whatever its value (-inf before a maximum must not leak in)."""
    return move(F.pad, input, pad, mode=mode)


def fill(run: PathGraph, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
    """`masked_fill`: filled positions carry no path."""
    if not isinstance(value, PathValue) or isinstance(mask, PathValue):
        raise NoPathRuleError("filling by data has no path rule")
    return PathValue(value.tensor.masked_fill(raw(mask), 0.0), value.bounded, value.divisor, value.peak)


def where(run: PathGraph, condition: Any, left: Any = None, right: Any = None) -> Any:
    """Selection by a constant condition: the path operand where it is selected, zero elsewhere."""
    if isinstance(condition, PathValue) or left is None:
        raise NoPathRuleError("selection by data has no path rule")
    values = [item for item in (left, right) if isinstance(item, PathValue)]
    if all(item.divisor for item in values):
        return move(torch.where, condition, left, right)
    zero = values[0].tensor.new_zeros(())
    sides = [zero if not isinstance(item, PathValue) else item.tensor for item in (left, right)]
    shapes = [raw(item).shape if isinstance(raw(item), Tensor) else () for item in (condition, left, right)]
    chosen = torch.where(raw(condition), *sides).expand(torch.broadcast_shapes(*shapes))
    return PathValue(chosen, all(item.bounded for item in values))


def interpolate(run: PathGraph, value: PathValue, *args: Any, **kwargs: Any) -> Any:
    """Resampling; bicubic weights have negative lobes, so bilinear ones stand for them."""
    args = tuple("bilinear" if item == "bicubic" else item for item in raw(args))
    kwargs = {name: "bilinear" if item == "bicubic" else item for name, item in raw(kwargs).items()}
    return move(F.interpolate, value, *args, **kwargs)


def attribute(run: PathGraph, value: Any, name: str, *default: Any) -> Any:
    """`getattr`: shapes and the like are constants; the dtype is the network's, not the path graph's."""
    if not isinstance(value, PathValue):
        return getattr(value, name, *default)
    if name == "dtype":
        return run.model_dtype
    if name in ("T", "mT", "H", "mH"):
        return move(getattr, value, name)
    if name in (
        "shape",
        "device",
        "ndim",
        "is_cuda",
        "is_cpu",
        "layout",
        "requires_grad",
        "is_quantized",
        "is_sparse",
    ):
        return getattr(value.tensor, name)
    raise NoPathRuleError(f"attribute `{name}` of an activation has no path rule")


def new_tensor_like(function: Callable[..., Any]) -> Callable[..., Any]:
    """`zeros_like`, `new_ones`, ...: a constant of the network's dtype."""

    def rule(run: PathGraph, value: PathValue, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            made = function(value.tensor.to(run.model_dtype), *raw(args), **raw(kwargs))
        return made

    return rule


def zero_in_place(run: PathGraph, value: PathValue) -> Any:
    """`zero_`: a constant from here on."""
    return torch.zeros_like(value.tensor, dtype=run.model_dtype, requires_grad=False)


def copy_in_place(run: PathGraph, base: Any, source: Any, *args: Any) -> Any:
    """`copy_` onto a whole tensor: the source, in the base's shape."""
    shape = raw(base).shape
    return move(Tensor.expand, source, shape) if isinstance(source, PathValue) else raw(source).expand(shape)


MOVING_METHODS: dict[str, Callable[..., Any]] = {
    name: getattr(Tensor, name)
    for name in [
        "reshape",
        "reshape_as",
        "permute",
        "transpose",
        "transpose_",
        "swapaxes",
        "swapdims",
        "movedim",
        "moveaxis",
        "flatten",
        "unflatten",
        "squeeze",
        "squeeze_",
        "unsqueeze",
        "unsqueeze_",
        "expand",
        "expand_as",
        "repeat",
        "tile",
        "repeat_interleave",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
        "index_select",
        "__getitem__",
        "select",
        "narrow",
        "roll",
        "flip",
        "fliplr",
        "flipud",
        "rot90",
        "unfold",
        "gather",
        "take",
        "take_along_dim",
        "broadcast_to",
        "diagonal",
        "t",
        "adjoint",
        "masked_select",
        "tril",
        "triu",
        "sum",
        "cumsum",
        "nansum",
        "ravel",
    ]
}
MOVING_METHODS["view"] = Tensor.reshape
MOVING_METHODS["view_as"] = Tensor.reshape_as

MOVING_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    torch.reshape, torch.permute, torch.transpose, torch.swapaxes, torch.swapdims, torch.movedim, torch.moveaxis,
    torch.flatten, torch.unflatten, torch.squeeze, torch.unsqueeze, torch.tile, torch.chunk, torch.split,
    torch.functional.split,
    torch.tensor_split, torch.unbind, torch.index_select, torch.select, torch.narrow, torch.roll,
    torch.flip, torch.fliplr, torch.flipud, torch.rot90, torch.gather, torch.take, torch.take_along_dim,
    torch.broadcast_to, torch.diagonal, torch.t, torch.sum, torch.cumsum, torch.tril, torch.triu, torch.adjoint,
    torch.ravel, torch.channel_shuffle, torch.pixel_shuffle, torch.pixel_unshuffle, F.unfold, F.fold, F.pixel_shuffle,
    F.pixel_unshuffle, F.channel_shuffle, torch.repeat_interleave, torch.masked_select,
)  # fmt: skip

_CHANGES_SUM = {"sum", "cumsum", "nansum"}
_CONSTANT_METHODS = [
    "size",
    "dim",
    "numel",
    "nelement",
    "ndimension",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "stride",
    "storage_offset",
    "element_size",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "__eq__",
    "__ne__",
    "__lt__",
    "__le__",
    "__gt__",
    "__ge__",
    "isnan",
    "isinf",
    "isfinite",
    "argmax",
    "argmin",
    "argsort",
    "topk",
    "sort",
    "long",
    "int",
    "bool",
    "nonzero",
    "any",
    "all",
    "item",
    "tolist",
    "__len__",
    "__bool__",
    "logical_not",
    "__invert__",
    "multinomial",
    "bincount",
    "sign",
]
_ENDING_FUNCTIONS = (
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.is_, operator.is_not,
    operator.not_, operator.contains, torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge, torch.isnan,
    torch.isinf, torch.isfinite, torch.argmax, torch.argmin, torch.argsort, torch.topk, torch.sort, torch.any,
    torch.all, torch.nonzero, F.one_hot, torch.numel, torch.is_tensor, torch.is_floating_point, torch.is_complex,
    torch.logical_not, torch.logical_and, torch.logical_or, torch.sign, torch._assert, len, bool, builtins.isinstance,
    builtins.type, torch.is_grad_enabled,
)  # fmt: skip
_LIKE_METHODS = ["new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"]
_LIKE_FUNCTIONS = (
    torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.rand_like, torch.randn_like,
)  # fmt: skip


def _summed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Sums run as they are, but their results may be larger than what they add up."""

    def rule(run: PathGraph, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("dtype", None)
        result = move(function, *args, **kwargs)
        return map_leaves(lambda item: _unknown_peak(item), result)

    return rule


def _unknown_peak(item: Any) -> Any:
    return PathValue(item.tensor, False, item.divisor) if isinstance(item, PathValue) else item


_SUMMING = (torch.sum, torch.cumsum, F.fold)
_JOINING = (torch.cat, torch.concat, torch.concatenate, torch.stack, torch.hstack, torch.vstack, torch.dstack)

FUNCTIONS: dict[Any, Any] = {
    **{function: moving(function) for function in MOVING_FUNCTIONS},
    **{function: _summed(function) for function in _SUMMING},
    **{function: ending(function) for function in _ENDING_FUNCTIONS},
    **{function: joining(function) for function in _JOINING},
    **{function: new_tensor_like(function) for function in _LIKE_FUNCTIONS},
    operator.getitem: get_item,
    set_item: write_item,
    F.pad: padding,
    F.interpolate: interpolate,
    torch.masked_fill: fill,
    torch.where: where,
    builtins.getattr: attribute,
}

METHODS: dict[str, Any] = {
    **{name: moving(function) for name, function in MOVING_METHODS.items()},
    **{name: _summed(MOVING_METHODS[name]) for name in _CHANGES_SUM},
    **{name: ending(getattr(Tensor, name)) for name in _CONSTANT_METHODS},
    **{name: new_tensor_like(getattr(Tensor, name)) for name in _LIKE_METHODS},
    "__getitem__": get_item,
    "masked_fill": fill,
    "masked_fill_": fill,
    "where": lambda run, value, condition, other: where(run, condition, value, other),
    "zero_": zero_in_place,
    "copy_": copy_in_place,
}
