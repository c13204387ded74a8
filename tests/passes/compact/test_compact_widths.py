"""Compacted models state the widths that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compact_nets import agree, awake, sparse_net
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

import growfx
from growfx.compaction.apply import apply_plan
from growfx.compaction.plan import CompactionPlan
from growfx.errors import ArtifactError
from growfx.passes.compact.network import compact

pytestmark = pytest.mark.slow


def timm_model(name: str) -> Any:
    return awake(growfx.create_model(name, num_classes=4))


def channels_of(model: nn.Module, entries: list[dict[str, Any]], x: Tensor) -> list[int]:
    """The channels that the named modules give."""
    seen: dict[str, int] = {}

    def note(name: str) -> Any:
        return lambda _, args, result: seen.__setitem__(name, result.shape[1])

    hooks = [model.get_submodule(e["module"]).register_forward_hook(note(e["module"])) for e in entries]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return [seen[entry["module"]] for entry in entries]


def check_widths(model: Any, x: Tensor) -> None:
    """`reset_classifier` gives a head that fits, the hidden size is that before the head, features are as told."""
    before = [model.num_features, model.head_hidden_size]
    with torch.no_grad():
        features = model.forward_features(x)
        assert model.num_features in (features.shape[1], features.shape[-1])
        assert model.forward_head(features, pre_logits=True).shape[-1] == model.head_hidden_size
        assert model.num_classes == 4
        if features.ndim == 4:
            entries = list(model.feature_info)
            assert [entry["num_chs"] for entry in entries] == channels_of(model, entries, x)
        model.reset_classifier(7)
        assert model(x).shape == (len(x), 7)
        assert model.num_classes == 7
        assert [model.num_features, model.head_hidden_size] == before
        model.reset_classifier(0)
        assert model(x).shape == (len(x), model.head_hidden_size)


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "mobilenetv3_small_050", "regnetx_002"])
def test_a_compacted_model_takes_a_new_head_and_so_does_the_one_loaded_from_its_artifact(
    name: str, tmp_path: Path
) -> None:
    model = timm_model(name)
    x = torch.randn(2, 3, 64, 64)
    width, info = model.num_features, [dict(entry) for entry in model.feature_info]
    net = sparse_net(model, x, 0.2, 0.4)
    result = compact(net)
    small: Any = result.model
    assert small.num_features < width
    assert sum(e["num_chs"] for e in small.feature_info) < sum(e["num_chs"] for e in info)
    assert (model.num_features, model.feature_info) == (width, info)
    agree(net, small, x)
    growfx.save(net, tmp_path / "small", compact=True)
    loaded: Any = growfx.load(tmp_path / "small")
    agree(net, loaded, x)
    assert loaded.feature_info == small.feature_info
    for candidate in (small, loaded, growfx.unwrap(growfx.wrap(growfx.load(tmp_path / "small"), x))):
        check_widths(candidate, x)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet10t", {"global_pool": "catavgmax"}),
        ("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
        ("test_byobnet", {}),
    ],
)
def test_pools_that_widen_and_features_that_are_joined_are_followed(name: str, options: dict[str, Any]) -> None:
    model = awake(growfx.create_model(name, num_classes=4, **options))
    width, x = model.num_features, torch.randn(2, 3, 64, 64)
    small: Any = compact(sparse_net(model, x, 0.2, 0.4)).model
    assert small.num_features < width
    check_widths(small, x)


def test_channels_that_stand_last_are_followed() -> None:
    model: Any = awake(growfx.create_model("test_mambaout", num_classes=4))
    x = torch.randn(2, 3, 64, 64)
    small: Any = compact(sparse_net(model, x, 0.2, 0.4)).model
    with torch.no_grad():
        features = small.forward_features(x)
        assert features.shape[-1] == small.num_features
        hidden = small.forward_head(features, pre_logits=True).shape[-1]
        assert hidden == small.head_hidden_size < model.head_hidden_size
        small.reset_classifier(7)
        assert small(x).shape == (2, 7)


def test_widths_that_a_norm_over_channels_keeps_are_stated_as_they_were() -> None:
    model = awake(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4))
    x = torch.randn(2, 3, 64, 64)
    result = compact(sparse_net(model, x, 0.3, 0.4))
    assert result.report.removed > 0
    assert result.plan.widths.get("", {}) == {}
    check_widths(result.model, x)


def test_a_head_with_a_hidden_layer_states_how_wide_it_is_and_keeps_it() -> None:
    model = awake(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=4, head_hidden_size=24))
    x = torch.randn(2, 3, 64, 64)
    small: Any = compact(sparse_net(model, x, 0.3, 0.4)).model
    width = small.head.pre_logits.fc.out_features
    assert width < 24
    assert (small.head.hidden_size, small.head.num_features, small.head_hidden_size) == (width, width, width)
    check_widths(small, x)


class Stated(nn.Module):
    """Its own numbers, none of them under a name of any library."""

    def __init__(self, scaled: bool = False, classes: int = 12) -> None:
        super().__init__()
        self.in_channels, self.hidden_dim, self.out_features, self.num_classes = 3, 12, 12, classes
        self.num_heads, self.scaled = 12, scaled
        self.first, self.last = nn.Conv2d(3, 12, 3), nn.Linear(12, classes)
        self.described = [{"module": "first", "channels": 12, "stride": 12}, {"module": "gone", "channels": 12}]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu().mean((2, 3))
        return self.last(x / self.hidden_dim if self.scaled else x)


def test_numbers_of_any_names_follow_what_they_describe_and_others_stay() -> None:
    x = torch.randn(2, 3, 8, 8)
    small: Any = compact(sparse_net(awake(Stated()), x, 0.5, 0.5)).model
    width = small.first.out_channels
    assert width < 12
    assert (small.hidden_dim, small.described[0]["channels"]) == (width, width)
    assert (small.in_channels, small.out_features, small.num_classes, small.num_heads) == (3, 12, 12, 12)
    assert (small.described[0]["stride"], small.described[1]["channels"]) == (12, 12)


def test_a_width_that_the_outputs_are_computed_with_stays() -> None:
    x = torch.randn(2, 3, 8, 8)
    net = sparse_net(awake(Stated(scaled=True)), x, 0.5, 0.5)
    small: Any = compact(net).model
    assert small.first.out_channels < 12
    assert (small.hidden_dim, small.described[0]["channels"]) == (12, small.first.out_channels)
    agree(net, small, x)


@pytest.mark.parametrize(
    "widths",
    [
        {"": {"hidden_dim": 13}},
        {"": {"num_heads": 2}},
        {"": {"described.0.stride": 2}},
        {"": {"described.7.channels": 2}},
        {"": {"first.hidden": 2}},
        {"missing": {"hidden_dim": 2}},
        {"": {"training": 1}},
    ],
)
def test_a_plan_cannot_write_anything_but_smaller_widths(widths: dict[str, dict[str, int]]) -> None:
    model = Stated()
    state = {key: value for key, value in vars(model).items() if not key.startswith("_")}
    with pytest.raises(ArtifactError, match="damaged"):
        apply_plan(model, CompactionPlan(widths=widths))
    assert {key: value for key, value in vars(model).items() if not key.startswith("_")} == state


@pytest.mark.parametrize("widths", [[], {"": 3}, {"": {"hidden_dim": 0}}, {"": {"hidden_dim": True}}])
def test_widths_of_another_form_are_refused(widths: object) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        CompactionPlan.from_json({"biases": [], "modules": {}, "tensors": {}, "widths": widths})


@pytest.mark.parametrize(
    "heads",
    [
        {"": {"num_heads": 13}},
        {"": {"hidden": 3}},
        {"": {"in_channels": 2}},
        {"": {"training": 1}},
        {"missing": {"num_heads": 2}},
    ],
)
def test_a_plan_cannot_write_anything_but_fewer_heads(heads: dict[str, dict[str, int]]) -> None:
    model = Stated()
    with pytest.raises(ArtifactError, match="damaged"):
        apply_plan(model, CompactionPlan(heads=heads))
    assert (model.num_heads, model.in_channels, model.training) == (12, 3, True)


def test_a_plan_with_heads_is_read_as_it_was_written() -> None:
    plan = CompactionPlan(heads={"": {"num_heads": 5}})
    assert plan
    assert CompactionPlan.from_json(plan.to_json()) == plan
    assert apply_plan(Stated(), plan).num_heads == 5
    with pytest.raises(ArtifactError, match="damaged"):
        CompactionPlan.from_json({"biases": [], "modules": {}, "tensors": {}, "heads": {"": {"num_heads": 0}}})


def test_a_plan_with_widths_is_read_as_it_was_written() -> None:
    plan = CompactionPlan(widths={"": {"hidden_dim": 5, "described.0.channels": 4}})
    assert plan
    assert CompactionPlan.from_json(plan.to_json()) == plan
    model = apply_plan(Stated(), plan)
    assert (model.hidden_dim, model.described[0]["channels"]) == (5, 4)
