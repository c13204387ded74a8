"""Continuous sparsification: the search against plain torch, what follows it, and that a run can be resumed."""

import copy
import json

import pytest
import torch
from artifact_nets import Tied
from breadth import some
from method_nets import small_net
from staged_runs import STEPS, batch, session, tensors, train_stage, train_step
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx import methods
from growfx.errors import CheckpointError, ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.methods.staged.continuous import SoftMask
from growfx.runs.checkpoint import content_digest
from growfx.training.start import train


def begin(epochs: int = 3, net=None, **options):
    run, method = session(net, epochs), methods.create("continuous", **options)
    method.begin(run)
    return run, method


def gates(net) -> dict[str, SoftMask]:
    return {name: layer.gate for name, layer in net.layers.items() if layer.gate is not None}


def scores(net) -> dict[str, torch.Tensor]:
    return {name: gate.scores.detach().clone() for name, gate in gates(net).items()}


def spread(net, seed: int = 0) -> dict[str, torch.Tensor]:
    """Give the scores normal values, as a long search would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in gates(net).values():
            gate.scores.copy_(torch.randn(gate.scores.shape, generator=generator))
    return scores(net)


# -- the soft mask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [0.0, -0.3, 2.0])
def test_a_soft_mask_is_a_sigmoid_of_the_scores_that_starts_as_no_mask_at_all(initial):
    weight = torch.randn(3, 4)
    gate = SoftMask(weight, initial)
    assert torch.allclose(gate(weight), weight, atol=1e-6)
    gate.temperature = 5.0
    with torch.no_grad():
        gate.scores.copy_(torch.randn(3, 4))
    expected = weight * torch.sigmoid(5 * gate.scores) / torch.sigmoid(torch.tensor(initial))
    assert torch.allclose(gate(weight), expected)
    assert gate(weight.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("initial", "temperature"), [(0.0, 1.0), (-1.0, 20.0), (0.5, 3.0)])
def test_the_penalty_is_the_gradient_of_the_sum_of_the_scaled_mask(initial, temperature):
    gate = SoftMask(torch.randn(3, 4), initial)
    gate.temperature = temperature
    with torch.no_grad():
        gate.scores.copy_(0.2 * torch.randn(3, 4))
    total = 0.01 * (torch.sigmoid(temperature * gate.scores) / torch.sigmoid(torch.tensor(initial))).sum()
    (expected,) = torch.autograd.grad(total, gate.scores)
    gate.penalise(0.01)
    assert torch.allclose(gate.scores.grad, expected, rtol=1e-5)
    gate.penalise(0.01)
    assert torch.allclose(gate.scores.grad, 2 * expected, rtol=1e-5)


def test_between_rounds_what_was_suppressed_stays_so_and_the_rest_starts_anew():
    """By the temperature of the end: -0.05 would come back as sigmoid(-0.05) = 0.49 otherwise."""
    gate = SoftMask(torch.ones(4), 0.1)
    with torch.no_grad():
        gate.scores.copy_(torch.tensor([-0.05, 0.0002, 0.3, -2.0]))
    gate.restart(200.0, 0.1)
    assert gate.scores.tolist() == pytest.approx([-10.0, 0.04, 0.1, -400.0])


def test_a_copy_of_the_network_computes_the_same_with_scores_of_its_own():
    run, method = begin()
    train_stage(run, method)
    clone = copy.deepcopy(run.net)
    images, _ = batch(9)
    assert torch.equal(clone(images), run.net(images))
    before = run.net(images).detach()
    spread(clone)
    assert torch.equal(run.net(images), before)
    assert not torch.equal(clone(images), before)
    assert set(run.net.state_dict()) == set(small_net().state_dict())


# -- the search ---------------------------------------------------------------------------------------------------


def reference_search(
    net, epochs: int, initial: float, penalty: float, final: float, rates: list[float], mask_lr: float
):
    """One round in plain torch; returns weights, buffers and scores."""
    plain = growfx.unwrap(copy.deepcopy(net)).train()
    masked = {f"{name}.weight": torch.full(layer.mask.shape, initial) for name, layer in net.layers.items()}
    for value in masked.values():
        value.requires_grad_()
    weights = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    moments = {name: torch.zeros_like(value) for name, value in masked.items()}
    base = torch.sigmoid(torch.tensor(initial))
    for number in range(epochs * STEPS):
        temperature = final ** ((number // STEPS) / (epochs - 1))
        soft = {name: torch.sigmoid(temperature * value) / base for name, value in masked.items()}
        used = {name: value * soft.get(name, 1) for name, value in plain.named_parameters()}
        images, targets = batch(number)
        loss = F.cross_entropy(functional_call(plain, used, (images,)), targets)
        loss = loss + penalty * sum(value.sum() for value in soft.values())
        found = torch.autograd.grad(loss, [*plain.parameters(), *masked.values()])
        for value, grad in zip(plain.parameters(), found, strict=False):
            value.grad = grad
        for group in weights.param_groups:
            group["lr"] = rates[number]
        weights.step()
        with torch.no_grad():
            for (name, value), grad in zip(masked.items(), found[-len(masked) :], strict=True):
                moments[name].mul_(0.9).add_(grad)
                value.sub_(mask_lr * rates[number] / 0.1 * (grad + 0.9 * moments[name]))
    return plain.state_dict(), {name.removesuffix(".weight"): value.detach() for name, value in masked.items()}


@pytest.mark.parametrize(("initial", "penalty"), [(0.0, 0.0), (-0.2, 1e-2)])
def test_a_search_is_what_plain_torch_makes_of_the_paper(initial, penalty):
    """Rates go down over the steps: those of the scores go with them, as `mask_lr` to the run's 0.1."""
    run, method = begin(initial_mask=initial, penalty=penalty, final_temperature=30, mask_lr=0.5)
    rates = [0.08 * (1 - number / 16) for number in range(3 * STEPS)]
    expected, wanted = reference_search(run.net, 3, initial, penalty, 30.0, rates, 0.5)
    for number, rate in enumerate(rates):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        assert not train_step(run, method, number)
    state = run.net.state_dict()
    for name, value in expected.items():
        assert torch.allclose(state[name].float(), value.float(), atol=2e-5), name
    moved = 0.0
    for name, value in scores(run.net).items():
        assert torch.allclose(value, wanted[name], atol=2e-5), name
        moved = max(moved, float((value - initial).abs().max()))
    assert moved > 0.01


