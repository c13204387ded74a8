"""Exact exchange of edges, sharing out of growth, and schedules."""

import math

import numpy as np
import pytest
import torch
from error_facts import facts
from hypothesis import given, settings
from hypothesis import strategies as st

from growfx.errors import ConfigError
from growfx.methods.stepwise.exchange import (
    apportion,
    drop_to,
    exchange,
    finite_magnitudes,
    grow_to,
    keep_largest,
    mean_of_active,
)
from growfx.methods.stepwise.schedules import Clock, Ramp, anneal, step_at
from growfx.selection.edge_keys import EdgeKeys

KINDS = ("distinct", "zero", "ties", "infinite")


def scores_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "ties":
        return torch.randint(0, 3, shape, generator=generator).float()
    values = torch.rand(shape, generator=generator)
    return torch.where(values < 0.3, math.inf, values) if kind == "infinite" else values


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_an_exchange_has_exactly_the_counts_asked_for_whatever_the_scores(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    shapes = {name: tuple(data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))) for name in ("a", "b.c")}
    kinds = {side: data.draw(st.sampled_from(KINDS)) for side in ("drop", "grow")}
    masks = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in shapes.items()}
    drop, grow = ({n: scores_of(kinds[side], s, generator) for n, s in shapes.items()} for side in ("drop", "grow"))
    keep = {name: data.draw(st.integers(0, int(mask.sum()))) for name, mask in masks.items()}
    target = {name: data.draw(st.integers(keep[name], mask.numel())) for name, mask in masks.items()}
    for growth in (grow, None):
        new = exchange(masks, keep, target, drop, growth, 3, "test")
        assert {name: int(mask.sum()) for name, mask in new.items()} == target
        kept = drop_to(masks, keep, drop, EdgeKeys(3, "drop test"))
        assert all((kept[name] <= masks[name]).all() for name in masks)
        assert all((kept[name] <= new[name]).all() for name in masks)


def test_an_exchange_is_the_sorting_one_would_do_by_hand():
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(6, 7, generator=generator) < 0.5
    drop, grow = torch.rand(6, 7, generator=generator), torch.rand(6, 7, generator=generator)
    active = int(mask.sum())
    new = exchange({"w": mask}, {"w": active - 5}, {"w": active + 2}, {"w": drop}, {"w": grow}, 0, "")["w"]
    present = sorted(np.flatnonzero(mask), key=lambda i: float(drop.reshape(-1)[i]))[5:]
    absent = sorted(set(range(42)) - set(present), key=lambda i: -float(grow.reshape(-1)[i]))[:7]
    assert set(np.flatnonzero(new).tolist()) == {int(i) for i in [*present, *absent]}


def test_an_edge_just_dropped_may_grow_again():
    mask, worth = torch.tensor([True, True, True, False]), torch.tensor([3.0, 1.0, 2.0, 0.0])
    back = exchange({"w": mask}, {"w": 2}, {"w": 3}, {"w": worth}, {"w": torch.tensor([0.0, 9.0, 0.0, 1.0])}, 0, "")
    assert back["w"].tolist() == mask.tolist()


def test_random_growth_gives_every_absent_edge_the_same_chance():
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[0] = True
    grown = torch.zeros(4, 5)
    for seed in range(1500):
        grown += grow_to({"w": mask}, {"w": 8}, None, EdgeKeys(seed, "grow"))["w"]
    assert (grown[0] == 1500).all()
    # 3 of 15 edges in each of 1500 draws: 300 times, standard deviation 15.5
    assert (grown[1:] - 300).abs().max() < 4.5 * 15.5


