"""Iterative magnitude pruning: how much each level prunes, what the next starts from, and that a run can be resumed."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from breadth import some
from staged_runs import STEPS, session, tensors, train_stage, train_step
from torch import nn
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx import methods
from growfx.errors import CheckpointError, ConfigError
from growfx.methods.session import Stage
from growfx.runs.checkpoint import content_digest
from growfx.training.start import train


def begin(epochs: int = 3, net=None, **options):
    run, method = session(net, epochs), methods.create("imp", **{"density": 0.5, **options})
    method.begin(run)
    return run, method


def skip(run, method, accuracy: float | None = 0.5) -> Stage:
    """End the stage under way without training it."""
    stage = method.next_stage()
    for _ in range(stage.first_step, stage.epochs * STEPS):
        method.step()
    if accuracy is not None:
        method.report(accuracy)
    method.end_stage(stage)
    return stage


def densities(**options) -> list[float]:
    """The density of each level."""
    run, method = begin(**options)
    while method.next_stage() is not None:
        skip(run, method)
    return [entry["density"] for entry in method.trace]


# -- levels -------------------------------------------------------------------------------------------------------


def test_every_level_prunes_a_fifth_of_what_is_left_and_the_last_one_hits_the_density():
    # 0.8, 0.64, ... of Frankle & Carbin; 10 % takes eleven prunings, the last of them a smaller one
    found = densities(density=0.1)
    numel = session().net.numel
    assert found[:-1] == [round(numel * 0.8**level) / numel for level in range(11)]
    assert found[-1] == round(0.1 * numel) / numel
    assert math.ceil(math.log(0.1) / math.log(0.8)) == len(found) - 1 == 11


@pytest.mark.parametrize("levels", [1, 2, 3, 7])
def test_a_number_of_levels_prunes_that_often_by_one_fraction(levels):
    numel = session().net.numel
    found = densities(density=0.1, levels=levels)
    assert len(found) == levels + 1
    assert (found[0], found[-1]) == (1.0, round(0.1 * numel) / numel)
    for level, density in enumerate(found):
        assert density == pytest.approx(0.1 ** (level / levels), abs=1.01 / numel)


def test_the_smallest_fraction_and_a_single_edge_come_to_an_end():
    numel = session().net.numel
    assert densities(density=1.0) == [1.0]
    found = densities(density=1 / numel, prune_fraction=0.01)
    assert found[-1] == 1 / numel
    assert all(after < before for before, after in itertools.pairwise(found))


def test_the_edges_that_stay_are_the_largest_of_those_present_over_all_layers():
    run, method = begin(density=0.4, levels=2)
    for level, share in enumerate((0.4**0.5, 0.4)):
        stage = train_stage(run, method)
        weights = np.concatenate(
            [layer.parameter.detach().abs().flatten().numpy() for layer in run.net.layers.values()]
        )
        before = np.concatenate([layer.mask.flatten().numpy() for layer in run.net.layers.values()])
        method.end_stage(stage)
        after = np.concatenate([layer.mask.flatten().numpy() for layer in run.net.layers.values()])
        assert after.sum() == round(share * run.net.numel)
        assert not (after & ~before).any()
        assert weights[after].min() > weights[before & ~after].max()
        run.net.verify()
        assert stage.number == level


def test_the_trace_has_one_entry_a_level_with_the_last_accuracy_reported_in_it():
    run, method = begin(density=0.4, levels=2)
    for accuracy in (0.5, 0.6, None):
        assert len(method.trace) == {0.5: 0, 0.6: 1, None: 2}[accuracy]
        if accuracy:
            method.report(0.1)
        skip(run, method, accuracy)
    assert json.loads(json.dumps(method.trace)) == method.trace
    assert [entry["val_accuracy"] for entry in method.trace] == [0.5, 0.6, None]
    assert [entry["level"] for entry in method.trace] == [entry["round"] for entry in method.trace] == [0, 1, 2]
    assert [entry["nnz"] for entry in method.trace][-1] == run.net.nnz == round(0.4 * run.net.numel)
    assert (method.next_stage(), method.growing, method.stop_reason) == (None, False, "")


class WithTable(nn.Module):
    """A bias computed from constants alone: off path."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.table = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x)).mean((2, 3))
        return self.head(x + self.table(torch.ones(1, 6)))


def test_layers_no_path_crosses_keep_their_masks_and_are_counted():
    net = growfx.wrap(WithTable(), torch.randn(2, 3, 8, 8))
    net.layers["table"].mask.bernoulli_(0.5, generator=torch.Generator().manual_seed(1))
    kept = net.layers["table"].mask.clone()
    run, method = begin(net=net, density=0.3, levels=2)
    while method.next_stage() is not None:
        assert torch.equal(net.layers["table"].mask, kept)
        skip(run, method)
    assert net.nnz == round(0.3 * net.numel)
    small = growfx.wrap(WithTable(), torch.randn(2, 3, 8, 8))
    run, method = begin(net=small, density=0.02, levels=2)  # less than the table alone has: it is pruned too
    while method.next_stage() is not None:
        skip(run, method)
    assert small.nnz == round(0.02 * small.numel)
    assert small.layers["table"].density < 1