@pytest.mark.parametrize(
    ("epochs", "expected"), [(1, [200.0]), (2, [1.0, 200.0]), (4, [1.0, 200 ** (1 / 3), 200 ** (2 / 3), 200.0])]
)
def test_the_temperature_rises_once_an_epoch_to_exactly_its_last_value_in_every_round(epochs, expected):
    run, method = begin(epochs=3, search_epochs=epochs, rounds=2, rewind_epochs=0)
    for number in range(2):
        stage = method.next_stage()
        assert (stage.kind, stage.number, stage.epochs, stage.first_step) == ("search", number, epochs, 0)
        found = []
        for _ in range(epochs * STEPS):
            found.append({gate.temperature for gate in gates(run.net).values()})
            method.step()
        assert [value for values in found for value in values] == pytest.approx(
            [t for t in expected for _ in range(STEPS)]
        )
        assert found[-1] == {200.0}
        assert {gate.temperature for gate in gates(run.net).values()} == {200.0}  # as what is validated now
        method.end_stage(stage)
    assert method.next_stage().kind == "final"


def test_a_round_starts_from_the_weights_and_the_clamped_scores_of_the_one_before_with_fresh_optimizers():
    run, method = begin(rounds=2, initial_mask=0.1)
    stage = train_stage(run, method)
    found, before = spread(run.net), tensors(run.net)
    method.end_stage(stage)
    for name, value in scores(run.net).items():
        assert torch.allclose(value, torch.minimum(200 * found[name], torch.tensor(0.1)))
    assert content_digest(tensors(run.net)) == content_digest(before)
    assert run.optimizer.state_dict()["state"] == {}
    assert method.state_dict()["memory"]["optimizer"]["state"] == {}
    assert {gate.temperature for gate in gates(run.net).values()} == {1.0}
    train_step(run, method, 0)
    assert method.state_dict()["memory"]["optimizer"]["state"] != {}


