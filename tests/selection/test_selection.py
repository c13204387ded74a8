"""Exact selection: counts, the law of the draw, independence of how the work is cut."""

import itertools
import math

import numpy as np
import pytest
import torch
from error_facts import facts
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from growfx.errors import ConfigError
from growfx.selection import whole as whole_scores
from growfx.selection.choose import draw, top
from growfx.selection.edge_keys import EdgeKeys


def example_layers(seed: int = 0, spread: float = 2.0) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"stem": (8, 3, 3, 3), "body.0": (40, 50), "body.1": (7, 11, 3), "head": (10, 33)}
    return {name: torch.exp(spread * torch.randn(shape, generator=noise)).double() for name, shape in shapes.items()}


def picked(masks: dict[str, torch.Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def probability_of_set(scores: list[float], chosen: tuple[int, ...]) -> float:
    """Sum the probabilities of drawing `chosen` one after another, in every order."""
    total = 0.0
    for order in itertools.permutations(chosen):
        left, probability = sum(scores), 1.0
        for edge in order:
            probability *= scores[edge] / left
            left -= scores[edge]
        total += probability
    return total


def test_a_draw_follows_sequential_sampling_without_replacement():
    scores = [5.0, 1.0, 0.3, 2.0, 0.05, 3.0]
    layers = {"b": torch.tensor(scores[:2]), "a": torch.tensor(scores[2:]).reshape(2, 2)}
    draws, counts = 6000, dict.fromkeys(itertools.combinations(range(6), 3), 0)
    for number in range(draws):
        masks = draw(layers, 3, EdgeKeys(11, str(number))).masks
        flat = torch.cat([masks["b"], masks["a"].reshape(-1)])
        counts[tuple(flat.nonzero().reshape(-1).tolist())] += 1
    expected = [draws * probability_of_set(scores, chosen) for chosen in counts]
    assert sum(expected) == pytest.approx(draws)
    # sets too rare for chi-square are pooled
    rare = [number for number, value in enumerate(expected) if value < 8]
    observed = [value for number, value in enumerate(counts.values()) if number not in rare]
    wanted = [value for number, value in enumerate(expected) if number not in rare]
    observed.append(draws - sum(observed))
    wanted.append(draws - sum(wanted))
    assert chisquare(observed, wanted).pvalue > 0.001


def test_the_deadline_does_not_change_who_wins():
    """The k smallest of all arrival times, computed without any deadline, are the same edges."""
    layers = example_layers(spread=4.0)
    keys = EdgeKeys(3, "race")
    times = {name: -np.log1p(-keys.uniform(name, 0, t.numel())) / t.reshape(-1).numpy() for name, t in layers.items()}
    pooled = np.sort(np.concatenate(list(times.values())))
    for k in (1, 5, 100, 1500, len(pooled) - 1):
        masks = draw(layers, k, keys).masks
        assert all(np.array_equal(masks[name].reshape(-1).numpy(), times[name] <= pooled[k - 1]) for name in layers)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3000), st.integers(1, 700), st.integers(0, 5))
def test_counts_are_exact_and_chunks_and_layer_order_change_nothing(k, chunk, seed):
    layers = example_layers(seed)
    layers["stem"][0] = 0.0
    for choose, in_chunks in ((draw, whole_scores.draw), (top, whole_scores.top)):
        whole = choose(layers, k, EdgeKeys(seed, "s"))
        cut = in_chunks(dict(reversed(list(layers.items()))), k, EdgeKeys(seed, "s"), None, chunk=chunk)
        candidates = sum(t.numel() for t in layers.values()) - (27 if choose is draw else 0)
        assert picked(whole.masks) == whole.count == cut.count == min(k, candidates)
        assert all(torch.equal(whole.masks[name], cut.masks[name]) for name in layers)
        assert all(whole.masks[name].shape == layers[name].shape for name in layers)


def test_a_layers_numbers_are_the_same_read_whole_or_from_any_edge_on():
    keys = EdgeKeys(9, "round 4")
    whole = keys.uniform("layer", 0, 1000)
    for start, count in ((0, 1), (1, 7), (2, 3), (3, 500), (4, 4), (997, 3)):
        assert np.array_equal(keys.uniform("layer", start, count), whole[start : start + count])
    assert ((whole > 0) & (whole < 1)).all()
    assert not np.array_equal(whole, keys.uniform("other", 0, 1000))
    assert not np.array_equal(whole, EdgeKeys(9, "round 5").uniform("layer", 0, 1000))


def test_a_score_of_zero_is_never_drawn_and_a_shortage_is_told():
    layers = {"a": torch.tensor([0.0, 1e-300, 0.0, 5.0]), "b": torch.zeros(3)}
    layers["a"] = layers["a"].double()
    layers["a"][1] = 1e-300
    drawn = draw(layers, 6, EdgeKeys(0, "s"))
    assert (drawn.count, drawn.asked) == (2, 6)
    assert drawn.masks["a"].tolist() == [False, True, False, True]
    assert not drawn.masks["b"].any()


