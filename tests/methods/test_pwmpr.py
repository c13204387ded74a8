"""PWMPR's rounds: the clock, growth, the stop and the way back."""

from itertools import pairwise

import pytest
import torch
from method_nets import OPTIMIZERS, small_net, train_steps

from growfx import methods
from growfx.errors import CheckpointError, ConfigError, GrowfxWarning
from growfx.methods.growth.pwmpr import PWMPR
from growfx.methods.growth.snapshots import Snapshot, next_nnz


def attached(optimizer_name: str = "sgd", steps_per_epoch: int = 1, **options):
    net = small_net()
    optimizer = OPTIMIZERS[optimizer_name](net)
    method = methods.create("pwmpr", **{"epochs_per_round": 1, "seed_density": 0.1, **options})
    assert isinstance(method, PWMPR)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=steps_per_epoch)
    return net, optimizer, method


def plateau_at(density: float) -> float:
    """An accuracy that saturates steeply in density."""
    return 0.9 - 0.4 / (1 + (density / 0.08) ** 4)


def grow(net, optimizer, method, accuracy, limit: int = 60) -> list[dict]:
    """One step and one report a round until growth stops; the networks' states by round."""
    states = []
    for number in range(limit):
        train_steps(net, optimizer, method, 1, number)
        states.append({name: value.clone() for name, value in net.state_dict().items()})
        method.report(accuracy(net.density), 0.001)
        if not method.growing:
            break
    return states


def test_rounds_are_30_percent_apart_and_new_edges_start_at_zero():
    net, optimizer, method = attached(steps_per_epoch=2)
    masks = {name: layer.mask.clone() for name, layer in net.layers.items()}
    nnz = net.nnz
    assert nnz == round(0.1 * net.numel)
    train_steps(net, optimizer, method, 2)
    kept = {name: layer.parameter.detach().clone() for name, layer in net.layers.items()}
    method.report(0.5)
    assert net.nnz == round(1.3 * nnz)
    for name, layer in net.layers.items():
        assert not (masks[name] & ~layer.mask).any()  # growth never removes
        assert torch.equal(layer.parameter.detach(), kept[name])  # nor changes a weight: new ones are zero
        assert not layer.parameter.detach()[layer.mask & ~masks[name]].any()
        momentum = optimizer.state[layer.parameter]["momentum_buffer"]
        assert not momentum[layer.mask & ~masks[name]].any()
        assert momentum[masks[name]].any()


def test_reports_within_a_round_do_not_count():
    net, optimizer, method = attached(steps_per_epoch=3)
    for number in range(3):
        method.report(0.5)
        assert method.trace == []
        train_steps(net, optimizer, method, 1, number)
    method.report(0.5)
    assert [entry["round"] for entry in method.trace] == [0]


def test_without_reports_growth_follows_the_clock_to_max_density():
    net, optimizer, method = attached(steps_per_epoch=2, max_density=0.2)
    changed = train_steps(net, optimizer, method, 12)
    assert changed == [False, False, True, False, True, False, True, *[False] * 5]
    assert net.nnz == round(0.2 * net.numel)
    assert (method.growing, method.stop_reason) == (False, "max_density")
    assert [entry["val_accuracy"] for entry in method.trace] == [None] * 4


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_at_the_plateau_growth_stops_and_the_operating_round_is_put_back_whole(optimizer_name):
    net, optimizer, method = attached(optimizer_name)
    states = grow(net, optimizer, method, plateau_at)
    assert method.stop_reason == "plateau"
    back = method.operating_round
    assert back is not None
    assert back < len(states) - 1
    assert back == method.trace[-1]["fit"]["operating_round"]
    assert net.density == method.trace[back]["density"]
    now = net.state_dict()
    assert all(torch.equal(now[name], value) for name, value in states[back].items())
    assert not optimizer.state
    assert plateau_at(1.0) - plateau_at(net.density) < 0.005
    assert method.step() is False
    method.report(0.1)
    assert len(method.trace) == len(states)


def test_the_seed_may_be_trained_for_longer_than_the_other_rounds():
    net, optimizer, method = attached(steps_per_epoch=2, seed_epochs=3, max_density=0.2)
    # by the clock: grown in the first step after six steps, then in every second one
    changed = train_steps(net, optimizer, method, 12)
    assert [number for number, grown in enumerate(changed) if grown] == [6, 8, 10]
    net, optimizer, method = attached(steps_per_epoch=2, seed_epochs=3)
    for number in range(6):
        method.report(0.5)
        assert method.trace == []
        train_steps(net, optimizer, method, 1, number)
    method.report(0.5)
    train_steps(net, optimizer, method, 2)
    method.report(0.5)
    assert [entry["round"] for entry in method.trace] == [0, 1]


