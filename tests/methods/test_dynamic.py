"""Dynamic sparse training: which edges are exchanged, when, and at what price."""

import copy
import math

import numpy as np
import pytest
import torch
from breadth import representative, some
from method_nets import OPTIMIZERS, small_net, train_steps
from torch.nn import functional as F

import growfx
from growfx import methods
from growfx.errors import ConfigError
from growfx.selection.density import layer_counts

ALL = ("mest", "rigl", "rigl-sg", "rigl-sm", "set", "snfs")
BY_LAYER = ("rigl", "set")


def begin(name: str, total_steps: int = 40, optimizer: str = "sgd", **options):
    net = small_net()
    own = OPTIMIZERS[optimizer](net)
    method = methods.create(name, **{"density": 0.2, "update_every": 4, **options})
    method.attach(net, own, total_steps=total_steps, steps_per_epoch=5)
    return net, own, method


def counts_of(net) -> dict[str, int]:
    return {name: layer.nnz for name, layer in net.layers.items()}


def batch(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `train_steps` trains step `number` (from 0) on."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    return images, images.mean((1, 2, 3)).gt(0).long()


def plain_gradients(net, number: int) -> dict[str, torch.Tensor]:
    """Gradients of all weights by a plain copy of the network, which knows no masks."""
    plain = growfx.unwrap(copy.deepcopy(net)).train()
    images, targets = batch(number)
    weights = [plain.get_parameter(f"{name}.weight") for name in net.layers]
    return dict(zip(net.layers, torch.autograd.grad(F.cross_entropy(plain(images), targets), weights), strict=True))


# -- counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some([name for name in ALL if name != "mest"], representative))
def test_an_exchange_never_changes_the_number_of_edges(name):
    net, optimizer, method = begin(name, update_until=1.0)
    edges, before = round(0.2 * net.numel), counts_of(net)
    changed = []
    for number in range(40):
        changed += train_steps(net, optimizer, method, 1, number)
        assert net.nnz == edges
        if name in BY_LAYER:
            assert counts_of(net) == before
    assert [number + 1 for number, moved in enumerate(changed) if moved] == list(range(4, 40, 4))
    assert (counts_of(net) == before) == (name in BY_LAYER)
    assert method.exploration > net.density


@pytest.mark.filterwarnings("ignore:.* steps has no update:growfx.GrowfxWarning")
@pytest.mark.parametrize("total_steps", some([1, 2, 5, 10], lambda count: count in (1, 10)))
@pytest.mark.parametrize("name", some(ALL, representative))
def test_density_is_exact_at_the_end_however_many_updates_there_were(name, total_steps):
    for every in (1, 3):
        net, optimizer, method = begin(name, total_steps, update_every=every, density=0.37)
        train_steps(net, optimizer, method, total_steps)
        assert net.nnz == round(0.37 * net.numel)


@pytest.mark.parametrize("until", [0.5, 1.0])
def test_updates_end_where_they_should_and_never_after_the_last_step(until):
    net, optimizer, method = begin("set", 12, update_every=3, update_until=until)
    changed = train_steps(net, optimizer, method, 15)
    ticks = {0.5: [3], 1.0: [3, 6, 9]}[until]
    assert [number + 1 for number, moved in enumerate(changed) if moved] == ticks


def test_a_training_too_short_for_an_update_keeps_its_masks():
    net, optimizer, method = begin("rigl", 10, update_every=100)
    before = net.mask_digest()
    assert train_steps(net, optimizer, method, 10) == [False] * 10
    assert net.mask_digest() == before
    assert method.exploration == net.density


@pytest.mark.parametrize(
    ("decay", "rate"), [("cosine", 0.3 * (1 + math.cos(math.pi * 10 / 30))), ("linear", 0.4), ("constant", 0.6)]
)
def test_a_layer_drops_the_rate_of_its_edges_rounded_down(decay, rate):
    """Growth is planted outside the masks, so that nothing dropped comes back."""
    net, optimizer, method = begin("rigl", 40, update_every=10, drop_fraction=0.6, decay=decay)
    train_steps(net, optimizer, method, 9)
    plant(net, {name: (~layer.mask).float() for name, layer in net.layers.items()})
    before = {name: layer.mask.clone() for name, layer in net.layers.items()}
    optimizer.step()
    assert method.step()
    for name, layer in net.layers.items():
        active = int(before[name].sum())
        room = layer.numel - active
        assert int((before[name] & ~layer.mask).sum()) == min(int(rate * active), room)


def plant(net, gradients: dict[str, torch.Tensor]) -> None:
    """Put gradients where the backward pass of the step under way would leave them."""
    for name, gradient in gradients.items():
        net.layers[name].parameter.grad = gradient.clone()


# -- which edges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rigl", "rigl-sg"])
def test_rigl_grows_where_a_plain_network_has_the_largest_gradients(name):
    net, optimizer, method = begin(name, update_every=6)
    train_steps(net, optimizer, method, 5)
    before, counts = {k: layer.mask.clone() for k, layer in net.layers.items()}, counts_of(net)
    gradients = {k: g.abs() for k, g in plain_gradients(net, 5).items()}
    step_alone(net, optimizer, 5)
    weights = {k: layer.parameter.detach().abs().clone() for k, layer in net.layers.items()}
    rate = 0.15 * (1 + math.cos(math.pi * 6 / 30))
    assert method.step()
    for k, layer in net.layers.items():
        drops = int(rate * counts[k])
        present = sorted(np.flatnonzero(before[k]), key=lambda i, k=k: float(weights[k].reshape(-1)[i]))[drops:]
        absent = set(range(layer.numel)) - {int(i) for i in present}
        best = sorted(absent, key=lambda i, k=k: -float(gradients[k].reshape(-1)[i]))[: layer.nnz - len(present)]
        assert {int(i) for i in np.flatnonzero(layer.mask)} == {int(i) for i in present} | set(best)


def step_alone(net, optimizer, number: int) -> None:
    """What `train_steps` does in step `number`, up to the method's part."""
    images, targets = batch(number)
    net.train()
    F.cross_entropy(net(images), targets).backward()
    optimizer.step()


def test_random_growth_does_not_follow_a_planted_gradient_and_gradient_growth_does():
    grown = {}
    for name in ("set", "rigl", "mest"):
        net, optimizer, method = begin(name, 100, update_every=1, drop_fraction=0.5, density=0.1)
        layer = net.layers["wide"]
        before = layer.mask.clone()
        target = ~before & (torch.arange(before.numel()).reshape(before.shape) % 7 == 0)
        plant(net, {k: torch.where(target, 10.0, 0.0) if k == "wide" else torch.zeros_like(m.mask, dtype=torch.float)
                    for k, m in net.layers.items()})  # fmt: skip
        optimizer.step()
        assert method.step()
        new = layer.mask & ~before
        grown[name] = float((new & target).sum() / new.sum())
    assert grown["rigl"] == 1.0
    assert max(grown["set"], grown["mest"]) < 0.5


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", some(ALL, representative))
def test_new_edges_start_at_zero_and_edges_grown_again_at_once_keep_value_and_state(name, optimizer_name):
    net, optimizer, method = begin(name, optimizer=optimizer_name, update_every=5, drop_fraction=0.9, density=0.5)
    train_steps(net, optimizer, method, 4)
    step_alone(net, optimizer, 4)
    before = {k: (layer.mask.clone(), layer.parameter.detach().clone()) for k, layer in net.layers.items()}
    moments = {k: moments_of(optimizer, layer) for k, layer in net.layers.items()}
    assert method.step()
    for k, layer in net.layers.items():
        mask, weight = before[k]
        same = mask & layer.mask
        # with nine tenths dropped and half the edges active, many come back
        assert same.sum() > 0.1 * mask.sum()
        assert torch.equal(layer.parameter.detach(), torch.where(same, weight, 0.0))
        for old, new in zip(moments[k], moments_of(optimizer, layer), strict=True):
            assert torch.equal(new, torch.where(same, old, 0.0))


def moments_of(optimizer, layer) -> list[torch.Tensor]:
    state = optimizer.state[layer.parameter]
    found = [v.clone() for v in state.values() if torch.is_tensor(v) and v.shape == layer.mask.shape]
    assert found
    return found


@pytest.mark.parametrize("name", some(ALL, representative))
def test_gradients_that_are_all_zero_change_no_counts(name):
    net, optimizer, method = begin(name, 12, update_every=1, update_until=1.0, drop_fraction=0.5, density=0.3)
    before = counts_of(net)
    for _ in range(12):
        plant(net, {k: torch.zeros(layer.mask.shape) for k, layer in net.layers.items()})
        optimizer.step()
        method.step()
    assert net.nnz == round(0.3 * net.numel)
    assert counts_of(net) == before


@pytest.mark.parametrize("name", ["rigl", "set", "mest"])
def test_a_full_layer_stays_as_it_is(name):
    net, optimizer, method = begin(name, density=0.35)
    full = [k for k, layer in net.layers.items() if layer.nnz == layer.numel]
    assert full
    train_steps(net, optimizer, method, 40)
    assert all(net.layers[k].mask.all() for k in full)


# -- gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("set", []),
        ("mest", []),
        ("rigl", [4, 8, 12]),
        ("rigl-sg", [4, 8, 12]),
        ("rigl-sm", [4, 8, 12]),
        ("snfs", list(range(1, 13))),
    ],
)
def test_gradients_of_absent_edges_are_paid_for_in_exactly_the_steps_that_read_them(name, steps):
    net, optimizer, method = begin(name, 20)
    paid, collected = [], []
    for number in range(20):
        if method.needs_dense_gradient:
            paid.append(number + 1)
        if all(layer.collects_gradient for layer in net.layers.values()):
            collected.append(number + 1)
        train_steps(net, optimizer, method, 1, number)
    assert paid == collected == steps


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["rigl", "rigl-sg", "rigl-sm", "snfs", "mest"])
def test_a_step_without_finite_gradients_is_left_out(name, bad):
    """As under mixed precision, where a loss scaler leaves such a step out; it is not counted either."""
    net, optimizer, method = begin(name, 40)
    train_steps(net, optimizer, method, 3)
    before = net.mask_digest()
    plant(net, {k: torch.full(layer.mask.shape, bad) for k, layer in net.layers.items()})
    assert not method.step()
    assert net.mask_digest() == before
    optimizer.zero_grad()
    changed = train_steps(net, optimizer, method, 36, 4)
    assert changed[0]
    assert net.nnz == round(0.2 * net.numel)
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_weights_that_are_not_finite_are_an_error_that_names_the_layer():
    net, optimizer, method = begin("rigl", 40)
    train_steps(net, optimizer, method, 3)
    optimizer.step()
    with torch.no_grad():
        net.layers["wide"].parameter[net.layers["wide"].mask] = math.nan
    with pytest.raises(ConfigError, match="weights of layer `wide` are not finite"):
        method.step()


