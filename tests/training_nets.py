"""A tiny network, data it can learn, and runs that stop half way: shared by the tests of training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import growfx
from growfx.options import TrainOptions
from growfx.runs.checkpoint import read


class Tiny(nn.Module):
    """Two convolutions with batch norm and dropout: everything that carries state or draws numbers."""

    def __init__(self, classes: int = 4):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.head(self.drop(x.amax((2, 3))))


def loaders(count: int = 96, batch: int = 16):
    """Four classes told apart by the brightest corner."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.arange(count) % 4
    images = torch.randn(count, 1, 8, 8, generator=generator)
    for i, target in enumerate(targets.tolist()):
        row, column = 4 * (target // 2), 4 * (target % 2)
        images[i, 0, row : row + 3, column : column + 3] += 1.0 + target
    data = TensorDataset(images, targets)
    return DataLoader(data, batch_size=batch, shuffle=True, drop_last=True), DataLoader(data, batch_size=40)


def fresh_net() -> growfx.MaskedGraph:
    torch.manual_seed(3)
    return growfx.wrap(Tiny(), torch.randn(1, 1, 8, 8))


QUICK = TrainOptions(epochs=3, lr=0.1, warmup_epochs=1, device="cpu", kernels="dense")


def interrupt_at(monkeypatch, epoch: int, step: int) -> None:
    """Raise in the given step of the given epoch (both counted from the beginning of the run)."""
    from growfx.training.run import Run
    from growfx.training.step import TrainStep

    set_up, train_on = Run.set_up, TrainStep.__call__
    started: list[Run] = []
    steps = 0

    def noted(self):
        started.append(self)
        set_up(self)

    def stop(self, *window):
        nonlocal steps
        run = started[-1]
        if (run.state.at.epoch, steps % run.epoch_steps) == (epoch, step):
            raise KeyboardInterrupt
        steps += 1
        return train_on(self, *window)

    monkeypatch.setattr(Run, "set_up", noted)
    monkeypatch.setattr(TrainStep, "__call__", stop)


def untimed(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what differs from run to run."""
    return {name: value for name, value in result.items() if name != "kernels" and not name.endswith("seconds")}


def final_state(path) -> dict:
    state = read(path / "checkpoint" / "latest.pt")
    del state["log_position"]  # the log holds times
    del state["config"]  # it holds what may differ
    del state["seconds"], state["kernels"]
    return state
