"""Path rules of statistics and pooling: all of them average."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from growfx.passes.path_products.rules.arithmetic import add
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import ComparedValue, Ended, NoPathRuleError, PathValue, raw

__all__ = ["FAMILIES", "FUNCTIONS", "METHODS", "adaptive", "padded_window", "window", "with_indices"]

_AVERAGE = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def mean(run: PathRun, value: PathValue, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Mean over the dims; all of them when `dim` is None."""
    dims = tuple(range(value.tensor.ndim)) if dim is None or dim == () else dim
    return PathValue(value.tensor.mean(dims, keepdim=keepdim), divisor=value.divisor, peak=value.peak)


def spread(
    run: PathRun,
    value: PathValue,
    dim: Any = None,
    unbiased: bool = True,
    keepdim: bool = False,
    **kwargs: Any,
) -> Any:
    """Variance and standard deviation: the mean."""
    return mean(run, value, None if isinstance(dim, bool) else dim, keepdim)


def spread_and_mean(run: PathRun, value: PathValue, *args: Any, **kwargs: Any) -> Any:
    """`var_mean`, `std_mean`."""
    averaged = spread(run, value, *args, **kwargs)
    return averaged, averaged.same()


def norm(run: PathRun, value: PathValue, p: Any = "fro", dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    """Norms: the mean, so that they scale like what they measure."""
    return mean(run, value, dim, keepdim)


def distance(run: PathRun, x1: Any, x2: Any, *args: Any, **kwargs: Any) -> Any:
    """`cdist`: a norm, so the mean over coordinates, of each row of either side; a constant side carries no path."""
    sides = [
        item.tensor.mean(-1).unsqueeze(dim) if isinstance(item, PathValue) else raw(item)[..., 0].unsqueeze(dim)
        for item, dim in ((x1, -1), (x2, -2))
    ]
    values = [
        PathValue(side) if isinstance(item, PathValue) else side for side, item in zip(sides, (x1, x2), strict=True)
    ]
    return add(run, *values)


def extreme(
    function: Callable[..., Any], /, run: PathRun, value: Any, dim: Any = None, keepdim: bool = False, other: Any = None
) -> Any:
    """`max`, `min`, `median`: of all elements or over a dim, the mean; of two tensors, the sum."""
    other = dim if isinstance(dim, (Tensor, PathValue)) or not isinstance(value, PathValue) else other
    if other is not None:
        return add(run, value, other)
    if dim is None:
        return mean(run, value)
    with torch.no_grad():
        indices = function(value.tensor, dim, keepdim=keepdim)[1]
    return mean(run, value, dim, keepdim), ComparedValue(indices, (value,))


def _same_for_all(option: Any, spatial: int) -> tuple[int, ...]:
    return (option,) * spatial if isinstance(option, int) else tuple(option) * (spatial // len(option))


def window(
    tensor: Tensor,
    spatial: int,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Average over windows, padding not counted."""
    if any(step != 1 for step in _same_for_all(dilation, spatial)):
        raise NoPathRuleError("dilated pooling has no path rule")
    stride = kernel if stride is None or stride == () or stride == [] else stride
    margins = _same_for_all(padding, spatial)
    if spatial == 2 and all(2 * margin <= side for margin, side in zip(margins, _same_for_all(kernel, 2), strict=True)):
        return F.avg_pool2d(tensor, kernel, stride, padding, ceil_mode, count_include_pad=False)
    if not any(margins):
        return _AVERAGE[spatial](tensor, kernel, stride, 0, ceil_mode, count_include_pad=False)
    around = [margin for margin in reversed(margins) for _ in (0, 1)]
    return padded_window(tensor, around, spatial, kernel, stride, ceil_mode)


def padded_window(
    tensor: Tensor, around: list[int], spatial: int, kernel: Any, stride: Any, ceil_mode: bool = False
) -> Tensor:
    """Average over windows of a tensor padded by `around` (as in `F.pad`), dividing by what is not padding."""
    average = _AVERAGE[spatial]
    inside = torch.ones_like(tensor[:1, :1], requires_grad=False)
    inside, tensor = F.pad(inside, around), F.pad(tensor, around)
    covered = average(inside, kernel, stride, 0, ceil_mode, count_include_pad=False)
    return average(tensor, kernel, stride, 0, ceil_mode, count_include_pad=False) / covered


def with_indices(pooled: PathValue) -> tuple[PathValue, Ended]:
    """A pooled value and the positions of its maxima, where the path ends."""
    return pooled, Ended(torch.empty(pooled.tensor.shape, dtype=torch.int64, device="meta"))


def average_pool(
    spatial: int,
    /,
    run: PathRun,
    input: PathValue,  # noqa: A002 - torch's name
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Average pooling."""
    return PathValue(window(input.tensor, spatial, kernel_size, stride, padding, 1, ceil_mode), peak=input.peak)


def max_pool(
    spatial: int,
    /,
    run: PathRun,
    input: PathValue,  # noqa: A002 - torch's name
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Max pooling: any position may pass, so all count equally."""
    pooled = PathValue(
        window(input.tensor, spatial, kernel_size, stride, padding, dilation, ceil_mode), peak=input.peak
    )
    return with_indices(pooled) if return_indices else pooled


def adaptive(spatial: int, /, run: PathRun, input: PathValue, output_size: Any, return_indices: bool = False) -> Any:  # noqa: A002
    """Adaptive average and max pooling."""
    pooled = PathValue(_ADAPTIVE[spatial](input.tensor, output_size), peak=input.peak)
    return with_indices(pooled) if return_indices else pooled


FAMILIES: dict[str, tuple[Any, ...]] = {
    "mean": (mean,),
    "spread": (spread,),
    "spread_and_mean": (spread_and_mean,),
    "norm": (norm,),
    "extreme": (extreme,),
    "spatial": (average_pool, max_pool, adaptive),
}

FUNCTIONS: dict[Any, Any] = {
    **dict.fromkeys((torch.mean, torch.amax, torch.amin, torch.nanmean, torch.logsumexp), mean),
    **dict.fromkeys((torch.var, torch.std), spread),
    **dict.fromkeys((torch.var_mean, torch.std_mean), spread_and_mean),
    **dict.fromkeys((torch.norm, torch.functional.norm, torch.linalg.norm, torch.linalg.vector_norm), norm),
    **dict.fromkeys((torch.cdist, torch.functional.cdist), distance),
    torch.max: partial(extreme, torch.max),
    torch.min: partial(extreme, torch.min),
    torch.median: partial(extreme, torch.median),
    **dict.fromkeys((F.avg_pool1d, torch.avg_pool1d), partial(average_pool, 1)),
    F.avg_pool2d: partial(average_pool, 2),
    F.avg_pool3d: partial(average_pool, 3),
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d, F.max_pool1d_with_indices), partial(max_pool, 1)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d, F.max_pool2d_with_indices), partial(max_pool, 2)),
    **dict.fromkeys((F.max_pool3d, torch.max_pool3d, F.max_pool3d_with_indices), partial(max_pool, 3)),
    **dict.fromkeys((F.adaptive_avg_pool1d, torch.adaptive_avg_pool1d, F.adaptive_max_pool1d), partial(adaptive, 1)),
    **dict.fromkeys((F.adaptive_avg_pool2d, F.adaptive_max_pool2d), partial(adaptive, 2)),
    **dict.fromkeys((F.adaptive_avg_pool3d, F.adaptive_max_pool3d), partial(adaptive, 3)),
    F.adaptive_max_pool1d_with_indices: partial(adaptive, 1),
    F.adaptive_max_pool2d_with_indices: partial(adaptive, 2),
    F.adaptive_max_pool3d_with_indices: partial(adaptive, 3),
}

METHODS: dict[str, Any] = {
    **dict.fromkeys(["mean", "amax", "amin", "nanmean", "logsumexp"], mean),
    **dict.fromkeys(["var", "std"], spread),
    "norm": norm,
    "max": partial(extreme, torch.max),
    "min": partial(extreme, torch.min),
    "median": partial(extreme, torch.median),
}
