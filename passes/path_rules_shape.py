"""Path rules of data movement: reshaping, joining, splitting, padding."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.passes.path_values import Learned, NoPathRuleError, PathValue, map_leaves, move, paths_in, raw

if TYPE_CHECKING:
    from growfx.passes.path_graph import PathGraph

__all__ = ["FUNCTIONS", "JOINING", "METHODS", "MOVING_FUNCTIONS", "MOVING_METHODS", "zeros_for_constants"]


def moving(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function that is executed as it is; a constant moved into an activation's shape stays one."""

    def rule(run: PathGraph, value: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(value, PathValue):
            return move(function, value, *args, **kwargs)
        with torch.no_grad():
            moved = function(*raw((value, *args)), **raw(kwargs))
        return Learned(moved) if isinstance(value, Learned) and isinstance(moved, Tensor) else moved

    return rule


def zeros_for_constants(run: PathGraph, nest: Any) -> Any:
    """The nest with zeros in place of constant tensors: joined to path values they carry no path."""
    dtype = paths_in(nest)[0].tensor.dtype

    def replace(item: Any) -> Any:
        if isinstance(item, PathValue):
            return torch.zeros_like(item.tensor) if item.divisor else item.tensor
        tensor = raw(item)
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


def broadcasting(run: PathGraph, *tensors: Any) -> Any:
    """`broadcast_tensors`: each in the common shape; constants stay constants."""
    items = list(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else list(tensors)
    shape = torch.broadcast_shapes(*(raw(item).shape for item in items))
    return [moving(Tensor.expand)(run, item, shape) for item in items]


def padding(run: PathGraph, input: PathValue, pad: Any, mode: str = "constant", value: Any = None) -> Any:  # noqa: A002
    """Padding; a constant is written as zero, whatever its value (-inf before a maximum must not leak in)."""
    return move(F.pad, input, pad, mode=mode)


def attribute(run: PathGraph, value: Any, name: str, *default: Any) -> Any:
    """`getattr`: shapes and the like are constants; the dtype is the network's, not the path graph's."""
    if not isinstance(value, PathValue):
        return getattr(value, name, *default)
    if name == "dtype":
        return run.model_dtype
    if name in ("real", "imag"):  # one magnitude stands for both
        return value.same(bounded=False)
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
        "select",
        "narrow",
        "roll",
        "flip",
        "fliplr",
        "flipud",
        "rot90",
        "unfold",
        "gather",
        "masked_select",
        "take",
        "take_along_dim",
        "broadcast_to",
        "diagonal",
        "t",
        "adjoint",
        "tril",
        "triu",
        "sum",
        "cumsum",
        "nansum",
        "ravel",
        "diag_embed",
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
    F.pixel_unshuffle, F.channel_shuffle, torch.repeat_interleave, torch.masked_select, torch.diag_embed,
)  # fmt: skip

_CHANGES_SUM = {"sum", "cumsum", "nansum"}


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
JOINING = (
    torch.cat,
    torch.concat,
    torch.concatenate,
    torch.stack,
    torch.hstack,
    torch.vstack,
    torch.dstack,
    torch.column_stack,
)

FUNCTIONS: dict[Any, Any] = {
    **{function: moving(function) for function in MOVING_FUNCTIONS},
    **{function: _summed(function) for function in _SUMMING},
    **{function: joining(function) for function in JOINING},
    **dict.fromkeys((torch.broadcast_tensors, torch.functional.broadcast_tensors), broadcasting),
    F.pad: padding,
    builtins.getattr: attribute,
}

METHODS: dict[str, Any] = {
    **{name: moving(function) for name, function in MOVING_METHODS.items()},
    **{name: _summed(MOVING_METHODS[name]) for name in _CHANGES_SUM},
}
