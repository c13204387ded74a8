"""The sparse seed: exact counts, every unit alive, edges where random walks go."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import growfx
from growfx.errors import ConfigError
from growfx.passes.path_products.products import path_products
from growfx.passes.seed import dead_units, expected_visits, seed_masks


class Branches(nn.Module):
    """Residual, concatenation, depthwise, grouped and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 12, 1, groups=4)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(18, 5)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x + self.depthwise(x)
        return self.head(torch.cat([self.grouped(x).mean((2, 3)), self.up(x).mean((2, 3))], 1))


class WithTable(nn.Module):
    """A bias computed from constants alone: off path."""

    def __init__(self):
        super().__init__()
        self.table = nn.Linear(3, 6)
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)
        self.register_buffer("coordinates", torch.ones(1, 3))

    def forward(self, x):
        return self.head(F.relu(self.body(x) + self.table(self.coordinates)))


def branches() -> growfx.MaskedGraph:
    torch.manual_seed(1)
    return growfx.wrap(Branches(), torch.randn(2, 2, 6, 6))


def test_expected_visits_of_a_chain_are_the_walks_listed_one_by_one():
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
    first, second = (layer.parameter.detach().double().abs() for layer in net.layers.values())
    wanted = torch.zeros(4, 3), torch.zeros(2, 4)
    for i, j, k in itertools.product(range(3), range(4), range(2)):
        forward = first[j, i] / first[:, i].sum() * second[k, j] / second[:, j].sum() / 3
        backward = second[k, j] / second[k].sum() * first[j, i] / first[j].sum() / 2
        wanted[0][j, i] += 0.5 * (forward + backward)
        wanted[1][k, j] += 0.5 * (forward + backward)
    for got, value in zip(expected_visits(net).values(), wanted, strict=True):
        assert torch.allclose(got.float(), value, rtol=1e-5)
        assert float(got.sum()) == pytest.approx(1.0)  # one walk crosses each layer of a chain once


@pytest.mark.parametrize("density", [0.12, 0.3, 0.77, 1.0])
def test_a_seed_has_exactly_its_edges_and_no_dead_unit(density):
    net = branches()
    seed = seed_masks(net, density, seed=7)
    assert sum(int(mask.sum()) for mask in seed.masks.values()) == round(density * net.numel)
    assert seed.dead_units == dead_units(net, seed.masks) == 0
    net.set_masks(seed.masks)
    paths = path_products(net)
    assert all(alive.all() for alive in (*paths.alive_in.values(), *paths.alive_out.values()))


def test_a_seed_too_sparse_for_all_units_says_how_many_are_dead():
    seed = seed_masks(branches(), 0.02)
    assert seed.dead_units > 0


def test_the_automatic_density_is_the_smallest_step_where_every_unit_is_alive():
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 60)), torch.randn(2, 60))
    found = seed_masks(net)
    assert found.density in (0.02, 0.05)
    assert found.dead_units == 0
    below = {0.02: 0.01, 0.05: 0.02}[found.density]
    assert seed_masks(net, below).dead_units > 0
    assert seed_masks(net, largest=below).density == below


def test_seeds_depend_on_the_seed_alone():
    first, same, other = (seed_masks(branches(), 0.3, seed=number).masks for number in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_large_weights_are_drawn_more_often():
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 8)), torch.randn(2, 8))
    size = torch.cat([layer.parameter.detach().abs().reshape(-1) for layer in net.layers.values()])
    mask = torch.cat([mask.reshape(-1) for mask in seed_masks(net, 0.3).masks.values()])
    assert size[mask].mean() > 1.2 * size[~mask].mean()


def test_a_layer_of_zeros_is_seeded_all_the_same():
    net = branches()
    with torch.no_grad():
        net.layers["depthwise"].parameter.zero_()
    seed = seed_masks(net, 0.3)
    assert seed.masks["depthwise"].any()
    assert seed.dead_units == 0


def test_off_path_layers_stay_dense_and_are_counted():
    torch.manual_seed(0)
    net = growfx.wrap(WithTable(), torch.randn(2, 4))
    seed = seed_masks(net, 0.7)
    assert seed.masks["table"].all()
    assert sum(int(mask.sum()) for mask in seed.masks.values()) == round(0.7 * net.numel)
    with pytest.raises(ConfigError, match=r"`seed_density` is 0\.1, of 54 edges; 18 of them are in layers no path"):
        seed_masks(net, 0.1)
    with pytest.raises(ConfigError, match=r"`seed_density` is 1\.5; allowed is a number in"):
        seed_masks(net, 1.5)
