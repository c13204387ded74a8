"""Random walks through networks: where they go, how often, and the masks they leave."""

import math

import pytest
import torch
from breadth import some
from connect_nets import NETS, build
from method_nets import small_net
from torch import nn
from torch.nn import functional as F

import growfx
from growfx import methods
from growfx.analysis.weight_layout import joined_units
from growfx.errors import ConfigError, TraceError
from growfx.passes import walks as walks_pass
from growfx.passes.path_products.products import path_gradients
from growfx.passes.seed import expected_visits
from growfx.passes.walks import walk_masks, walk_visits


def chain(kind: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    if kind == "linear":
        return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 3)), torch.randn(1, 4)
    model = nn.Sequential(
        nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, 8, 2, groups=2), nn.ConvTranspose2d(8, 4, 1), nn.Conv2d(4, 3, 1)
    )
    return model, torch.randn(1, 4, 2, 2)


def deviation(found: torch.Tensor, expected: torch.Tensor, count: int) -> float:
    """Largest difference, in standard deviations of a count of rare events."""
    return float(((found - expected).abs() / (expected / count + 1 / count**2).sqrt()).max())


@pytest.mark.parametrize("kind", ["linear", "convolutions"])
def test_edges_of_a_chain_are_visited_as_often_as_endless_walks_would(kind):
    model, x = chain(kind)
    net = growfx.wrap(model, x)
    expected, found = expected_visits(net), walk_visits(net, 60_000)
    assert set(found) == set(expected)
    for name, visits in found.items():
        assert float(visits.sum()) == pytest.approx(1)  # every walk crosses every layer once
        assert deviation(visits, expected[name], 60_000) < 5