def test_only_allowed_edges_are_chosen():
    layers = example_layers()
    allowed = {name: torch.arange(t.numel()).reshape(t.shape) % 3 == 0 for name, t in layers.items() if name != "head"}
    for choose in (draw, top):
        chosen = choose(layers, 700, EdgeKeys(1, "s"), allowed)
        assert picked(chosen.masks) == 700
        assert not any((chosen.masks[name] & ~allowed[name]).any() for name in allowed)
        everything = choose(layers, 10**6, EdgeKeys(1, "s"), allowed)
        assert everything.count == sum(int(m.sum()) for m in allowed.values()) + layers["head"].numel()


def test_top_takes_the_largest_or_smallest_whatever_the_seed_when_there_are_no_ties():
    layers = example_layers()
    pooled = torch.cat([t.reshape(-1) for t in layers.values()]).sort().values
    high = top(layers, 50, EdgeKeys(0, "s")).masks
    low = top(layers, 50, EdgeKeys(1, "s"), largest=False).masks
    assert all(torch.equal(high[name], t >= pooled[-50]) for name, t in layers.items())
    assert all(torch.equal(low[name], t <= pooled[49]) for name, t in layers.items())


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("kind", ["scattered", "sample unlike the rest", "few values", "sorted"])
def test_top_of_many_scores_is_that_of_sorting_all(kind, largest):
    size = 150_001  # beyond what is looked at to guess bounds
    noise = torch.Generator().manual_seed(5)
    scores = torch.randn(size, generator=noise)
    if kind == "sample unlike the rest":
        scores[:: size // (1 << 15)] += 100
    elif kind == "few values":
        scores = scores.round()
    elif kind == "sorted":
        scores = scores.sort().values
    near = scores[:1000].double() * (1 + 1e-9)  # told from its neighbours in double precision alone
    allowed = {"a": torch.rand(size, generator=noise) < 0.7}
    pool = torch.cat([scores[allowed["a"]].double(), near]).sort(descending=largest).values
    for k in (1, 7, 1000, 60_000, len(pool) - 1, len(pool)):
        chosen = top({"a": scores, "b": near}, k, EdgeKeys(0, "s"), allowed, largest=largest)
        values = torch.cat([scores[chosen.masks["a"]].double(), near[chosen.masks["b"]]])
        assert not (chosen.masks["a"] & ~allowed["a"]).any()
        assert torch.equal(values.sort(descending=largest).values, pool[:k])


def test_ties_are_broken_evenly_by_the_seed():
    layers = {"a": torch.tensor([1.0, 2.0, 1.0]), "b": torch.tensor([1.0, -math.inf, 1.0])}
    seen = torch.zeros(4)
    for seed in range(1000):
        masks = top(layers, 3, EdgeKeys(seed, "s")).masks
        assert masks["a"][1]
        assert not masks["b"][1]
        seen += torch.stack([masks["a"][0], masks["a"][2], masks["b"][0], masks["b"][2]])
    assert chisquare(seen.numpy()).pvalue > 0.001


def test_half_precision_scores_are_chosen_by_their_exact_values():
    scores = {"w": torch.tensor([0.5, 0.25, 4.0, 2.0], dtype=torch.bfloat16)}
    assert top(scores, 2, EdgeKeys(0, "s")).masks["w"].tolist() == [False, False, True, True]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_scores_that_are_no_weights_are_refused_by_layer_name(bad):
    with pytest.raises(ConfigError, match=facts("conv")):
        draw({"conv": torch.tensor([1.0, bad, 2.0])}, 1, EdgeKeys(0, "s"))


@pytest.mark.parametrize("choose", [draw, top])
def test_of_no_layers_nothing_is_chosen_and_wrong_types_are_refused_by_class(choose):
    keys = EdgeKeys(0, "s")
    assert (choose({}, 1, keys).count, choose({}, 1, keys).asked, choose({}, 0, keys).masks) == (0, 1, {})
    assert choose({"conv": torch.ones(3)}, np.int64(2), keys).count == 2
    for scores, count, own, message in (
        ([1.0], 1, keys, "got list"),
        ({"conv": [1.0]}, 1, keys, "tensors"),
        ({"conv": torch.ones(3)}, 1, 7, "`keys`.*got int"),
        ({"conv": torch.ones(3)}, 1.5, keys, r"is 1\.5; allowed is 0 or more"),
        ({"conv": torch.ones(3)}, True, keys, "is True"),
    ):
        with pytest.raises(ConfigError, match=message):
            choose(scores, count, own)


def test_bad_arguments_of_a_selection_are_refused():
    layers = {"conv": torch.ones(3)}
    with pytest.raises(ConfigError, match=facts(-1, "0")):
        draw(layers, -1, EdgeKeys(0, "s"))
    with pytest.raises(ConfigError, match="NaN"):
        top({"conv": torch.tensor([1.0, math.nan])}, 1, EdgeKeys(0, "s"))
    with pytest.raises(ConfigError, match=facts("`allowed`", "conv", "(3,)")):
        top(layers, 1, EdgeKeys(0, "s"), {"conv": torch.ones(4, dtype=torch.bool)})