def test_every_use_of_a_tied_weight_is_gated_and_freed():
    net = growfx.wrap(Tied(), torch.randn(2, 3, 8, 8))
    run, method = begin(net=net, rounds=1, search_epochs=1, rewind_epochs=0)
    users = [module for module in net.modules() if isinstance(module, MaskedLayer)]
    assert len(users) > len(net.layers)
    assert all(module.gate is not None for module in users)
    end_search(run, method)
    assert all(module.gate is None for module in users)


# -- after the search ---------------------------------------------------------------------------------------------


def end_search(run, method, seed: int = 0):
    """End all rounds without training, with normal scores at the end; returns these."""
    found = {}
    while (stage := method.next_stage()).kind == "search":
        for _ in range(stage.epochs * STEPS):
            method.step()
        found = spread(run.net, seed)
        method.report(0.5)
        method.end_stage(stage)
    return found


@pytest.mark.parametrize("epochs", [0, 0.75, 2])
def test_a_ticket_has_the_edges_of_positive_score_and_everything_else_as_it_was_early_on(epochs):
    run, method = begin(rounds=2, rewind_epochs=epochs)
    state = tensors(run.net)
    for number in range(round(epochs * STEPS)):
        train_step(run, method, number)
        state = tensors(run.net)
    for number in range(round(epochs * STEPS), 3 * STEPS):
        train_step(run, method, number)
    method.end_stage(method.next_stage())
    stage = train_stage(run, method)
    found = spread(run.net)
    method.end_stage(stage)
    for name, value in tensors(run.net).items():
        layer = name.removesuffix(".mask").removesuffix(".weight")
        if name.endswith(".mask"):
            assert torch.equal(value, found[layer] > 0)
        else:
            kept = found[layer] > 0 if layer in found else torch.tensor(True)
            assert torch.equal(value, state[name] * kept)
    assert 0.3 < run.net.density < 0.7
    run.net.verify()
    assert all(layer.gate is None and "gate" not in vars(layer) for layer in run.net.layers.values())
    assert run.optimizer.state_dict()["state"] == {}
    stage = method.next_stage()
    assert (stage.kind, stage.epochs, stage.peak, stage.warmup, stage.first_step) == ("final", 3, 1.0, None, 0)
    train_stage(run, method)
    method.end_stage(stage)
    assert method.next_stage() is None
    run.net.verify()


@pytest.mark.parametrize("initial", [0.0, -0.5])
def test_pruning_keeps_the_trained_weights_and_the_function_of_the_hard_masks(initial):
    run, method = begin(mode="prune", initial_mask=initial, finetune_lr=0.05)
    train_stage(run, method)
    found = spread(run.net)
    before, images = tensors(run.net), batch(9)[0]
    # a much higher temperature is a step: the soft network is then the hard one
    for gate in gates(run.net).values():
        gate.temperature = 1e9
    expected = run.net.eval()(images).detach()
    method.end_stage(method.next_stage())
    assert torch.allclose(run.net(images), expected, atol=1e-5)
    scale = 1 / torch.sigmoid(torch.tensor(initial))
    for name, layer in run.net.layers.items():
        assert torch.equal(layer.mask, found[name] > 0)
        assert torch.allclose(layer.parameter, before[f"{name}.weight"] * (found[name] > 0) * scale)
    stage = method.next_stage()
    assert (stage.kind, stage.epochs, stage.peak, stage.warmup) == ("final", 3, 0.05, 0.0)


def test_the_default_number_of_rounds_is_three_for_a_ticket_and_one_for_pruning():
    for mode, rounds in (("ticket", 3), ("prune", 1)):
        run, method = begin(mode=mode)
        end_search(run, method)
        assert [entry["phase"] for entry in method.trace] == ["search"] * rounds


