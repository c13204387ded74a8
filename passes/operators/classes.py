"""Classes of layers that compute in one known way: torch's, and named ones of timm and torchvision.

A subclass of a convolution, linear layer or norm that has its own forward may compute anything. It is known when
it is listed here; otherwise a recording looks inside, where it calls operators that are known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = [
    "APPLIED",
    "BATCH_NORMS",
    "NORMS_OF_AXIS_1",
    "NORMS_OF_LAST_AXES",
    "STANDARDISED",
    "STANDARDISED_SAME",
    "is_known",
    "row_of",
]

_CONVS, _NORMS, _ACTS = "timm.layers.std_conv.", "timm.layers.norm.", "timm.layers.norm_act."
# Convolutions that standardise their weight; those below also pad as TensorFlow does.
STANDARDISED = (_CONVS + "StdConv2d", _CONVS + "ScaledStdConv2d")
STANDARDISED_SAME = (_CONVS + "StdConv2dSame", _CONVS + "ScaledStdConv2dSame")
BATCH_NORMS = (
    *(_ACTS + name for name in ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")),
    "torchvision.ops.misc.FrozenBatchNorm2d",
)
# Their learned scale runs along the last axes, or along axis 1.
NORMS_OF_LAST_AXES = (
    *(_NORMS + name for name in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm")),
    *(_ACTS + name for name in ("LayerNormAct", "LayerNormActFp32", "RmsNormAct", "RmsNormActFp32")),
    _NORMS + "SimpleNormFp32",
    "timm.models.metaformer.LayerNormNoBias",
)
NORMS_OF_AXIS_1 = (
    *(_NORMS + name for name in ("GroupNorm", "GroupNorm1", "LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d")),
    *(_NORMS + name for name in ("RmsNorm2d", "RmsNorm2dFp32", "SimpleNorm2d", "SimpleNorm2dFp32")),
    *(_ACTS + name for name in ("GroupNormAct", "GroupNorm1Act", "LayerNormAct2d", "LayerNormAct2dFp32")),
    *(_ACTS + name for name in ("RmsNormAct2d", "RmsNormAct2dFp32")),
    "timm.models.metaformer.GroupNorm1NoBias",
    "timm.models.metaformer.LayerNorm2dNoBias",
    "torchvision.models.convnext.LayerNorm2d",
)
_NAMED = {
    *(*STANDARDISED, *STANDARDISED_SAME, *BATCH_NORMS, *NORMS_OF_LAST_AXES, *NORMS_OF_AXIS_1),
    *("timm.layers.cond_conv2d.CondConv2d", "timm.layers.conv2d_same.Conv2dSame", "timm.layers.linear.Linear"),
    *("timm.layers.pool2d_same.AvgPool2dSame", "timm.layers.pool2d_same.MaxPool2dSame"),
}
# Names a subclass may define and still compute what its base computes (a parametrized layer has its own copying).
_HARMLESS = {
    *("__init__", "__repr__", "__str__", "extra_repr", "reset_parameters"),
    *("__reduce__", "__reduce_ex__", "__getstate__", "__deepcopy__"),
}
_NOT_CODE = {
    *("__module__", "__doc__", "__annotations__", "__constants__", "__dict__", "__weakref__", "__qualname__"),
    *("__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__", "_version"),
}


def standardised(module: Any, weight: Tensor) -> Tensor:
    """The weight that a weight-standardised convolution applies: zero mean, unit variance per output channel."""
    gain = module._parameters.get("gain")
    scale = None if gain is None else (gain.detach().to(weight) * module.scale).reshape(-1)
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, scale, None, True, 0.0, module.eps).reshape(weight.shape)


# How a class turns its parameter into the weight it applies, where it does not apply the parameter itself.
APPLIED: dict[Any, Callable[[Any, Tensor], Tensor]] = dict.fromkeys((*STANDARDISED, *STANDARDISED_SAME), standardised)


def row_of(table: dict[Any, Any], cls: type) -> Any:
    """The row of a class: its own, or its base's when the class overrides nothing of it; None when there is none.

    Keys are classes, or dotted names of classes of libraries that are not imported here.
    """
    for ancestor in cls.__mro__:
        row = table.get(ancestor) or table.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if row is not None:
            return row
        if _overrides(ancestor):
            return None
    return None


def is_known(module: nn.Module) -> bool:
    """Whether a layer runs the code of a class of torch or of a named one: nothing in it needs to be looked at."""
    if vars(module).keys() & {"forward", "_conv_forward"}:  # replaced for this one layer
        return False
    for ancestor in getattr(module, "twin_of", type(module)).__mro__:
        name = f"{ancestor.__module__}.{ancestor.__qualname__}"
        if name in _NAMED or name.startswith("torch.nn.modules."):
            return True
        if _overrides(ancestor):
            return False
    return False


def _overrides(cls: type) -> set[str]:
    """Names that a class defines anew, apart from construction and printing."""
    inherited = {name for name in vars(cls) if any(name in vars(base) for base in cls.__mro__[1:])}
    return inherited - _HARMLESS - _NOT_CODE
