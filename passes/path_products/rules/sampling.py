"""Path rules of resampling: at fixed places it is executed, at places computed from data it averages.

At places from data, the result is the mean over all positions of what is sampled, in a balanced product with the mean
over the coordinates where these carry paths.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growfx.passes.path_products.rules.arithmetic import balanced
from growfx.passes.path_products.rules.products import carrying
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import ComparedValue, Ended, PathValue, Weight, move, raw

__all__ = ["FAMILIES", "FUNCTIONS", "MODULES", "SEES_ENDS"]


def interpolate(run: PathRun, value: PathValue, *args: Any, **kwargs: Any) -> Any:
    """Resampling; bicubic weights have negative lobes, so bilinear ones stand for them."""
    args = tuple("bilinear" if item == "bicubic" else item for item in raw(args))
    kwargs = {name: "bilinear" if item == "bicubic" else item for name, item in raw(kwargs).items()}
    return move(F.interpolate, value, *args, **kwargs)


def upsample(run: PathRun, module: Any, value: PathValue) -> Any:
    """Resampling, bicubic as bilinear."""
    mode = "bilinear" if module.mode == "bicubic" else module.mode
    return move(
        lambda tensor: F.interpolate(tensor, module.size, module.scale_factor, mode, module.align_corners), value
    )


def _placed(image: Any, mean: Tensor, places: Any, coordinates: Tensor | None) -> PathValue:
    """What is sampled at places from data: image mean and coordinate mean, in shapes that broadcast."""
    if coordinates is None:
        return PathValue(mean, image.bounded)
    if not isinstance(image, PathValue):
        return PathValue(coordinates + torch.zeros_like(mean), places.bounded)
    product = balanced(mean, coordinates, image.bounded, places.bounded)
    return PathValue(product, image.bounded and places.bounded)


def grid_sample(
    run: PathRun,
    input: Any,  # noqa: A002 - torch's name
    grid: Any,
    mode: Any = "bilinear",
    padding_mode: Any = "zeros",
    align_corners: bool | None = None,
) -> Any:
    """Image (batch, channels, sides...), grid (batch, sides..., coordinates)."""
    image = raw(input).to(run.device, torch.float64)
    if not isinstance(grid, (PathValue, ComparedValue, Ended)):
        mode = {"bicubic": "bilinear", 2: 0}.get(mode, mode)
        places = raw(grid).to(run.device, torch.float64)
        sample: Callable[..., Tensor] = torch.grid_sampler if isinstance(mode, int) else F.grid_sample
        return PathValue(sample(image, places, mode, padding_mode, bool(align_corners)), input.bounded)
    sides = list(range(2, image.ndim))
    mean = image.mean(sides, keepdim=True)
    coordinates = grid.tensor.mean(-1)[:, None] if isinstance(grid, PathValue) else None
    found = _placed(input, mean, grid, coordinates)
    shape = (image.shape[0], image.shape[1], *raw(grid).shape[1:-1])
    return PathValue(found.tensor.expand(shape), found.bounded)


def roi_align(
    run: PathRun,
    image: Any,
    boxes: Any,
    scale: float,
    height: int,
    width: int,
    ratio: int = -1,
    aligned: bool = False,
) -> Any:
    """Image (batch, channels, height, width), boxes (count, 1 + 4): (count, channels, height, width) of each box."""
    if not isinstance(boxes, (PathValue, ComparedValue, Ended)):
        places = raw(boxes).to(run.device, torch.float64)
        function = torch.ops.torchvision.roi_align
        return PathValue(function(carrying(image), places, scale, height, width, ratio, aligned), image.bounded)
    mean = raw(image).mean((0, 2, 3)).reshape(1, -1, 1, 1)
    coordinates = boxes.tensor[:, 1:].mean(1).reshape(-1, 1, 1, 1) if isinstance(boxes, PathValue) else None
    found = _placed(image, mean, boxes, coordinates)
    return PathValue(found.tensor.expand(raw(boxes).shape[0], mean.shape[1], height, width), found.bounded)


def roi_pool(run: PathRun, image: Any, boxes: Any, scale: float, height: int, width: int) -> Any:
    """As `roi_align`; a maximum over each bin counts as its mean. Also returns the positions of the maxima."""
    pooled = roi_align(run, image, boxes, scale, height, width)
    return pooled, Ended(torch.empty(pooled.tensor.shape, dtype=torch.int64, device="meta"))


def deform_conv2d(
    run: PathRun,
    input: Any,  # noqa: A002 - torchvision's name
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    groups: int,
    offset_groups: int,
    use_mask: bool,
) -> Any:
    """Magnitude of the weight on what is sampled, each tap at its own place; the mask is one more factor."""
    image, kernel = carrying(input), run.matrix(weight)
    if isinstance(weight, Weight):
        run.watch(weight.layer, image, 1)
    if not any(isinstance(item, (PathValue, ComparedValue, Ended)) for item in (offset, mask)):
        places, factors, none = raw(offset).double(), raw(mask).double().abs(), kernel.new_zeros(kernel.shape[0])
        geometry = (stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, groups, offset_groups, use_mask)
        return PathValue(torch.ops.torchvision.deform_conv2d(image, kernel, places, factors, none, *geometry))
    batch, channels = image.shape[:2]
    taps, sides = kernel.shape[2] * kernel.shape[3], raw(offset).shape[2:]
    per_group = channels // offset_groups
    mean = image.mean((2, 3)).reshape(batch, offset_groups, per_group, 1, 1, 1)
    coordinates = None
    if isinstance(offset, PathValue):
        coordinates = offset.tensor.reshape(batch, offset_groups, 1, taps, 2, *sides).mean(4)
    found = _placed(input, mean, offset, coordinates)
    sampled = found.tensor
    if use_mask:
        factors = raw(mask).reshape(batch, offset_groups, 1, taps, *sides)
        if isinstance(mask, PathValue):
            sampled = balanced(sampled, factors, found.bounded, mask.bounded)
        elif not isinstance(mask, Ended):
            sampled = sampled * factors.double().abs()
    columns = sampled.expand(batch, offset_groups, per_group, taps, *sides).reshape(batch, groups, -1, *sides)
    rows = kernel.reshape(groups, kernel.shape[0] // groups, -1)
    return PathValue(torch.einsum("bgihw,goi->bgohw", columns, rows).flatten(1, 2))


def unpool(spatial: int) -> Callable[..., Any]:
    """The rule of max unpooling: each element goes to one unknown place of its window, so to all of them evenly."""

    def rule(
        run: PathRun,
        input: Any,  # noqa: A002 - torch's name
        indices: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        output_size: Any = None,
    ) -> Any:
        tensor = carrying(input)
        each = [(item,) * spatial if isinstance(item, int) else tuple(item) for item in (kernel_size, padding)]
        step = kernel_size if stride is None or stride == () else stride
        steps = (step,) * spatial if isinstance(step, int) else tuple(step)
        size = _unpooled(tensor, list(each[0]), list(steps), list(each[1]), output_size)
        spread = F.interpolate(tensor, tuple(size)) * (tensor.shape[-spatial:].numel() / torch.Size(size).numel())
        return PathValue(spread, input.bounded)

    return rule


def unpool_module(spatial: int) -> Callable[..., Any]:
    """The same as a module."""
    function = unpool(spatial)

    def rule(run: PathRun, module: Any, value: Any, indices: Any, output_size: Any = None) -> Any:
        return function(run, value, indices, module.kernel_size, module.stride, module.padding, output_size)

    return rule


_unpooled: Callable[..., list[int]] = vars(F)["_unpool_output_size"]
_UNPOOLS = {1: F.max_unpool1d, 2: F.max_unpool2d, 3: F.max_unpool3d}

FAMILIES: dict[str, tuple[Any, ...]] = {"spatial": (interpolate, upsample)}

FUNCTIONS: dict[Any, Any] = {
    F.interpolate: interpolate,
    **dict.fromkeys((F.grid_sample, torch.grid_sampler), grid_sample),
    "torchvision.roi_align": roi_align,
    "torchvision.roi_pool": roi_pool,
    "torchvision.deform_conv2d": deform_conv2d,
    **{function: unpool(spatial) for spatial, function in _UNPOOLS.items()},
}

MODULES: dict[Any, Any] = {
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), upsample),
    nn.MaxUnpool1d: unpool_module(1),
    nn.MaxUnpool2d: unpool_module(2),
    nn.MaxUnpool3d: unpool_module(3),
}

SEES_ENDS: frozenset[Callable[..., Any]] = frozenset({grid_sample, roi_align, roi_pool, deform_conv2d})