@pytest.mark.parametrize("mode", ["ticket", "prune"])
@pytest.mark.parametrize("density", [0.05, 0.5, 0.9])
def test_a_density_asked_for_is_hit_exactly_by_the_largest_scores(mode, density):
    run, method = begin(mode=mode, rounds=1, density=density)
    found = end_search(run, method)
    net = run.net
    assert net.nnz == round(density * net.numel)
    kept = torch.cat([found[name][layer.mask] for name, layer in net.layers.items()])
    lost = torch.cat([found[name][~layer.mask] for name, layer in net.layers.items()])
    assert kept.min() > lost.max()
    # the soft network, whose accuracy stands there, has more
    assert method.trace[0]["nnz"] == sum(int((value > 0).sum()) for value in found.values())


def test_equal_scores_are_told_apart_by_the_seed():
    def masks(seed):
        run, method = begin(rounds=1, search_epochs=1, rewind_epochs=0, density=0.3, seed=seed)
        stage = method.next_stage()
        method.end_stage(stage)
        assert run.net.nnz == round(0.3 * run.net.numel)
        return run.net.mask_digest()

    assert masks(1) == masks(1) != masks(2)


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


@pytest.mark.parametrize("density", [None, 0.4])
def test_layers_no_path_crosses_stay_as_they_are_and_are_counted(density):
    net = growfx.wrap(WithTable(), torch.randn(2, 3, 8, 8))
    net.layers["table"].mask.bernoulli_(0.5, generator=torch.Generator().manual_seed(1))
    kept = net.layers["table"].mask.clone()
    run, method = begin(net=net, density=density, rounds=1)
    assert net.layers["table"].gate is None
    found = end_search(run, method)
    assert torch.equal(net.layers["table"].mask, kept)
    positive = sum(int((value > 0).sum()) for value in found.values()) + int(kept.sum())
    assert method.trace[0]["nnz"] == positive
    assert net.nnz == (positive if density is None else round(0.4 * net.numel))


# -- in a run -----------------------------------------------------------------------------------------------------


def run_continuous(path, resume=False, epochs=3, **options):
    train_loader, val_loader = loaders()
    torch.manual_seed(len(str(path)))  # what came before the run must not matter
    net = fresh_net()
    method = methods.create("continuous", **{"search_epochs": 2, **options})
    given = {"method": method, "options": QUICK, "epochs": epochs, "progress": False}
    return net, train(net, train_loader, val_loader, out=path, resume=resume, **given)


def test_the_trace_tells_soft_rounds_from_the_hard_training(tmp_path):
    net, result = run_continuous(tmp_path / "run", rounds=2, rewind_epochs=1)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in log if record["event"] == "epoch"]
    assert [record["phase"] for record in epochs] == ["search"] * 4 + ["final"] * 3
    assert [record["density"] for record in epochs] == [1.0] * 4 + [net.density] * 3
    assert [entry["phase"] for entry in result.trace] == ["search", "search", "final"]
    assert [entry["val_accuracy"] for entry in result.trace] == [epochs[i]["val_accuracy"] for i in (1, 3, 6)]
    assert [entry["nnz"] for entry in result.trace[1:]] == [net.nnz] * 2
    assert 0 < result.trace[0]["density"] < 1
    # the whole schedule in each round and in the final training
    assert epochs[0]["lr"] == epochs[2]["lr"]
    assert epochs[-1]["lr"] < 0.1 * QUICK.lr
    # a search costs as much as dense training
    assert 4 < result.dense_equivalent_epochs < 4 + 3


def test_a_network_may_lose_all_its_edges(tmp_path):
    net, result = run_continuous(tmp_path / "run", rounds=2, rewind_epochs=1, initial_mask=-2, penalty=1.0)
    assert (net.nnz, result.density) == (0, 0.0)
    assert all(not layer.parameter.any() for layer in net.layers.values())
    assert [entry["nnz"] for entry in result.trace] == [0, 0, 0]


