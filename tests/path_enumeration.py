"""An independent reference for path products: a graph of scalar units whose paths are listed one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import growfx

Unit = int
Grid = dict[tuple[int, ...], Unit]  # position in a tensor -> unit


@dataclass
class UnitGraph:
    """Edges between scalar units; an edge may belong to a position of a layer's weight."""

    incoming: dict[Unit, list[tuple[Unit, float, tuple[str, tuple[int, ...]] | None]]] = field(default_factory=dict)
    fresh: itertools.count[int] = field(default_factory=itertools.count)

    def units(self, shape: Sequence[int]) -> Grid:
        return {index: next(self.fresh) for index in itertools.product(*map(range, shape))}

    def edge(self, source: Unit, target: Unit, weight: float, label: Any = None) -> None:
        self.incoming.setdefault(target, []).append((source, float(weight), label))

    def paths(self, unit: Unit) -> Iterator[list[tuple[float, Any]]]:
        """Every path from an input to `unit`, as its edges' weights and labels."""
        if unit not in self.incoming:
            yield []
        for source, weight, label in self.incoming.get(unit, ()):
            for path in self.paths(source):
                yield [*path, (weight, label)]

    def mean(self, grid: Grid) -> float:
        """Mean over units of the sums of their path products."""
        sums = (math.prod(weight for weight, _ in path) for unit in grid.values() for path in self.paths(unit))
        return sum(sums) / len(grid)

    def scores(self, outputs: Iterable[Unit]) -> tuple[dict[Any, float], float]:
        """Per label the sum over paths of the product of the other edges; and the sum of all products."""
        scores: dict[Any, float] = {}
        total = 0.0
        for unit in outputs:
            for path in self.paths(unit):
                total += math.prod(weight for weight, _ in path)
                for position, (_, label) in enumerate(path):
                    if label is not None:
                        others = (weight for other, (weight, _) in enumerate(path) if other != position)
                        scores[label] = scores.get(label, 0.0) + math.prod(others)
        return scores, total

    # Layers, spelled out

    def linear(self, grid: Grid, name: str, weight: Tensor) -> Grid:
        """Over the last axis."""
        rows, columns = weight.shape
        leading = sorted({index[:-1] for index in grid})
        result = {(*index, row): next(self.fresh) for index in leading for row in range(rows)}
        for (*index, row), unit in result.items():
            for column in range(columns):
                self.edge(grid[(*index, column)], unit, weight[row, column], (name, (row, column)))
        return result

    def conv(self, grid: Grid, name: str, weight: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Grid:
        """Two-dimensional, on (channel, row, column)."""
        height, width = (max(index[axis] for index in grid) + 1 for axis in (1, 2))
        outs, per_group, side, _ = weight.shape
        rows, columns = ((size + 2 * padding - side) // stride + 1 for size in (height, width))
        result = self.units((outs, rows, columns))
        for (out, row, column), unit in result.items():
            group = out // (outs // groups)
            for inner, down, right in itertools.product(range(per_group), range(side), range(side)):
                place = group * per_group + inner, row * stride + down - padding, column * stride + right - padding
                if place in grid:
                    self.edge(grid[place], unit, weight[out, inner, down, right], (name, (out, inner, down, right)))
        return result

    def scale(self, grid: Grid, factors: Tensor | float, axis: int = 0) -> Grid:
        """Each unit times the factor of its index along `axis`."""
        result = {index: next(self.fresh) for index in grid}
        for index, unit in result.items():
            self.edge(grid[index], unit, factors if isinstance(factors, float) else factors[index[axis]])
        return result

    def add(self, *grids: Grid) -> Grid:
        result = {index: next(self.fresh) for index in grids[0]}
        for grid in grids:
            for index, unit in result.items():
                self.edge(grid[index], unit, 1.0)
        return result

    def average(self, grid: Grid, axes: Sequence[int], keep: bool = False) -> Grid:
        groups: dict[tuple[int, ...], list[Unit]] = {}
        for index, unit in grid.items():
            place = tuple(0 if axis in axes else at for axis, at in enumerate(index) if keep or axis not in axes)
            groups.setdefault(place, []).append(unit)
        result = {index: next(self.fresh) for index in groups}
        for index, members in groups.items():
            for member in members:
                self.edge(member, result[index], 1 / len(members))
        return result

    def product(self, left: Grid, right: Grid, left_bounded: bool = False, right_bounded: bool = False) -> Grid:
        """Balanced product of grids that broadcast against each other, the balance factors as fixed weights."""
        mean_left, mean_right = self.mean(left), self.mean(right)
        if left_bounded == right_bounded:
            middle = math.sqrt(mean_left * mean_right)
        else:
            middle = mean_left if right_bounded else mean_right
        extents = [
            max(max(index[axis] for index in grid) for grid in (left, right)) + 1
            for axis in range(len(next(iter(left))))
        ]
        result = self.units(extents)
        for grid, mean in ((left, mean_left), (right, mean_right)):
            limits = [max(index[axis] for index in grid) for axis in range(len(extents))]
            for index, unit in result.items():
                place = tuple(min(at, limit) for at, limit in zip(index, limits, strict=True))
                self.edge(grid[place], unit, middle / (2 * mean))
        return result


def effective(net: Any, name: str) -> Tensor:
    """Magnitudes of a layer's active weights in float64."""
    layer = net.layers[name]
    return torch.where(layer.mask, layer.parameter.detach().double().abs(), 0)


def with_random_masks(net: Any, keep: float = 0.7, seed: int = 0) -> Any:
    """The net with some weights masked, no layer emptied."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, layer in net.layers.items():
        mask = torch.rand(layer.mask.shape, generator=generator) < keep
        mask.view(-1)[0] = True
        masks[name] = mask
    net.set_masks(masks)
    return net


def assert_scores_match(paths: Any, graph: UnitGraph, outputs: Iterable[Unit], rtol: float = 1e-12) -> None:
    """Every score of every layer, and the total, against the list of all paths."""
    expected, total = graph.scores(outputs)
    assert math.isclose(paths.log_total, math.log(total), rel_tol=rtol, abs_tol=rtol)
    for name, scores in paths.scores.items():
        wanted = torch.tensor(
            [expected.get((name, index), 0.0) for index in itertools.product(*map(range, scores.shape))],
            dtype=torch.float64,
        ).reshape(scores.shape)
        torch.testing.assert_close(scores * math.exp(paths.log_scale), wanted, rtol=rtol, atol=0.0)


def assert_follows(net: Any, rule: Callable[[dict[str, Tensor]], Tensor], rtol: float = 1e-12, **options: Any) -> Any:
    """The scores and the total against autograd through `rule`, a function of every layer's magnitudes."""
    paths = growfx.path_products(net, **options)
    leaves = {name: effective(net, name).requires_grad_() for name in net.layers}
    total = rule(leaves).sum()
    total.backward()
    assert math.isclose(paths.log_total, math.log(total.item()), rel_tol=rtol, abs_tol=rtol)
    for name, leaf in leaves.items():
        if leaf.grad is None:
            assert name in paths.off_path
        else:
            torch.testing.assert_close(paths.scores[name] * math.exp(paths.log_scale), leaf.grad, rtol=rtol, atol=0.0)
    return paths
