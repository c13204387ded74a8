"""What a masked layer keeps beside its parameter, so that its uses need not make it anew."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from growfx.masked.absent_gradient import AbsentGradient
from growfx.masked.gradients import GradientMark

__all__ = ["Stored"]


class Stored:
    """The parameter that is the layer's own, and what its uses share.

    `weight`: the parameter with its gradient masked, for the layer's own use; made once, since making it anew in every
    step costs as much as a small convolution. `mask`, `address`: what it was made of. `seen`: mask and version that the
    parameter was last made to obey. `entries`, `entries_of`: the weight for kernels that read active entries alone,
    and what it was made of. `mark`: the gradient that was masked last. `hook`: masks the gradient of a weight
    that the model reads without calling the layer. `absent`: the gradient of absent edges, while a method reads it.
    """

    def __init__(self, parameter: nn.Parameter, own_mask: Tensor) -> None:
        self.parameter, self.own_mask = parameter, own_mask
        self.weight: Tensor | None = None
        self.mask: Tensor | None = None
        self.address = 0
        self.entries: Tensor | None = None
        self.entries_of: tuple[int, ...] = ()
        self.seen: tuple[int, int] = (0, -1)
        self.mark = GradientMark()
        self.hook: Any = None
        self.absent: AbsentGradient | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Stored:
        return Stored(copy.deepcopy(self.parameter, memo), copy.deepcopy(self.own_mask, memo))

    def __reduce__(self) -> Any:
        return Stored, (self.parameter, self.own_mask)
