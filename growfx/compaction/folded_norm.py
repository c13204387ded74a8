"""What a batch norm leaves behind when the layer before it takes over its factors and summands."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["folding_refusal", "without_norm"]


def folding_refusal(norm: nn.Module) -> str:
    """Why no layer could take over a module as a batch norm; "" when one could."""
    kind = type(norm).__name__
    if not isinstance(norm, _BatchNorm):
        return f"a {kind} is not a batch norm"
    if type(norm).forward is not _BatchNorm.forward and not {"act", "drop"} <= norm._modules.keys():
        return f"a {kind} does more than a batch norm"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    return ""


def without_norm(norm: Any) -> nn.Module:
    """What a batch norm does besides (timm's contain an activation): an activation, else an identity."""
    rest = [norm._modules[name] for name in ("drop", "act") if norm._modules.get(name) is not None]
    rest = [module for module in rest if not isinstance(module, nn.Identity)]
    return (nn.Identity() if not rest else rest[0] if len(rest) == 1 else nn.Sequential(*rest)).eval()
