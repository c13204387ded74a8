"""Networks whose whole units are known, and what their cost is counted by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import growfx


def macs(model: nn.Module, x: Tensor) -> float:
    """Multiply-accumulates of one call, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() / 2


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


class Chain(nn.Module):
    """Two hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 20), nn.Linear(20, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


class Mobile(nn.Module):
    """A residual stream with norms, a depthwise convolution, a gate, a scale, and a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.expand, self.depth = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.gate = nn.Linear(24, 8), nn.Linear(8, 24)
        self.project, self.scale = nn.Conv2d(24, 16, 1), nn.Parameter(torch.randn(16, 1, 1))
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.depth(F.relu(self.expand(x))))
        y = y * torch.sigmoid(self.gate(F.relu(self.squeeze(y.mean((2, 3))))))[..., None, None]
        x = x + self.scale * self.project(y)
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


class Attention(nn.Module):
    """Heads that the module states, as transformers write them."""

    def __init__(self, dim: int = 12, heads: int = 6, fused: bool = True) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim, self.fused = heads, 4, 4 * heads, fused
        self.qkv, self.proj = nn.Linear(dim, 3 * self.attn_dim), nn.Linear(self.attn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, self.attn_dim))


class Transformer(nn.Module):
    """One block behind norms over the stream."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(5, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attn, self.fc1, self.fc2 = Attention(fused=fused), nn.Linear(12, 32), nn.Linear(32, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.head(x.mean(1))


IMAGES, TOKENS, ROWS = torch.randn(2, 3, 8, 8), torch.randn(2, 7, 5), torch.randn(2, 6)
NETS = {
    "chain": (Chain, ROWS),
    "mobile": (Mobile, IMAGES),
    "transformer": (Transformer, TOKENS),
    "written out": (lambda: Transformer(fused=False), TOKENS),
}


def net_of(name: str, seed: int = 0) -> growfx.MaskedGraph:
    torch.manual_seed(seed)
    make, x = NETS[name]
    return growfx.wrap(make().eval(), x)