def test_equal_magnitudes_are_pruned_to_the_exact_count_by_the_seed_alone():
    def masks(seed):
        run, method = begin(seed=seed, levels=1)
        for layer in run.net.layers.values():
            nn.init.ones_(layer.parameter)
        skip(run, method)
        assert run.net.nnz == round(0.5 * run.net.numel)
        return run.net.mask_digest()

    assert masks(1) == masks(1) != masks(2)


def test_an_edge_once_pruned_never_comes_back_though_present_ones_may_be_zero_too():
    run, method = begin(density=0.2, levels=3, rewind="continued")
    before = {name: layer.mask.clone() for name, layer in run.net.layers.items()}
    while method.next_stage() is not None:
        for name, layer in run.net.layers.items():
            nn.init.zeros_(layer.parameter)
            assert not (layer.mask & ~before[name]).any()
            before[name] = layer.mask.clone()
        skip(run, method)
    assert run.net.nnz == round(0.2 * run.net.numel)


# -- what a level starts from -------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0, 0.25, 1, 1.5, 2.75])
def test_rewinding_puts_back_everything_as_it_was_at_that_step_but_for_what_was_pruned(epochs):
    run, method = begin(rewind_epochs=epochs, density=0.5, prune_fraction=0.25)
    step = round(epochs * STEPS)
    stage = method.next_stage()
    state = tensors(run.net)
    for number in range(stage.epochs * STEPS):
        assert not train_step(run, method, number)
        if number + 1 == step:
            state = tensors(run.net)
    before = tensors(run.net)
    for level in (1, 2, 3):
        method.end_stage(stage)
        for name, value in tensors(run.net).items():
            expected = state[name]
            layer = name.removesuffix(".weight")
            if name.endswith(".mask"):
                assert int(value.sum()) < value.numel()
            elif layer in run.net.layers:
                assert torch.equal(value, expected * run.net.layers[layer].mask)
            else:
                assert torch.equal(value, expected)
        assert not torch.equal(before["bn.running_mean"], state["bn.running_mean"])
        assert run.optimizer.state_dict()["state"] == {}
        stage = method.next_stage()
        assert (stage.first_step, stage.epochs) == (step, 3)
        assert (stage.kind, stage.number) == (("level", level) if level < 3 else ("final", 0))
        train_stage(run, method)
    method.end_stage(stage)
    assert method.next_stage() is None


@pytest.mark.parametrize(("rewind", "first"), [("learning-rate", 6), ("continued", 0)])
def test_the_other_modes_keep_the_weights_and_differ_in_the_schedule(rewind, first):
    run, method = begin(rewind=rewind, levels=2, **({"rewind_epochs": 1.5} if first else {}))
    assert method.next_stage().first_step == 0
    for _ in range(2):
        stage = train_stage(run, method)
        before = tensors(run.net)
        method.end_stage(stage)
        after = tensors(run.net)
        for name, value in after.items():
            layer = name.removesuffix(".weight")
            if layer in run.net.layers:
                assert torch.equal(value, before[name] * run.net.layers[layer].mask)
            elif not name.endswith(".mask"):
                assert torch.equal(value, before[name])
        assert run.optimizer.state_dict()["state"] == {}
        assert method.next_stage().first_step == first
        assert method.state_dict()["memory"] == {}


def test_a_level_starts_with_an_optimizer_that_never_stepped():
    """Also where it counts its steps beside the parameters' state, as timm's Lamb does."""
    from growfx.training.recipe import make_optimizer

    run = session(weight_decay=0.1)
    options = dataclasses.replace(run.options, optimizer="lamb")
    run = dataclasses.replace(run, options=options, optimizer=make_optimizer(run.net, options))
    method = methods.create("imp", levels=1)
    method.begin(run)
    before = json.dumps(run.optimizer.state_dict())
    stage = train_stage(run, method)
    assert run.optimizer.state_dict()["state"]
    method.end_stage(stage)
    assert json.dumps(run.optimizer.state_dict()) == before


# -- in a run -----------------------------------------------------------------------------------------------------


def run_imp(path, resume=False, epochs=3, **options):
    train_loader, val_loader = loaders()
    torch.manual_seed(len(str(path)))  # what came before the run must not matter
    net = fresh_net()
    method = methods.create("imp", **{"density": 0.2, "levels": 2, **options})
    result = train(
        net,
        train_loader,
        val_loader,
        method=method,
        options=QUICK,
        epochs=epochs,
        out=path,
        progress=False,
        resume=resume,
    )
    return net, result


