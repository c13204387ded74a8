"""Cohorts: when edges were grown, and how those of each round fare."""

import pytest
import torch
from method_nets import OPTIMIZERS, small_net, train_steps

from growfx import methods
from growfx.errors import CheckpointError
from growfx.methods.growth.newborn import newest_cohorts


def attached(name="pwmpr", net=None, **options):
    net = small_net() if net is None else net
    optimizer = OPTIMIZERS["sgd"](net)
    method = methods.create(name, **{"epochs_per_round": 1, "seed_density": 0.1, **options})
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=2)
    return net, optimizer, method


@pytest.mark.parametrize("name", ["pwmpr", "grow-prune"])
def test_cohorts_are_what_masks_and_weights_say(name):
    net, optimizer, method = attached(name)
    born = {n: torch.where(x.mask, 0, -1) for n, x in net.layers.items()}
    sizes = [net.nnz]
    for number in range(4):
        train_steps(net, optimizer, method, 2, number)
        weights = {n: x.parameter.detach().abs().clone() for n, x in net.layers.items()}
        before = {n: x.mask.clone() for n, x in net.layers.items()}
        method.report(0.5, 0.01)
        cohorts = method.trace[-1]["cohorts"]
        assert [c["born"] for c in cohorts] == list(range(number + 1))
        assert [c["age"] for c in cohorts] == list(range(number, -1, -1))
        for cohort in cohorts:
            alive = {n: before[n] & (born[n] == cohort["born"]) for n in born}
            count = sum(int(mask.sum()) for mask in alive.values())
            assert cohort["edges"] == count
            assert cohort["survival"] == pytest.approx(count / sizes[cohort["born"]])
            mean = sum(float(weights[n][alive[n]].double().sum()) for n in alive) / count
            assert cohort["magnitude"] == pytest.approx(mean, rel=1e-5)
        for n, layer in net.layers.items():
            born[n][layer.mask & ~before[n]] = number + 1
            born[n][~layer.mask] = -1
        sizes.append(sum(int((value == number + 1).sum()) for value in born.values()))


def test_gradient_shares_are_of_the_last_step_of_the_round():
    net, optimizer, method = attached()
    train_steps(net, optimizer, method, 2)
    method.report(0.5)
    mask = {n: x.mask.clone() for n, x in net.layers.items()}
    old = {n: method._attachment.state.births.born[n] == 0 for n in mask}
    seen = {}

    def watched(*_):
        seen.update({n: x.parameter.grad.abs().double().clone() for n, x in net.layers.items()})

    optimizer.register_step_post_hook(watched)
    train_steps(net, optimizer, method, 2, 1)
    method.report(0.5)
    total = sum(float(value.sum()) for value in seen.values())
    of_seed = sum(float(value[mask[n] & old[n]].sum()) for n, value in seen.items())
    shares = [cohort["gradient_share"] for cohort in method.trace[1]["cohorts"]]
    assert 0 < of_seed < total
    assert shares == pytest.approx([of_seed / total, 1 - of_seed / total], rel=1e-4)


def test_growth_alone_loses_no_edge():
    net, optimizer, method = attached(max_density=0.2)
    train_steps(net, optimizer, method, 12)
    assert not method.growing
    assert {c["survival"] for entry in method.trace for c in entry["cohorts"]} == {1.0}
    assert sum(c["edges"] for c in method.trace[-1]["cohorts"]) == net.nnz


def test_cohorts_are_resumed_and_those_of_another_network_refused():
    ends = []
    for cut in (False, True):
        net, optimizer, method = attached("grow-prune")
        for number in range(2):
            train_steps(net, optimizer, method, 2, number)
            if cut:  # before the report, which needs the gradients of the last step
                parts = (net.state_dict(), optimizer.state_dict(), method.state_dict())
                net, optimizer, method = attached("grow-prune", small_net(seed=7))
                for part, state in zip((net, optimizer, method), parts, strict=True):
                    part.load_state_dict(state)
            method.report(0.5, 0.01)
        ends.append(method.trace)
    assert ends[0] == ends[1]
    state = method.state_dict()
    state["births"] = {**state["births"], "born": {"other": torch.zeros(2, dtype=torch.int16)}}
    with pytest.raises(CheckpointError, match="births"):
        method.load_state_dict(state)


def test_the_state_of_a_version_without_cohorts_is_continued():
    net, optimizer, method = attached()
    train_steps(net, optimizer, method, 2)
    state = {k: v for k, v in method.state_dict().items() if k not in ("births", "cohort_gradients", "first_epochs")}
    method.load_state_dict(state)
    method.report(0.5, 0.01)
    train_steps(net, optimizer, method, 2, 1)
    method.report(0.5, 0.01)
    assert [c["born"] for c in method.trace[-1]["cohorts"]] == [0, 1]


def test_a_held_round_has_no_newborn_edges():
    net, optimizer, method = attached(hold_every=1)
    for number in range(4):
        train_steps(net, optimizer, method, 2, number)
        method.report(0.5, 0.01)
    assert [entry["held"] for entry in method.trace] == [False, False, True, False]
    assert [[c["edges"] > 0 for c in entry["cohorts"]] for entry in method.trace[1:]] == [
        [True, True],
        [True, True],  # those of round 1, a round older
        [True, True, False, True],
    ]
    assert [row["round"] for row in newest_cohorts(method.trace)] == [1, 3]
