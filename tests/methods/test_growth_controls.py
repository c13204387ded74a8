"""What growth methods differ in: which edges are new, by what, and what is given up for them."""

import numpy as np
import pytest
import torch
from error_facts import facts
from method_nets import OPTIMIZERS, small_net, train_steps
from scipy import stats
from torch.nn import functional as F

from growfx import methods, path_products
from growfx.analysis.weight_layout import joined_units
from growfx.errors import CheckpointError, ConfigError, GrowfxWarning
from growfx.methods.growth.grow_prune import droppable
from growfx.passes.path_products.products import path_gradients
from growfx.passes.seed import dead_units
from growfx.selection.edge_keys import EdgeKeys

GROWTH = ["grow-prune", "gradient-growth", "pwmpr", "random-growth"]


def attached(name: str, steps_per_epoch: int = 1, net=None, **options):
    net = small_net() if net is None else net
    optimizer = OPTIMIZERS["sgd"](net)
    method = methods.create(name, **{"epochs_per_round": 1, "seed_density": 0.1, **options})
    method.attach(net, optimizer, total_steps=10, steps_per_epoch=steps_per_epoch)
    return net, optimizer, method


def masks_of(net) -> dict[str, torch.Tensor]:
    return {name: layer.mask.clone() for name, layer in net.layers.items()}


def magnitudes_of(net) -> dict[str, torch.Tensor]:
    return {name: layer.parameter.detach().abs().clone() for name, layer in net.layers.items()}


def one_round(net, optimizer, method, steps: int = 2):
    """Train a round and report; masks and magnitudes before growth, and the new edges."""
    train_steps(net, optimizer, method, steps)
    before, magnitudes = masks_of(net), magnitudes_of(net)
    method.report(0.5)
    return before, magnitudes, {name: net.layers[name].mask & ~mask for name, mask in before.items()}


def test_all_growth_starts_from_the_same_seed_and_has_the_same_number_of_edges_each_round():
    counts, starts = set(), set()
    for name in GROWTH:
        net, optimizer, method = attached(name, max_density=0.4, seed=7)
        starts.add(net.mask_digest())
        for number in range(8):
            train_steps(net, optimizer, method, 1, number)
            method.report(0.3 + 0.01 * number)
        assert net.nnz == round(0.4 * net.numel)
        assert method.stop_reason
        counts.add(tuple(entry["nnz"] for entry in method.trace))
    assert len(starts) == len(counts) == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [("random-growth", {}), ("gradient-growth", {"draw": "top"}), ("gradient-growth", {"draw": "sampled"})],
)
def test_growth_by_the_clock_also_reaches_full_density(name, options):
    net, optimizer, method = attached(name, growth_ratio=4.0, **options)
    train_steps(net, optimizer, method, 8)
    assert net.nnz == net.numel
    assert method.stop_reason == "max_density"


@pytest.mark.slow
def test_growth_at_random_gives_every_absent_edge_the_same_chance():
    hits: dict[str, np.ndarray] = {}
    added = 0
    for seed in range(40):
        net, optimizer, method = attached("random-growth", seed_density=None, seed=seed)
        start = masks_of(net)
        _, _, new = one_round(net, optimizer, method, steps=1)
        added += sum(int(mask.sum()) for mask in new.values())
        for name, mask in new.items():
            both = np.array([int(mask.sum()), int((~start[name]).sum())])
            hits[name] = hits.get(name, 0) + both
    grown, absent = np.array(list(hits.values())).T
    expected = absent * grown.sum() / absent.sum()
    assert added == grown.sum() > 500
    # the draws of a run exclude each other, which makes the spread smaller than that of independent ones
    assert stats.chisquare(grown, expected).pvalue > 1e-3


def gradient_of_absent_edges(steps: int) -> dict[str, torch.Tensor]:
    """The gradient at step number `steps`, from weights alone: of a dense copy of the net of that moment."""
    net, optimizer, method = attached("gradient-growth", steps_per_epoch=steps)
    train_steps(net, optimizer, method, steps - 1)
    net.train()
    # the data of the last step, under weights that are leaves of their own
    noise = torch.Generator().manual_seed(steps - 1)
    images = torch.randn(8, 3, 8, 8, generator=noise)
    dense = small_net()
    dense.load_state_dict({k: v for k, v in net.state_dict().items() if not k.endswith(".mask")})
    dense.train()
    F.cross_entropy(dense(images), images.mean((1, 2, 3)).gt(0).long()).backward()
    return {name: layer.parameter.grad.abs() for name, layer in dense.layers.items()}


