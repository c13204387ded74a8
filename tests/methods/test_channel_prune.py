"""Pruning whole units by a method: schedules, scores, plans, and what becomes of the network."""

import copy
import json
from typing import Any

import error_facts
import pytest
import torch
from breadth import some
from channel_nets import IMAGES, macs, net_of, size
from method_nets import OPTIMIZERS, small_net, train_steps
from training_nets import QUICK, Tiny, fresh_net, loaders

import growfx
from growfx import methods
from growfx.errors import ConfigError

X = torch.randn(2, 3, 8, 8)


def begun(net: Any, steps: int = 24, **options: Any) -> tuple[Any, Any]:
    updates = options.get("schedule") != "once" or options.get("score") == "taylor"
    options = {"update_every": 3, **options} if updates else options
    method, optimizer = methods.create("channel-prune", **options), OPTIMIZERS["sgd"](net)
    method.attach(net, optimizer, total_steps=steps, steps_per_epoch=3)
    return method, optimizer


@pytest.mark.parametrize("score", ["paths", "magnitude", "taylor"])
@pytest.mark.parametrize("schedule", ["once", "cubic"])
@pytest.mark.parametrize("budget", some(["flops=0.5", "params=0.4"], lambda budget: budget == "flops=0.5"))
def test_the_network_meets_its_budget_and_is_as_small_as_it_says(schedule: str, score: str, budget: str) -> None:
    net = small_net()
    dense = growfx.unwrap(net).eval()
    method, optimizer = begun(net, budget=budget, schedule=schedule, score=score)
    train_steps(net, optimizer, method, 24)
    small = growfx.unwrap(net, compact=True)
    kind, limit = budget.split("=")
    shares = {"flops": macs(small, X) / macs(dense, X), "params": size(small) / size(dense)}
    assert 0.7 * float(limit) < shares[kind] <= float(limit)
    with torch.no_grad():
        torch.testing.assert_close(small(X), net.eval()(X))
    net.verify()


def test_cost_falls_along_a_cubic_and_units_do_not_come_back() -> None:
    net = net_of("mobile")
    method, optimizer = begun(net, budget="flops=0.5", end=0.75, update_every=2)
    costs, gone = [], torch.zeros_like(net.layers["stem"].mask)
    for number in range(24):
        train_steps(net, optimizer, method, 1, number)
        costs.append(growfx.cost(net).sparse / growfx.cost(net).dense)
        assert not (gone & net.layers["stem"].mask).any()
        gone |= ~net.layers["stem"].mask
    assert costs == sorted(costs, reverse=True)
    assert costs[17:] == [costs[17]] * 7
    for step in (2, 8, 14, 18):
        wanted = 0.5 + 0.5 * (1 - step / 18) ** 3
        assert wanted - 0.12 < costs[step - 1] <= wanted


def test_once_prunes_before_the_first_step_and_never_again() -> None:
    net = net_of("mobile")
    plan = growfx.plan_channels(net, "flops=0.5")
    method, optimizer = begun(net, budget="flops=0.5", schedule="once")
    masks = plan.masks(net_of("mobile"))
    assert all(torch.equal(net.layers[name].mask, mask) for name, mask in masks.items())
    assert not any(train_steps(net, optimizer, method, 12))


@pytest.mark.parametrize("schedule", ["once", "cubic"])
def test_a_plan_is_carried_out_exactly(schedule: str, tmp_path: Any) -> None:
    plan = growfx.plan_channels(net_of("mobile"), "flops=0.45", score="magnitude", round_to=2)
    expected = {name: mask.clone() for name, mask in plan.masks(net_of("mobile")).items()}
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    for given in (plan, plan.to_json(), json.dumps(plan.to_json()), str(tmp_path / "plan.json")):
        net = net_of("mobile")
        method, optimizer = begun(net, plan=given, schedule=schedule)
        train_steps(net, optimizer, method, 24)
        assert all(torch.equal(net.layers[name].mask, mask) for name, mask in expected.items())
        assert all(bool(x.mask.all()) for name, x in net.layers.items() if name not in expected)