@pytest.mark.parametrize("name", ["rigl-sm", "mest"])
def test_gradients_taken_away_before_the_step_are_missed(name):
    _, optimizer, method = begin(name, 40, update_every=1)
    optimizer.zero_grad()
    with pytest.raises(ConfigError, match=r"call `method.step\(\)` after `optimizer.step\(\)` and before"):
        method.step()


def test_momentum_is_the_moving_average_of_a_plain_networks_gradients():
    net, optimizer, method = begin("snfs", 40, averaging=0.75)
    average = {name: torch.zeros(layer.mask.shape) for name, layer in net.layers.items()}
    for number in range(3):
        for name, gradient in plain_gradients(net, number).items():
            average[name] = 0.75 * average[name] + 0.25 * gradient
        train_steps(net, optimizer, method, 1, number)
    memory = method.state_dict()["memory"]
    assert all(torch.allclose(memory[name], average[name], rtol=1e-4, atol=1e-7) for name in average)
    train_steps(net, optimizer, method, 37, 3)
    assert method.state_dict()["memory"] == {}


def test_momentum_of_an_edge_that_went_is_gone_when_it_comes_back():
    net, optimizer, method = begin("rigl-sm", 40, drop_fraction=0.9)
    train_steps(net, optimizer, method, 4)
    memory = method.state_dict()["memory"]
    for name, layer in net.layers.items():
        assert not memory[name][~layer.mask].any()
        assert memory[name][layer.mask].any()


