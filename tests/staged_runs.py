"""Runs of methods that train several times over, driven by hand on a few batches of noise."""

from collections.abc import Iterator
from typing import Any

import torch
from method_nets import OPTIMIZERS, small_net
from torch.nn import functional as F

from growfx.methods import Method
from growfx.methods.session import Session, Stage
from growfx.options import TrainOptions

STEPS = 4  # of an epoch


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and class numbers of a batch that depend on its number alone."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    return images, images.mean((1, 2, 3)).gt(0).long()


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One pass over the data."""
    return (batch(number) for number in range(STEPS))


def session(net: Any = None, epochs: int = 3, optimizer: str = "sgd", **options: Any) -> Session:
    """A run of `epochs` epochs of four steps."""
    net = small_net() if net is None else net
    train = TrainOptions(epochs=epochs, device="cpu", kernels="dense", **options)
    return Session(net, OPTIMIZERS[optimizer](net), train, STEPS, batches, F.cross_entropy)


def train_step(run: Session, method: Method, number: int) -> bool:
    """One optimizer step, on the batch of that number."""
    run.net.train()
    images, targets = batch(number)
    run.loss(run.net(images), targets).backward()
    run.optimizer.step()
    changed = method.step()
    run.optimizer.zero_grad()
    return changed


def train_stage(run: Session, method: Method, accuracy: float = 0.5) -> Stage:
    """All of the stage under way but its end."""
    stage = method.next_stage()
    assert stage is not None
    for number in range(stage.first_step, stage.epochs * STEPS):
        train_step(run, method, number)
        if number % STEPS == STEPS - 1:
            method.report(accuracy * (number + 1) / (stage.epochs * STEPS))
    return stage


def tensors(net: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}
