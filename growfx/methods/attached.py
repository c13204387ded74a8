"""What the run state of every method has: the network and the optimizer that the method is attached to."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Self

from torch.optim import Optimizer

from growfx.methods.sign_in import SignIn

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Attached"]


class Attached:
    """What a method is attached to. A deep copy is attached to the copies, and goes on as the original would.

    Attributes:
        net, optimizer: of the training.
        sign_in: trains the weights as products, None where that is off.
    """

    net: MaskedGraph
    optimizer: Optimizer
    sign_in: SignIn | None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copied = memo[id(self)] = object.__new__(type(self))
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in vars(self).items()})
        # a copy of a network collects no gradients, and one of an optimizer has no hooks
        for name, layer in self.net.layers.items():
            copied.net.layers[name].collects_gradient = layer.collects_gradient
        if copied.sign_in is not None:
            copied.sign_in.work_in(copied.optimizer)
        return copied
