"""Which modules are one operator of a graph, whatever they compute inside."""

from __future__ import annotations

import torch
from torch import nn

from growfx.masked.layers import MaskedLayer
from growfx.passes.operators.classes import is_known
from growfx.runtime.lowered_layer import LoweredLayer

__all__ = ["LEAF_KINDS", "is_one_operator"]

# One node each, whatever is inside.
_WHOLE_KINDS = (LoweredLayer, nn.RNNBase, torch.jit.ScriptModule)
# One node each where they compute in a known way; inside others there are operators that are known.
LEAF_KINDS = (
    MaskedLayer,
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.MultiheadAttention,
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
)
# Library modules that are one operator though they are not torch's; named, so that nothing has to be imported.
_LEAF_NAMES = {
    "timm.layers.cond_conv2d.CondConv2d",
    "timm.layers.drop.DropPath",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "torchvision.ops.stochastic_depth.StochasticDepth",
}


def is_one_operator(module: nn.Module) -> bool:
    """Whether a recording makes one node of a call, and looks at nothing inside."""
    if isinstance(module, _WHOLE_KINDS):
        return True
    if isinstance(module, LEAF_KINDS):
        return is_known(module)
    kind = type(module)
    if f"{kind.__module__}.{kind.__qualname__}" in _LEAF_NAMES:
        return True
    childless = next(module.children(), None) is None
    return childless and kind.__module__.startswith("torch.nn.") and "forward" not in vars(module)