def test_adaptive_rounds_train_the_seed_for_as_long_as_the_final_training():
    # ten steps are said to be the final training
    net, optimizer, method = attached(steps_per_epoch=2, growth_rounds="adaptive", max_density=0.2)
    changed = train_steps(net, optimizer, method, 16)
    assert [number for number, grown in enumerate(changed) if grown] == [10, 12, 14]
    with pytest.warns(GrowfxWarning, match="`growth_rounds` = 'adaptive' has no effect beside `seed_epochs`"):
        net, optimizer, method = attached(steps_per_epoch=2, growth_rounds="adaptive", seed_epochs=2, max_density=0.2)
    changed = train_steps(net, optimizer, method, 10)
    assert [number for number, grown in enumerate(changed) if grown] == [4, 6, 8]


def test_published_rounds_are_alike_and_those_of_other_loops_unless_others_are_asked_for():
    for options in ({}, {"growth_rounds": "published"}):
        net, optimizer, method = attached(steps_per_epoch=2, max_density=0.2, **options)
        changed = train_steps(net, optimizer, method, 8)
        assert [number for number, grown in enumerate(changed) if grown] == [2, 4, 6]
    with pytest.raises(ConfigError, match="`growth_rounds`"):
        attached(growth_rounds="long")


def test_an_adaptive_first_round_is_resumed_at_its_length():
    net, optimizer, method = attached(steps_per_epoch=2, growth_rounds="adaptive", max_density=0.2)
    train_steps(net, optimizer, method, 6)
    method.load_state_dict(method.state_dict())
    changed = train_steps(net, optimizer, method, 8, 6)
    assert [number for number, grown in enumerate(changed) if grown] == [4, 6]


def test_held_rounds_add_no_edges_and_are_marked():
    net, optimizer, method = attached(steps_per_epoch=2, seed_epochs=3, hold_every=2, max_density=0.3)
    counts = []
    for number in range(30):
        train_steps(net, optimizer, method, 1, number)
        method.report(0.5)
        counts.append(net.nnz)
        if not method.growing:
            break
    entries = method.trace
    assert [entry["held"] for entry in entries] == [n > 0 and n % 3 == 0 for n in range(len(entries))]
    assert [entry["epochs"] for entry in entries] == [3 + n for n in range(len(entries))]
    for before, entry in pairwise(entries):
        assert (entry["nnz"] == before["nnz"]) == entry["held"]
    assert entries[-1]["nnz"] == round(0.3 * net.numel)
    assert not entries[-1]["held"]


def test_a_held_round_reads_no_dense_gradient_beforehand_and_is_resumed():
    net = small_net()
    optimizer = OPTIMIZERS["sgd"](net)
    method = methods.create("gradient-growth", epochs_per_round=1, seed_density=0.1, hold_every=1, max_density=0.9)
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
    needed = []
    for number in range(12):
        needed.append(method.needs_dense_gradient)
        if number == 7:
            method.load_state_dict(method.state_dict())
        train_steps(net, optimizer, method, 1, number)
    assert [number for number, needs in enumerate(needed) if needs] == [1, 5, 9]
    assert [entry["held"] for entry in method.trace] == [False, False, True, False, True]


def test_rounds_from_before_some_were_held_count_in_the_fit_with_their_time():
    net, optimizer, method = attached(seed_epochs=3)
    grow(net, optimizer, method, lambda density: 0.5 + density / 10, limit=7)
    state = method.state_dict()
    assert all("epochs" not in entry for entry in state["trace"])
    method = methods.create("pwmpr", epochs_per_round=1, seed_epochs=3, hold_every=1, masks="given")
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=1)
    method.load_state_dict(state)
    before = len(method.trace)
    grow(net, optimizer, method, lambda density: 0.6 + 0.01 * len(method.trace), limit=2)
    assert len(method.trace) == before + 2
    assert method.trace[-1]["held"]
    assert method.trace[-1]["nnz"] == method.trace[-2]["nnz"]
    assert method.trace[-1]["fit"]["time"] > 0


@pytest.mark.parametrize("optimizer_name", sorted(OPTIMIZERS))
def test_initial_weights_are_put_back_under_the_grown_masks(optimizer_name):
    initial = small_net().state_dict()
    net, optimizer, method = attached(optimizer_name, final_weights="initial")
    states = grow(net, optimizer, method, plateau_at)
    assert method.stop_reason == "plateau"
    assert method.operating_round is not None
    wanted = states[method.operating_round]
    for name, value in net.state_dict().items():
        if name.endswith(".mask"):
            assert torch.equal(value, wanted[name])
        elif f"{name.removesuffix('weight')}mask" in wanted and name.endswith("weight"):
            assert torch.equal(value, torch.where(wanted[name.removesuffix("weight") + "mask"], initial[name], 0.0))
        else:
            assert torch.equal(value, initial[name])
    assert not optimizer.state


