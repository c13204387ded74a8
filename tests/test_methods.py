"""What every method must do, and how methods are made."""

import dataclasses
import json

import pytest
import torch
from method_nets import OPTIMIZERS, small_net, train_steps

from growfx import methods
from growfx.errors import CheckpointError, ConfigError
from growfx.methods.base import change_masks


def short(name: str, **options) -> methods.Method:
    """A method whose rounds, if it has any, take one epoch."""
    kind = type(methods.create(name))
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    return methods.create(name, **({"epochs_per_round": 1} if "epochs_per_round" in fields else {}), **options)


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("name", methods.names())
def test_every_method_makes_a_dense_net_sparse_and_keeps_masked_weights_zero(name, optimizer_name):
    net = small_net()
    optimizer = OPTIMIZERS[optimizer_name](net)
    method = short(name)
    method.attach(net, optimizer, total_steps=40, steps_per_epoch=3)
    assert 0 < net.density < 1
    for _ in range(4):
        before = net.mask_digest()
        changed = train_steps(net, optimizer, method, 3)
        assert any(changed) == (net.mask_digest() != before)
        net.verify()
        method.report(0.5, 0.01)
    for layer in net.layers.values():
        state = optimizer.state.get(layer.parameter, {})
        moments = [v for v in state.values() if torch.is_tensor(v) and v.shape == layer.mask.shape]
        assert all(not moment[~layer.mask].any() for moment in moments)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_resumes_in_mid_round_bit_for_bit(name, tmp_path):
    whole, cut = small_net(), small_net()
    accuracies = [0.5, 0.6, 0.65, 0.7, 0.72, 0.725, 0.727, 0.728]

    def begin(net):
        optimizer, method = OPTIMIZERS["sgd"](net), short(name, seed=3)
        method.attach(net, optimizer, total_steps=40, steps_per_epoch=3)
        return optimizer, method

    def advance(net, optimizer, method, first: int, last: int):
        for number in range(first, last):
            train_steps(net, optimizer, method, 1, number)
            if number % 3 == 2:
                method.report(accuracies[number // 3], 0.002)

    optimizer, method = begin(whole)
    advance(whole, optimizer, method, 0, 24)
    first_optimizer, first = begin(cut)
    advance(cut, first_optimizer, first, 0, 13)
    torch.save([cut.state_dict(), first_optimizer.state_dict(), first.state_dict()], tmp_path / "state.pt")
    net_state, optimizer_state, method_state = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = small_net(seed=9)
    second_optimizer, second = begin(fresh)
    fresh.load_state_dict(net_state)
    second_optimizer.load_state_dict(optimizer_state)
    second.load_state_dict(method_state)
    advance(fresh, second_optimizer, second, 13, 24)
    assert fresh.mask_digest() == whole.mask_digest()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))
    assert second.trace == method.trace
    assert (second.growing, second.stop_reason) == (method.growing, method.stop_reason)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_draws_the_same_masks_from_the_same_seed_only(name):
    digests = []
    for seed in (4, 4, 5):
        net = small_net()
        optimizer = OPTIMIZERS["sgd"](net)
        method = short(name, seed=seed)
        method.attach(net, optimizer, total_steps=40, steps_per_epoch=2)
        train_steps(net, optimizer, method, 3)
        digests.append(net.mask_digest())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", methods.names())
def test_every_method_refuses_bad_use_with_its_reason(name):
    method = short(name)
    for use in (method.step, method.state_dict):
        with pytest.raises(ConfigError, match=f"method `{name}` is not attached"):
            use()
    net = small_net()
    method.attach(net, OPTIMIZERS["sgd"](net), total_steps=10, steps_per_epoch=2)
    with pytest.raises(ConfigError, match=r"`accuracy` is 87\.5; allowed is a fraction"):
        method.report(87.5)
    with pytest.raises(CheckpointError, match="the state is of method `other`"):
        method.load_state_dict({**method.state_dict(), "method": "other"})
    with pytest.raises(ConfigError, match=f"method `{name}` has no option `speed`; allowed: .*`seed` in"):
        methods.create(name, speed=1)
    with pytest.raises(ConfigError, match="`seed`"):
        methods.create(name, seed=-1)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_is_a_frozen_value_whose_trace_is_json(name):
    method = short(name)
    assert method == short(name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.seed = 1
    net = small_net()
    optimizer = OPTIMIZERS["sgd"](net)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=1)
    for number in range(6):
        train_steps(net, optimizer, method, 1, number)
        method.report(0.3 + 0.05 * number)
    assert json.loads(json.dumps(method.trace)) == method.trace
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
