"""Gradual pruning, regeneration, and alternating dense and sparse phases."""

import math

import numpy as np
import pytest
import torch
from breadth import some
from error_facts import facts
from method_nets import OPTIMIZERS, small_net, train_steps
from torch.nn import functional as F

from growfx import methods
from growfx.errors import ConfigError
from growfx.selection.density import layer_counts


def begin(name: str, total_steps: int = 40, optimizer: str = "sgd", **options):
    net = small_net()
    own = OPTIMIZERS[optimizer](net)
    short = {"acdc": {}, "gmp": {"update_every": 4}, "granet": {"update_every": 4, "initial_density": 0.5}}[name]
    method = methods.create(name, **{"density": 0.2, **short, **options})
    method.attach(net, own, total_steps=total_steps, steps_per_epoch=5)
    return net, own, method


def edges_per_step(net, optimizer, method, steps: int) -> list[int]:
    """Edges after each of `steps` steps, and before the first."""
    edges = [net.nnz]
    for number in range(steps):
        train_steps(net, optimizer, method, 1, number)
        edges.append(net.nnz)
    return edges


def step_alone(net, optimizer, number: int) -> None:
    """What `train_steps` does in step `number`, up to the method's part."""
    images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    net.train()
    F.cross_entropy(net(images), images.mean((1, 2, 3)).gt(0).long()).backward()
    optimizer.step()


def largest(scores: dict[str, torch.Tensor], count: int) -> dict[str, set[int]]:
    """Flat indices of the `count` largest scores over all layers, by sorting."""
    ranked = sorted(((-float(v), k, i) for k, s in scores.items() for i, v in enumerate(s.reshape(-1).tolist())))
    return {k: {i for _, name, i in ranked[:count] if name == k} for k in scores}


def indices(mask: torch.Tensor) -> set[int]:
    return {int(i) for i in np.flatnonzero(mask.numpy())}


# -- the ramp -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "first", "until"), [("gmp", 1.0, 30), ("granet", 0.6, 30)])
def test_the_density_falls_along_the_cubic_and_stays_at_its_end(name, first, until):
    ends = {"gmp": {"end": 0.75}, "granet": {"prune_until": 0.75, "initial_density": 0.6}}[name]
    net, optimizer, method = begin(name, **ends)
    edges = edges_per_step(net, optimizer, method, 44)
    expected, density = [], first
    for step in range(45):
        if (step % 4 == 0 and step < until) or step == until:
            density = 0.2 + (first - 0.2) * (1 - step / until) ** 3
        expected.append(round(density * net.numel))
    assert edges == expected


def test_pruning_starts_after_its_start():
    net, optimizer, method = begin("gmp", start=0.5, end=1.0, update_every=1)
    edges = edges_per_step(net, optimizer, method, 40)
    assert edges[20] == net.numel > edges[21]
    assert edges[36] > edges[40] == round(0.2 * net.numel)


