"""Small networks for tests of the native runtime, and how to run one there."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from growfx.deploy.native.export import native_plan
from growfx.passes.lower.plan.file import network_bytes
from growfx.runtime.native.library import NativeNetwork


class Function(nn.Module):
    """A function as a module, with parameters of its own."""

    def __init__(self, function: Callable[..., Any], *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.values = nn.ParameterList(parameters)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(*inputs, *self.values)


def native(model: Any, *inputs: Tensor, threads: int = 1) -> NativeNetwork:
    """The network in the native runtime."""
    return NativeNetwork(network_bytes(native_plan(model, tuple(inputs))), threads)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Over the largest expected number; shapes must be equal."""
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


def largest_error(model: nn.Module, *inputs: Tensor, threads: int = 1) -> float:
    """Of the native network's outputs, planned for a batch of 1, on a batch as given."""
    made = native(model, *(x[:1] for x in inputs), threads=threads)
    with torch.no_grad():
        expected = model.eval()(*inputs)
    leaves = torch.utils._pytree.tree_leaves(expected)
    return max(relative_error(a, b) for a, b in zip(made(*inputs), leaves, strict=True))


class Classifier(nn.Module):
    """Convolutions with norms, a residual, a gate, pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 5, 1, 2, groups=8, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.gate, self.project = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.depthwise(x)
        y = self.project(y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1))))
        return self.head((x + y).mean((2, 3)))