@pytest.mark.parametrize("grow", ["random", "ties"])
def test_a_choice_depends_on_seed_names_and_scores_alone(grow):
    generator = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(9, 9, generator=generator) < 0.4 for name in ("x", "y", "z")}
    flat = None if grow == "random" else {name: torch.ones(9, 9) for name in masks}
    drop = {name: torch.zeros(9, 9) for name in masks}
    keep = {name: int(mask.sum()) // 2 for name, mask in masks.items()}
    target = {name: int(mask.sum()) for name, mask in masks.items()}
    whole = exchange(masks, keep, target, drop, flat, 5, "s")
    torch.manual_seed(99)
    backwards = exchange(dict(reversed(masks.items())), keep, target, drop, flat, 5, "s")
    alone = exchange({"y": masks["y"]}, keep, target, drop, flat, 5, "s")
    assert all(torch.equal(whole[name], backwards[name]) for name in masks)
    assert torch.equal(whole["y"], alone["y"])
    for seed, stream in ((6, "s"), (5, "t")):
        assert not torch.equal(whole["y"], exchange(masks, keep, target, drop, flat, seed, stream)["y"])
    assert not torch.equal(whole["x"], whole["y"])
    # where nothing is dropped growth alone differs
    active = {name: int(mask.sum()) for name, mask in masks.items()}
    more = {name: count + 9 for name, count in active.items()}
    grown = [exchange(masks, active, more, drop, flat, seed, "s")["y"] for seed in (5, 6)]
    assert not torch.equal(*grown)


def test_counts_a_layer_cannot_have_are_refused():
    mask = {"w": torch.tensor([True, False, False])}
    for count in (-1, 2):
        with pytest.raises(ValueError, match=facts("`w`", 1, count)):
            drop_to(mask, {"w": count}, mask, EdgeKeys(0, ""))
    for count in (0, 4):
        with pytest.raises(ValueError, match=facts("`w`", 1, 3, count)):
            grow_to(mask, {"w": count}, None, EdgeKeys(0, ""))


layers = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.integers(0, 40), st.one_of(st.just(0.0), st.floats(1e-12, 1e12))),
    min_size=1,
    max_size=7,
)


@settings(max_examples=300, deadline=None)
@given(layers, st.floats(0, 1))
def test_shares_are_exact_in_sum_within_capacity_and_proportional_where_there_is_room(layers, fill):
    capacity = {name: room for name, (room, _) in layers.items()}
    weights = {name: weight for name, (_, weight) in layers.items()}
    total = int(fill * sum(capacity.values()))
    counts = apportion(total, weights, capacity)
    assert sum(counts.values()) == total
    assert all(0 <= counts[name] <= capacity[name] for name in layers)
    assert apportion(total, weights, dict(reversed(capacity.items()))) == counts
    # one factor fits all: counts are `factor * weight` to within one edge, or full
    low = max((counts[n] - 1) / weights[n] for n in layers if weights[n]) if any(weights.values()) else 0.0
    highs = [(counts[n] + 1) / weights[n] for n in layers if weights[n] and counts[n] < capacity[n]]
    assert low <= min(highs, default=math.inf) * (1 + 1e-9)
    if any(counts[n] for n in layers if not weights[n]):
        assert all(counts[n] == capacity[n] for n in layers if weights[n])


def test_growth_that_overflows_a_layer_goes_to_the_others_by_their_shares():
    # 60 edges by 10:3:2 would be 40, 12, 8; the first layer takes 20 and leaves 40 to be shared 3:2
    assert apportion(60, {"a": 10.0, "b": 3.0, "c": 2.0}, {"a": 20, "b": 100, "c": 100}) == {"a": 20, "b": 24, "c": 16}
    assert apportion(7, {"a": 1.0, "b": 1.0}, {"a": 9, "b": 9}) == {"a": 4, "b": 3}
    assert apportion(6, {"a": 0.0, "b": 0.0}, {"a": 10, "b": 20}) == {"a": 2, "b": 4}
    with pytest.raises(ValueError, match=facts(8, 7)):
        apportion(8, {"a": 1.0, "b": 1.0}, {"a": 3, "b": 4})


@pytest.mark.parametrize("spread", ["global", "uniform", "erk"])
def test_the_largest_are_kept_over_the_network_or_layer_by_layer(spread):
    generator = torch.Generator().manual_seed(4)
    masks = {"a": torch.ones(10, 10, dtype=torch.bool), "b": torch.rand(20, 15, generator=generator) < 0.3}
    scores = {"a": torch.rand(10, 10, generator=generator), "b": 3 * torch.rand(20, 15, generator=generator)}
    kept = keep_largest(masks, 60, scores, spread, EdgeKeys(0, ""))
    counts = {name: int(mask.sum()) for name, mask in kept.items()}
    assert sum(counts.values()) == 60
    for name, mask in masks.items():
        assert (kept[name] <= mask).all()
        assert scores[name][kept[name]].min() > scores[name][mask & ~kept[name]].max()
    if spread == "global":
        lowest = min(float(scores[n][kept[n]].min()) for n in masks)
        assert lowest > max(float(scores[n][masks[n] & ~kept[n]].max()) for n in masks)
    else:  # 0.15 of all; by ERK a share of 20/100 against 35/300, times sizes 100 and 300: 20 to 35
        assert counts == ({"a": 15, "b": 45} if spread == "uniform" else {"a": 22, "b": 38})