def test_gradient_growth_takes_the_absent_edges_of_largest_gradient_in_the_last_step_of_the_round():
    expected = gradient_of_absent_edges(3)
    net, optimizer, method = attached("gradient-growth", steps_per_epoch=3)
    before, _, new = one_round(net, optimizer, method, steps=3)
    count = sum(int(mask.sum()) for mask in new.values())
    rivals = torch.cat([expected[name][~mask] for name, mask in before.items()])
    limit = rivals.topk(count).values[-1]
    for name, mask in new.items():
        clear = (expected[name] - limit).abs() > 1e-6 * limit  # a sum in another order may swap the last two
        assert torch.equal(mask[clear], (~before[name] & (expected[name] > limit))[clear])
    assert count == round(1.3 * round(0.1 * net.numel)) - round(0.1 * net.numel)


def test_sampled_gradient_growth_prefers_large_gradients_but_is_not_the_largest():
    expected = gradient_of_absent_edges(3)
    net, optimizer, method = attached("gradient-growth", steps_per_epoch=3, draw="sampled")
    before, _, new = one_round(net, optimizer, method, steps=3)
    chosen = torch.cat([expected[name][mask] for name, mask in new.items()])
    rivals = torch.cat([expected[name][~mask] for name, mask in before.items()])
    assert chosen.mean() > 1.3 * rivals.mean()
    assert chosen.sum() < rivals.topk(len(chosen)).values.sum()


@pytest.mark.parametrize(("name", "dense_steps"), [("gradient-growth", [2, 5, 8]), ("pwmpr", []), ("grow-prune", [])])
def test_the_gradient_of_absent_edges_is_asked_for_in_the_last_step_of_a_round_alone(name, dense_steps):
    net, optimizer, method = attached(name, steps_per_epoch=3, max_density=0.2)
    asked = []
    for number in range(14):
        if method.needs_dense_gradient:
            asked.append(number)
        collecting = {layer.collects_gradient for layer in net.layers.values()}
        assert collecting == {method.needs_dense_gradient}
        train_steps(net, optimizer, method, 1, number)
        method.report(0.5)
    assert asked == dense_steps  # 0.1 -> 0.13 -> 0.169 -> 0.2; the last round does not grow


@pytest.mark.parametrize(("options", "grown"), [({}, [3, 4, 5, 6, 7]), ({"hold_every": 1}, [3, 5, 7])])
def test_rounds_of_one_step_that_nobody_reports_grow_by_the_gradient_of_that_step(options, grown, monkeypatch):
    net, optimizer, method = attached("gradient-growth", steps_per_epoch=1, seed_epochs=3, **options)
    found, choose = [], type(method)._grown

    def grow(own, growth, *rest):
        found.append(set(growth.gradients))
        return choose(own, growth, *rest)

    monkeypatch.setattr(type(method), "_grown", grow)
    changed = [number for number in range(8) if train_steps(net, optimizer, method, 1, number)[0]]
    assert changed == grown
    assert found == [set(net.layers)] * len(grown)


@pytest.mark.parametrize("draw", ["top", "sampled"])
@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_without_a_usable_gradient_a_round_still_has_its_edges(draw, value):
    net, optimizer, method = attached("gradient-growth", steps_per_epoch=2, draw=draw)
    train_steps(net, optimizer, method, 2)
    for gradient in method._attachment.state.gradients.values():
        gradient.fill_(value)
    method.report(0.5)
    assert net.nnz == round(1.3 * round(0.1 * net.numel))


def test_a_gradient_that_awaits_the_report_is_resumed(tmp_path):
    ends = []
    for cut in (False, True):
        net, optimizer, method = attached("gradient-growth", steps_per_epoch=3)
        train_steps(net, optimizer, method, 3)
        if cut:
            torch.save([net.state_dict(), optimizer.state_dict(), method.state_dict()], tmp_path / "state.pt")
            net, optimizer, method = attached("gradient-growth", steps_per_epoch=3, net=small_net(seed=5))
            parts = torch.load(tmp_path / "state.pt", weights_only=True)
            for part, state in zip((net, optimizer, method), parts, strict=True):
                part.load_state_dict(state)
        method.report(0.5)
        ends.append(net.mask_digest())
    assert ends[0] == ends[1]


