"""The layouts of weights against what the layers compute: an edge joins the units it says."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from growfx.analysis.weight_layout import by_unit, canonical, from_canonical, from_units, joined_units
from growfx.masked.twins import to_twin

LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "linear": (nn.Linear(4, 6), (1, 4), 1),
    "convolution": (nn.Conv2d(4, 6, 3, padding=1), (1, 4, 3, 3), 1),
    "grouped": (nn.Conv1d(4, 6, 3, padding=1, groups=2), (1, 4, 3), 1),
    "depthwise": (nn.Conv2d(4, 4, 1, groups=4), (1, 4, 2, 2), 1),
    "transposed": (nn.ConvTranspose2d(4, 6, 2), (1, 4, 2, 2), 1),
    "grouped transposed": (nn.ConvTranspose1d(4, 6, 2, groups=2), (1, 4, 2), 1),
}


def touched(layer: Any, shape: tuple[int, ...], axis: int, position: int) -> tuple[list[int], list[int]]:
    """The input and output units that one weight alone joins, found by running the layer."""
    weight = layer.weight.detach()
    weight.zero_().view(-1)[position] = 1.0
    if layer.bias is not None:
        layer.bias.detach().zero_()
    x = torch.ones(shape, requires_grad=True)
    out = layer(x)
    out.sum().backward()
    units = []
    for values in (x.grad, out.detach()):
        assert values is not None
        units.append(values.transpose(0, axis).flatten(1).any(1).nonzero().flatten().tolist())
    return units[0], units[1]


@pytest.mark.parametrize("kind", LAYERS)
def test_every_edge_joins_the_units_that_its_weight_joins(kind: str) -> None:
    layer, shape, axis = LAYERS[kind]
    twin: Any = to_twin(copy.deepcopy(layer))
    plain: Any = copy.deepcopy(layer)
    for position in range(plain.weight.numel()):
        edges = torch.zeros_like(plain.weight, dtype=torch.bool)
        edges.view(-1)[position] = True
        inputs, outputs = joined_units(twin, edges)
        assert (inputs.nonzero().flatten().tolist(), outputs.nonzero().flatten().tolist()) == touched(
            plain, shape, axis, position
        )


def mixed(groups: int) -> Any:
    from timm.layers.cond_conv2d import CondConv2d

    return CondConv2d(4, 6, 3, padding=1, groups=groups, num_experts=2)


def test_an_edge_of_a_mixture_joins_the_units_of_its_kernel() -> None:
    layer = mixed(groups=2)
    for position in range(layer.weight.numel()):
        kernel = position % (layer.weight.numel() // 2)
        plain = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        edges = torch.zeros_like(layer.weight, dtype=torch.bool)
        edges.view(-1)[position] = True
        inputs, outputs = joined_units(layer, edges)
        wanted = touched(plain, (1, 4, 3, 3), 1, kernel)
        assert (inputs.nonzero().flatten().tolist(), outputs.nonzero().flatten().tolist()) == wanted


def all_layers() -> list[Any]:
    return [layer for layer, _, _ in LAYERS.values()] + [mixed(1), mixed(2), nn.MultiheadAttention(4, 2)]


@pytest.mark.parametrize("layer", all_layers(), ids=lambda layer: type(layer).__name__)
def test_every_arrangement_can_be_undone(layer: Any) -> None:
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    layer.parameter = weight
    values: Tensor = torch.arange(weight.numel()).reshape(weight.shape)
    assert torch.equal(from_canonical(layer, canonical(layer, values)), values)
    for by_output in (True, False):
        rows = by_unit(layer, values, by_output)
        assert torch.equal(from_units(layer, rows, by_output), values)
        assert sorted(itertools.chain(*rows.tolist())) == list(range(weight.numel()))