def test_sharing_among_layers_never_asks_a_layer_for_more_than_it_has():
    masks = {"a": torch.zeros(10, 10, dtype=torch.bool), "b": torch.ones(10, 10, dtype=torch.bool)}
    masks["a"][0, :3] = True
    kept = keep_largest(masks, 40, {n: torch.rand(10, 10) for n in masks}, "uniform", EdgeKeys(0, ""))
    assert {name: int(mask.sum()) for name, mask in kept.items()} == {"a": 3, "b": 37}


def test_a_layers_importance_is_the_mean_magnitude_of_its_edges():
    values = {"a": torch.tensor([1.0, -3.0, 100.0]), "b": torch.tensor([5.0])}
    masks = {"a": torch.tensor([True, True, False]), "b": torch.tensor([False])}
    assert mean_of_active(values, masks) == {"a": 2.0, "b": 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_seen(bad):
    values = {"a": torch.tensor([-1.0, 2.0]), "b": torch.tensor([0.0, bad])}
    assert finite_magnitudes(values) is None
    with pytest.raises(ConfigError, match=facts("weights", "`b`", "finite", "learning rate")):
        finite_magnitudes(values, "weights")
    assert finite_magnitudes({"a": values["a"]})["a"].tolist() == [1.0, 2.0]


# -- schedules ----------------------------------------------------------------------------------------------------


def test_rates_decay_as_published():
    assert [anneal("cosine", 0.4, done) for done in (0, 0.5, 1)] == pytest.approx([0.4, 0.2, 0.0])
    assert anneal("cosine", 0.3, 1 / 3) == pytest.approx(0.3 / 2 * (1 + math.cos(math.pi / 3)))
    assert anneal("linear", 0.4, 0.25) == pytest.approx(0.3)
    assert anneal("constant", 0.4, 0.99) == 0.4
    assert [anneal("cosine", 0.5, done, 0.005) for done in (0, 1, 1.5)] == pytest.approx([0.5, 0.005, 0.005])


def test_a_clock_ticks_every_so_many_steps_and_stops_before_its_end():
    for total, until, every in ((40, 0.75, 10), (10, 0.7, 7), (10, 1.0, 5), (9, 1.0, 5), (3, 0.5, 100), (1, 1.0, 1)):
        clock = Clock.until(until, total, every)
        ticks = [step for step in range(total + 3) if clock.due(step)]
        assert ticks == [step for step in range(1, total) if step % every == 0 and step * 1000 < total * until * 1000]
        assert clock.last == max(ticks, default=0)


@pytest.mark.parametrize("total", [1, 2, 5, 10, 37])
@pytest.mark.parametrize("every", [1, 4, 1000])
def test_a_ramp_ends_exactly_once_at_exactly_its_density(total, every):
    ramp = Ramp(round(0.1 * total), step_at(0.8, total), every)
    due = [step for step in range(1, total + 1) if ramp.due(step)]
    assert due[-1] == ramp.end
    densities = [ramp.density(step, 1.0, 0.07) for step in range(total + 1)]
    assert [step for step in due if densities[step] == 0.07] == [ramp.end]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] == 1.0


def test_a_ramp_is_the_cubic_of_zhu_and_gupta():
    sparsity = [1 - Ramp(700, 65918, 100).density(step, 1.0, 0.1) for step in (700, 33309, 49613)]
    # s_f + (s_i - s_f) (1 - (t - t0) / (T - t0)) ** 3 with s_i = 0, s_f = 0.9, at progress 0, 0.5 and 0.75
    assert sparsity == pytest.approx([0.0, 0.9 * (1 - 0.5**3), 0.9 * (1 - 0.25**3)], abs=1e-4)


@pytest.mark.parametrize(("fraction", "total", "step"), [(0.5, 10, 5), (0.0, 10, 1), (0.01, 10, 1), (1.0, 3, 3)])
def test_a_fraction_of_a_training_is_one_of_its_steps(fraction, total, step):
    assert step_at(fraction, total) == step