def test_a_gradient_of_another_network_is_refused():
    net, optimizer, method = attached("gradient-growth")
    train_steps(net, optimizer, method, 1)
    state = method.state_dict()
    assert state["gradients"]
    state["gradients"]["head"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match=facts("gradient", "(2, 2)", "`head`")):
        method.load_state_dict(state)


def test_pwmpr_by_top_takes_the_largest_path_scores_and_never_a_score_of_zero():
    net, optimizer, method = attached("pwmpr", draw="top")
    train_steps(net, optimizer, method, 1)
    scores = path_products(net).scores
    before = masks_of(net)
    method.report(0.5)
    new = {name: net.layers[name].mask & ~mask for name, mask in before.items()}
    chosen = torch.cat([scores[name][mask] for name, mask in new.items()])
    left = torch.cat([scores[name][~before[name] & ~mask] for name, mask in new.items()])
    assert chosen.min() >= left.max()
    assert chosen.min() > 0


def test_pwmpr_by_top_stops_where_no_path_reaches_an_absent_edge():
    net, optimizer, method = attached("pwmpr", draw="top")
    train_steps(net, optimizer, method, 1)
    with torch.no_grad():
        head = net.layers["head"].parameter
        head.copy_(torch.where(torch.arange(16) == 0, 1.0, 0.0).expand(4, 16))
        net.layers["head"].mask[:, 0] = True
        # one unit alone leads to an output; edges into the others have no score
    for number in range(40):
        method.report(0.1 + 0.02 * number)
        if not method.growing:
            break
        method._attachment.state.steps = 1
    assert method.stop_reason == "no absent edge lies on a path"
    assert net.layers["head"].density == 1
    assert net.nnz < net.numel
    scores = path_products(net).scores
    assert not any(score[~net.layers[name].mask].any() for name, score in scores.items())


@pytest.mark.parametrize("draw", ["sampled", "top"])
@pytest.mark.parametrize("zero", ["head", "bn"])
def test_where_every_product_is_zero_paths_are_counted_and_it_is_told(zero, draw):
    net, optimizer, method = attached("pwmpr", draw=draw)
    train_steps(net, optimizer, method, 1)
    with torch.no_grad():
        (net.layers["head"].parameter if zero == "head" else net.bn.weight).zero_()
    before, nnz = masks_of(net), net.nnz
    with pytest.warns(GrowfxWarning, match="`head` are zero" if zero == "head" else "norm or learned scale") as told:
        method.report(0.5)
    assert len(told) == 1
    assert net.nnz == round(1.3 * nnz)
    counts = path_gradients(net, before, norm="identity", unit_scales=True).scores
    new = {name: net.layers[name].mask & ~mask for name, mask in before.items()}
    assert all((counts[name][mask] > 0).all() for name, mask in new.items())
    assert sum(bool(mask.any()) for mask in new.values()) > 1
    if draw == "top":
        chosen = torch.cat([counts[name][mask] for name, mask in new.items()])
        left = torch.cat([counts[name][~net.layers[name].mask] for name in new])
        assert chosen.min() >= left.max()


def test_a_head_that_starts_at_zero_gets_the_seed_of_connectivity():
    dead = {}
    for zero in (False, True):
        net = small_net()
        if zero:
            with torch.no_grad():
                net.layers["head"].parameter.zero_()
        method = methods.create("pwmpr", seed_density=0.2)
        method.attach(net, torch.optim.SGD(net.parameters(), 0.1), total_steps=8, steps_per_epoch=2)
        assert net.nnz == round(0.2 * net.numel)
        dead[zero] = dead_units(net, masks_of(net))
    assert dead == {False: 0, True: 0}


