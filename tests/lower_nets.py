"""Networks to lower, and what they are compared with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import growfx
from growfx.masked.graph import MaskedGraph
from growfx.recorded.inputs import Inputs


class Residual(nn.Module):
    """A stem, a block with a projected shortcut, one with a plain shortcut, and a head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.shortcut = nn.Conv2d(width, 2 * width, 1, stride=2)
        self.second = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.first(x)
        y += self.shortcut(x)
        y = F.relu(y)
        y = torch.relu(self.second(y) + y)
        return self.head(self.drop(y.mean((2, 3))))


class Mixed(nn.Module):
    """Concatenation, a gate, a depthwise layer, a layer called twice, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding="same")
        self.right = nn.Conv2d(3, 4, 5, padding=2, dilation=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.again = self.twice
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), F.silu(self.right(x))], 1)
        x = x * torch.sigmoid(self.gate(self.depthwise(x).mean((2, 3), keepdim=True)))
        x = self.twice(x).relu_() + self.again(x)
        return self.head(x.flatten(2).mean(-1)).relu()


class Attention(nn.Module):
    """A transformer block over patches."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        rows, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(rows, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(rows, tokens, width)
        x = x + self.proj(y)
        x = x + self.fc2(F.gelu(self.fc1(x)))
        return self.head(x.mean(1))


class Picky(nn.Module):
    """A convolution, a part that takes a value out of its data, and a head."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.mean()) > 0 else -self.inner(x)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.part, self.head = nn.Conv2d(3, 4, 3), Picky.Part(), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(self.conv(x).relu()).mean((2, 3)))


NETS: dict[str, type[nn.Module]] = {"residual": Residual, "mixed": Mixed, "attention": Attention, "picky": Picky}


def make(kind: str, density: float = 0.3) -> MaskedGraph:
    """A net of this kind with random masks and norms that are awake."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NETS[kind]().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    assert tensor is not None
                    tensor.data.normal_()
        x = torch.randn(1, 3, 12, 12)
        net = growfx.wrap(model, x).eval()
        net.set_masks({name: torch.rand(layer.mask.shape) < density for name, layer in net.layers.items()})
    return net


def saved(kind: str, folder: Path, density: float = 0.3) -> tuple[Path, nn.Module]:
    """An artifact of such a net, and the dense model."""
    net = make(kind, density)
    growfx.save(net, folder)
    return folder, growfx.unwrap(net).eval()


def recorded(net: MaskedGraph, x: Tensor) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The plain model of a net as a graph module, and its masks."""
    recording = net.recording(Inputs((x,), {}), training=False)
    masks: dict[str, Any] = {name: layer.mask for name, layer in net.layers.items()}
    graph = copy.deepcopy(recording.graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).replace(".effective_weight", ".weight")
    return fx.GraphModule(growfx.unwrap(net).eval(), graph), masks


def same(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