@pytest.mark.parametrize(
    ("name", "ratio"), [("rigl-sg", 2.0), ("rigl-sm", (0.9 * 5 + 2) / 1.9), ("snfs", (0.9 * 5 + 2) / 1.9)]
)
def test_growth_is_shared_out_by_the_last_gradient_or_by_its_average(name, ratio):
    net, optimizer, method = begin(name, 40, update_every=2, distribution="uniform", drop_fraction=0.5)
    before = counts_of(net)
    for wide in (5.0, 2.0):
        sizes = {"stem": 0.0, "block": 1.0, "wide": wide, "head": 0.0}
        plant(net, {k: torch.full(layer.mask.shape, -sizes[k]) for k, layer in net.layers.items()})
        optimizer.step()
        method.step()
    rate = 0.25 * (1 + math.cos(math.pi * 2 / 30))
    drops = {k: int(rate * count) for k, count in before.items()}
    grown = {k: net.layers[k].nnz - (before[k] - drops[k]) for k in before}
    assert sum(grown.values()) == sum(drops.values())
    assert grown["stem"] == grown["head"] == 0
    assert abs(grown["wide"] - ratio * grown["block"]) <= 1 + ratio


# -- MEST ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("excess", [0.0, 0.1, 0.9])
def test_a_soft_bound_passes_the_density_by_an_excess_that_shrinks_to_nothing(excess):
    net, optimizer, method = begin("mest", 40, excess=excess, distribution="uniform")
    densities = []
    for number in range(7):
        train_steps(net, optimizer, method, 4, 4 * number)
        densities.append(net.nnz)
    share = [(1 + math.cos(math.pi * step / 30)) / 2 for step in (4, 8, 12, 16, 20, 24)] + [0.0]
    assert densities == [min(round((0.2 + excess * s) * net.numel), net.numel) for s in share]


