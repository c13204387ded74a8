"""Heads of attentions whose layers are modules deep inside the one that says how many heads there are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import growfx


class Normed(nn.Sequential):
    """A pointwise convolution and its norm."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))


class Attention(nn.Module):
    """Queries, keys and values by `Normed`, eight heads of eight; `talking` mixes the maps of all heads."""

    def __init__(self, talking: bool, scale: float) -> None:
        super().__init__()
        self.num_heads, self.scale = 8, scale
        self.q, self.k, self.v = (Normed(32, 64) for _ in range(3))
        self.out = Normed(64, 32)
        self.talking_head = nn.Conv2d(8, 8, 1) if talking else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = (part(x).reshape(batch, self.num_heads, -1, height * width) for part in (self.q, self.k, self.v))
        scores = self.talking_head(q.transpose(2, 3) @ k * self.scale)
        mixed = v @ scores.softmax(-1).transpose(2, 3)
        return self.out(mixed.reshape(batch, -1, height, width))


class Network(nn.Module):
    def __init__(self, talking: bool, scale: float = 0.5) -> None:
        super().__init__()
        self.stem, self.attention = nn.Conv2d(3, 32, 4, 4), Attention(talking, scale)
        self.wide, self.narrow, self.head = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention(self.stem(x))
        return self.head(self.narrow(self.wide(x).relu()).mean((2, 3)))


def _planned(net: growfx.MaskedGraph, budget: str) -> tuple[growfx.ChannelPlan, Any]:
    plan = growfx.plan_channels(net, budget)
    net.set_masks(plan.masks(net))
    return plan, growfx.unwrap(net, compact=True)


def test_the_number_of_heads_is_looked_for_in_the_modules_further_around() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Network(talking=False), x := torch.randn(2, 3, 16, 16)).eval()
    _, small = _planned(net, "flops=0.6")
    heads = small.attention.num_heads
    assert 1 <= heads < 8
    assert small.attention.q[0].out_channels == 8 * heads
    assert torch.allclose(small(x), net(x), atol=1e-5)


def test_heads_that_cannot_leave_are_not_planned_though_their_scores_hardly_count() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Network(talking=True, scale=1e-7), x := torch.randn(2, 3, 16, 16)).eval()
    plan, small = _planned(net, "flops=0.9")
    assert all(family.reason for family in plan.families if "attention.q.0" in family.outputs)
    dense, planned = (growfx.cost(growfx.wrap(model, x[:1])).dense for model in (Network(True), small))
    assert planned / dense <= 0.9 + 1e-6