def test_plans_and_budgets_that_do_not_fit_are_refused_before_anything_changes(tmp_path: Any) -> None:
    plan = growfx.plan_channels(net_of("mobile"), "flops=0.5")
    for options, facts in (
        ({"budget": "flops=2"}, r"\(0, 1\]"),
        ({"budget": "weights=0.5"}, "`weights`"),
        ({"budget": "params=0.5", "plan": plan}, r"params=0\.5.*flops=0\.5"),
        ({"plan": str(tmp_path / "nowhere.json")}, "cannot be read as a file"),
        ({"plan": "{}"}, "channel plan"),
        ({"start": 0.5, "end": 0.5}, "`start` = 0.5 is not before"),
        ({"floors": "stem"}, "PATTERN=FRACTION"),
    ):
        with pytest.raises(ConfigError, match=facts):
            methods.create("channel-prune", **options)
    for options, facts in (
        ({"budget": "flops=0.001"}, "least reachable"),
        ({"exclude": "stemm"}, "`stemm`"),
        ({"plan": growfx.plan_channels(net_of("chain"), "flops=0.5")}, "another network"),
        ({"round_to": 100}, "`round_to` is 100"),
    ):
        net = net_of("mobile")
        weights = copy.deepcopy(net.state_dict())
        with pytest.raises(ConfigError, match=facts):
            begun(net, **options)
        assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    "option", [{"score": "taylor"}, {"floor": 0.9}, {"floors": "stem=1"}, {"round_to": 4}, {"exclude": "stem"}], ids=str
)
def test_options_of_planning_are_refused_beside_a_plan(option: dict[str, Any]) -> None:
    plan = growfx.plan_channels(net_of("mobile"), "flops=0.5")
    with pytest.raises(
        ConfigError, match=error_facts.facts(*(f"`{name}` = {value!r}" for name, value in option.items()), "`plan`")
    ):
        methods.create("channel-prune", plan=plan, **option)


def test_given_masks_are_pruned_on_and_their_absent_units_leave_first() -> None:
    net = net_of("mobile")
    net.set_masks(growfx.plan_channels(net, "flops=0.7").masks(net))
    before = {name: layer.mask.clone() for name, layer in net.layers.items()}
    method, optimizer = begun(net, budget="flops=0.5", masks="given")
    assert all(torch.equal(layer.mask, before[name]) for name, layer in net.layers.items())
    train_steps(net, optimizer, method, 24)
    assert all(not (layer.mask & ~before[name]).any() for name, layer in net.layers.items())
    assert growfx.cost(net).sparse <= 0.5 * growfx.cost(net).dense


def test_taylor_needs_the_gradients_of_the_steps() -> None:
    net = small_net()
    method, optimizer = begun(net, score="taylor", schedule="once", update_every=2)
    changed = []
    for number in range(2):
        noise = torch.Generator().manual_seed(number)
        net(torch.randn(4, 3, 8, 8, generator=noise)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            changed.append(method.step())
    assert changed == [False]
    with pytest.raises(ConfigError, match=r"before `optimizer\.zero_grad\(\)`"):
        method.step()


@pytest.mark.slow
def test_a_budget_of_time_ends_with_a_measured_network() -> None:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 1024), torch.nn.Linear(1024, 4))
    net = growfx.wrap(torch.nn.Sequential(*layers), torch.randn(64, 256))
    method, optimizer = begun(net, steps=6, budget="time=0.8", update_every=1, score="magnitude")
    for _ in range(6):
        net(torch.randn(8, 256)).square().mean().backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    assert net.density < 1


def test_frozen_meanwhile_leaves_what_touches_the_layer(recwarn: Any) -> None:
    net = net_of("mobile")
    method, optimizer = begun(net, budget="flops=0.8", end=1.0)
    train_steps(net, optimizer, method, 6)
    net.layers["stem"].parameter.requires_grad_(False)
    mask = net.layers["stem"].mask.clone()
    train_steps(net, optimizer, method, 18, 6)
    assert torch.equal(net.layers["stem"].mask, mask)


def test_a_run_leaves_an_artifact_that_loads_small(tmp_path: Any) -> None:
    net = fresh_net()
    method = methods.create("channel-prune", budget="flops=0.4", update_every=2)
    result = growfx.train(net, *loaders(), method=method, options=QUICK, out=tmp_path / "run", progress=False)
    growfx.save(net, tmp_path / "small", compact=True)
    small = growfx.load(tmp_path / "small", model=Tiny())
    images = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(small(images), net.eval()(images), rtol=1e-4, atol=1e-5)
    assert macs(small, images) <= 0.4 * macs(Tiny(), images)
    assert result.density < 0.5
    torch.export.export(small, (images,))
    again = growfx.wrap(growfx.unwrap(net, compact=True), images)
    assert again.density == 1


def test_pruned_units_keep_their_outputs_equal_in_training_mode_of_the_smaller_model() -> None:
    net = net_of("mobile")
    method, optimizer = begun(net, budget="flops=0.5")
    train_steps(net, optimizer, method, 24)
    small = growfx.unwrap(net, compact=True).train()
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), net.train()(IMAGES), rtol=1e-4, atol=1e-5)
