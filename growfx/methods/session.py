"""What a method and a training run (`growfx.train`) tell each other, and where a method keeps its run state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from growfx.masked.graph import MaskedGraph
from growfx.options import TrainOptions

__all__ = ["Attachment", "Session", "Stage"]

_State = TypeVar("_State")


@dataclass
class Attachment(Generic[_State]):
    """The run state of a method: None until it is attached. A method itself, which is its options, stays frozen."""

    state: _State | None = None


@dataclass(frozen=True)
class Session:
    """What a run lends its method.

    Attributes:
        net: the network, on its device.
        optimizer: over the network's parameters.
        options: of the run; `epochs` and `lr` are what a method measures its stages by.
        steps_per_epoch: optimizer steps.
        batches: one pass over the training data, as (images (B, ...), class numbers (B)) on the network's device.
        loss: of the network's output for one batch, given output (B, classes) and class numbers (B).
    """

    net: MaskedGraph
    optimizer: Optimizer
    options: TrainOptions
    steps_per_epoch: int
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """A stretch of training under one learning-rate schedule.

    Attributes:
        kind: what it is, for log and progress: "round" (of growth), "level" (of pruning), "search" (for masks), "base",
            "cycle" (of tickets), "final". "base" and "final" have the run's schedule. The best checkpoint is one of the
            final stage.
        epochs: length of the schedule.
        number: how many stages of this kind there were before.
        first_step: step of the schedule that training starts at: above 0 after rewinding.
        peak: largest learning rate, as a fraction of the run's.
        warmup: epochs of linear warmup; None takes the run's.
        low: None for a cosine. Else the rate climbs in a straight line from `low` (a fraction of the run's) to `peak`
            in the middle of the stage, and back.
        averaged: a growth round: not validated every epoch, but once at its end, by its averaged weights.
    """

    kind: str
    epochs: int
    number: int = 0
    first_step: int = 0
    peak: float = 1.0
    warmup: float | None = None
    low: float | None = None
    averaged: bool = False

    @property
    def title(self) -> str:
        """Kind and number, from 1, for progress bars."""
        return "training" if self.kind == "final" else f"{self.kind} {self.number + 1}"
