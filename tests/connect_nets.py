"""Small networks, one for each way in which units of one layer come to feed another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Residual(nn.Module):
    """Two branches added, one of them through a norm and a shortcut layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 6), (6, 4), (4, 6), (6, 5)))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.norm(self.c(torch.tanh(self.b(x))))
        return self.d(torch.tanh(x)).mean((2, 3))


class Dense(nn.Module):
    """Concatenation of a value and what was made of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(7, 2, 1)
        self.norm = nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.norm(torch.cat([torch.tanh(x), self.b(x)], 1))).mean((2, 3))


class Shuffle(nn.Module):
    """Channels split in halves, one of them transformed, joined and interleaved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        x = torch.cat([left, self.b(right)], 1)
        batch, channels, height, width = x.shape
        x = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.c(x).mean((2, 3))


class Subpixel(nn.Module):
    """Every four channels become one of twice the size."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(3, 8, 1), nn.PixelShuffle(2), nn.Conv2d(2, 4, 3, padding=1)
        self.c = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.up(self.a(x)))).mean((2, 3)))


class Windows(nn.Module):
    """Attention within shifted windows, then patches merged into features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj = nn.Conv2d(3, 6, 1), nn.Linear(6, 18), nn.Linear(6, 6)
        self.merge = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        batch, height, width, dim = x.shape
        shifted = torch.roll(F.pad(x, (0, 0, 0, 0, 0, 0)), (-1, -1), (1, 2))
        parts = shifted.view(batch, height // 2, 2, width // 2, 2, dim).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, dim)
        q, k, v = self.qkv(parts).reshape(-1, 4, 3, 2, dim // 2).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, dim)
        mixed = self.proj(mixed).view(batch, height // 2, width // 2, 2, 2, dim).permute(0, 1, 3, 2, 4, 5)
        x = x + torch.roll(mixed.reshape(batch, height, width, dim), (1, 1), (1, 2))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.merge(torch.cat(corners, -1)).mean((1, 2))


class Excite(nn.Module):
    """Squeeze and excitation, and a gate that is one map for all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up, self.b = (
            nn.Conv2d(3, 6, 1),
            nn.Conv2d(6, 2, 1),
            nn.Conv2d(2, 6, 1),
            nn.Conv2d(6, 4, 1),
        )
        self.map, self.c = nn.Conv2d(6, 1, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x * torch.sigmoid(self.up(torch.tanh(self.down(x.mean((2, 3), keepdim=True)))))
        return self.c((self.b(x) * torch.sigmoid(self.map(x))).mean((2, 3)))


class Attention(nn.Module):
    """A class token, position table, fused or written-out attention with a layer scale, a gated feed-forward."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.fused = fused
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.token, self.place = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.qkv, self.proj, self.scale = nn.Linear(8, 24), nn.Linear(8, 8), nn.Parameter(torch.rand(8))
        self.fc1, self.fc2, self.head = nn.Linear(8, 12), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.place
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT / 2).softmax(-1) @ v
        x = x + self.scale * self.proj(mixed.transpose(1, 2).flatten(2))
        gate, value = self.fc1(x).chunk(2, -1)
        x = x + self.fc2(F.silu(gate) * value)
        return self.head(x[:, 0])


class Mixer(nn.Module):
    """Layers over tokens between layers over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.tokens, self.back = nn.Conv2d(3, 5, 2, stride=2), nn.Linear(4, 6), nn.Linear(6, 4)
        self.channels, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.back(torch.tanh(self.tokens(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x.mean(1) + self.channels(x).mean(1))


class Flat(nn.Module):
    """Feature maps flattened into features, a depthwise and a transposed convolution before."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.deep = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 3, padding=1, groups=4)
        self.up, self.norm = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.pool, self.c = nn.MaxPool2d(2), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.pad(self.norm(self.up(self.deep(self.a(x)))), (0, 0, 0, 0)))
        return self.c(torch.flatten(x, 1))


class Linearised(nn.Module):
    """Attention without softmax, keys times values first; channels attended to by channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj, self.second, self.head = (
            nn.Linear(i, o) for i, o in ((5, 6), (6, 18), (6, 6), (6, 18), (6, 2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, dim // 2).permute(2, 0, 3, 1, 4)
        x = x + self.proj((q @ (k.mT @ v)).transpose(1, 2).reshape(batch, tokens, dim))
        q, k, v = self.second(x).reshape(batch, tokens, 3, 2, dim // 2).permute(2, 0, 3, 4, 1)
        attended = (q @ k.mT).softmax(-1) @ v
        return self.head(attended.permute(0, 3, 1, 2).reshape(batch, tokens, dim))


NETS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "residual": (Residual, (3, 4, 4)),
    "dense": (Dense, (3, 4, 4)),
    "shuffle": (Shuffle, (3, 4, 4)),
    "subpixel": (Subpixel, (3, 4, 4)),
    "windows": (Windows, (3, 4, 4)),
    "excite": (Excite, (3, 4, 4)),
    "attention": (Attention, (3, 4, 4)),
    "written attention": (lambda: Attention(False), (3, 4, 4)),
    "mixer": (Mixer, (3, 4, 4)),
    "flat": (Flat, (3, 4, 4)),
    "linearised": (Linearised, (7, 5)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network in evaluation mode and float64, and an input of batch 2."""
    torch.manual_seed(0)
    kind, shape = NETS[name]
    model = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    return model, torch.randn(2, *shape, dtype=torch.float64)
