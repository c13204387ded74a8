"""Layers without input or output features: a branch that a model's settings left nothing for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growfx


class Branches(nn.Module):
    """Two branches side by side, of which one has no input or no output."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide, self.empty, self.head = nn.Linear(8, 12), nn.Linear(inputs, outputs), nn.Linear(12 + outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        given = x if self.empty.in_features else x[:, 8:]
        return self.head(torch.relu(torch.cat([self.wide(x), self.empty(given)], 1)))


X = torch.randn(4, 8)
SHAPES = [(0, 4), (8, 0)]


def branches(inputs: int, outputs: int) -> Branches:
    torch.manual_seed(0)
    return Branches(inputs, outputs)


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_layer_has_no_mask_and_stands_in_nobodys_way(inputs: int, outputs: int, tmp_path: Any) -> None:
    net = growfx.wrap(branches(inputs, outputs), X, density=0.4).eval()
    assert list(net.layers) == ["wide", "head"]
    assert net.trace_report.unmasked["empty"] == "its weight has no elements"
    net.wide.mask[:3] = False
    expected = net(X)
    assert growfx.cost(net).sparse == net.nnz
    assert growfx.path_products(net).scores.keys() == {"wide", "head"}
    small = growfx.unwrap(net, compact=True)
    assert small.wide.out_features == 9
    torch.testing.assert_close(small(X), expected)
    growfx.save(net, tmp_path / "a")
    for runtime in ("dense", "sparse"):
        loaded = growfx.load(tmp_path / "a", model=branches(inputs, outputs), runtime=runtime)
        torch.testing.assert_close(loaded(X), expected)
    assert "wide" in str(growfx.plan_channels(net, "params=0.6"))


@pytest.mark.parametrize("name", ["pwmpr", "phew", "rigl", "gmp"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_methods_train_a_network_with_an_empty_layer(name: str, inputs: int, outputs: int) -> None:
    net = growfx.use_kernels(growfx.wrap(branches(inputs, outputs), X), "sparse", example_inputs=X)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method: Any = growfx.methods.create(name, **({"max_density": 0.3} if name == "pwmpr" else {"density": 0.3}))
    method.attach(net, optimizer, total_steps=4, steps_per_epoch=2)
    for _ in range(4):
        net(X).square().sum().backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    assert net.nnz < net.numel
