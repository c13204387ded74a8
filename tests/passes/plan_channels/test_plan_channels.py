"""Plans for budgets: what they cost, what they leave out, and what they refuse."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from breadth import some
from channel_nets import IMAGES, NETS, Chain, macs, net_of, size
from torch import nn

import growfx
from growfx.analysis.channel_plan import ChannelPlan
from growfx.errors import ConfigError, TraceError
from growfx.passes.connect import connect

BUDGETS = {"flops": 0.5, "params": 0.6}


def small_of(net: growfx.MaskedGraph, plan: ChannelPlan) -> nn.Module:
    net.set_masks(plan.masks(net))
    return growfx.unwrap(net, compact=True)


@pytest.mark.parametrize("kind", some(BUDGETS, lambda kind: kind == "flops"))
@pytest.mark.parametrize("name", NETS)
def test_a_plan_costs_what_the_smaller_model_does_and_changes_no_output(name: str, kind: str) -> None:
    net, x = net_of(name), NETS[name][1]
    dense = growfx.unwrap(net)
    plan = growfx.plan_channels(net, f"{kind}={BUDGETS[kind]}", floor=0.05)
    small = small_of(net, plan)
    assert plan.share("flops") == pytest.approx(macs(small, x) / macs(dense, x), rel=1e-6)
    assert plan.share("params") == pytest.approx(size(small) / size(dense), rel=1e-6)
    assert plan.share(kind) <= BUDGETS[kind]
    with torch.no_grad():
        torch.testing.assert_close(small(x), net.eval()(x))
    masked = sum(layer.nnz for layer in net.layers.values()) / net.numel
    assert plan.share("weights") == pytest.approx(masked, rel=1e-6)


@pytest.mark.parametrize("name", NETS)
def test_no_further_group_fits_into_a_budget(name: str) -> None:
    net, x = net_of(name), NETS[name][1]
    dense, found = macs(growfx.unwrap(net), x), connect(net)
    plan = growfx.plan_channels(net, "flops=0.7", floor=0.05)
    assert plan.removed
    for family in plan.families:
        if not family.removed:
            continue
        back = {layer: groups[family.removed[0]] for layer, groups in family.outputs.items()}
        groups = {int(found.coupled(layer)[unit]) for layer, units in back.items() for unit in units}
        outputs = {n: tuple(u for u in units if u not in back.get(n, ())) for n, units in plan.outputs.items()}
        columns = {
            n: tuple(c for c in cs if int(found.group[max(int(found.layers[n].sources[c]), 0)]) not in groups)
            for n, cs in plan.columns.items()
        }
        wider = net_of(name)
        small = small_of(wider, dataclasses.replace(plan, outputs=outputs, columns=columns))
        assert macs(small, x) > 0.7 * dense


@pytest.mark.parametrize("score", ["paths", "magnitude", "taylor"])
def test_groups_of_least_gain_leave_and_like_groups_are_one_family(score: str) -> None:
    net = net_of("mobile")
    net(IMAGES).square().sum().backward()
    plan = growfx.plan_channels(net, "flops=0.6", score=score)
    assert plan.score == score
    for family in plan.families:
        gone = set(family.removed)
        assert not family.gains or max((family.gains[i] for i in gone), default=0) <= min(
            family.gains[i] for i in range(family.size) if i not in gone
        )
    names = {family.name: family for family in plan.families}
    stream = names["stem + project + grouped"]
    assert (stream.size, stream.reason) == (8, "")  # the grouped convolution takes its channels two by two
    assert [family.size for name, family in names.items() if name.startswith("expand + depth")] == [24]


def test_the_gain_by_paths_is_the_share_of_path_products_through_a_unit() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Chain(), torch.randn(1, 6))
    plan = growfx.plan_channels(net, "flops=0.5")
    a, b, c = (layer.parameter.detach().double().abs() for layer in net.layers.values())
    total = (c @ b @ a).sum()
    expected = (c @ b).sum(0) * a.sum(1) / total
    assert torch.tensor(plan.families[0].gains, dtype=torch.float64).numpy() == pytest.approx(expected.numpy())
    assert sum(plan.families[1].gains) == pytest.approx(1.0)


def test_heads_leave_whole_and_their_number_is_true_afterwards() -> None:
    for name in ("transformer", "written out"):
        net = net_of(name)
        plan = growfx.plan_channels(net, "flops=0.8", exclude=["fc1"], floor=0.3)
        small: Any = small_of(net, plan)
        heads = small.attn.num_heads
        assert 2 <= heads < 6
        assert small.attn.attn_dim == 4 * heads == small.attn.proj.in_features
        assert small.fc1.out_features == 32
        assert all(
            len(groups[0]) == 12 for family in plan.families for n, groups in family.outputs.items() if "qkv" in n
        )


def test_a_saved_plan_is_read_and_carried_out_exactly() -> None:
    net = net_of("mobile")
    plan = growfx.plan_channels(net, "flops=0.5")
    again = ChannelPlan.from_json(json.dumps(plan.to_json()))
    assert again == plan
    other = net_of("mobile", seed=4)
    masks, expected = again.masks(other), plan.masks(net)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match=r"another network.*`stem`"):
        plan.masks(net_of("chain"))
    for broken in ({}, {**plan.to_json(), "version": 9}, "[1", {**plan.to_json(), "shapes": {}}, 3):
        with pytest.raises(ConfigError, match="plan"):
            ChannelPlan.from_json(broken)


def test_floors_and_multiples_are_kept() -> None:
    net = net_of("mobile")
    plan = growfx.plan_channels(net, "flops=0.55", round_to=4, floors={"expand": 0.75}, floor=0.2)
    small: Any = small_of(net, plan)
    assert small.expand.out_channels >= 18
    widths = [small.stem.out_channels, small.expand.out_channels, small.squeeze.out_features]
    assert all(width % 4 == 0 for width in widths)
    assert min(family.kept / family.size for family in plan.families) >= 0.2


def test_units_that_are_absent_already_leave_first_and_are_counted_as_gone() -> None:
    net = net_of("mobile")
    first = growfx.plan_channels(net, "flops=0.7")
    net.set_masks(first.masks(net))
    again = growfx.plan_channels(net, "flops=0.9")
    assert (again.outputs, again.columns) == (first.outputs, first.columns)
    assert again.share("flops") == first.share("flops")
    further = growfx.plan_channels(net, "flops=0.5")
    assert all(set(units) <= set(further.outputs[name]) for name, units in first.outputs.items())


def test_what_stays_says_why_and_is_printed() -> None:
    plan = growfx.plan_channels(net_of("transformer"), "flops=0.7")
    reasons = "\n".join(plan.refused.values())
    assert "a norm runs over it in `norm1`" in reasons
    assert "it is an output of the network" in reasons
    assert all(reason in str(plan) for reason in plan.refused.values())
    kept = [group for group in plan.groups if group.reason]
    assert kept
    assert all(group.kept and group.gain is None for group in kept)


@pytest.mark.parametrize(
    ("budget", "facts"),
    [
        ("flops=0", r"\(0, 1\]"),
        ("flops=1.2", r"flops=1\.2.*\(0, 1\]"),
        ("flops=nan", "KIND=FRACTION"),
        ("bytes=0.5", "`bytes`.*`params`, `flops`, `time`"),
        ("half", "KIND=FRACTION"),
        (0.5, "KIND=FRACTION"),
        ("flops=0.001", r"flops=0\.001.*least reachable is flops=0\.\d+.*output of the network"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(budget: Any, facts: str) -> None:
    net = net_of("mobile")
    digest = net.mask_digest()
    with pytest.raises(ConfigError, match=facts):
        growfx.plan_channels(net, budget)
    assert net.mask_digest() == digest


def test_the_least_budget_that_is_named_can_be_reached() -> None:
    net = net_of("mobile")
    with pytest.raises(ConfigError) as refusal:
        growfx.plan_channels(net, "flops=0.001")
    least = float(str(refusal.value).partition("least reachable is flops=")[2].partition(";")[0])
    assert growfx.plan_channels(net, f"flops={least}").share("flops") <= least
    with pytest.raises(ConfigError):
        growfx.plan_channels(net, f"flops={least - 2e-4}")


def test_options_that_do_not_fit_are_refused() -> None:
    net = net_of("mobile")
    for options, facts in (
        ({"exclude": ["nothing*"]}, r"`nothing\*`.*matches no masked layer"),
        ({"round_to": 64}, r"`round_to` is 64.*`\w+` has only \d+ units"),
        ({"round_to": 0}, "`round_to` is 0"),
        ({"floor": 1.5}, r"`floor` is 1\.5"),
        ({"score": "size"}, "`paths`, `magnitude`, `taylor`"),
        ({"score": "taylor"}, r"gradients.*backward"),
    ):
        with pytest.raises(ConfigError, match=facts):
            growfx.plan_channels(net, "flops=0.5", **options)
    with pytest.raises(ConfigError, match=r"growfx\.plan_channels expects"):
        growfx.plan_channels(nn.Linear(2, 2), "flops=0.5")
    alone = growfx.wrap(nn.Sequential(nn.Linear(4, 3)), torch.randn(1, 4))
    with pytest.raises(ConfigError, match=r"no units that can leave.*output of the network"):
        growfx.plan_channels(alone, "flops=0.5")
    hollow = growfx.wrap(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)).to("meta"), torch.randn(1, 4, device="meta"))
    with pytest.raises(TraceError, match="meta"):
        growfx.plan_channels(hollow, "flops=0.5")


class Split(nn.Module):
    """Sizes written into the code: its first layer cannot be narrower."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 16), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.a(x).split([8, 8], 1)
        return self.c(torch.relu(self.b(left * right)))