def test_a_soft_bound_drops_each_layer_below_its_share_before_it_grows():
    net, optimizer, method = begin("mest", 40, excess=0.2, drop_fraction=0.5, gradient_weight=0.0)
    shapes = {name: tuple(layer.mask.shape) for name, layer in net.layers.items()}
    train_steps(net, optimizer, method, 7)
    step_alone(net, optimizer, 7)
    rate = 0.25 * (1 + math.cos(math.pi * 8 / 30))
    share = layer_counts(shapes, round(0.2 * net.numel) / net.numel)
    before = {k: (layer.mask.clone(), layer.parameter.detach().abs().clone()) for k, layer in net.layers.items()}
    assert method.step()
    stayed = expected = variance = 0.0
    for k, layer in net.layers.items():
        mask, weight = before[k]
        kept = share[k] - int(rate * share[k])
        strongest = torch.where(mask, weight, -1.0).reshape(-1).topk(kept).indices
        assert layer.mask.reshape(-1)[strongest].all()
        weak = mask.reshape(-1).clone()
        weak[strongest] = False
        # the others come back by chance, as often as edges that were never there
        chance = (layer.nnz - kept) / (layer.numel - kept)
        stayed += int((layer.mask.reshape(-1) & weak).sum())
        expected += chance * int(weak.sum())
        variance += chance * (1 - chance) * int(weak.sum())
    assert abs(stayed - expected) < 4 * math.sqrt(variance)


def test_an_edge_is_worth_its_weight_and_its_gradient():
    kept = {}
    for weight in (0.0, 1e6):
        net, _, method = begin("mest", 40, update_every=1, gradient_weight=weight, excess=0.0, drop_fraction=0.9)
        layer = net.layers["wide"]
        favoured = layer.mask & (torch.arange(layer.numel).reshape(layer.mask.shape) % 10 == 0)
        for other in net.layers.values():
            other.parameter.grad = torch.zeros(other.mask.shape)
        layer.parameter.grad = favoured.float()
        method.step()
        kept[weight] = float((layer.mask & favoured).sum() / favoured.sum())
    assert kept[0.0] < 0.5
    assert kept[1e6] > 0.95


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [("update_every", 0), ("drop_fraction", 0.0), ("drop_fraction", 1.1), ("update_until", 0.0), ("decay", "step")],
)
@pytest.mark.parametrize("name", ALL)
def test_options_out_of_range_are_refused_by_name(name, option, value):
    with pytest.raises(ConfigError, match=f"`{option}` = .*; allowed: "):
        methods.create(name, **{option: value})


def test_exploration_grows_with_longer_updates():
    """In-time over-parameterization: updates to the end, seen in the share of edges ever active."""
    explored = []
    for until in (0.25, 1.0):
        net, optimizer, method = begin("set", 40, update_until=until, decay="constant")
        train_steps(net, optimizer, method, 40)
        explored.append(method.exploration)
    assert net.density < explored[0] < explored[1]