class Blocks(nn.Module):
    """Two residual blocks, three layers side by side, one of them a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.left, self.right, self.short = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.one(torch.tanh(x))
        x = x + self.two(torch.tanh(x))
        x = torch.cat([self.left(x), self.right(x)], -1) + self.short(x)
        return self.head(x)


def test_walks_choose_evenly_among_layers_and_turn_by_turn_among_summands():
    torch.manual_seed(0)
    model = Blocks()
    for layer in model.children():
        nn.init.ones_(layer.weight)
    found = {name: float(v.sum()) for name, v in walk_visits(growfx.wrap(model, torch.randn(1, 4)), 40_000).items()}
    # backward, the sum before the head is left or right (by its column), or the shortcut
    expected = {
        "stem": 1, "one": 0.5, "two": 0.5, "head": 1,
        "left": (1 / 3 + 1 / 4) / 2, "right": (1 / 3 + 1 / 4) / 2, "short": (1 / 3 + 1 / 2) / 2,
    }  # fmt: skip
    for name, visits in expected.items():
        assert found[name] == pytest.approx(visits, abs=5 * (visits / 40_000) ** 0.5 if visits < 1 else 0), name


def test_backward_walks_take_values_as_often_as_queries_and_keys_together():
    model, x = build("attention")
    nn.init.ones_(model.qkv.weight)
    count = 30_000
    queries, keys, values = (part.sum() for part in walk_visits(growfx.wrap(model, x), count)["qkv"].chunk(3))
    backward = 4 * float(values - (queries + keys) / 2)  # forward, all three are alike
    forward = 3 * float(values) - 1.5 * backward
    assert float(queries) == pytest.approx(float(keys), abs=5 * (2 * float(keys) / count) ** 0.5)
    # of what the head reads, half is made by attention, and so is half of what its feed-forward part reads
    assert backward == pytest.approx((1 / 2 + 1 / 4) / 2, abs=0.04)
    assert forward == pytest.approx(1 / 2 / 2, abs=0.06)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("share", some([0.05, 0.3, 0.8, 1.0], lambda share: share == 0.3))
def test_masks_have_exactly_the_edges_asked_for(name, share):
    model, x = build(name)
    net = growfx.wrap(model, x)
    edges = round(share * net.numel)
    found = walk_masks(net, edges)
    assert sum(int(mask.sum()) for mask in found.masks.values()) == edges
    assert {n: m.shape for n, m in found.masks.items()} == {n: layer.mask.shape for n, layer in net.layers.items()}
    assert found.drawn < edges or edges < 10
    if share <= 0.3:
        assert found.drawn == 0


@pytest.mark.parametrize("name", sorted(set(NETS) - {"mixer", "flat", "attention", "written attention"}))
# In the others positions matter, which walks do not follow.
def test_only_the_last_walk_leaves_units_that_lead_nowhere(name):
    model, x = build(name)
    net = growfx.wrap(model, x)
    for edges in (6, 11, 19, 32):
        masks = walk_masks(net, edges, seed=3).masks
        paths = path_gradients(net, masks, norm="identity", unit_scales=True)
        stranded = 0
        for layer, alive in paths.alive_out.items():
            stranded += int((joined_units(net.layers[layer], masks[layer])[1] & ~alive).sum())
        assert stranded <= len(net.layers)


def test_more_edges_are_more_walks_of_the_same_kind():
    model, x = build("residual")
    net = growfx.wrap(model, x)
    few, more = (walk_masks(net, edges, seed=1) for edges in (60, 200))
    assert few.walks < more.walks
    assert all((more.masks[name] | ~mask).all() for name, mask in few.masks.items())
    other = walk_masks(net, 200, seed=2)
    assert any(not torch.equal(mask, more.masks[name]) for name, mask in other.masks.items())
    assert all(torch.equal(mask, more.masks[n]) for n, mask in walk_masks(net, 200, seed=1).masks.items())


def test_inputs_and_outputs_take_turns():
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(7, 5)), torch.randn(1, 7))
    weights = net.layers["0"].parameter
    nn.init.zeros_(weights)
    with torch.no_grad():
        weights[0], weights[:, 0] = 1e-6, 1.0  # forward to output 0 (from inputs above 0), backward to input 0
        weights[0, 0] = 1.0
    visits = walk_visits(net, 35 * 200)["0"]
    assert float(visits[:, 0].sum()) == pytest.approx(0.5 + 0.5 / 7, abs=0.01)
    torch.testing.assert_close(visits[0, 1:], torch.full((6,), 0.5 / 7, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(visits[1:, 0], torch.full((4,), 0.1 + 0.1 / 7, dtype=torch.float64), atol=0.01, rtol=0)


def test_units_without_weight_step_evenly():
    model, x = chain("linear")
    nn.init.zeros_(model[2].weight)
    net = growfx.wrap(model, x)
    found = walk_visits(net, 40_000)
    assert deviation(found["2"].sum(1), expected_visits(net)["2"].sum(1), 40_000) < 5
    assert float(found["2"].min()) > 0


def test_weights_decide_what_comes_first():
    torch.manual_seed(0)
    net = growfx.wrap(nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30)), torch.randn(1, 30))
    masks = walk_masks(net, round(0.2 * net.numel)).masks
    for name, layer in net.layers.items():
        size = layer.parameter.detach().abs()
        assert size[masks[name]].mean() > 1.2 * size[~masks[name]].mean()


def test_layers_without_a_mask_are_crossed():
    torch.manual_seed(0)
    net = growfx.wrap(Blocks(), torch.randn(1, 4), exclude=["left", "stem"])
    assert "left" not in net.layers
    found = walk_visits(net, 4000)
    assert set(found) == set(net.layers)
    assert float(found["head"].sum()) == 1
    assert float(found["one"].sum()) == pytest.approx(0.5, abs=0.05)
    grouped = nn.Sequential(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 8, 1, groups=2), nn.Conv2d(8, 3, 1))
    nets = growfx.wrap(grouped, torch.randn(1, 4, 2, 2), exclude=["1"])
    visits = walk_visits(nets, 4000)
    assert {name: float(v.sum()) for name, v in visits.items()} == {"0": 1.0, "2": 1.0}
    assert walk_masks(nets, 20).drawn == 0


class Position(nn.Module):
    """A layer that no path crosses."""

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.place = nn.Linear(6, 9), nn.Linear(9, 3), nn.Linear(2, 9)
        self.register_buffer("table", torch.randn(1, 2))

    def forward(self, x):
        return self.head(F.relu(self.fc(x) + self.place(self.table)))


def attached(net, **options):
    method = methods.create("phew", **options)
    method.attach(net, torch.optim.SGD(net.parameters(), lr=0.1), total_steps=4, steps_per_epoch=2)
    return method


def test_the_method_leaves_layers_off_every_path_alone_and_counts_them():
    torch.manual_seed(0)
    net = growfx.wrap(Position(), torch.randn(1, 6))
    attached(net, density=0.4)
    assert net.layers["place"].density == 1
    assert net.nnz == round(0.4 * net.numel)
    with pytest.raises(ConfigError, match=r"allowed are densities above"):
        attached(growfx.wrap(Position(), torch.randn(1, 6)), density=0.1)


def test_walks_hardly_finding_new_edges_give_way_to_a_draw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight[1, 3] *= 1e-12
    net = growfx.wrap(model, torch.randn(1, 6))
    found = walk_masks(net, net.numel - 1)
    assert found.drawn == 0
    assert not found.masks["0"][1, 3]
    assert walk_masks(net, net.numel).drawn == 1


def test_without_connectivity_all_edges_are_drawn_by_expected_visits(monkeypatch):
    net = small_net()

    def refuse(net):
        raise TraceError("no units")

    monkeypatch.setattr(walks_pass, "connect", refuse)
    found = walk_masks(net, 100)
    assert (found.walks, found.drawn) == (0, 100)
    assert sum(int(mask.sum()) for mask in found.masks.values()) == 100
    monkeypatch.setattr(walks_pass, "expected_visits", refuse)
    with pytest.raises(TraceError, match="no units"):
        walk_masks(net, 100)


def test_more_edges_than_there_are_is_all_of_them():
    net = small_net()
    found = walk_masks(net, 10**9)
    assert all(mask.all() for mask in found.masks.values())


def test_sparse_aware_weights_keep_the_masks():
    nets = small_net(), small_net()
    for net, init in zip(nets, ("dense", "sparse-aware"), strict=True):
        attached(net, density=0.2, init=init, seed=1)
    assert nets[0].mask_digest() == nets[1].mask_digest()
    one, other = (net.layers["block"] for net in nets)
    scale = (72 / one.mask.flatten(1).sum(1).clamp(min=1)).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(other.parameter.detach(), one.parameter.detach() * scale)
    assert math.isfinite(growfx.path_products(nets[1]).log_total)