@pytest.mark.parametrize("updates", some([1, 2, 5, 10], lambda count: count in (1, 5)))
@pytest.mark.parametrize("total_steps", some([1, 2, 5, 10, 23], lambda count: count in (1, 23)))
@pytest.mark.parametrize("name", ["gmp", "granet"])
def test_the_final_density_is_exact_for_any_number_of_steps_and_updates(name, total_steps, updates):
    """Codes that stop one update short end at ``density + (initial - density) / updates**3``."""
    every = max(total_steps // updates, 1)
    for density in (0.05, 0.37):
        net, optimizer, method = begin(name, total_steps, density=density, update_every=every)
        train_steps(net, optimizer, method, total_steps)
        assert net.nnz == round(density * net.numel)


def test_the_smallest_magnitudes_of_the_whole_network_go():
    net, optimizer, method = begin("gmp", 10, update_every=100, end=0.5)
    train_steps(net, optimizer, method, 4)
    step_alone(net, optimizer, 4)
    best = largest({k: layer.parameter.detach().abs() for k, layer in net.layers.items()}, round(0.2 * net.numel))
    assert method.step()
    assert {k: indices(layer.mask) for k, layer in net.layers.items()} == best


@pytest.mark.parametrize("name", ["gmp", "acdc"])
@pytest.mark.parametrize("scope", ["uniform", "erk", "er"])
def test_layers_pruned_apart_have_their_shares(name, scope):
    net, optimizer, method = begin(name, scope=scope)
    train_steps(net, optimizer, method, 40)
    shapes = {k: tuple(layer.mask.shape) for k, layer in net.layers.items()}
    shares = layer_counts(shapes, 0.2, scope)
    assert net.nnz == sum(shares.values())
    assert all(abs(layer.nnz - shares[k]) <= 1 for k, layer in net.layers.items())


@pytest.mark.parametrize("name", ["gmp", "acdc"])
def test_pruning_by_magnitude_never_pays_for_gradients_of_absent_edges(name):
    net, optimizer, method = begin(name)
    for number in range(40):
        assert not method.needs_dense_gradient
        train_steps(net, optimizer, method, 1, number)


# -- GraNet -------------------------------------------------------------------------------------------------------


def test_granet_starts_sparse_or_dense():
    net, _, _ = begin("granet")
    shapes = {k: tuple(layer.mask.shape) for k, layer in net.layers.items()}
    assert {k: layer.nnz for k, layer in net.layers.items()} == layer_counts(shapes, 0.5, "erk")
    dense = small_net()
    granet = methods.create("granet")
    granet.attach(dense, OPTIMIZERS["sgd"](dense), total_steps=10, steps_per_epoch=5)
    assert dense.nnz == dense.numel


def test_granet_regenerates_to_the_end_but_for_the_last_step_and_pays_only_then():
    net, optimizer, method = begin("granet", 40, prune_until=0.55)
    paid, changed = [], []
    for number in range(40):
        if method.needs_dense_gradient:
            paid.append(number + 1)
        changed += train_steps(net, optimizer, method, 1, number)
    due = [4, 8, 12, 16, 20, 22, 24, 28, 32, 36]
    assert paid == due
    assert {number + 1 for number, moved in enumerate(changed) if moved} <= set(due)


def test_a_ramp_to_the_very_end_prunes_in_the_last_step_and_exchanges_nothing():
    net, optimizer, method = begin("granet", 10, prune_until=1.0)
    train_steps(net, optimizer, method, 9)
    assert not method.needs_dense_gradient
    before = {k: layer.mask.clone() for k, layer in net.layers.items()}
    assert train_steps(net, optimizer, method, 1, 9) == [True]
    assert all((layer.mask <= before[k]).all() for k, layer in net.layers.items())


def test_granet_prunes_globally_then_exchanges_within_each_layer():
    net, optimizer, method = begin("granet", 40, update_every=8, drop_fraction=0.4, last_drop_fraction=0.1)
    train_steps(net, optimizer, method, 7)
    step_alone(net, optimizer, 7)
    weights = {k: layer.parameter.detach().abs().clone() for k, layer in net.layers.items()}
    gradients = {}
    for k, layer in net.layers.items():
        layer.dense_gradient = gradients[k] = torch.rand(layer.mask.shape)
    active = {k: torch.where(layer.mask, weights[k], -1.0) for k, layer in net.layers.items()}
    pruned = largest(active, round((0.2 + 0.3 * (1 - 8 / 20) ** 3) * net.numel))
    rate = 0.1 + 0.3 * (1 + math.cos(math.pi * 8 / 40)) / 2
    assert method.step()
    for k, layer in net.layers.items():
        keep = len(pruned[k]) - math.ceil(rate * len(pruned[k]))
        kept = set(sorted(pruned[k], key=lambda i, k=k: -float(weights[k].reshape(-1)[i]))[:keep])
        rest = set(range(layer.numel)) - kept
        grown = sorted(rest, key=lambda i, k=k: -float(gradients[k].reshape(-1)[i]))[: len(pruned[k]) - keep]
        assert indices(layer.mask) == kept | set(grown)


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_edges_that_come_back_in_the_same_update_keep_value_and_state(optimizer_name):
    net, optimizer, method = begin("granet", optimizer=optimizer_name, drop_fraction=0.9)
    train_steps(net, optimizer, method, 3)
    step_alone(net, optimizer, 3)
    before = {k: (layer.mask.clone(), layer.parameter.detach().clone()) for k, layer in net.layers.items()}
    state = {k: moments_of(optimizer, layer.parameter) for k, layer in net.layers.items()}
    for layer in net.layers.values():
        layer.dense_gradient = layer.parameter.detach().abs().clone()  # what was dropped for its size comes back
    method.step()
    for k, layer in net.layers.items():
        mask, weight = before[k]
        same = mask & layer.mask
        assert torch.equal(layer.parameter.detach(), torch.where(same, weight, 0.0))
        for old, new in zip(state[k], moments_of(optimizer, layer.parameter), strict=True):
            assert torch.equal(new, torch.where(same, old, 0.0))
            assert new[same].any()


def moments_of(optimizer, parameter) -> list[torch.Tensor]:
    state = optimizer.state[parameter]
    found = [v.clone() for v in state.values() if torch.is_tensor(v) and v.shape == parameter.shape]
    assert found
    return found


def test_an_exchange_at_a_density_already_reached_never_densifies():
    """With target = initial density a global threshold of zero must not let everything in."""
    net, optimizer, method = begin("granet", density=0.3, initial_density=0.3)
    edges = edges_per_step(net, optimizer, method, 40)
    assert set(edges) == {round(0.3 * net.numel)}
    assert method.exploration > net.density


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_granet_prunes_on_without_finite_gradients(bad):
    net, optimizer, method = begin("granet", 8, prune_until=0.5)
    train_steps(net, optimizer, method, 3)
    step_alone(net, optimizer, 3)
    before = {k: layer.mask.clone() for k, layer in net.layers.items()}
    for layer in net.layers.values():
        layer.dense_gradient = torch.full(layer.mask.shape, bad)
    assert method.step()
    assert net.nnz == round(0.2 * net.numel)
    assert all((layer.mask <= before[k]).all() for k, layer in net.layers.items())


def test_no_drop_fraction_leaves_gradual_pruning_alone():
    net, optimizer, method = begin("granet", drop_fraction=0.0, last_drop_fraction=0.0)
    before = {k: layer.mask.clone() for k, layer in net.layers.items()}
    for number in range(40):
        assert not method.needs_dense_gradient
        train_steps(net, optimizer, method, 1, number)
    assert all((layer.mask <= before[k]).all() for k, layer in net.layers.items())
    assert net.nnz == round(0.2 * net.numel)


# -- AC/DC --------------------------------------------------------------------------------------------------------


def test_phases_are_those_of_the_published_hundred_epochs():
    net, optimizer, method = begin("acdc", 100)
    edges = edges_per_step(net, optimizer, method, 100)
    sparse = round(0.2 * net.numel)
    begins = [step for step in range(1, 101) if edges[step] < edges[step - 1]]
    ends = [step for step in range(1, 101) if edges[step] > edges[step - 1]]
    assert begins == [10, 20, 30, 40, 50, 60, 70, 85]
    assert ends == [15, 25, 35, 45, 55, 65, 75]
    assert set(edges) == {sparse, net.numel}


@pytest.mark.parametrize("total_steps", some([1, 2, 3, 5, 10, 33], lambda count: count in (1, 10)))
def test_the_last_phase_is_sparse_at_exactly_the_density(total_steps):
    for cycles in (1, 3, 7):
        net, optimizer, method = begin("acdc", total_steps, density=0.13, cycles=cycles)
        train_steps(net, optimizer, method, total_steps + 2)
        assert net.nnz == round(0.13 * net.numel)


def test_a_sparse_phase_keeps_its_mask_and_a_dense_one_restarts_pruned_edges_at_zero():
    net, optimizer, method = begin("acdc", 100)
    train_steps(net, optimizer, method, 10)
    digest = net.mask_digest()
    masks = {k: layer.mask.clone() for k, layer in net.layers.items()}
    assert train_steps(net, optimizer, method, 4, 10) == [False] * 4
    assert net.mask_digest() == digest
    assert train_steps(net, optimizer, method, 1, 14) == [True]
    assert all(layer.mask.all() for layer in net.layers.values())
    for k, layer in net.layers.items():
        assert not layer.parameter.detach()[~masks[k]].any()
        assert layer.parameter.detach()[masks[k]].any()
    train_steps(net, optimizer, method, 1, 15)
    assert all(layer.parameter.detach()[~masks[k]].any() for k, layer in net.layers.items() if not masks[k].all())


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("reset", [True, False])
def test_the_optimizer_forgets_everything_when_edges_come_back_if_asked(optimizer_name, reset):
    net, optimizer, method = begin("acdc", 100, optimizer_name, reset_optimizer=reset)
    train_steps(net, optimizer, method, 11)
    kept = moments_of(optimizer, net.get_parameter("bn.weight"))
    assert any(moment.any() for moment in kept)  # compression leaves the state of what stays
    train_steps(net, optimizer, method, 4, 11)
    assert bool(optimizer.state) != reset
    train_steps(net, optimizer, method, 1, 15)
    assert moments_of(optimizer, net.get_parameter("bn.weight"))


def test_a_dense_phase_after_one_too_short_for_a_step_changes_nothing():
    """In four steps a sparse phase and the dense one behind it begin at step 1: the second is what counts."""
    net, optimizer, method = begin("acdc", 4, warmup=0.1, cycles=1, last_dense=0.6)
    assert train_steps(net, optimizer, method, 1) == [False]
    assert optimizer.state
    assert net.nnz == net.numel


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gmp", {"start": 0.5, "end": 0.5}, facts("`start`", "`end`", 0.5)),
        ("gmp", {"scope": "local"}, facts("`scope`", "local", "`global`", "`erk`")),
        ("gmp", {"end": 0.0}, facts("`end`", 0.0)),
        (
            "granet",
            {"density": 0.6, "initial_density": 0.5},
            facts("`initial_density`", 0.5, "`density`", 0.6),
        ),
        ("granet", {"drop_fraction": 0.001}, facts("`last_drop_fraction`", 0.005, "`drop_fraction`", 0.001)),
        ("acdc", {"warmup": 0.8}, facts("`warmup`", "`last_dense`", "`last_sparse`", 1.05)),
        ("acdc", {"cycles": 0}, facts("`cycles`", 0)),
    ],
)
def test_options_that_cannot_be_are_refused_with_the_reason(name, options, message):
    with pytest.raises(ConfigError, match=message):
        methods.create(name, **options)


@pytest.mark.parametrize("name", ["gmp", "granet", "acdc"])
def test_a_density_of_no_edge_is_refused_before_training(name):
    with pytest.raises(ConfigError, match="leave at least one edge"):
        begin(name, density=1e-5)


@pytest.mark.parametrize("name", ["gmp", "granet", "acdc"])
def test_weights_that_are_not_finite_are_an_error_that_names_the_layer(name):
    net, optimizer, method = begin(name, 10, **({"warmup": 0.3} if name == "acdc" else {}))
    with torch.no_grad():
        layer = net.layers["wide"]
        layer.parameter[layer.mask] = math.nan
    with pytest.raises(ConfigError, match=r"weights .*`[a-z]+`.* finite"):
        train_steps(net, optimizer, method, 10)


def test_granet_refuses_an_init_that_would_do_nothing():
    with pytest.raises(ConfigError, match=facts("`init`", "`sparse-aware`", "`initial_density`", 1)):
        methods.create("granet", init="sparse-aware")
    methods.create("granet", init="sparse-aware", initial_density=0.5)