def test_rewinding_into_an_epoch_enters_the_schedule_in_its_middle(tmp_path):
    """Six steps an epoch: half an epoch is three of them, and a level then has three epochs, a short one first."""
    net, result = run_imp(tmp_path / "run", rewind_epochs=0.5)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in log if record["event"] == "epoch"]
    assert [record["phase"] for record in epochs] == ["level"] * 6 + ["final"] * 3
    assert [record["steps"] for record in epochs] == [6, 12, 18, 21, 27, 33, 36, 42, 48]
    rates = [record["lr"] for record in epochs]
    assert rates[:3] == rates[3:6] == rates[6:]
    assert (result.epochs, result.steps) == (9, 48)
    share = [entry["density"] for entry in result.trace]
    assert share == pytest.approx([1, 0.2**0.5, 0.2], abs=1 / net.numel)
    assert net.nnz == round(0.2 * net.numel)
    assert result.val_accuracy == result.trace[-1]["val_accuracy"]
    # three epochs dense, and twice two and a half at no more than their density
    assert 3 < result.dense_equivalent_epochs < 3 + 2.5 * 2


CUTS = (
    [({"rewind_epochs": 0.5}, *at) for at in [(0, 2), (2, 5), (3, 0), (4, 4), (6, 3), (8, 5)]]
    + [({"rewind_epochs": 0}, 0, 4), ({"rewind_epochs": 2}, 1, 3), ({"rewind_epochs": 2}, 4, 1)]
    + [({"rewind": "learning-rate"}, 5, 2), ({"rewind": "continued"}, 3, 0), ({"rewind": "continued"}, 7, 3)]
)


@pytest.mark.parametrize(("options", "epoch", "step"), some(CUTS, lambda cut: cut in CUTS[::4]))
def test_a_run_that_is_interrupted_and_resumed_ends_as_one_that_was_not(tmp_path, monkeypatch, options, epoch, step):
    """Three levels; the first is epochs 0 to 2."""
    net, whole = run_imp(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch, step)
        with pytest.raises(KeyboardInterrupt):
            run_imp(tmp_path / "parts", **options)
    again, resumed = run_imp(tmp_path / "parts", resume=True, **options)
    assert resumed == whole
    assert content_digest(dict(again.state_dict())) == content_digest(dict(net.state_dict()))
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))


def test_a_state_is_plain_values_and_of_its_network_alone(tmp_path):
    run, method = begin()
    train_stage(run, method)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content_digest(state) == content_digest(method.state_dict())
    again = methods.create("imp", density=0.5)
    again.begin(session())
    again.load_state_dict(state)
    assert content_digest(again.state_dict()) == content_digest(state)
    other = methods.create("imp", density=0.5)
    other.begin(session(fresh_net()))
    with pytest.raises(CheckpointError, match="network with other layers; resume with the model it came from"):
        other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="the state is of method `other`"):
        method.load_state_dict({**state, "method": "other"})
    with pytest.raises(CheckpointError, match="the state has 9 stages to come, this run 5 in all"):
        method.load_state_dict({**state, "stages_left": 9})
    with pytest.raises(ConfigError, match=r"`accuracy` is 87\.5"):
        method.report(87.5)


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0}, "`density` = 0.0 is out of range; allowed: (0, 1]"),
        ({"prune_fraction": 1}, "`prune_fraction` = 1.0 is out of range; allowed: [0.01, 1)"),
        ({"levels": 0}, "`levels` = 0 is out of range; allowed: [1, 1000]"),
        ({"rewind": "back"}, "`rewind` = 'back' is unknown; allowed: `weights`, `learning-rate`, `continued`"),
        ({"levels": 3, "prune_fraction": 0.5}, "`prune_fraction` = 0.5 has no effect with `levels` given"),
        (
            {"rewind": "continued", "rewind_epochs": 2},
            "`rewind_epochs` = 2.0 has no effect with `rewind` = 'continued'",
        ),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ConfigError) as caught:
        methods.create("imp", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("rewind", ["weights", "learning-rate"])
def test_rewinding_to_the_end_of_the_training_is_refused_before_anything_changes(rewind):
    run = session()
    before = content_digest(tensors(run.net))
    method = methods.create("imp", rewind=rewind, rewind_epochs=3)
    with pytest.raises(ConfigError, match=r"`rewind_epochs` = 3 is not before the end .* 3 epochs; allowed: \[0, 3\)"):
        method.begin(run)
    assert content_digest(tensors(run.net)) == before
    with pytest.raises(ConfigError, match=r"method `imp` is not attached; run it through growfx\.train"):
        method.next_stage()
    with pytest.raises(ConfigError, match=r"method `imp` trains several times over; run it through growfx\.train"):
        method.attach(run.net, run.optimizer, total_steps=4, steps_per_epoch=2)
