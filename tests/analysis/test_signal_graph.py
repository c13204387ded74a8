"""Walks over signals against a plain recursion, and their cost where every unit is carried on and on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from growfx.analysis.signal_graph import Origin, Reach, SignalGraph


def none() -> np.ndarray:
    return np.zeros(0, np.int64)


@st.composite
def graphs(draw: st.DrawFn) -> SignalGraph:
    """Random signals in the order they arise, and layers with several signals at some columns and none at others."""
    size = draw(st.integers(2, 14))
    unit, left, right = (np.zeros(size, np.int64) for _ in range(3))
    members: dict[int, np.ndarray] = {}
    count = 0
    for signal in range(1, size):
        kind = draw(st.integers(0, 2)) if signal > 1 else 0
        if kind == 0:
            count += 1
            unit[signal] = count
        elif kind == 1:
            left[signal], right[signal] = draw(st.integers(1, signal - 1)), draw(st.integers(0, signal - 1))
        else:
            members[signal] = np.array(draw(st.lists(st.integers(1, signal - 1), min_size=1, max_size=4)))
    pairs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, size - 1)), max_size=8)
    drawn = {name: np.array(draw(pairs), np.int64).reshape(-1, 2) for name in "ab"}
    return SignalGraph(unit, left, right, members, {name: (found[:, 0], found[:, 1]) for name, found in drawn.items()})


def units_in(graph: SignalGraph, signal: int) -> set[int]:
    parts = [int(graph.left[signal]), int(graph.right[signal]), *graph.members.get(signal, none()).tolist()]
    own = {int(graph.unit[signal])} - {0}
    return own.union(*(units_in(graph, part) for part in parts if part))


def expected(graph: SignalGraph, layer: str) -> set[tuple[int, int]]:
    columns = zip(*(side.tolist() for side in graph.columns.get(layer, (none(), none()))), strict=True)
    return {(column, unit) for column, signal in columns for unit in units_in(graph, signal)}


@settings(max_examples=150, deadline=None)
@given(graphs(), st.data())
def test_pairs_reach_and_origin_are_what_a_recursion_finds(graph: SignalGraph, data: st.DataObject) -> None:
    total = int(graph.unit.max()) + 1
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)))
    chosen[0] = False
    columns = torch.tensor(data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))
    reach = Reach(graph, torch.zeros(total, dtype=torch.bool))
    for unit in chosen.nonzero().flatten().tolist():  # one after the other, as all at once
        reach.add(torch.tensor([unit]))
    origin, wanted = Origin(graph), set()
    for layer in "abc":
        pairs = expected(graph, layer)
        assert list(zip(*(side.tolist() for side in graph.pairs(layer)), strict=True)) == sorted(pairs)
        hit = {column for column, unit in pairs if chosen[unit]}
        for found in (reach, Reach(graph, chosen)):
            assert set(found.at(layer, 5).nonzero().flatten().tolist()) == hit
        fresh = {unit for column, unit in pairs if columns[column]} - wanted
        assert sorted(origin.add(layer, columns).tolist()) == sorted(fresh)
        wanted |= fresh
        assert set(origin.units().nonzero().flatten().tolist()) == wanted


@pytest.mark.parametrize("depth", [10, 2000])
def test_a_long_chain_of_sums_is_walked_once(depth: int) -> None:
    """Signal 2k is the sum of all units up to k: pairs of layers and units grow with the square of the depth."""
    size = 2 * depth + 2
    unit, left, right = (np.zeros(size, np.int64) for _ in range(3))
    unit[1] = 1
    for k in range(1, depth + 1):
        left[2 * k], right[2 * k] = 2 * k - 2 or 1, 2 * k - 1
        unit[2 * k + 1] = k + 1
    layers = {str(k): (np.zeros(1, np.int64), np.array([2 * k])) for k in range(1, depth + 1)}
    origin = Origin(SignalGraph(unit, left, right, {}, layers))
    new = [len(origin.add(name, torch.ones(1, dtype=torch.bool))) for name in layers]
    assert new == [1] * depth
