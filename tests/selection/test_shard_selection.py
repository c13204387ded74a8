"""Choosing among scores that are spread over ranks: the same edges as among whole ones."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from error_facts import facts
from torch import Tensor

from growfx.errors import ConfigError
from growfx.selection import sharded as shard_selection
from growfx.selection import whole as selection
from growfx.selection.edge_keys import EdgeKeys
from growfx.selection.sharded import Part

KEYS = EdgeKeys(3, "test")
SHAPES = {"b": (7, 11), "a": (3, 2, 2), "c": (1, 40), "d": (64, 9)}  # rows that 2, 3 and 5 ranks do not share evenly


class Ranks:
    """Threads that play ranks; counts the bytes that each gives away."""

    def __init__(self, count: int):
        self.count, self.bytes = count, 0
        self._barrier, self._said = threading.Barrier(count, timeout=30), [np.empty(0)] * count

    def run(self, job: Callable[["Rank"], object]) -> list:
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(job, [Rank(self, number) for number in range(self.count)]))

    def exchange(self, rank: int, values: np.ndarray) -> np.ndarray:
        self._said[rank] = values
        self._barrier.wait()
        found = np.stack(self._said)
        self._barrier.wait()
        self.bytes += values.nbytes if rank == 0 else 0
        return found


class Rank:
    def __init__(self, ranks: Ranks, rank: int):
        self.ranks, self.rank = ranks, rank

    def total(self, counts: np.ndarray) -> np.ndarray:
        return self.ranks.exchange(self.rank, counts).sum(0)

    def gather(self, values: np.ndarray) -> np.ndarray:
        return self.ranks.exchange(self.rank, values)


def parts_of(scores: dict[str, Tensor], allowed: dict[str, Tensor] | None, rank: int, count: int) -> list[Part]:
    parts = []
    for name in sorted(scores):
        rows = -(-len(scores[name]) // count)
        own = slice(rank * rows, (rank + 1) * rows)
        inner = scores[name][0].numel()
        may = None if allowed is None or name not in allowed else allowed[name][own].reshape(-1).numpy()
        start = min(rank * rows * inner, scores[name].numel())
        flat = scores[name][own].reshape(-1).numpy()
        parts.append(Part(name, scores[name].numel(), rows * inner, start, flat, may))
    return parts


def spread(choose: Callable, scores, k, allowed=None, count: int = 3, **options) -> dict[str, Tensor]:
    """What all ranks choose, which is the same."""
    found = Ranks(count).run(lambda rank: choose(parts_of(scores, allowed, rank.rank, count), k, KEYS, rank, **options))
    assert all(np.array_equal(of[name], found[0][name]) for of in found for name in scores)
    return {name: torch.from_numpy(found[0][name]).reshape(scores[name].shape) for name in scores}


def some(kind: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if kind == "ties":
        return {name: (score * 2).round() for name, score in scores.items()}
    if kind == "zeros":
        return {name: torch.zeros_like(score) * score.sign() for name, score in scores.items()}  # of both signs
    if kind == "float64":
        scores["b"] = scores["b"].double() * 1e-200
        scores["c"] = torch.full(SHAPES["c"], torch.inf)
    return scores


KINDS = ["float", "ties", "zeros", "float64"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_the_best_of_all_ranks_are_those_of_whole_scores(kind, count):
    for seed in range(3):
        scores = some(kind, seed)
        total = sum(score.numel() for score in scores.values())
        generator = torch.Generator().manual_seed(seed)
        allowed = {name: torch.rand(shape, generator=generator) < 0.7 for name, shape in SHAPES.items() if name != "b"}
        for k in (0, 1, total // 3, total - 1, total, total + 9):
            for may, largest in ((None, True), (allowed, True), (allowed, False)):
                whole = selection.top(scores, k, KEYS, may, largest=largest)
                found = spread(shard_selection.choose_top, scores, k, may, count, largest=largest)
                assert all(torch.equal(found[name], whole.masks[name]) for name in scores), (k, largest)


@pytest.mark.parametrize("kind", ["float", "ties", "zeros"])
def test_draws_over_ranks_are_those_of_whole_scores(kind):
    for seed in range(3):
        scores = {name: score.abs() for name, score in some(kind, seed).items()}
        scores["c"] = torch.full(SHAPES["c"], 1e-40)
        allowed = {"d": torch.rand(SHAPES["d"], generator=torch.Generator().manual_seed(seed)) < 0.5}
        for k in (0, 1, 200, 10_000):
            whole = selection.draw(scores, k, KEYS, allowed)
            found = spread(shard_selection.choose_drawn, scores, k, allowed)
            assert all(torch.equal(found[name], whole.masks[name]) for name in scores), k


def test_equal_keys_are_chosen_by_layer_and_index(monkeypatch):
    monkeypatch.setattr(EdgeKeys, "uniform", lambda self, layer, start, count: np.full(count, 0.5))
    scores = some("zeros", 0)
    for k in (5, 12, 60, 300):
        whole = selection.top(scores, k, KEYS)
        found = spread(shard_selection.choose_top, scores, k)
        assert all(torch.equal(found[name], whole.masks[name]) for name in scores)
        assert sum(int(mask.sum()) for mask in found.values()) == k


@pytest.mark.parametrize(
    ("choose", "value", "message"),
    [
        (shard_selection.choose_top, torch.nan, facts("NaN")),
        (shard_selection.choose_drawn, torch.nan, facts("`b`", 1)),
        (shard_selection.choose_drawn, -1.0, facts("`b`", 1)),
        (shard_selection.choose_drawn, torch.inf, facts("`b`", 1)),
    ],
)
def test_what_is_no_score_on_one_rank_is_an_error_on_every_rank(choose, value, message):
    scores = {name: score.abs() for name, score in some("float", 0).items()}
    scores["b"][6, 2] = value

    def refused(rank):
        with pytest.raises(ConfigError, match=message):
            choose(parts_of(scores, None, rank.rank, 3), 4, KEYS, rank)
        return True

    assert Ranks(3).run(refused) == [True] * 3
    with pytest.raises(ConfigError, match=facts(-1, "0")):
        choose([], -1, KEYS, Rank(Ranks(1), 0))


def test_scores_are_not_sent():
    scores = {"layer": torch.rand(400, 1000, generator=torch.Generator().manual_seed(1))}
    ranks = Ranks(2)
    ranks.run(lambda rank: shard_selection.choose_top(parts_of(scores, None, rank.rank, 2), 40_000, KEYS, rank))
    bits = 200 * 1000 / 8
    assert bits <= ranks.bytes < bits + 3 * 2048 * 8 + 257 * 8 + 100
    assert ranks.bytes < scores["layer"].numel() * 4 / 10
