"""Path products of randomly drawn networks equal the list of all their paths."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from path_enumeration import Grid, UnitGraph, assert_scores_match, effective, with_random_masks
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.path_products.products import path_products

pytestmark = pytest.mark.slow

SIDE = 2
MOST_PATHS = 6_000
OPERATORS = [
    *("conv1", "conv3", "grouped", "linear", "norm", "layer norm", "add", "concat", "chunk", "shuffle"),
    *("gate", "product", "average", "maximum", "relu", "swish"),
]


class Drawn(nn.Module):
    """A program over a growing list of values of shape (batch, channels, 2, 2): operator, operands, channels."""

    def __init__(self, program: list[tuple[str, int, int, int]]) -> None:
        super().__init__()
        self.steps: list[tuple[str, int, int, Any]] = []
        widths = [2]
        for position, (operator, first, second, channels) in enumerate(program):
            first, second = first % len(widths), second % len(widths)
            if operator in ("add", "product") and widths[first] != widths[second]:
                operator = "concat"
            if operator in ("grouped", "chunk", "shuffle") and widths[first] % 2:
                operator = "relu"
            layer = self.layer(operator, widths[first], channels)
            if layer is not None:
                self.add_module(f"{operator.replace(' ', '_')}_{position}", layer)
            self.steps.append((operator, first, second, layer))
            if operator == "chunk":
                widths += [widths[first] // 2] * 2
            elif operator == "concat":
                widths.append(widths[first] + widths[second])
            else:
                made = operator in ("conv1", "conv3", "linear")
                widths.append(channels if made else 2 * channels if operator == "grouped" else widths[first])
        self.pooled = program[0][3] == 1
        self.head = nn.Linear(widths[-1] * (1 if self.pooled else SIDE * SIDE), 2)

    @staticmethod
    def layer(operator: str, width: int, channels: int) -> nn.Module | None:
        if operator == "norm":
            norm = nn.BatchNorm2d(width)
            assert norm.running_var is not None
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            return norm
        if operator == "layer norm":
            norm = nn.LayerNorm(width)
            nn.init.normal_(norm.weight)
            return norm
        return {
            "conv1": lambda: nn.Conv2d(width, channels, 1),
            "conv3": lambda: nn.Conv2d(width, channels, 3, padding=1),
            "grouped": lambda: nn.Conv2d(width, 2 * channels, 1, groups=2),
            "linear": lambda: nn.Linear(width, channels),
            "gate": lambda: nn.Conv2d(width, width, 1),
        }.get(operator, lambda: None)()

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for operator, first, second, layer in self.steps:
            values += self.step(operator, layer, values[first], values[second])
        last = values[-1].mean((2, 3)) if self.pooled else values[-1].flatten(1)
        return self.head(last)

    def step(self, operator: str, layer: Any, x: Tensor, y: Tensor) -> list[Tensor]:
        size = x.size()
        if operator == "chunk":
            return list(x.chunk(2, 1))
        return [
            {
                "linear": lambda: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                "layer norm": lambda: layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
                "add": lambda: x - y,
                "concat": lambda: torch.cat([x, y], 1),
                "shuffle": lambda: x.view(size[0], 2, size[1] // 2, *size[2:]).transpose(1, 2).reshape(size),
                "gate": lambda: x * torch.sigmoid(layer(x.mean((2, 3), keepdim=True))),
                "product": lambda: x * y,
                "average": lambda: F.avg_pool2d(x, 3, 1, 1),
                "maximum": lambda: F.max_pool2d(x, 3, 1, 1),
                "relu": lambda: F.relu(x),
                "swish": lambda: x * x.sigmoid(),
            }.get(operator, lambda: layer(x))()
        ]


class Reference:
    """The same program on scalar units."""

    def __init__(self, net: Any, model: Drawn) -> None:
        self.net, self.model, self.graph = net, model, UnitGraph()
        self.names = {id(module): name for name, module in model.named_modules()}
        values = [self.graph.units((2, SIDE, SIDE))]
        for operator, first, second, layer in model.steps:
            values += self.step(operator, layer, values[first], values[second])
            self.bound(values[-1])
        head = effective(net, "head")
        if model.pooled:
            self.outputs = self.graph.linear(self.graph.average(values[-1], (1, 2)), "head", head)
        else:
            flat = {(position,): unit for position, (_, unit) in enumerate(sorted(values[-1].items()))}
            self.outputs = self.graph.linear(flat, "head", head)
        self.bound(self.outputs)

    def bound(self, grid: Grid) -> None:
        """Listing all paths ends somewhere: drop programs with too many."""
        known: dict[int, int] = {}

        def count(unit: int) -> int:
            if unit not in known:
                known[unit] = sum(count(source) for source, _, _ in self.graph.incoming.get(unit, ())) or 1
            return known[unit]

        assume(sum(map(count, grid.values())) <= MOST_PATHS)

    def step(self, operator: str, layer: Any, x: Grid, y: Grid) -> list[Grid]:
        graph, width = self.graph, 1 + max(index[0] for index in x)
        name = self.names.get(id(layer), "")
        if operator in ("conv1", "conv3", "grouped"):
            weight = effective(self.net, name)
            return [graph.conv(x, name, weight, padding=weight.shape[-1] // 2, groups=layer.groups)]
        if operator == "linear":
            last: Grid = {(row, column, channel): unit for (channel, row, column), unit in x.items()}
            mapped = graph.linear(last, name, effective(self.net, name))
            return [{(channel, row, column): unit for (row, column, channel), unit in mapped.items()}]
        if operator == "norm":
            return [graph.scale(x, layer.weight.detach().double().abs() / (layer.running_var.double() + 1e-5).sqrt())]
        if operator == "layer norm":
            return [graph.scale(x, layer.weight.detach().double().abs())]
        if operator == "add":
            return [graph.add(x, y)]
        if operator == "concat":
            return [{**x, **{(channel + width, *place): unit for (channel, *place), unit in y.items()}}]
        if operator == "chunk":
            half = width // 2
            parts: list[Grid] = [{}, {}]
            for (channel, *place), unit in x.items():
                parts[channel // half][channel % half, *place] = unit
            return parts
        if operator == "shuffle":
            half = width // 2
            return [{((channel % half) * 2 + channel // half, *place): unit for (channel, *place), unit in x.items()}]
        if operator == "gate":
            gate = graph.conv(graph.average(x, (1, 2), keep=True), name, effective(self.net, name))
            return [graph.product(x, gate, right_bounded=True)]
        if operator == "product" and x is not y:
            return [graph.product(x, y)]
        if operator in ("average", "maximum"):
            return [self.pooled(x)]
        return [x]

    def pooled(self, x: Grid) -> Grid:
        """Windows of three by three cover the whole of two by two."""
        result = {index: next(self.graph.fresh) for index in x}
        for (channel, _, _), unit in result.items():
            for other, source in x.items():
                if other[0] == channel:
                    self.graph.edge(source, unit, 1 / SIDE**2)
        return result


STEP = st.tuples(st.sampled_from(OPERATORS), st.integers(0, 5), st.integers(0, 5), st.integers(1, 3))


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(program=st.lists(STEP, min_size=2, max_size=6), seed=st.integers(0, 99))
def test_a_random_network_has_the_path_products_of_its_listed_paths(program: Any, seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(program).eval()
    net = with_random_masks(growfx.wrap(model, torch.randn(2, 2, SIDE, SIDE)), seed=seed)
    reference = Reference(net, model)
    assert_scores_match(path_products(net), reference.graph, reference.outputs.values())


@pytest.mark.parametrize("norm", ["fold", "identity"])
@settings(max_examples=8, derandomize=True, deadline=None, database=None)
@given(program=st.lists(STEP, min_size=30, max_size=60), seed=st.integers(0, 99))
def test_a_deep_random_network_with_extreme_norms_is_finite(norm: str, program: Any, seed: int) -> None:
    torch.manual_seed(seed)
    # Only the newest values are read, so that the network is deep rather than wide.
    width, steps = 1, []
    for operator, first, second, channels in program:
        steps.append((operator, width - 1 - first % min(width, 3), width - 1 - second % min(width, 2), channels))
        width += 2 if operator == "chunk" else 1
    model = Drawn([step for step in steps if step[0] != "concat"]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            module.running_var.fill_(1e-3)
            module.weight.data.fill_(10)
    paths = path_products(growfx.wrap(model, torch.randn(2, 2, SIDE, SIDE)), norm=norm)
    assert math.isfinite(paths.log_total)
    for score in paths.scores.values():
        assert bool(torch.isfinite(score).all() & (score >= 0).all() & score.any())