def test_an_exchange_gives_up_the_weakest_edges_and_ends_with_as_many_as_growth_alone():
    net, optimizer, method = attached("grow-prune", steps_per_epoch=3, seed_density=0.3, exchange_fraction=0.2)
    before, magnitudes, new = one_round(net, optimizer, method, steps=3)
    gone = {name: mask & ~net.layers[name].mask for name, mask in before.items()}
    count = sum(int(mask.sum()) for mask in gone.values())
    assert net.nnz == round(1.3 * round(0.3 * net.numel))
    assert method.trace[0]["exchanged"] == count > 0
    for name, mask in gone.items():
        assert int(mask.sum()) <= int(0.2 * before[name].sum())
        strongest_gone = magnitudes[name][mask].max() if mask.any() else 0
        free = before[name] & ~mask & (magnitudes[name] < strongest_gone)
        # weaker edges stay only where they are the strongest of a unit
        protected = strongest_by_hand(magnitudes[name], before[name])
        assert not (free & ~protected).any()
        assert not (mask & protected).any()
    assert all(not net.layers[name].parameter[mask].any() for name, mask in new.items())


def strongest_by_hand(magnitude: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """For layers laid out (out, in, ...): a loop over units."""
    protected = torch.zeros_like(mask)
    for axis in (0, 1):
        for unit in range(mask.shape[axis]):
            row, active = magnitude.select(axis, unit), mask.select(axis, unit)
            if active.any():
                best = torch.where(active, row, -1.0).argmax()
                protected.select(axis, unit)[np.unravel_index(int(best), row.shape)] = True
    return protected


def test_no_edge_is_given_up_in_the_round_it_was_born_nor_comes_back_in_the_round_it_went():
    net, optimizer, method = attached("grow-prune", exchange_fraction=0.5, growth_ratio=1.1)
    exchanged = 0
    for number in range(6):
        train_steps(net, optimizer, method, 1, number)
        before = masks_of(net)
        count = net.nnz
        method.report(0.5)
        new = {name: net.layers[name].mask & ~mask for name, mask in before.items()}
        gone = {name: mask & ~net.layers[name].mask for name, mask in before.items()}
        # every edge drawn is there, every edge given up is gone: the trace counts both
        assert sum(int(mask.sum()) for mask in gone.values()) == method.trace[-1]["exchanged"]
        assert sum(int(mask.sum()) for mask in new.values()) == net.nnz - count + method.trace[-1]["exchanged"]
        exchanged += method.trace[-1]["exchanged"]
    assert exchanged > 0


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_an_exchange_leaves_every_unit_that_had_an_edge_with_one(fraction):
    net, optimizer, method = attached("grow-prune", exchange_fraction=fraction, growth_ratio=1.05)
    for number in range(4):
        train_steps(net, optimizer, method, 1, number)
        before = masks_of(net)
        method.report(0.5)
        for name, layer in net.layers.items():
            for had, has in zip(joined_units(layer, before[name]), joined_units(layer, layer.mask), strict=True):
                assert not (had & ~has).any()


def test_near_full_density_an_exchange_gives_up_no_more_than_there_is_to_draw():
    net, optimizer, method = attached("grow-prune", seed_density=0.97, growth_ratio=1.02, exchange_fraction=0.5)
    one_round(net, optimizer, method, steps=1)
    total = round(1.02 * round(0.97 * net.numel))
    assert net.nnz == total
    assert method.trace[0]["exchanged"] == (net.numel - round(0.97 * net.numel)) - (total - round(0.97 * net.numel))


def test_what_may_be_given_up_is_a_part_of_the_present_edges():
    net = small_net()
    layer = net.layers["wide"]
    layer.mask.copy_(torch.rand(layer.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.3)
    with torch.no_grad():
        layer.parameter.fill_(0.5)  # all alike: the keys decide
    chosen = droppable("wide", layer, 0.1, EdgeKeys(1, "x"))
    assert int(chosen.sum()) == int(0.1 * layer.nnz)
    assert not (chosen & ~layer.mask).any()
    assert not torch.equal(chosen, droppable("wide", layer, 0.1, EdgeKeys(2, "x")))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pwmpr", {"draw": "best"}, facts("`draw`", "best", "`sampled`", "`top`")),
        ("gradient-growth", {"draw": "best"}, facts("`draw`", "best", "`sampled`", "`top`")),
        ("grow-prune", {"exchange_fraction": 0.0}, facts("`exchange_fraction`", 0.0)),
        ("grow-prune", {"exchange_fraction": 1.0}, facts("`exchange_fraction`", 1.0)),
        (
            "random-growth",
            {"seed_density": 0.5, "max_density": 0.2},
            facts("`seed_density`", 0.5, 0.2),
        ),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options, message):
    with pytest.raises(ConfigError, match=message):
        methods.create(name, **options)