def test_units_that_the_models_code_needs_stay_with_the_reason() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Split(), torch.randn(2, 4))
    plan = growfx.plan_channels(net, "flops=0.7")
    assert [family.name for family in plan.families if not family.reason] == ["b"]
    assert "the model fails without it" in plan.refused["a"]


def test_layers_without_a_mask_keep_their_units() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Chain(), torch.randn(2, 6), exclude="b")
    with pytest.raises(ConfigError, match="`b` has no mask"):
        growfx.plan_channels(net, "flops=0.5")


def test_a_network_of_another_type_than_it_was_wrapped_in_is_planned_alike() -> None:
    plan = growfx.plan_channels(net_of("mobile"), "flops=0.5")
    wide = growfx.plan_channels(net_of("mobile").double(), "flops=0.5")
    assert (plan.outputs, plan.columns) == (wide.outputs, wide.columns)


def test_a_budget_of_time_is_met_by_measurement() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 8))
    net = growfx.wrap(model, torch.randn(64, 512))
    plan = growfx.plan_channels(net, "time=0.7", score="magnitude", example_inputs=torch.randn(64, 512))
    assert 0 < plan.share("time") <= 0.7
    assert plan.share("flops") < 1
    with pytest.raises(ConfigError, match="`time` was not counted"):
        growfx.plan_channels(net, "flops=0.7").share("time")


