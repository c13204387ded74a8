"""Growth of width: the seed, what a round adds and what it costs, and that a round changes no output."""

import itertools
from typing import Any

import pytest
import torch
from channel_nets import NETS, macs, net_of
from method_nets import OPTIMIZERS, train_steps
from training_nets import QUICK, fresh_net, loaders

import growfx
from growfx import methods
from growfx.errors import ConfigError
from growfx.passes.connect import connect


def begun(net: Any, **options: Any) -> tuple[Any, Any]:
    options = {"epochs_per_round": 1, "growth_ratio": 1.4, **options}
    method, optimizer = methods.create("channel-growth", **options), OPTIMIZERS["adamw"](net)
    method.attach(net, optimizer, total_steps=24, steps_per_epoch=3)
    return method, optimizer


def absent(net: Any, layer: str) -> torch.Tensor:
    return ~net.layers[layer].mask.flatten(1).any(1)


def train(net: Any, optimizer: Any, method: Any, steps: int, x: torch.Tensor, start: int = 0) -> None:
    for number in range(start, start + steps):
        noise = torch.Generator().manual_seed(number)
        net(torch.randn(x.shape, generator=noise)).square().mean().backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", NETS)
def test_a_round_changes_no_output_and_adds_whole_groups(name: str) -> None:
    net, x = net_of(name), NETS[name][1]
    found = connect(net)
    method, optimizer = begun(net)
    grown = 0
    for number in range(6):
        net.train()
        train(net, optimizer, method, 3, x, 3 * number)
        with torch.no_grad():
            before, old = net.eval()(x), net.mask_digest()
            method.report(0.3 + 0.05 * number, 0.001)
            torch.testing.assert_close(net.eval()(x), before, rtol=1e-5, atol=1e-6)
        grown += net.mask_digest() != old
        net.verify()
        gone = {int(g) for n in net.layers for g in found.coupled(n)[absent(net, n)].tolist()}
        for layer in net.layers:
            here = torch.tensor([int(g) in gone for g in found.coupled(layer)])
            assert torch.equal(absent(net, layer), here)
    assert grown >= 3


def test_every_family_is_alive_in_the_seed_and_the_rest_is_as_dense_as_asked() -> None:
    chosen: tuple[tuple[float | None, str], ...] = ((None, "drawn"), (0.3, "drawn"), (0.3, "magnitude"))
    for density, masks in chosen:
        net = net_of("mobile")
        begun(net, seed_density=density, masks=masks)
        assert all(not bool(absent(net, name).all()) for name in net.layers)
        assert all(bool(alive.any()) for alive in growfx.path_products(net).alive_out.values())
        assert net.density <= (density or 0.1) + 1e-9
        assert net.density > (density or 0.0) - 0.1


def test_a_draw_is_in_proportion_to_the_mass_that_a_unit_would_carry() -> None:
    """Against the formula, written out for a chain with one hidden layer."""
    from growfx.methods.growth.channel_growth import would_carry

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 2))
    first, second = (layer.weight.detach().double().abs().clone() for layer in model)
    net = growfx.wrap(model, torch.randn(1, 3))
    method, optimizer = begun(net, seed_density=0.5)
    train(net, optimizer, method, 2, torch.randn(4, 3))
    growth = method._attachment.state
    gone = absent(net, "0")
    assert 0 < int(gone.sum()) < 8
    expected = torch.where(gone, first.sum(1) * second.sum(0), 0.0)
    planner = growth.tools["planner"]
    found = torch.from_numpy(would_carry(growth, planner))[planner.units.outputs["0"]]
    scale = expected.sum() / found.sum()
    torch.testing.assert_close(found * scale, expected)


def test_new_units_start_with_their_initial_incoming_weights_and_norms_and_nothing_out() -> None:
    net = net_of("mobile")
    initial = {name: value.clone() for name, value in net.state_dict().items()}
    method, optimizer = begun(net, seed_density=0.3, growth_ratio=2.0)
    train_steps(net, optimizer, method, 3)
    before = {name: layer.mask.clone() for name, layer in net.layers.items()}
    method.report(0.5)
    born = ~before["stem"].flatten(1).any(1) & net.layers["stem"].mask.flatten(1).any(1)
    assert born.any()
    stem = net.layers["stem"].parameter.detach()
    assert torch.equal(stem[born], initial["stem.weight"][born])
    assert torch.equal(net.state_dict()["norm.running_var"][born], initial["norm.running_var"][born])
    assert not net.layers["expand"].parameter.detach()[before["expand"].flatten(1).any(1)][:, born].any()
    moments = optimizer.state[net.layers["stem"].parameter]["exp_avg"]
    assert not moments[born].any()


@pytest.mark.parametrize("price", ["weights", "flops"])
def test_rounds_stay_within_their_growth_and_the_largest_density(price: str) -> None:
    net = net_of("mobile")
    dense = growfx.cost(net).dense
    method, optimizer = begun(net, price=price, growth_ratio=1.5, max_density=0.6, seed_density=0.2)
    sizes = []
    for number in range(10):
        train_steps(net, optimizer, method, 3, 3 * number)
        sizes.append(net.density if price == "weights" else growfx.cost(net).sparse / dense)
        method.report(0.3 + 0.05 * number, 0.001)
    assert sizes == sorted(sizes)
    assert max(sizes) <= 0.6 + 1e-9
    assert max(sizes) > 0.5
    assert all(after <= 1.5 * before + 1e-9 for before, after in itertools.pairwise(sizes))
    assert not method.growing


def test_a_grown_network_is_saved_as_a_smaller_dense_one(tmp_path: Any) -> None:
    net = fresh_net()
    options = {"epochs_per_round": 1, "max_density": 0.6, "growth_ratio": 1.6, "growth_rounds": "published"}
    method = methods.create("channel-growth", **options)
    result = growfx.train(net, *loaders(), method=method, options=QUICK, out=tmp_path / "run", progress=False)
    assert result.stop_reason
    small, images = growfx.unwrap(net, compact=True), torch.randn(2, 1, 8, 8)
    assert macs(small, images) < 0.8 * macs(growfx.unwrap(net), images)
    assert growfx.wrap(small, images).density == 1
    with torch.no_grad():
        torch.testing.assert_close(small(images), net.eval()(images))


def test_units_counted_by_a_norm_are_there_from_the_start() -> None:
    net = net_of("transformer")
    begun(net)
    assert not absent(net, "embed").any()
    assert absent(net, "fc1").any()


def test_a_seed_below_the_narrowest_network_is_refused_with_what_holds_it_up() -> None:
    net = net_of("transformer")
    digest = net.mask_digest()
    with pytest.raises(ConfigError, match=r"`seed_density` is 0\.001.*narrowest network.*a norm runs over it"):
        begun(net, seed_density=0.001)
    with pytest.raises(ConfigError, match="matches no masked layer"):
        begun(net, exclude="nothing")
    assert net.mask_digest() == digest
