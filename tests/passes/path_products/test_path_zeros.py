"""Heads and gains that start at zero: path products name them, and can count them as one."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import growfx
from growfx.passes.path_products.products import path_gradients, path_products
from growfx.passes.seed import seed_masks


class Block(nn.Module):
    """A branch with a gain beside a shortcut, where there is one."""

    def __init__(self, gain: float, shortcut: bool) -> None:
        super().__init__()
        self.inner, self.gain, self.shortcut = nn.Linear(4, 4), nn.Parameter(torch.tensor(gain)), shortcut

    def forward(self, x: Tensor) -> Tensor:
        branch = self.inner(x) * (0.2 * self.gain)
        return x + branch if self.shortcut else branch


def network(zero: str) -> nn.Module:
    torch.manual_seed(0)
    block = Block(0.0 if "gain" in zero else 1.0, zero == "gain beside a shortcut")
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), block, nn.Linear(4, 2)).eval()
    if zero == "head":
        nn.init.zeros_(model[3].weight)
    if zero == "norm":
        nn.init.zeros_(model[1].weight)
    return model


ZEROS = {"head": "3.weight", "norm": "1.weight", "gain": "2.gain"}


@pytest.mark.parametrize("zero", ZEROS)
def test_a_factor_of_zero_is_named_in_a_warning_and_on_the_result(zero: str) -> None:
    net = growfx.wrap(network(zero), torch.randn(2, 4))
    with pytest.warns(growfx.GrowfxWarning, match=ZEROS[zero]):
        paths = path_products(net)
    assert paths.log_total == -math.inf
    assert len(paths.notes) == 1
    assert f"`{ZEROS[zero]}`" in paths.notes[0]


def test_a_gain_of_zero_beside_a_shortcut_is_noted_without_a_warning() -> None:
    paths = path_products(growfx.wrap(network("gain beside a shortcut"), torch.randn(2, 4)))
    assert paths.log_total > -math.inf
    assert not bool(paths.scores["2.inner"].any())
    assert ["2.gain" in note for note in paths.notes] == [True]


@pytest.mark.parametrize("zero", ZEROS)
def test_zeros_counted_as_one_score_as_ones_do(zero: str) -> None:
    net, ones = (growfx.wrap(network(zero), torch.randn(2, 4)) for _ in range(2))
    with torch.no_grad():
        for parameter in ones.parameters():
            if parameter.ndim != 1 or zero == "norm":
                # The factor in the network is a fifth of the gain.
                parameter.copy_(torch.where((parameter == 0).all(), 5.0 if zero == "gain" else 1.0, parameter))
    paths, expected = path_gradients(net, zeros_as_one=True), path_products(ones)
    assert not paths.notes
    for name, score in expected.scores.items():
        torch.testing.assert_close(paths.scores[name], score)


def test_counting_zeros_as_one_changes_nothing_where_there_are_none() -> None:
    net = growfx.wrap(network("none"), torch.randn(2, 4), density=0.6)
    plain, filled = path_products(net), path_gradients(net, zeros_as_one=True)
    assert plain.log_total == filled.log_total
    assert all(torch.equal(plain.scores[name], filled.scores[name]) for name in plain.scores)
    assert plain.notes == ()


def test_masks_that_leave_no_path_are_no_zero_factor() -> None:
    net = growfx.wrap(network("none"), torch.randn(2, 4))
    net.set_masks({"3": torch.zeros(2, 4, dtype=torch.bool)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = path_products(net)
    assert paths.log_total == -math.inf
    assert paths.notes == ()


@pytest.mark.parametrize("zero", ZEROS)
def test_a_seed_keeps_every_unit_alive_whatever_is_zero(zero: str) -> None:
    net: Any = growfx.wrap(network(zero), torch.randn(2, 4))
    seed = seed_masks(net, 0.5)
    assert seed.dead_units == 0