def test_units_behind_an_exponential_leave_as_planned() -> None:
    class Exponential(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.exp()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Exponential(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(5, 6)
    net = growfx.wrap(model, x)
    plan = growfx.plan_channels(net, "params=0.5")
    small = small_of(net, plan)
    assert size(small) <= 0.5 * size(model)
    torch.testing.assert_close(small(x), net.eval()(x))


def test_a_floor_for_no_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`floors`.*zz"):
        growfx.plan_channels(net_of("chain"), "params=0.6", floors={"zz*": 0.9})


class Reading(nn.Module):
    """Reads a number out of its data, which shapes alone do not have, and writes a width into its code."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.second(torch.relu(self.first(x))).reshape(-1, 12))
        return self.head(hidden * (2.0 if x.abs().sum().item() > 0 else 1.0))


def test_cuts_are_tried_with_values_where_shapes_alone_do_not_run() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6)
    net = growfx.wrap(Reading().eval(), x)
    plan = growfx.plan_channels(net, "flops=0.7")
    assert plan.refused["second"].startswith("the model fails without it")
    assert set(plan.outputs) == {"first"}
    small = small_of(net, plan)
    with torch.no_grad():
        torch.testing.assert_close(small(x), net(x))


def test_a_plan_whose_parts_contradict_each_other_is_refused() -> None:
    plan = growfx.plan_channels(net_of("mobile"), "flops=0.6")
    place = next(i for i, family in enumerate(plan.families) if family.removed)
    values = plan.to_json()
    spared = json.loads(json.dumps(values))
    spared["families"][place]["removed"].pop()  # a unit that is to stay, though `outputs` still has it
    assert ChannelPlan.from_json(values) == plan
    for changed, fact in (
        (spared, "`outputs` of `(" + "|".join(plan.families[place].outputs) + ")`"),
        ({**values, "outputs": {}}, "`outputs`"),
        ({**values, "planned": {}}, "`planned`"),
        ({**values, "families": [{**family, "gains": [1.0]} for family in values["families"]]}, "gains"),
    ):
        with pytest.raises(ConfigError, match=fact):
            ChannelPlan.from_json(changed)
