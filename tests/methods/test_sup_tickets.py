"""Sup-tickets: the phases of a run, what is averaged and how, and that a run can be resumed."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from artifact_nets import Tied
from breadth import representative, some
from method_nets import small_net
from staged_runs import STEPS, batches, session, tensors, train_stage, train_step
from torch import nn
from training_nets import QUICK, final_state, fresh_net, interrupt_at, loaders

import growfx
from growfx import methods
from growfx.errors import CheckpointError, ConfigError
from growfx.methods.staged.norm_statistics import reestimate_norms
from growfx.methods.staged.sup_tickets import join
from growfx.runs.checkpoint import content_digest
from growfx.training.evaluation import evaluate
from growfx.training.start import train

EXPLORING = ("granet", "mest", "rigl", "rigl-sg", "rigl-sm", "set", "snfs")


def begin(epochs: int = 4, net=None, **options):
    run = session(net, epochs)
    method = methods.create("sup-tickets", **{"density": 0.3, "tickets": 2, "cycle_epochs": 1, **options})
    method.begin(run)
    return run, method


# -- averages -----------------------------------------------------------------------------------------------------


def test_an_average_of_equal_tickets_is_that_ticket_to_the_bit():
    ticket = {"weight": torch.randn(50) * 10.0 ** torch.randint(-30, 30, (50,)), "count": torch.tensor(7)}
    ticket["bias"] = torch.tensor([-math.inf, 0.1, math.inf])
    average = ticket
    for number in range(2, 9):
        average = join(average, ticket, number)
        assert all(torch.equal(average[name], value) for name, value in ticket.items())


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_ticket_has_the_same_weight_and_counters_are_those_of_the_last(count):
    tickets = [{"weight": torch.randn(20), "count": torch.tensor(n), "mask": torch.rand(3) < 0.5} for n in range(count)]
    average = tickets[0]
    for number, ticket in enumerate(tickets[1:], start=2):
        average = join(average, ticket, number)
    expected = torch.stack([ticket["weight"].double() for ticket in tickets]).mean(0)
    assert torch.allclose(average["weight"].double(), expected, atol=1e-6)
    assert int(average["count"]) == count - 1
    assert torch.equal(average["mask"], tickets[-1]["mask"])


def test_an_average_shares_no_memory_with_what_it_came_from_and_is_wide_enough():
    one = {"weight": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(1)}
    two = {"weight": torch.full((3,), 1.0078125, dtype=torch.bfloat16), "count": torch.tensor(2)}
    average = join(one, two, 2)
    assert average["weight"].tolist() == [1.00390625] * 3  # half a step of bfloat16
    for value in (*one.values(), *two.values()):
        value.fill_(5)
    assert average["weight"].tolist() == [1.00390625] * 3
    assert int(average["count"]) == 2


def expected_average(tickets: list[dict[str, torch.Tensor]], layers: list[str], edges: int) -> dict[str, torch.Tensor]:
    """Tickets averaged one by one, each average pruned by global magnitude, in float64."""
    average = {name: value.double().numpy().copy() for name, value in tickets[0].items()}
    for number, ticket in enumerate(tickets[1:], start=1):
        for name in average:
            average[name] = average[name] * number / (number + 1) + ticket[name].double().numpy() / (number + 1)
        magnitudes = np.concatenate([np.abs(average[f"{layer}.weight"]).ravel() for layer in layers])
        limit = np.sort(magnitudes)[::-1][edges - 1]
        for layer in layers:
            weight = average[f"{layer}.weight"]
            weight[np.abs(weight) < limit] = 0
    return {name: torch.from_numpy(np.asarray(value)) for name, value in average.items()}


@pytest.mark.parametrize("base", ["rigl", "static"])
def test_the_run_ends_as_the_pruned_average_of_its_tickets_with_norm_statistics_of_its_own(base):
    run, method = begin(base=base, epochs=5, tickets=3)
    net, tickets = run.net, []
    while method.next_stage() is not None:
        stage = train_stage(run, method)
        tickets.append(tensors(net))
        method.end_stage(stage)
        if method.next_stage() is not None:
            # training goes on from the ticket
            assert content_digest(tensors(net)) == content_digest(tickets[-1])
    assert len(tickets) == 4
    edges = round(0.3 * net.numel)
    assert net.nnz == edges
    net.verify()
    expected = expected_average(tickets, list(net.layers), edges)
    for name, value in tensors(net).items():
        layer = name.removesuffix(".mask")
        if name.endswith(".mask"):
            assert torch.equal(value, expected[f"{layer}.weight"] != 0)
        elif "running" not in name and "num_batches" not in name:
            assert torch.allclose(value.double(), expected[name], atol=1e-6), name
    clone = copy.deepcopy(net)
    clone.get_submodule("bn").reset_running_stats()
    reestimate_norms(clone, batches())
    assert content_digest(tensors(clone)) == content_digest(tensors(net))
    assert not torch.allclose(net.get_submodule("bn").running_mean.double(), expected["bn.running_mean"], atol=1e-3)
    assert run.optimizer.state_dict()["state"] == {}


def test_the_average_never_shares_memory_with_the_network():
    run, method = begin(base="static")
    kept = None
    while method.next_stage() is not None:
        stage = train_stage(run, method)
        if kept is not None:
            assert content_digest(method.state_dict()["memory"]["average"]) == content_digest(kept)
        method.end_stage(stage)
        kept = method.state_dict()["memory"]["average"]
    assert kept is None  # it is the network now


def test_tickets_that_are_equal_give_that_ticket():
    run, method = begin(base="set", explore_fraction=0)
    before = tensors(run.net)
    while (stage := method.next_stage()) is not None:
        method.end_stage(stage)
    after = tensors(run.net)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked"}


def test_tied_weights_are_averaged_once():
    net = growfx.wrap(Tied(), torch.randn(2, 3, 8, 8))
    _, method = begin(net=net, base="static")
    tickets = []
    while (stage := method.next_stage()) is not None:
        with torch.no_grad():
            for layer in net.layers.values():
                layer.parameter.add_(torch.randn(layer.mask.shape) * layer.mask)
        net.settle()
        tickets.append(net.layers["first"].parameter.detach().clone())
        method.end_stage(stage)
    mask = net.layers["first"].mask
    assert torch.allclose(net.layers["first"].parameter[mask], torch.stack(tickets).mean(0)[mask], atol=1e-6)
    state = net.state_dict()
    assert torch.equal(state["first.weight"], state["second.weight"])
    assert torch.equal(state["first.mask"], state["second.mask"])
    assert net.nnz == round(0.3 * net.numel)


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
    run, method = begin(net=net, density=0.4)
    while method.next_stage() is not None:
        method.end_stage(train_stage(run, method))
    assert torch.equal(net.layers["table"].mask, kept)
    assert net.nnz == round(0.4 * net.numel)


# -- phases -------------------------------------------------------------------------------------------------------


def test_the_first_phase_is_the_base_method_in_so_many_epochs():
    run, method = begin(base="rigl", epochs=6, update_every=2, seed=5)
    train_stage(run, method)
    alone = session(epochs=4)
    base = methods.create("rigl", density=0.3, update_every=2, seed=5)
    base.begin(alone)
    train_stage(alone, base)
    assert content_digest(tensors(alone.net)) == content_digest(tensors(run.net))


def test_a_tenth_of_the_run_is_for_the_cycles_and_their_rate_is_a_triangle():
    """As published for CIFAR: 226 epochs, then three times 8, from 0.001 to 0.005 where the run has 0.1."""
    _, method = begin(epochs=250, tickets=3, cycle_epochs=None)
    stages = []
    while (stage := method.next_stage()) is not None:
        stages.append(stage)
        if stage.kind == "base":
            base = method._attachment.state.memory["base"]
            assert base._attachment.state.total_steps == 226 * STEPS
        method.end_stage(stage)
    assert [(stage.kind, stage.epochs, stage.number) for stage in stages] == [
        ("base", 226, 0),
        ("cycle", 8, 0),
        ("cycle", 8, 1),
        ("final", 8, 0),
    ]
    assert (stages[0].low, stages[0].peak) == (None, 1.0)
    assert all((stage.low, stage.peak) == (0.01, 0.05) for stage in stages[1:])
    assert begin(epochs=30, tickets=3, cycle_epochs=None)[1].next_stage().epochs == 27


@pytest.mark.parametrize("base", some(EXPLORING, representative))
def test_a_cycle_exchanges_many_edges_after_its_first_step_and_none_later(base):
    run, method = begin(base=base, tickets=3, epochs=5, explore_fraction=0.4, update_every=1)
    net = run.net
    method.end_stage(train_stage(run, method))
    edges = round(0.3 * net.numel)
    for _ in range(3):
        stage = method.next_stage()
        before = {name: layer.mask.clone() for name, layer in net.layers.items()}
        assert method.needs_dense_gradient == (base not in ("set", "mest"))
        assert train_step(run, method, 0)
        assert not method.needs_dense_gradient
        assert not any(layer.collects_gradient for layer in net.layers.values())
        moved = {name: int((before[name] & ~layer.mask).sum()) for name, layer in net.layers.items()}
        assert net.nnz == edges
        net.verify()
        # at most the fraction of each layer, as some come back at once
        if base != "mest":
            assert all(count <= math.ceil(0.4 * int(before[name].sum())) for name, count in moved.items())
        assert sum(moved.values()) > 0.05 * edges
        digest = net.mask_digest()
        for number in range(1, STEPS):
            assert not train_step(run, method, number)
        assert net.mask_digest() == digest
        method.report(0.5)
        method.end_stage(stage)
    assert method.next_stage() is None


@pytest.mark.filterwarnings("ignore:.* steps has no update:growfx.GrowfxWarning")
def test_exploration_drops_the_smallest_by_the_rate_asked_for_whatever_the_bases_own_rate_is():
    run, method = begin(base="set", drop_fraction=0.01, explore_fraction=0.5)
    method.end_stage(train_stage(run, method))
    masks = {name: layer.mask.clone() for name, layer in run.net.layers.items()}
    magnitudes = {name: layer.parameter.detach().abs() for name, layer in run.net.layers.items()}
    assert method.step()
    dropped = 0
    for name, layer in run.net.layers.items():
        count = int(masks[name].sum())
        largest = magnitudes[name][masks[name]].sort(descending=True).values[: count - count // 2]
        stayed = masks[name] & layer.mask
        assert int((magnitudes[name][stayed] >= largest.min()).sum()) == len(largest)
        dropped += count - int(stayed.sum())
    # some of the half grow again at once, as many as are drawn at random
    assert 0.2 * run.net.nnz < dropped < 0.5 * run.net.nnz


def test_exploration_of_another_seed_or_another_cycle_draws_other_edges():
    def drawn(seed: int) -> list[dict[str, torch.Tensor]]:
        run, method = begin(base="set", seed=seed, explore_fraction=1.0, epochs=5, tickets=2)
        found = []
        while (stage := method.next_stage()) is not None:
            method.step()
            found.append({name: layer.mask.clone() for name, layer in run.net.layers.items()})
            method.end_stage(stage)
        return found

    one, same, other = drawn(1), drawn(1), drawn(2)
    assert all(torch.equal(a[name], b[name]) for a, b in zip(one, same, strict=True) for name in a)
    for name in ("block", "wide"):
        assert not torch.equal(one[1][name], one[2][name])
        assert not torch.equal(one[1][name], other[1][name])


@pytest.mark.parametrize(("base", "options"), [("static", {}), ("gmp", {}), ("rigl", {"explore_fraction": 0})])
def test_masks_stay_in_the_cycles_where_nothing_is_to_be_explored(base, options):
    run, method = begin(base=base, **options)
    method.end_stage(train_stage(run, method))
    before = run.net.mask_digest()
    assert run.net.nnz == round(0.3 * run.net.numel)
    assert not method.needs_dense_gradient
    train_stage(run, method)
    assert run.net.mask_digest() == before


def test_the_trace_has_one_entry_a_ticket():
    run, method = begin(base="set", update_every=2)
    while method.next_stage() is not None:
        stage = train_stage(run, method, accuracy=0.7)
        assert json.loads(json.dumps(method.trace)) == method.trace
        method.end_stage(stage)
    trace = method.trace
    assert [(entry["round"], entry["phase"]) for entry in trace] == [(0, "base"), (1, "cycle"), (2, "cycle")]
    assert all(entry["nnz"] == round(0.3 * run.net.numel) for entry in trace)
    assert [entry["val_accuracy"] for entry in trace] == [0.7] * 3
    explored = [entry["exploration"] for entry in trace]
    assert 0.3 < explored[0] < explored[1] < explored[2] <= 1
    assert (method.growing, method.stop_reason) == (False, "")


# -- in a run -----------------------------------------------------------------------------------------------------


def run_sup(path, resume=False, **options):
    train_loader, val_loader = loaders()
    torch.manual_seed(len(str(path)))  # what came before the run must not matter
    net = fresh_net()
    chosen = {"density": 0.3, "tickets": 2, "cycle_epochs": 2, "update_every": 2, **options}
    method = methods.create("sup-tickets", **chosen)
    given = {"method": method, "options": QUICK, "epochs": 6, "progress": False}
    return net, train(net, train_loader, val_loader, out=path, resume=resume, **given)


def test_the_accuracy_of_the_run_is_that_of_the_average(tmp_path):
    net, result = run_sup(tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    epochs = [record for record in log if record["event"] == "epoch"]
    assert [record["phase"] for record in epochs] == ["base"] * 2 + ["cycle"] * 2 + ["final"] * 2
    rates = [record["lr"] / QUICK.lr for record in epochs[2:]]
    assert rates[0] == rates[2]
    assert rates[1] == rates[3]
    assert all(0.01 <= rate <= 0.05 for rate in rates)
    assert (result.epochs, result.nnz) == (6, net.nnz)
    assert net.nnz == round(0.3 * net.numel)
    assert result.val_accuracy == evaluate(net, loaders()[1], "cpu").accuracy
    assert [record["val_accuracy"] for record in log if record["event"] == "replaced"] == [result.val_accuracy]
    assert [entry["val_accuracy"] for entry in result.trace] == [epochs[i]["val_accuracy"] for i in (1, 3, 5)]


CUTS = [("rigl", *at) for at in [(0, 3), (2, 0), (2, 1), (3, 2), (4, 0), (5, 5)]] + [
    ("snfs", 1, 4),
    ("snfs", 2, 1),
    ("set", 2, 3),
    ("granet", 4, 2),
    ("snip", 3, 0),
]


@pytest.mark.parametrize(("base", "epoch", "step"), some(CUTS, lambda cut: cut in CUTS[::4]))
def test_a_run_that_is_interrupted_and_resumed_ends_as_one_that_was_not(tmp_path, monkeypatch, base, epoch, step):
    """Two epochs of the base, two cycles of two."""
    options = {"base": base, **({"update_every": None} if base == "snip" else {})}
    net, whole = run_sup(tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        interrupt_at(patch, epoch, step)
        with pytest.raises(KeyboardInterrupt):
            run_sup(tmp_path / "parts", **options)
    again, resumed = run_sup(tmp_path / "parts", resume=True, **options)
    assert resumed == whole
    assert content_digest(dict(again.state_dict())) == content_digest(dict(net.state_dict()))
    assert content_digest(final_state(tmp_path / "parts")) == content_digest(final_state(tmp_path / "whole"))


def test_a_state_is_plain_values_and_of_its_network_alone(tmp_path):
    run, method = begin()
    method.end_stage(train_stage(run, method))
    torch.save(method.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert content_digest(state) == content_digest(method.state_dict())
    again, other = (methods.create("sup-tickets", density=0.3, tickets=2, cycle_epochs=1) for _ in range(2))
    again.begin(session(epochs=4))
    again.load_state_dict(state)
    assert content_digest(again.state_dict()) == content_digest(state)
    other.begin(session(fresh_net(), epochs=4))
    with pytest.raises(CheckpointError, match="network with other layers"):
        other.load_state_dict(state)


# -- options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "rigle"}, "method `rigle` is unknown"),
        ({"base": "pwmpr"}, "`base` = 'pwmpr' does not work step by step towards a density; allowed: `acdc`, `gmp`"),
        ({"base": "sup-tickets"}, "`base` = 'sup-tickets' does not work step by step"),
        ({"base": "static", "drop_fraction": 0.2}, "`drop_fraction` has no effect with `base` = 'static'"),
        ({"base": "gmp", "distribution": "erk"}, "`distribution` has no effect with `base` = 'gmp'"),
        ({"base": "gmp", "explore_fraction": 0.5}, "`explore_fraction` = 0.5 has no effect with `base` = 'gmp'"),
        ({"distribution": "even"}, "`distribution` = 'even' is unknown; allowed: `erk`"),
        ({"density": 0}, "`density` = 0.0 is out of range; allowed: (0, 1]"),
        ({"tickets": 0}, "`tickets` = 0 is out of range"),
        ({"cycle_epochs": 0}, "`cycle_epochs` = 0 is out of range"),
        ({"cycle_low": 0.1}, "`cycle_low` = 0.1 is above `cycle_peak` = 0.05"),
        ({"explore_fraction": 1.5}, "`explore_fraction` = 1.5 is out of range; allowed: [0, 1]"),
    ],
)
def test_options_that_cannot_be_are_refused_by_name(options, message):
    with pytest.raises(ConfigError) as caught:
        methods.create("sup-tickets", **options)
    assert message in str(caught.value)


def test_cycles_longer_than_the_run_are_refused_before_anything_changes():
    run = session(epochs=6)
    method = methods.create("sup-tickets", tickets=3, cycle_epochs=2)
    message = r"`tickets` = 3 cycles of `cycle_epochs` = 2 are 6 of the run's 6 epochs; allowed are fewer"
    with pytest.raises(ConfigError, match=message):
        method.begin(run)
    assert content_digest(tensors(run.net)) == content_digest(tensors(small_net()))
    with pytest.raises(ConfigError, match=r"method `sup-tickets` is not attached; run it through growfx\.train"):
        method.step()
    with pytest.raises(ConfigError, match=r"trains in cycles at the end and averages them; run it through growfx\."):
        method.attach(run.net, run.optimizer, total_steps=4, steps_per_epoch=2)