def test_initial_weights_survive_a_state_dict():
    net, optimizer, method = attached(final_weights="initial")
    train_steps(net, optimizer, method, 1)
    state, weights = method.state_dict(), net.state_dict()
    other, its_optimizer, resumed = attached(final_weights="initial")
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for net_, optimizer_, method_ in ((net, optimizer, method), (other, its_optimizer, resumed)):
        grow(net_, optimizer_, method_, lambda density: 0.5)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in other.state_dict().items())
    state["origin"] = {name: value[:1] for name, value in state["origin"].items() if value.dim()}
    with pytest.raises(CheckpointError, match="initial weights"):
        attached(final_weights="initial")[2].load_state_dict(state)


def test_a_curve_that_keeps_rising_has_no_plateau_and_stays_at_max_density():
    net, optimizer, method = attached(max_density=0.6)
    grow(net, optimizer, method, lambda density: 0.2 + 0.6 * density)
    assert method.stop_reason == "no plateau below max_density"
    assert net.nnz == round(0.6 * net.numel)
    assert method.operating_round == len(method.trace) - 1


def test_the_trace_holds_density_fit_and_dead_units_of_each_round():
    net, optimizer, method = attached()
    grow(net, optimizer, method, plateau_at)
    assert [entry["fit"] is None for entry in method.trace[:5]] == [True] * 4 + [False]
    assert method.trace[0]["nnz"] == round(0.1 * net.numel)
    assert all(entry["dead_units"] == 0 and entry["off_path"] == 0 for entry in method.trace)
    assert method.trace[-1]["fit"]["stop"]
    assert method.trace[-1]["fit"]["gain"] < 0.003


def test_rounds_far_below_the_plateau_are_not_kept():
    net, optimizer, method = attached()
    for number in range(7):
        train_steps(net, optimizer, method, 1, number)
        method.report(0.2 + 0.6 * net.density, 0.001)
    assert method.growing
    kept = {int(number) for number in method.state_dict()["snapshots"]}
    assert len(method.trace) - 1 in kept
    assert 0 not in kept


def test_a_snapshot_is_exact_and_about_as_large_as_the_active_weights():
    net, optimizer, _ = attached()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    kept = Snapshot.from_state(Snapshot.take(net).state_dict(), net)
    net.set_masks({name: torch.ones_like(layer.mask) for name, layer in net.layers.items()})
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.ones_like(tensor))
    kept.restore(net, optimizer)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert sum(value.numel() for value in kept.active.values()) == net.nnz
    assert sum(value.numel() for value in kept.masks.values()) <= net.numel / 8 + len(net.layers)


def test_the_state_of_another_network_is_refused():
    _, _, method = attached()
    state = method.state_dict()
    net = small_net()
    state["snapshots"] = {"0": Snapshot.take(net).state_dict()}
    state["snapshots"]["0"]["masks"].pop("head")
    with pytest.raises(CheckpointError, match="network with other layers"):
        method.load_state_dict(state)


def test_next_nnz_grows_by_at_least_one_and_never_past_the_limit():
    assert next_nnz(100, 1000, 1.3, 1.0) == 130
    assert next_nnz(1, 1000, 1.3, 1.0) == 2
    assert next_nnz(900, 1000, 1.3, 0.95) == 950
    assert next_nnz(950, 1000, 1.3, 0.95) == 950


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed_density": 0.0}, "`seed_density`"),
        ({"growth_ratio": 1.0}, "`growth_ratio`"),
        ({"epochs_per_round": 0}, "`epochs_per_round`"),
        ({"epochs_per_round": None}, "`epochs_per_round`"),
        ({"max_density": 1.2}, "`max_density`"),
        ({"hold_every": -1}, "`hold_every`"),
        ({"tolerance": 0.0}, "`tolerance`"),
        ({"norm": "batch"}, r"`norm`.*`fold`, `identity`"),
        ({"seed_density": 0.5, "max_density": 0.2}, r"`seed_density` 0\.5 is above `max_density` 0\.2"),
    ],
)
def test_options_out_of_range_are_refused_by_name(options, message):
    with pytest.raises(ConfigError, match=message):
        methods.create("pwmpr", **options)
