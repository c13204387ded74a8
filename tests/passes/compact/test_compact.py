"""Compaction against the masked network itself: the same outputs from fewer units."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from breadth import some
from compact_nets import RandomNet, agree, awake, sparse_net
from connect_nets import NETS, build
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.compaction.apply import apply_plan
from growfx.compaction.plan import CompactionPlan
from growfx.passes.compact.network import Compacted, compact


def units(result: Compacted) -> dict[str, tuple[int, int]]:
    return {change.layer: (change.before, change.after) for change in result.report.layers}


@pytest.mark.parametrize("seed", some(range(3), lambda seed: seed == 0))
@pytest.mark.parametrize("name", NETS)
def test_outputs_stay_and_a_second_compaction_finds_nothing(name: str, seed: int) -> None:
    model, x = build(name)
    net = sparse_net(awake(model), x, 0.5, 0.4, seed)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    result = compact(net)
    assert not result.report.refusal
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    agree(net, result.model, x, torch.randn_like(x))
    again = growfx.wrap(copy.deepcopy(result.model), x)
    again.set_masks(result.masks)
    second = compact(again)
    assert second.report.removed == 0
    assert not second.plan


# Nets whose graphs let units go: dead ones must leave, not merely be allowed to stay.
@pytest.mark.parametrize("name", ["residual", "dense", "excite", "flat", "attention", "subpixel"])
def test_units_leave_where_nothing_holds_them(name: str) -> None:
    model, x = build(name)
    removed = [compact(sparse_net(awake(copy.deepcopy(model)), x, 0.5, 0.5, seed)).report.removed for seed in range(4)]
    assert sum(removed) > 0


def wrapped(model: nn.Module, x: Tensor, **dead: list[int]) -> growfx.MaskedGraph:
    """A dense net of which some output units have no incoming weight."""
    net = growfx.wrap(model.eval(), x)
    for name, rows in dead.items():
        net.layers[name].mask[rows] = False
    net.settle()
    return net


class Pair(nn.Module):
    """Two layers with something between them."""

    def __init__(self, second: nn.Module, between: Callable[[Tensor], Tensor] = torch.relu, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.between = nn.Conv2d(3, 6, 3, bias=bias), second, between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def pair(value: float, second: nn.Module, between: Callable[[Tensor], Tensor] = torch.relu) -> tuple[Any, Tensor]:
    """Units 1 and 4 of the first layer are the constant `value`."""
    model, x = Pair(second, between), torch.randn(2, 3, 9, 9)
    model.a.bias.data[[1, 4]] = value
    net = wrapped(model, x, a=[1, 4])
    result = compact(net)
    agree(net, result.model, x, torch.randn(1, 3, 12, 12))
    return result, x


def test_a_constant_goes_into_the_next_bias_where_nothing_is_padded() -> None:
    result, _ = pair(2.0, nn.Conv2d(6, 5, 3))
    assert units(result)["a"] == (6, 4)
    assert result.model.b.bias is not None
    assert result.plan.biases == ()


def test_a_layer_without_bias_gets_one_for_a_constant() -> None:
    result, _ = pair(2.0, nn.Conv2d(6, 5, 3, bias=False))
    assert units(result)["a"] == (6, 4)
    assert result.plan.biases == ("b",)


def test_a_constant_is_kept_where_zeros_are_padded_and_leaves_where_it_is_zero() -> None:
    kept, _ = pair(2.0, nn.Conv2d(6, 5, 3, padding=1))
    assert units(kept)["a"] == (6, 6)
    assert kept.report.kept == {"a": ("its constant meets the zero padding of `b`",)}
    gone, _ = pair(-2.0, nn.Conv2d(6, 5, 3, padding=1))  # behind the ReLU it is zero
    assert units(gone)["a"] == (6, 4)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_constant_stays_itself_where_padding_repeats(mode: str) -> None:
    assert units(pair(2.0, nn.Conv2d(6, 5, 3, padding=1, padding_mode=mode))[0])["a"] == (6, 4)


@pytest.mark.parametrize("padding", ["same", "valid", 0, (0, 1)])
def test_padding_by_name_and_by_axis(padding: Any) -> None:
    after = 6 if padding in ("same", (0, 1)) else 4
    assert units(pair(2.0, nn.Conv2d(6, 5, 3, padding=padding))[0])["a"] == (6, after)


def test_zeros_padded_by_an_operator_of_their_own_keep_a_constant() -> None:
    result, _ = pair(2.0, nn.Conv2d(6, 5, 3), lambda x: F.pad(torch.relu(x), (1, 1, 1, 1)))
    assert units(result)["a"] == (6, 6)
    assert result.report.kept == {"a": ("its constant is not the same everywhere before `b`",)}


def test_pooling_that_counts_its_padding_keeps_a_constant_and_other_pooling_does_not() -> None:
    for include, after in ((True, 6), (False, 4)):
        pool = nn.AvgPool2d(3, 2, padding=1, count_include_pad=include)
        result, _ = pair(2.0, nn.Conv2d(6, 5, 1), lambda x, pool=pool: pool(torch.sigmoid(x)))
        assert units(result)["a"] == (6, after), include


def test_a_transposed_convolution_keeps_constants_for_their_borders_differ() -> None:
    result, _ = pair(2.0, nn.ConvTranspose2d(6, 5, 3, stride=2))
    assert units(result)["a"] == (6, 6)
    assert "ConvTranspose2d" in result.report.kept["a"][0]


def test_the_shift_of_a_norm_is_part_of_the_constant() -> None:
    norm = nn.BatchNorm2d(6)
    nn.init.normal_(norm.bias), nn.init.normal_(norm.running_mean)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), norm, nn.GELU(), nn.Conv2d(6, 4, 3, bias=False))
    x = torch.randn(2, 3, 8, 8)
    net = wrapped(model, x, **{"0": [0, 3, 5]})
    result = compact(net)
    agree(net, result.model, x)
    assert units(result)["0"] == (6, 3)
    small = result.model.get_submodule("1")
    assert (small.num_features, len(small.running_mean)) == (3, 3)


def test_a_unit_that_nothing_reads_leaves_whatever_its_value() -> None:
    model, x = Pair(nn.Conv2d(6, 5, 3, padding=1)), torch.randn(2, 3, 8, 8)
    net = growfx.wrap(model.eval(), x)
    net.layers["b"].mask[:, 2] = False
    net.settle()
    result = compact(net)
    agree(net, result.model, x)
    assert units(result)["a"] == (6, 5)


def test_a_unit_behind_a_scale_of_zero_leaves_in_eval_mode() -> None:
    model, x = Pair(nn.Conv2d(6, 5, 1)), torch.randn(2, 3, 8, 8)
    model.between = nn.Sequential(nn.BatchNorm2d(6), nn.SiLU())
    nn.init.normal_(model.between[0].bias)
    model.between[0].weight.data[3] = 0
    net = growfx.wrap(model.eval(), x)
    result = compact(net)
    agree(net, result.model, x)
    assert units(result)["a"] == (6, 5)


def test_a_relu_that_is_silent_on_the_inputs_seen_is_not_taken_for_a_constant() -> None:
    model, x = Pair(nn.Conv2d(6, 5, 3)), torch.randn(2, 3, 8, 8)
    model.a.bias.data[2] = -100.0
    net = growfx.wrap(model.eval(), x)
    result = compact(net)
    assert result.report.removed == 0
    agree(net, result.model, x, 1000 * x)


@pytest.mark.parametrize("shift", [-5.0, -100.0, -1e5])
def test_a_shift_that_silences_what_was_seen_so_far_is_not_taken_for_a_gate_of_zero(shift: float) -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.d, self.b = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x) + self.d(x)))

    model, x = Shifted(), torch.randn(2, 3)
    model.a.bias.data[1] = shift
    net = wrapped(model, x, a=[1])
    result = compact(net)
    assert result.report.removed == 0
    agree(net, result.model, x, 1e6 * torch.randn(50, 3))


def test_a_unit_that_is_always_zero_takes_its_gate_along() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True))))

    model, x = Gated(), torch.randn(2, 3, 6, 6)
    model.a.bias.data[[0, 2]] = torch.tensor([-1.0, 1.0])
    net = wrapped(model, x, a=[0, 2])
    result = compact(net)
    agree(net, result.model, x)
    assert units(result) == {"a": (6, 5), "gate": (6, 5), "b": (4, 4)}  # the other one is a constant times a gate


def test_a_whole_branch_that_is_dead_keeps_one_unit_a_layer() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([x, torch.relu(self.b(torch.relu(self.a(x))))], 1))

    model, x = Branches(), torch.randn(2, 3, 5, 5)
    net = wrapped(model, x, b=[0, 1, 2, 3, 4])
    result = compact(net)
    agree(net, result.model, x)
    assert units(result) == {"a": (4, 1), "b": (5, 1), "c": (3, 3)}
    assert result.report.kept["b"] == ("a unit of `b` has to stay",)


def test_depthwise_channels_leave_with_their_inputs_and_uneven_groups_stay() -> None:
    def make(groups: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False),
            nn.ReLU(), nn.Conv2d(8, 4, 1),
        )  # fmt: skip

    x = torch.randn(2, 3, 6, 6)
    net = wrapped(make(8), x, **{"0": [1, 2, 6]})
    result = compact(net)
    agree(net, result.model, x)
    deep = result.model.get_submodule("2")
    assert (deep.groups, deep.in_channels, tuple(deep.weight.shape)) == (5, 5, (5, 1, 3, 3))
    net = wrapped(make(4), x, **{"0": [0, 1, 4]})  # the whole first group, and half of the third
    result = compact(net)
    agree(net, result.model, x)
    grouped = result.model.get_submodule("2")
    assert (grouped.groups, tuple(grouped.weight.shape)) == (3, (6, 2, 3, 3))
    assert result.report.kept["0"] == ("groups of `2` would be uneven",)


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_that_lose_unequally_keep_as_many_as_the_largest(transposed: bool) -> None:
    middle = (nn.ConvTranspose2d if transposed else nn.Conv2d)(12, 16, 3, padding=1, groups=4, bias=False)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1, bias=False), nn.ReLU(), middle, nn.ReLU(), nn.Conv2d(16, 4, 1)
    )  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    net = growfx.wrap(model.eval(), x)
    net.layers["0"].mask[[0, 1, 5, 6, 7, 8, 10]] = False  # of three inputs each group keeps 1, 2, 0 and 2
    net.layers["4"].mask[:, [0, 1, 2, 6, 12]] = False  # of four outputs each 1, 3, 4 (of a group without input), 3
    net.settle()
    result = compact(net)
    agree(net, result.model, x)
    small: Any = result.model.get_submodule("2")
    assert (small.groups, small.in_channels, small.out_channels) == (3, 6, 9)
    assert tuple(small.weight.shape) == ((6, 3, 3, 3) if transposed else (9, 2, 3, 3))
    assert units(result)["0"] == (12, 6)
    assert result.masks["2"].shape == small.weight.shape
    assert bool((small.weight[~result.masks["2"]] == 0).all())
    assert set(result.report.kept) == {"0", "2"}
    assert result.report.kept["0"] == ("groups of `2` would be uneven",)
    again = apply_plan(copy.deepcopy(model), CompactionPlan.from_json(result.plan.to_json()))
    again.load_state_dict(result.model.state_dict())
    agree(net, again, x)


def test_sizes_written_into_the_code_put_back_only_what_breaks() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 4, 1)
            self.d = nn.Linear(4 * 16, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.b(torch.relu(self.a(x)))).view(x.shape[0], 8, 16).view(-1, 8, 4, 4)
            return self.d(torch.relu(self.c(x)).flatten(1))

    model, x = Fixed(), torch.randn(2, 3, 4, 4)
    net = wrapped(model, x, a=[0, 1], b=[3], c=[2])
    result = compact(net)
    agree(net, result.model, x)
    assert units(result) == {"a": (6, 4), "b": (8, 8), "c": (4, 3), "d": (5, 5)}
    assert "the model fails without it: shape '[2, 8, 16]' is invalid" in result.report.kept["b"][0]


def test_norms_over_units_and_tied_weights_keep_them() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    result = compact(wrapped(model, torch.randn(2, 4), **{"0": [1]}))
    assert result.report.removed == 0
    assert "a norm runs over it" in result.report.kept["0"][0]
    tied = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2))
    tied[4].weight = tied[2].weight
    result = compact(wrapped(tied, torch.randn(2, 3), **{"0": [1], "2": [1]}))
    assert result.report.removed == 0
    assert any("is tied" in reason for reasons in result.report.kept.values() for reason in reasons)


def test_masks_keep_their_sparsity_inside_the_weights_that_stay() -> None:
    model, x = build("flat")
    net = sparse_net(awake(model), x, 0.6, 0.5, 1)
    result = compact(net)
    assert result.report.removed > 0
    for name, mask in result.masks.items():
        weight = result.model.get_parameter(f"{name}.weight")
        assert mask.shape == weight.shape
        assert not weight[~mask].any()
        assert int(mask.sum()) <= net.layers[name].nnz


def test_the_report_is_a_table_of_the_layers_with_dead_units() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 1)
    ).double()
    model[0].bias.data[:] = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    net = wrapped(model, torch.randn(1, 3, 4, 4, dtype=torch.float64), **{"0": [0, 1], "2": [4]})
    report = compact(net).report
    report = type(report)(report.layers, report.parameters, 0.0, report.checked)
    assert str(report) == (
        "layer  units  after  dead, kept  because\n"
        "0      6      5      1           its constant meets the zero padding of `2`\n"
        "2      5      4\n"
        "2 of 15 units left out; 323 parameters before, 224 after; largest error 0.0e+00 of the outputs "
        "on inputs of 2x3x4x4, 2x3x8x8"
    )


def test_where_nothing_can_be_removed_it_says_so() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3))
    result = compact(net)
    assert not result.plan
    assert str(result.report).startswith("nothing to leave out: every unit is on a path from input to output\n")


@pytest.mark.parametrize(
    ("name", "size", "least"),
    some(
        [
            ("test_resnet", 48, 0.05),
            ("test_efficientnet", 48, 0.05),
            ("test_byobnet", 48, 0.02),
            ("test_convnext", 48, 0.02),
            ("test_vit", 160, 0.02),
            ("mobilenetv3_small_050", 48, 0.02),
            ("torchvision/squeezenet1_1", 48, 0.05),
        ],
        lambda case: case[0] in ("test_resnet", "test_vit"),
    ),
)
def test_models_of_the_zoo_get_smaller_and_compute_the_same(name: str, size: int, least: float) -> None:
    model: Any = awake(growfx.create_model(name, num_classes=5))
    x = torch.randn(2, 3, size, size)
    net = sparse_net(model, x, 0.3, 0.3)
    result = compact(net)
    agree(net, result.model, torch.randn_like(x))
    assert type(result.model) is type(model)
    before, after = result.report.parameters
    assert after < (1 - least) * before
    assert not [m for m in result.model.modules() if type(m).__name__.startswith("Masked")]


@pytest.mark.parametrize("seed", range(6))
def test_random_graphs_compute_the_same(seed: int) -> None:
    model, x = RandomNet(seed), torch.randn(2, 3, 17, 17)
    net = sparse_net(awake(model).double(), x.double(), 0.4, 0.4, seed)
    result = compact(net)
    agree(net, result.model, x.double(), 100 * torch.randn(3, 3, 17, 17).double(), torch.randn(1, 3, 22, 22).double())
