"""Path rules of data movement: reshaping, joining, splitting, padding."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.passes.operators.names import MOVING_FUNCTIONS, MOVING_METHODS
from growfx.passes.operators.nests import map_leaves
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import Learned, NoPathRuleError, PathValue, move, paths_in, raw

__all__ = ["FAMILIES", "FUNCTIONS", "JOINING", "METHODS", "zeros_for_constants"]


def moving(function: Callable[..., Any], /, run: PathRun, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a function that moves elements; a constant moved into an activation's shape stays one."""
    if isinstance(value, PathValue):
        return move(function, value, *args, **kwargs)
    with torch.no_grad():
        moved = function(*raw((value, *args)), **raw(kwargs))
    return Learned(moved) if isinstance(value, Learned) and isinstance(moved, Tensor) else moved


def zeros_for_constants(run: PathRun, nest: Any) -> Any:
    """The nest with zeros in place of constant tensors: joined to path values they carry no path."""
    dtype = paths_in(nest)[0].tensor.dtype

    def replace(item: Any) -> Any:
        if isinstance(item, PathValue):
            return torch.zeros_like(item.tensor) if item.divisor else item.tensor
        tensor = raw(item)
        return torch.zeros_like(tensor, dtype=dtype) if isinstance(tensor, Tensor) else item

    return map_leaves(replace, nest)


def joining(function: Callable[..., Any], /, run: PathRun, tensors: Any, *args: Any, **kwargs: Any) -> Any:
    """`cat`, `stack` and their like: executed, constants replaced by zeros."""
    sources = [source for source in paths_in(tensors) if not source.divisor]
    if not sources:
        return move(function, tensors, *args, **kwargs)
    joined = function(zeros_for_constants(run, tensors), *raw(args), **raw(kwargs))
    return PathValue(joined, all(source.bounded for source in sources), peak=None)


def building(container: type, run: PathRun, /, *args: Any, **kwargs: Any) -> Any:
    """A container of what there is."""
    return container(*args, **kwargs)


def broadcasting(run: PathRun, *tensors: Any) -> Any:
    """`broadcast_tensors`: each in the common shape; constants stay constants."""
    items = list(tensors[0]) if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)) else list(tensors)
    shape = torch.broadcast_shapes(*(raw(item).shape for item in items))
    return [moving(Tensor.expand, run, item, shape) for item in items]


def padding(run: PathRun, input: PathValue, pad: Any, mode: str = "constant", value: Any = None) -> Any:  # noqa: A002
    """Padding; a constant is written as zero, whatever its value (-inf before a maximum must not leak in)."""
    return move(F.pad, input, pad, mode=mode)


def attribute(run: PathRun, value: Any, name: str, *default: Any) -> Any:
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


_CHANGES_SUM = {"sum", "cumsum", "nansum"}


def _summed(function: Callable[..., Any], /, run: PathRun, *args: Any, **kwargs: Any) -> Any:
    """Sums run as they are, but their results may be larger than what they add up."""
    kwargs.pop("dtype", None)
    result = move(function, *args, **kwargs)
    return map_leaves(lambda item: _unknown_peak(item), result)


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

FAMILIES: dict[str, tuple[Any, ...]] = {
    "moving": (moving,),
    "joining": (joining,),
    "container": (building,),
    "padding": (padding,),
    "attribute": (attribute,),
    "summed": (_summed,),
}

FUNCTIONS: dict[Any, Any] = {
    **{function: partial(moving, function) for function in MOVING_FUNCTIONS},
    **{function: partial(_summed, function) for function in _SUMMING},
    **{function: partial(joining, function) for function in JOINING},
    **dict.fromkeys((torch.broadcast_tensors, torch.functional.broadcast_tensors), broadcasting),
    F.pad: padding,
    builtins.getattr: attribute,
}

METHODS: dict[str, Any] = {
    **{name: partial(moving, function) for name, function in MOVING_METHODS.items()},
    **{name: partial(_summed, MOVING_METHODS[name]) for name in _CHANGES_SUM},
}