CUTS = (
    [({"rounds": 2, "rewind_epochs": 0.5}, *at) for at in [(0, 2), (1, 0), (1, 5), (2, 0), (3, 3), (4, 0), (6, 4)]]
    + [({"rounds": 1, "rewind_epochs": 1.5}, 1, 5), ({"rounds": 2, "rewind_epochs": 0, "density": 0.3}, 4, 2)]
    + [({"mode": "prune"}, *at) for at in [(1, 1), (2, 0), (3, 3)]]
)


@pytest.mark.parametrize(("options", "epoch", "step"), some(CUTS, lambda cut: cut in CUTS[::4]))
def test_a_run_that_is_interrupted_and_resumed_ends_as_one_that_was_not(tmp_path, monkeypatch, options, epoch, step):
    """Rounds of two epochs, then three."""
    net, whole = run_continuous(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch, step)
        with pytest.raises(KeyboardInterrupt):
            run_continuous(tmp_path / "parts", **options)
    again, resumed = run_continuous(tmp_path / "parts", resume=True, **options)
    assert resumed == whole
    assert content_digest(dict(again.state_dict())) == content_digest(dict(net.state_dict()))
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))
    assert all("gate" not in vars(layer) for layer in again.layers.values())


def test_a_state_is_plain_values_and_of_its_network_alone(tmp_path):
    run, method = begin()
    train_stage(run, method)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content_digest(state) == content_digest(method.state_dict())
    again = methods.create("continuous")
    again.begin(session())
    again.load_state_dict(state)
    assert content_digest(again.state_dict()) == content_digest(state)
    other = methods.create("continuous")
    other.begin(session(fresh_net()))
    with pytest.raises(CheckpointError, match="network with other layers"):
        other.load_state_dict(state)


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initial_mask": 11}, "`initial_mask` = 11.0 is out of range; allowed: [-10, 10]"),
        ({"penalty": -1}, "`penalty` = -1.0 is out of range; allowed: [0, inf)"),
        ({"final_temperature": 0.5}, "`final_temperature` = 0.5 is out of range; allowed: [1, inf)"),
        ({"rounds": 0}, "`rounds` = 0 is out of range; allowed: [1, inf)"),
        ({"search_epochs": 0}, "`search_epochs` = 0 is out of range; allowed: [1, inf)"),
        ({"mode": "both"}, "`mode` = 'both' is unknown; allowed: `ticket`, `prune`"),
        ({"density": 0}, "`density` = 0.0 is out of range; allowed: (0, 1]"),
        ({"finetune_lr": 0.2}, "`finetune_lr` = 0.2 has no effect with `mode` = 'ticket'; leave it at 0.1"),
        ({"mode": "prune", "rewind_epochs": 1}, "`rewind_epochs` = 1.0 has no effect with `mode` = 'prune'"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ConfigError) as caught:
        methods.create("continuous", **options)
    assert message in str(caught.value)


def test_what_does_not_fit_the_run_is_refused_before_anything_changes():
    run = session(epochs=5)
    before = content_digest(tensors(run.net))
    for options, message in (
        (
            {"search_epochs": 2},
            r"`rewind_epochs` = 2 is not before the end of a training of 2 epochs; allowed: \[0, 2\)",
        ),
        ({"density": 1e-5}, r"a density of 1e-05 is 0 of \d+ edges"),
    ):
        method = methods.create("continuous", **options)
        with pytest.raises(ConfigError, match=message):
            method.begin(run)
    assert content_digest(tensors(run.net)) == before
    assert all("gate" not in vars(layer) for layer in run.net.layers.values())
    empty = growfx.wrap(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3), exclude="*")
    with pytest.raises(ConfigError, match="no masks to choose: the network has no masked layer"):
        methods.create("continuous").begin(session(empty))
    with pytest.raises(ConfigError, match=r"`continuous` trains several times over; run it through growfx\.train"):
        method.attach(run.net, run.optimizer, total_steps=4, steps_per_epoch=2)
