"""Visits of paths to units, against the scores of the edges that lead to them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from path_enumeration import with_random_masks
from timm.layers.std_conv import StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.analysis.weight_layout import by_unit
from growfx.passes.path_products.products import path_gradients, path_visits


class Joined(nn.Module):
    """Branches that are grouped, depthwise and transposed, a sum and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up, self.head = nn.ConvTranspose2d(16, 6, 2, 2, groups=2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = torch.cat([x + self.grouped(x), self.deep(x)], 1)
        return self.head(self.up(x).mean((2, 3)))


class Repeated(nn.Module):
    """A layer that is called twice, and whose weight the model then uses itself."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(F.relu(self.inner(x)))
        return self.last(x + F.linear(x, self.inner.weight))


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.last = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.steps, self.last = nn.Linear(5, 6), nn.GRU(6, 7, batch_first=True), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.steps(self.first(x))[0][:, -1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "joined": (Joined, (1, 3, 6, 6)),
    "repeated": (Repeated, (1, 6)),
    "attending": (Attending, (1, 4, 8)),
    "recurrent": (Recurrent, (1, 4, 5)),
}


def _by_edges(net: growfx.MaskedGraph, zeros_as_one: bool = False) -> dict[str, Tensor]:
    paths = path_gradients(net, zeros_as_one=zeros_as_one)
    total, found = math.exp(paths.log_total - paths.log_scale), {}
    for name, scores in paths.scores.items():
        layer = net.layers[name]
        sizes = layer.parameter.detach().double().abs() * layer.mask
        sizes = layer.mask.double() if not bool(sizes.any()) else sizes
        found[name] = by_unit(layer, sizes * scores, by_output=True).sum(1) / total
    return found


def _assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, visits in expected.items():
        assert torch.allclose(found[name], visits, rtol=1e-10), name


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_visits_of_a_unit_are_those_of_its_edges(kind: str) -> None:
    build, shape = NETWORKS[kind]
    torch.manual_seed(0)
    net = with_random_masks(growfx.wrap(build(), torch.randn(shape)), 0.7)
    _assert_same(dict(path_visits(net).visits), _by_edges(net))


def test_what_is_zero_throughout_counts_as_one_where_asked() -> None:
    net = growfx.wrap(Joined(), torch.randn(1, 3, 6, 6))
    with torch.no_grad():
        net.layers["head"].parameter.zero_()
    _assert_same(dict(path_visits(net, zeros_as_one=True).visits), _by_edges(net, zeros_as_one=True))
    assert not any(bool(visits.any()) for visits in path_visits(net).visits.values())


def test_every_path_visits_one_unit_of_each_layer_of_a_chain() -> None:
    layers = StdConv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    paths = path_visits(growfx.wrap(nn.Sequential(*layers), torch.randn(1, 3, 6, 6)))
    assert paths.visits.keys() == {"0", "2", "4"}
    for visits in paths.visits.values():
        assert visits.sum().item() == pytest.approx(1, rel=1e-12)


def test_layers_off_every_path_have_the_same_reasons() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.fixed = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.fixed(torch.ones(2))

    net = growfx.wrap(Aside(), torch.randn(1, 4))
    paths = path_visits(net)
    assert paths.visits.keys() == {"used"}
    assert paths.off_path == growfx.path_products(net).off_path
