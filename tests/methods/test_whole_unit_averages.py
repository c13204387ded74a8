"""Averages of networks whose whole units change, and runs of them that are continued."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from channel_nets import IMAGES, macs, net_of
from method_nets import OPTIMIZERS, train_steps
from timm.utils.model_ema import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import growfx
from growfx import methods

METHODS: dict[str, dict[str, Any]] = {
    "channel-prune": {"budget": "flops=0.5", "update_every": 2, "end": 0.75},
    "channel-growth": {"seed_density": 0.3, "growth_ratio": 1.2, "max_density": 0.6, "epochs_per_round": 1},
}
AVERAGES: dict[str, Any] = {
    "timm": lambda net: ModelEmaV3(net, decay=0.5),
    "torch": lambda net: AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
}


def begun(name: str, seed: int = 0) -> tuple[Any, Any, Any]:
    net = net_of("mobile", seed)
    method, optimizer = methods.create(name, **METHODS[name]), OPTIMIZERS["adamw"](net)
    method.attach(net, optimizer, total_steps=24, steps_per_epoch=3)
    return net, optimizer, method


def advance(net: Any, optimizer: Any, method: Any, average: Any, steps: int) -> None:
    for number in range(steps):
        train_steps(net, optimizer, method, 1, number)
        if number % 3 == 2:
            method.report(0.3 + 0.02 * number, 0.001)
        (average.update if isinstance(average, ModelEmaV3) else average.update_parameters)(net)


@pytest.mark.parametrize("library", AVERAGES)
@pytest.mark.parametrize("name", METHODS)
def test_the_average_has_the_units_of_the_network_and_is_cut_like_it(name: str, library: str) -> None:
    net, optimizer, method = begun(name)
    average = AVERAGES[library](net)
    advance(net, optimizer, method, average, 24)
    module = average.module.eval()
    assert 0 < net.density < 1
    assert module.mask_digest() == net.mask_digest()
    small, own = growfx.unwrap(module, compact=True), growfx.unwrap(net, compact=True)
    assert [p.shape for p in small.parameters()] == [p.shape for p in own.parameters()]
    assert macs(small, IMAGES) < 0.75 * macs(growfx.unwrap(net), IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), module(IMAGES), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(small(IMAGES), own(IMAGES))


@pytest.mark.parametrize("name", METHODS)
def test_a_mean_within_the_masks_is_that_of_the_weights_by_hand(name: str) -> None:
    net, optimizer, method = begun(name)
    average = AVERAGES["timm"](net)
    by_hand = {key: layer.parameter.detach().clone() for key, layer in net.layers.items()}
    for number in range(12):
        train_steps(net, optimizer, method, 1, number)
        average.update(net)
        for key, layer in net.layers.items():
            by_hand[key] = torch.where(layer.mask, 0.5 * by_hand[key] + 0.5 * layer.parameter.detach(), 0)
    found = average.module.state_dict()
    for key in net.layers:
        torch.testing.assert_close(found[f"{key}.weight"], by_hand[key])


@pytest.mark.parametrize("name", METHODS)
def test_optimizers_keep_no_state_of_units_that_left_and_start_new_ones_at_zero(name: str) -> None:
    net, optimizer, method = begun(name)
    for number in range(24):
        before = {key: layer.mask.clone() for key, layer in net.layers.items()}
        train_steps(net, optimizer, method, 1, number)
        if number % 3 == 2:
            method.report(0.3 + 0.02 * number, 0.001)
        for key, layer in net.layers.items():
            state = optimizer.state.get(layer.parameter, {})
            moments = [v for v in state.values() if torch.is_tensor(v) and v.shape == layer.mask.shape]
            fresh = layer.mask & ~before[key]
            assert all(not moment[~layer.mask | fresh].any() for moment in moments)
    assert 0 < net.density < 1


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_a_network_goes_on_as_a_network_without_its_method(name: str) -> None:
    net, optimizer, method = begun(name)
    advance(net, optimizer, method, AVERAGES["timm"](net), 3)
    twin = copy.deepcopy(net)
    digest = twin.mask_digest()
    advance(net, optimizer, method, AVERAGES["timm"](net), 12)
    assert twin.mask_digest() == digest != net.mask_digest()
    small = growfx.unwrap(twin, compact=True)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), twin.eval()(IMAGES), rtol=1e-4, atol=1e-5)
