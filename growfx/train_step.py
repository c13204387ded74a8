"""One step of training: forward, loss, backward, optimizer, method."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from growfx.evaluation import logits_of
from growfx.graph import MaskedGraph
from growfx.options import TrainOptions

if TYPE_CHECKING:
    from growfx.methods.base import Method

__all__ = ["TrainStep"]


class TrainStep:
    """What is done with one batch, in the order of a loop of one's own (`growfx.methods`).

    Attributes:
        net, optimizer, method: attached to each other before the first step.
        criterion: of class scores (B, classes), and class numbers (B) or mixed targets (B, classes).
        mix: turns images and class numbers into mixed images and targets; None leaves a batch as it is.
    """

    def __init__(
        self, net: MaskedGraph, optimizer: Optimizer, method: "Method", criterion: nn.Module, options: TrainOptions
    ) -> None:
        self.net, self.optimizer, self.method, self.criterion = net, optimizer, method, criterion
        self.options = options
        self.mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """Return the loss of what the network gave for one batch."""
        return self.criterion(logits_of(output), targets)

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, bool]:
        """Train on one batch, on the network's device; return its loss, and whether masks changed."""
        if self.mix is not None:
            images, targets = self.mix(images, targets)
        loss = self.loss(self.net(images), targets)
        loss.backward()
        if self.options.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.options.clip_grad)
        self.optimizer.step()
        changed = self.method.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach(), changed
