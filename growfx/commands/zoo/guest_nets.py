"""Small networks around what some guest packages give: layers, neurons and heads rather than whole models.

They are written as the packages' own documentation shows.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "DataNet",
    "GraphNet",
    "LogProbability",
    "Readout",
    "Steps",
    "Two",
    "barlow_twins",
    "norse_net",
    "simsiam",
    "snn_net",
    "spiking_resnet",
]


class LogProbability(nn.Module):
    """The log-probability of a density estimator, as its training loss needs it."""

    def __init__(self, flow: nn.Module, evaluate: Callable[[Any, Tensor, Tensor | None], Tensor]):
        super().__init__()
        self.flow, self.evaluate = flow, evaluate

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log-probabilities (batch,) of rows `x`."""
        return self.evaluate(self.flow, x, context)


class GraphNet(nn.Module):
    """Two graph convolutions and a linear head over nodes."""

    def __init__(self, first: nn.Module, second: nn.Module, width: int):
        super().__init__()
        self.first, self.second, self.head = first, second, nn.Linear(width, 4)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """Scores of nodes (nodes, 4) from features (nodes, channels) and edges (2, edges)."""
        return self.head(self.second(self.first(x, edge_index).relu(), edge_index).relu())


class DataNet(nn.Module):
    """A graph network that takes a `Data` or `Batch` object and pools over graphs."""

    def __init__(self, body: nn.Module, width: int):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 4)

    def forward(self, data: Any) -> Tensor:
        """Scores of graphs (graphs, 4)."""
        pool = import_module("torch_geometric.nn").global_mean_pool
        return self.head(pool(self.body(data.x, data.edge_index), data.batch))


class Two(nn.Module):
    """Two networks one after the other."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        """What the second makes of the first's output."""
        return self.second(self.first(x))


class Readout(nn.Module):
    """One entry of the tuple that a network returns."""

    def __init__(self, net: nn.Module, index: int = 0):
        super().__init__()
        self.net, self.index = net, index

    def forward(self, *args: Any) -> Any:
        """That entry."""
        return self.net(*args)[self.index]


class Steps(nn.Module):
    """A spiking network shown one input for several steps, its state set to zero before: mean output."""

    def __init__(self, net: nn.Module, reset: Callable[[nn.Module], None], steps: int = 3):
        super().__init__()
        self.net, self.reset, self.steps = net, reset, steps

    def forward(self, x: Tensor) -> Tensor:
        """Firing rates."""
        self.reset(self.net)
        return torch.stack([self.net(x) for _ in range(self.steps)]).mean(0)


def spiking_resnet(step: str) -> nn.Module:
    """spikingjelly's ResNet-18 in single-step ("s") or multi-step ("m") mode; it keeps its state between calls."""
    clock = import_module("spikingjelly.activation_based")
    build = import_module("spikingjelly.activation_based.model.spiking_resnet").spiking_resnet18
    surrogate = clock.surrogate.ATan()
    net = build(spiking_neuron=clock.neuron.LIFNode, surrogate_function=surrogate, detach_reset=True, num_classes=10)
    clock.functional.set_step_mode(net, step)
    return Steps(net, clock.functional.reset_net, 2 if step == "s" else 1)


def snn_net(keep_state: bool) -> nn.Module:
    """Leaky integrate-and-fire layers of snntorch, which hold their own state; kept between calls or set to zero."""
    snn = import_module("snntorch")
    spike = import_module("snntorch.surrogate").fast_sigmoid(slope=25)
    neuron = {"beta": 0.9, "spike_grad": spike, "init_hidden": True}
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        snn.Leaky(**neuron),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 10),
        snn.Leaky(**neuron, output=keep_state),
    )
    return Readout(net, 1) if keep_state else Steps(net, import_module("snntorch.utils").reset)


def norse_net(recurrent: bool) -> nn.Module:
    """A sequential spiking network of norse over (time, batch, features)."""
    norse = import_module("norse.torch")
    cell = norse.LIFRecurrent(32, 32) if recurrent else norse.LIF()
    return Readout(norse.SequentialState(norse.Lift(nn.Linear(16, 32)), cell, norse.Lift(nn.Linear(32, 4))))


def _backbone() -> nn.Module:
    resnet = import_module("lightly.models").ResNetGenerator("resnet-9")
    return nn.Sequential(*list(resnet.children())[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten())


def simsiam() -> nn.Module:
    """Backbone, projection and prediction head of SimSiam."""
    heads = import_module("lightly.models.modules")
    projection, prediction = heads.SimSiamProjectionHead(512, 64, 32), heads.SimSiamPredictionHead(32, 16, 32)
    return Two(Two(_backbone(), projection), prediction)


def barlow_twins() -> nn.Module:
    """Backbone and projection head of Barlow Twins."""
    return Two(_backbone(), import_module("lightly.models.modules").BarlowTwinsProjectionHead(512, 64, 32))
