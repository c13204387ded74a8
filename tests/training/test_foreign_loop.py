import gc
import importlib
import sys
import weakref

import pytest
import torch
from breadth import some
from error_facts import facts
from loop_nets import BATCH, EPOCHS, STEPS, data, net, optimizer_of, plain_loop, pwmpr, rigl
from torch import nn

import growfx
from growfx.errors import ConfigError
from growfx.runs.checkpoint import content_digest
from growfx.training.foreign_loop import ForeignLoop, find_net, find_optimizer

CLOCK = {"total_steps": EPOCHS * STEPS, "steps_per_epoch": STEPS}


def run_epochs(model, optimizer, loop, epochs):
    """A loop that knows nothing of methods."""
    images, targets = data()
    model.train()
    for _ in range(epochs):
        for batch in range(STEPS):
            rows = slice(batch * BATCH, (batch + 1) * BATCH)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[rows]), targets[rows]).backward()
            optimizer.step()
        model.eval()
        with torch.inference_mode():
            right = (model(images).argmax(1) == targets).float().mean()
            loop.report({"accuracy": right}, "accuracy")
        model.train()


@pytest.mark.parametrize("make", [rigl, pwmpr])
def test_a_method_that_follows_its_optimizer_ends_as_one_that_is_called(make):
    expected_method, method = make(), make()
    expected = plain_loop(expected_method)
    model = net()
    optimizer = optimizer_of(model)
    loop = ForeignLoop(method)
    loop.start(model, optimizer, **CLOCK)
    run_epochs(model, optimizer, loop, EPOCHS)
    assert content_digest(dict(model.state_dict())) == content_digest(dict(expected.state_dict()))
    assert content_digest(method.state_dict()) == content_digest(expected_method.state_dict())


@pytest.mark.parametrize("make", [rigl, pwmpr])
@pytest.mark.parametrize("epochs", some([1, 3], lambda epochs: epochs == 3))
def test_a_state_continues_on_the_weights_that_are_there(make, epochs):
    whole_method, method = make(), make()
    whole = plain_loop(whole_method)
    first, second = net(), net(seed=5)
    optimizer, other = optimizer_of(first), optimizer_of(second)
    loop = ForeignLoop(make())
    loop.start(first, optimizer, **CLOCK)
    run_epochs(first, optimizer, loop, epochs)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(optimizer.state_dict())
    state = loop.method.state_dict()
    loop.stop()
    loop = ForeignLoop(method)
    loop.start(second, other, **CLOCK, state=state)
    run_epochs(second, other, loop, EPOCHS - epochs)
    assert content_digest(dict(second.state_dict())) == content_digest(dict(whole.state_dict()))
    assert content_digest(method.state_dict()) == content_digest(whole_method.state_dict())


def test_steps_of_others_and_steps_after_the_end_do_not_count():
    model = net()
    optimizer, other = optimizer_of(model), optimizer_of(nn.Linear(2, 2))
    loop = ForeignLoop(rigl())
    loop.start(model, optimizer, **CLOCK)
    steps = lambda: loop.method.state_dict()["steps"]  # noqa: E731
    other.step()
    assert steps() == 0
    optimizer.step()
    assert steps() == 1
    loop.stop()
    optimizer.step()
    assert steps() == 1
    assert not loop.started


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_skips_a_step_skips_the_methods_too(fused):
    """Fused optimizers are called all the same, and skip by themselves."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=fused)
    loop = ForeignLoop(rigl())
    loop.start(model, optimizer, **CLOCK)
    scaler = torch.amp.GradScaler("cpu")
    images, targets = data()
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * nn.functional.cross_entropy(model(images), targets)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert loop.method.state_dict()["steps"] == 2


def test_a_loop_that_is_forgotten_holds_nothing():
    model = net()
    optimizer = optimizer_of(model)
    loop = ForeignLoop(rigl())
    loop.start(model, optimizer, **CLOCK)
    gone = weakref.ref(loop)
    steps = loop.method
    del loop
    gc.collect()
    assert gone() is None
    optimizer.step()
    assert steps.state_dict()["steps"] == 0


def test_the_network_is_found_and_what_cannot_be_found_is_said():
    one, two = net(), net()
    holder = nn.ModuleDict({"a": one, "b": two})
    assert find_net(nn.Sequential(one), None) is one
    assert find_net(one, None) is one
    assert find_net(holder, "b") is two
    with pytest.raises(ConfigError, match=r"`ModuleDict` has 2 growfx.MaskedGraph \(`a`, `b`\); .* by `net`"):
        find_net(holder, None)
    with pytest.raises(ConfigError, match=r"`Linear` has 0 growfx.MaskedGraph \(none\); wrap the model"):
        find_net(nn.Linear(1, 1), None)
    with pytest.raises(ConfigError, match=facts("`net` = `c`", "`ModuleDict`", "`a`, `b`")):
        find_net(holder, "c")


def test_the_optimizer_is_found_and_what_cannot_be_found_is_said():
    model = net()
    own, other = optimizer_of(model), optimizer_of(nn.Linear(2, 2))
    assert find_optimizer(model, [other, own]) is own
    with pytest.raises(ConfigError, match="0 optimizers train the masked weights"):
        find_optimizer(model, [other])
    with pytest.raises(ConfigError, match="2 optimizers train the masked weights"):
        find_optimizer(model, [own, optimizer_of(model)])


def test_a_metric_that_is_not_there_or_no_fraction_is_refused():
    model = net()
    loop = ForeignLoop(rigl())
    loop.start(model, optimizer_of(model), **CLOCK)
    with pytest.raises(ConfigError, match=facts("`monitor` = `acc`", "`loss`")):
        loop.report({"loss": 1.0}, "acc")
    with pytest.raises(ConfigError, match="97"):
        loop.report({"acc": 97.0}, "acc")


def test_a_method_that_trains_several_times_over_is_refused():
    model = net()
    with pytest.raises(ConfigError, match=r"growfx\.train"):
        ForeignLoop(growfx.methods.create("imp")).start(model, optimizer_of(model), **CLOCK)


@pytest.mark.parametrize(
    ("package", "module"), [("lightning", "growfx.lightning"), ("transformers", "growfx.hf_trainer")]
)
def test_a_missing_package_is_named(monkeypatch, package, module):
    really = importlib.import_module

    def without(name, *args):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return really(name, *args)

    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=facts(module, f"`{package}`", "pip install")):
        really(module)
