"""The effective weight as compiled code computes it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["compiled_weight"]


class _CompiledWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, collects: Tensor) -> Tensor:
        ctx.save_for_backward(mask, collects)
        return torch.where(mask, weight, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        mask, collects = ctx.saved_tensors
        return torch.where(mask | collects, grads[0], 0), None, None


def compiled_weight(weight: Tensor, mask: Tensor, collects: Tensor) -> Tensor:
    """``where(mask, weight, 0)`` with a masked gradient, or the whole one while the bool scalar `collects` is True.

    A value decides, not a branch, so that neither another mask nor a step that collects gradients compiles anew.
    """
    return cast(Tensor, _CompiledWeight.apply(weight, mask, collects))
