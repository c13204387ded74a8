"""Path rules of normalization: the learned scale acts per channel, the data-dependent divisor is dropped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from growfx.passes.operators.classes import BATCH_NORMS, NORMS_OF_AXIS_1, NORMS_OF_LAST_AXES
from growfx.passes.path_products.rules.products import carrying
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import PathValue, raw

__all__ = ["FAMILIES", "FUNCTIONS", "MODULES"]


def _per_channel(value: PathValue, scale: Tensor, last: bool) -> PathValue:
    """`value` times `scale` along the trailing axes, or along axis 1."""
    if not last:
        scale = scale.reshape(-1, *(1,) * (value.tensor.ndim - 2))
    return PathValue(carrying(value) * scale)


def _folded(run: PathRun, weight: Any, variance: Any, eps: float) -> Tensor | None:
    """|gamma| / sqrt(var + eps) per channel, or None where nothing scales."""
    if run.norm == "identity" or (raw(weight) is None and raw(variance) is None):
        return None
    scale: Any = 1.0
    if raw(weight) is not None:
        scale = run.size_of(raw(weight))
    if raw(variance) is not None:
        scale = scale / (raw(variance).detach().to(run.device, torch.float64) + eps).sqrt()
    return scale**run.power


def _unbounded(value: PathValue) -> PathValue:
    return value.same(bounded=False)


def batch_norm(
    run: PathRun,
    input: PathValue,  # noqa: A002 - torch's name
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Any:
    """|gamma| / sqrt(running_var + eps); without running statistics the divisor depends on data and is dropped."""
    scale = _folded(run, weight, None if training else running_var, eps)
    return _unbounded(input) if scale is None else _per_channel(input, scale, last=False)


def _scaled(run: PathRun, value: PathValue, weight: Any, last: bool) -> PathValue:
    scale = _folded(run, weight, None, 0.0)
    return _unbounded(value) if scale is None else _per_channel(value, scale, last)


def layer_norm(
    run: PathRun,
    input: PathValue,  # noqa: A002 - torch's name
    normalized_shape: Any,
    weight: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """|gamma| over the last axes; also `rms_norm`."""
    return _scaled(run, input, weight, last=True)


def group_norm(
    run: PathRun,
    input: PathValue,  # noqa: A002 - torch's name
    num_groups: int,
    weight: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """|gamma| per channel (axis 1)."""
    return _scaled(run, input, weight, last=False)


def instance_norm(
    run: PathRun,
    input: PathValue,  # noqa: A002 - torch's name
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """|gamma| per channel; over sqrt(running_var + eps) when running statistics are used."""
    scale = _folded(run, weight, None if use_input_stats else running_var, eps)
    return _unbounded(input) if scale is None else _per_channel(input, scale, last=False)


def local_response_norm(run: PathRun, input: PathValue, *args: Any, **kwargs: Any) -> Any:  # noqa: A002
    """No learned scale."""
    return input


def batch_norm_module(run: PathRun, module: Any, value: PathValue) -> Any:
    """Batch norm and its drop and activation where the class has them."""
    running_var = module.running_var if getattr(module, "track_running_stats", True) else None
    return _then_activate(run, module, batch_norm(run, value, None, running_var, module.weight, eps=module.eps))


def instance_norm_module(run: PathRun, module: Any, value: PathValue) -> Any:
    """Instance norm."""
    stats = module.running_var is None
    return instance_norm(run, value, None, module.running_var, module.weight, None, stats, eps=module.eps)


def last_axes_module(run: PathRun, module: Any, value: PathValue) -> Any:
    """Norm modules that scale the last axes."""
    return _then_activate(run, module, _scaled(run, value, module.weight, last=True))


def axis_1_module(run: PathRun, module: Any, value: PathValue) -> Any:
    """Norm modules that scale axis 1."""
    return _then_activate(run, module, _scaled(run, value, module.weight, last=False))


def _then_activate(run: PathRun, module: nn.Module, value: PathValue) -> Any:
    """The drop and activation modules that norm-and-activation classes hold."""
    children = module._modules
    for name in ("drop", "act"):
        child = children.get(name)
        if child is not None:
            value = run.call(child, value)
    return value


_TORCH_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_TORCH_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

FAMILIES: dict[str, tuple[Any, ...]] = {
    "batch_norm": (batch_norm, instance_norm, batch_norm_module, instance_norm_module),
    "layer_norm": (layer_norm, last_axes_module),
    "group_norm": (group_norm, axis_1_module),
    "neighbours": (local_response_norm,),
}

MODULES: dict[Any, Any] = {
    **dict.fromkeys(_TORCH_BATCH, batch_norm_module),
    **dict.fromkeys(BATCH_NORMS, batch_norm_module),
    **dict.fromkeys(_TORCH_INSTANCE, instance_norm_module),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), last_axes_module),
    nn.GroupNorm: axis_1_module,
    **dict.fromkeys(NORMS_OF_LAST_AXES, last_axes_module),
    **dict.fromkeys(NORMS_OF_AXIS_1, axis_1_module),
    nn.LocalResponseNorm: lambda run, module, value: value,
}

FUNCTIONS: dict[Any, Any] = {
    **dict.fromkeys((F.layer_norm, F.rms_norm, torch.rms_norm), layer_norm),
    F.group_norm: group_norm,
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.local_response_norm: local_response_norm,
}
