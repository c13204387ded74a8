"""What every method must do, and how methods are made."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import representative, some
from method_nets import OPTIMIZERS, small_net, train_steps

import growfx
from growfx import methods
from growfx.errors import CheckpointError, ConfigError
from growfx.methods.masks import change_masks

# Why a method cannot work in a loop of one's own.
NOT_STEPWISE = {
    "continuous": "trains several times over",
    "grasp": "second derivative",
    "imp": "trains several times over",
    "sup-tickets": "at the end",
}
STEPWISE = [name for name in methods.names() if name not in NOT_STEPWISE]
# Methods that find out which edges to keep while they train.
DENSE_START = {"acdc", "channel-prune", "gmp", "granet", "snip"}
# Methods whose density is an outcome.
GROWTH = {"channel-growth", "gradient-growth", "grow-prune", "pwmpr", "random-growth"}
WITH_DENSITY = [name for name in STEPWISE if name not in GROWTH | {"channel-prune", "ticket"}]
# Methods that draw nothing: another seed changes ties at most.
NOTHING_DRAWN = {"acdc", "channel-prune", "gmp", "granet", "small-dense", "snip", "synflow"}


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """An artifact to take masks from."""
    folder = tmp_path_factory.mktemp("source") / "artifact"
    net = small_net()
    growfx.methods.create("static", density=0.2).attach(net, OPTIMIZERS["sgd"](net), total_steps=1, steps_per_epoch=1)
    growfx.save(net, folder)
    return folder


def short(name: str, source: Path, **options: Any) -> methods.Method:
    """A method whose rounds and updates fit into a few steps."""
    quick = {"epochs_per_round": 1, "update_every": 2, "source": str(source)}
    known = {field.name for field in dataclasses.fields(methods.kind_of(name)) if field.init}
    return methods.create(name, **{k: v for k, v in {**quick, **options}.items() if k in known})


def begun(name: str, source: Path, optimizer: str = "sgd", net_seed: int = 0, **options: Any) -> tuple[Any, Any, Any]:
    net = small_net(seed=net_seed)
    method, own = short(name, source, **options), OPTIMIZERS[optimizer](net)
    method.attach(net, own, total_steps=24, steps_per_epoch=3)
    return net, own, method


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", some(STEPWISE, representative))
def test_every_method_makes_a_dense_net_sparse_and_keeps_masked_weights_zero(name, optimizer_name, source):
    net, optimizer, method = begun(name, source, optimizer_name)
    assert 0 < net.density < 1 or name in DENSE_START
    for _ in range(8):
        before = net.mask_digest()
        changed = train_steps(net, optimizer, method, 3)
        assert any(changed) == (net.mask_digest() != before) or changed.count(True) > 1
        net.verify()
        method.report(0.5, 0.01)
    assert 0 < net.density < 1
    for layer in net.layers.values():
        state = optimizer.state.get(layer.parameter, {})
        moments = [v for v in state.values() if torch.is_tensor(v) and v.shape == layer.mask.shape]
        assert all(not moment[~layer.mask].any() for moment in moments)


@pytest.mark.parametrize("name", some(WITH_DENSITY, representative))
def test_every_method_with_a_density_hits_it_exactly(name, source):
    net, optimizer, method = begun(name, source, density=0.23)
    train_steps(net, optimizer, method, 24)
    assert net.nnz == round(0.23 * net.numel)


@pytest.mark.parametrize("name", some(STEPWISE, representative))
def test_every_method_resumes_in_mid_round_bit_for_bit(name, source, tmp_path):
    accuracies = [0.5, 0.6, 0.65, 0.7, 0.72, 0.725, 0.727, 0.728]

    def advance(net, optimizer, method, first: int, last: int):
        for number in range(first, last):
            train_steps(net, optimizer, method, 1, number)
            if number % 3 == 2:
                method.report(accuracies[number // 3], 0.002)

    whole, optimizer, method = begun(name, source, seed=3)
    advance(whole, optimizer, method, 0, 24)
    cut, first_optimizer, first = begun(name, source, seed=3)
    advance(cut, first_optimizer, first, 0, 13)
    torch.save([cut.state_dict(), first_optimizer.state_dict(), first.state_dict()], tmp_path / "state.pt")
    net_state, optimizer_state, method_state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh, second_optimizer, second = begun(name, source, seed=3, net_seed=9)
    fresh.load_state_dict(net_state)
    second_optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(method_state)
    advance(fresh, second_optimizer, second, 13, 24)
    assert fresh.mask_digest() == whole.mask_digest()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))
    assert second.trace == method.trace
    assert (second.growing, second.stop_reason) == (method.growing, method.stop_reason)


@pytest.mark.parametrize("name", some(STEPWISE, representative))
def test_every_method_draws_the_same_masks_from_the_same_seed_only(name, source):
    digests = []
    for seed in (4, 4, 5):
        net, optimizer, method = begun(name, source, seed=seed, shuffle=True)
        train_steps(net, optimizer, method, 12)
        digests.append(net.mask_digest())
    assert digests[0] == digests[1]
    assert (digests[1] == digests[2]) == (name in NOTHING_DRAWN)


@pytest.mark.parametrize("name", some(methods.names(), representative))
def test_every_method_refuses_bad_use_with_its_reason(name, source):
    method = short(name, source)
    for use in (method.step, method.state_dict, method.next_stage):
        with pytest.raises(ConfigError, match=f"method `{name}` is not attached"):
            use()
    with pytest.raises(ConfigError, match=f"method `{name}` has no option `speed`; allowed: .*`"):
        methods.create(name, speed=1)


@pytest.mark.parametrize("name", some(STEPWISE, representative))
def test_every_stepwise_method_refuses_a_bad_clock_accuracy_and_state(name, source):
    net, optimizer, method = begun(name, source)
    with pytest.raises(ConfigError, match=r"`accuracy` is 87\.5; allowed is a fraction"):
        method.report(87.5)
    with pytest.raises(CheckpointError, match="the state is of method `other`"):
        method.load_state_dict({**method.state_dict(), "method": "other"})
    with pytest.raises(ConfigError, match="`steps_per_epoch` is 0; allowed are whole numbers from 1 up"):
        method.attach(net, optimizer, total_steps=4, steps_per_epoch=0)


@pytest.mark.parametrize("name", NOT_STEPWISE)
def test_methods_that_need_a_whole_run_say_so_when_attached(name, source):
    net = small_net()
    with pytest.raises(ConfigError, match=rf"method `{name}` .*{NOT_STEPWISE[name]}.*growfx\.train"):
        short(name, source).attach(net, OPTIMIZERS["sgd"](net), total_steps=4, steps_per_epoch=2)
    assert net.density == 1


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_a_frozen_value(name, source):
    method = short(name, source)
    assert method == short(name, source)
    field = next(field.name for field in dataclasses.fields(method) if field.init)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, field, 1)


@pytest.mark.parametrize("name", some(STEPWISE, representative))
def test_the_trace_of_every_method_is_json(name, source):
    net, optimizer, method = begun(name, source)
    for number in range(6):
        train_steps(net, optimizer, method, 1, number)
        method.report(0.3 + 0.05 * number)
    assert json.loads(json.dumps(method.trace)) == method.trace
    assert method.trace
    assert all({"round", "density", "nnz", "val_accuracy", "fit"} <= set(entry) for entry in method.trace)


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"method `rigle` is unknown; allowed: .*`pwmpr`"):
        methods.create("rigle")


def test_static_has_exactly_its_density_for_good():
    net = small_net()
    optimizer = OPTIMIZERS["sgd"](net)
    method = methods.create("static", density=0.37, distribution="uniform", seed=2)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
    before = net.mask_digest()
    assert net.nnz == round(0.37 * net.numel)
    assert train_steps(net, optimizer, method, 4) == [False] * 4
    assert net.mask_digest() == before
    method.report(0.5)
    assert (method.growing, method.stop_reason) == (False, "")
    assert [entry["exploration"] for entry in method.trace] == [net.density]


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_changed_positions_get_zero_weight_and_zero_state_and_others_keep_theirs(optimizer_name):
    net = small_net()
    optimizer = OPTIMIZERS[optimizer_name](net)
    train_steps(net, optimizer, _Idle(), 3)
    layer = net.layers["block"]
    weight = layer.parameter.detach().clone()
    state = {k: v.clone() for k, v in optimizer.state[layer.parameter].items() if v.shape == weight.shape}
    off = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert change_masks(net, optimizer, {"block": ~off}) == int(off.sum())
    assert change_masks(net, optimizer, {"block": torch.ones_like(off)}) == int(off.sum())
    assert torch.equal(layer.parameter.detach(), torch.where(off, 0.0, weight))
    assert state
    for key, value in state.items():
        assert torch.equal(optimizer.state[layer.parameter][key], torch.where(off, 0.0, value))


class _Idle:
    def step(self) -> bool:
        return False
