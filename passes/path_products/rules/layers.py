"""Path rules of modules with weights, of pooling, reshaping and activation modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from growfx.passes.operators.classes import STANDARDISED, STANDARDISED_SAME
from growfx.passes.path_products.rules.arithmetic import balanced, gated
from growfx.passes.path_products.rules.products import carrying
from growfx.passes.path_products.rules.reduce import adaptive, padded_window, window, with_indices
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import NoPathRuleError, PathValue, move

__all__ = ["FAMILIES", "MODULES"]

_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_SCATTER: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


def _same_margins(sizes: Any, kernel: Any, stride: Any, dilation: Any) -> list[int]:
    """TensorFlow's SAME padding, as `F.pad` wants it."""
    around: list[int] = []
    for size, side, step, gap in zip(sizes, kernel, stride, dilation, strict=True):
        total = max((-(-size // step) - 1) * step + (side - 1) * gap + 1 - size, 0)
        around = [total // 2, total - total // 2, *around]
    return around


def linear(run: PathRun, module: Any, value: Any) -> Any:
    """Magnitude of the weight, no bias."""
    tensor = carrying(value)
    run.watch(run.layer_of(module), tensor, -1)
    return PathValue(run.produced(module, -1, lambda weight: F.linear(tensor, weight)))


def convolution(run: PathRun, module: Any, value: Any, around: list[int] | None = None) -> Any:
    """Magnitude of the weight, no bias, in the module's geometry."""
    tensor, padding = carrying(value), module.padding
    spatial = len(module.kernel_size)
    run.watch(run.layer_of(module), tensor, -spatial - 1)
    if around is not None:
        tensor, padding = F.pad(tensor, around), 0
    elif module.padding_mode != "zeros":
        tensor, padding = F.pad(tensor, module._reversed_padding_repeated_twice, mode=module.padding_mode), 0

    def convolve(weight: Tensor) -> Tensor:
        return _CONVOLVE[spatial](tensor, weight, None, module.stride, padding, module.dilation, module.groups)

    return PathValue(run.produced(module, -spatial - 1, convolve))


def same_convolution(run: PathRun, module: Any, value: Any) -> Any:
    """Convolution with TensorFlow's SAME padding, unless the class found static padding to be the same."""
    if not getattr(module, "same_pad", True):
        return convolution(run, module, value)
    sizes = carrying(value).shape[-2:]
    return convolution(run, module, value, _same_margins(sizes, module.kernel_size, module.stride, module.dilation))


def mixed_convolution(run: PathRun, module: Any, value: Any, routing: Any) -> Any:
    """Kernels mixed per sample: the mean over experts of magnitudes, times the mean over experts of the routing.

    The routing is a bounded factor of a balanced product; a constant one acts by the mean of its magnitudes.
    """
    tensor, padding = carrying(value), module.padding
    run.watch(run.layer_of(module), tensor, -3)
    if module.dynamic_padding:
        sizes = tensor.shape[-2:]
        tensor = F.pad(tensor, _same_margins(sizes, module.kernel_size, module.stride, module.dilation))
        padding = 0
    weight = run.weight(module).mean(0).reshape(module.weight_shape)
    convolved = F.conv2d(tensor, weight, None, module.stride, padding, module.dilation, module.groups)
    if not isinstance(routing, PathValue):
        return PathValue(convolved * run.matrix(routing).mean())
    shares = routing.tensor.mean(-1).reshape(-1, 1, 1, 1)
    return PathValue(balanced(convolved, shares, False, True))


def transposed_convolution(run: PathRun, module: Any, value: Any, output_size: Any = None) -> Any:
    """Transposed convolution: magnitude of the weight, no bias."""
    tensor = carrying(value)
    spatial = len(module.kernel_size)
    run.watch(run.layer_of(module), tensor, -spatial - 1)
    extra = module._output_padding(
        tensor, output_size, module.stride, module.padding, module.kernel_size, spatial, module.dilation
    )

    def scatter(weight: Tensor) -> Tensor:
        sizes = module.stride, module.padding, extra, module.groups, module.dilation
        return _SCATTER[spatial](tensor, weight, None, *sizes)

    return PathValue(run.produced(module, -spatial - 1, scatter))


def _identity(run: PathRun, module: Any, value: Any, *args: Any) -> Any:
    return value


def _bounded(run: PathRun, module: Any, value: PathValue) -> Any:
    return value.same(bounded=True)


def _gated(run: PathRun, module: Any, value: PathValue) -> Any:
    return gated(run, value, module.dim)


def empty_sequence(run: PathRun, module: Any, value: Any) -> Any:
    """A sequence without modules, which some models use as a shortcut."""
    if len(module):
        raise NoPathRuleError("the sequence was recorded whole; path products need its modules one by one")
    return value


def pool(spatial: int, /, run: PathRun, module: Any, value: PathValue) -> Any:
    """Average and max pooling modules."""
    dilation = getattr(module, "dilation", 1)
    sizes = module.kernel_size, module.stride, module.padding
    pooled = window(value.tensor, spatial, *sizes, dilation, module.ceil_mode)
    result = PathValue(pooled, peak=value.peak)
    return with_indices(result) if getattr(module, "return_indices", False) else result


def same_pool(run: PathRun, module: Any, value: PathValue) -> Any:
    """Pooling with TensorFlow's SAME padding."""
    dilation = getattr(module, "dilation", (1, 1))
    if tuple(dilation) != (1, 1):
        raise NoPathRuleError("dilated pooling has no path rule")
    around = _same_margins(value.tensor.shape[-2:], module.kernel_size, module.stride, dilation)
    pooled = padded_window(value.tensor, around, 2, module.kernel_size, module.stride, module.ceil_mode)
    return PathValue(pooled, peak=value.peak)


def adaptive_pool(spatial: int, /, run: PathRun, module: Any, value: PathValue) -> Any:
    """Adaptive average and max pooling modules."""
    return adaptive(spatial, run, value, module.output_size, getattr(module, "return_indices", False))


def executed(run: PathRun, module: Any, value: PathValue) -> Any:
    """Modules that only move elements run as they are."""
    return move(lambda tensor: type(module).forward(module, tensor), value)


def folding(run: PathRun, module: Any, value: PathValue) -> Any:
    """`Fold` adds overlapping blocks."""
    return PathValue(module.forward(value.tensor), value.bounded)


def zero_pad(run: PathRun, module: Any, value: PathValue) -> Any:
    """Constant padding writes zero, whatever its value."""
    return move(lambda tensor: F.pad(tensor, module.padding), value)


_IDENTITY = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardtanh, nn.Softplus, nn.Softsign, nn.Threshold, nn.LogSigmoid, nn.LogSoftmax, nn.Hardshrink,
    nn.Softshrink, nn.Tanhshrink, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)  # fmt: skip
_ACTS, _FAST_ACTS = "timm.layers.activations.", "timm.layers.activations_me."
_TIMM_IDENTITY = (
    *(_ACTS + name for name in ("Swish", "Mish", "HardSwish", "HardMish", "PReLU", "GELU", "GELUTanh", "QuickGELU")),
    *(_FAST_ACTS + name for name in ("SwishMe", "MishMe", "HardSwishMe", "HardMishMe")),
    "timm.layers.drop.DropPath",
    "timm.layers.drop.DropBlock2d",
    "timm.layers.patch_dropout.PatchDropout",
    "torchvision.ops.stochastic_depth.StochasticDepth",
    "torchvision.ops.drop_block.DropBlock2d",
)
_TIMM_BOUNDED = (*(_ACTS + name for name in ("Sigmoid", "Tanh", "HardSigmoid")), _FAST_ACTS + "HardSigmoidMe")
_BOUNDED = (nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softmax, nn.Softmax2d, nn.Softmin)
_EXECUTED = (
    nn.Flatten, nn.Unflatten, nn.Unfold, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_ZERO_PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip

FAMILIES: dict[str, tuple[Any, ...]] = {
    "linear": (linear,),
    "convolution": (convolution, same_convolution, transposed_convolution),
    "mixed_convolution": (mixed_convolution,),
    "same": (_identity, _bounded, empty_sequence),
    "gated": (_gated,),
    "spatial": (pool, same_pool, adaptive_pool),
    "executed": (executed,),
    "folding": (folding,),
    "zero_pad": (zero_pad,),
}

MODULES: dict[Any, Any] = {
    **dict.fromkeys(
        (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, "timm.layers.linear.Linear"), linear
    ),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, *STANDARDISED), convolution),
    "timm.layers.conv2d_same.Conv2dSame": same_convolution,
    "timm.layers.cond_conv2d.CondConv2d": mixed_convolution,
    **dict.fromkeys(STANDARDISED_SAME, same_convolution),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), transposed_convolution),
    **dict.fromkeys((*_IDENTITY, *_TIMM_IDENTITY), _identity),
    **dict.fromkeys((*_BOUNDED, *_TIMM_BOUNDED), _bounded),
    nn.Sequential: empty_sequence,
    nn.GLU: _gated,
    **dict.fromkeys((nn.AvgPool1d, nn.MaxPool1d), partial(pool, 1)),
    **dict.fromkeys((nn.AvgPool2d, nn.MaxPool2d), partial(pool, 2)),
    **dict.fromkeys((nn.AvgPool3d, nn.MaxPool3d), partial(pool, 3)),
    **dict.fromkeys(("timm.layers.pool2d_same.AvgPool2dSame", "timm.layers.pool2d_same.MaxPool2dSame"), same_pool),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), partial(adaptive_pool, 1)),
    **dict.fromkeys((nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), partial(adaptive_pool, 2)),
    **dict.fromkeys((nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), partial(adaptive_pool, 3)),
    **dict.fromkeys(_EXECUTED, executed),
    nn.Fold: folding,
    **dict.fromkeys(_ZERO_PADS, zero_pad),
}
