"""Each operator between two layers against the linear map that its path rule stands for, in plain autograd."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from breadth import some
from torch import Tensor, fx, nn
from torch.nn import functional as F

import growfx
from growfx.passes.path_products.interpreter import PathGraph
from growfx.passes.path_products.products import path_products
from growfx.passes.path_products.rules import table as path_rules

Map = Callable[[Tensor], Tensor]
CONSTANT = torch.tensor([[0.5, -2.0, 3.0, 1.0]])


def same(x: Tensor) -> Tensor:
    return x


def times_constant(x: Tensor) -> Tensor:
    return x * CONSTANT.abs().to(x.dtype)


def zero_second(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=x.dtype)


def written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1] = 7.0
    return y


def filled(x: Tensor) -> Tensor:
    return x.masked_fill(torch.tensor([False, True, False, False]), -torch.inf)


def average_pairs(x: Tensor) -> Tensor:
    return F.avg_pool1d(x[:, None], 2).repeat(1, 1, 2)[:, 0]


def maximum_of_pairs(x: Tensor) -> Tensor:
    return F.max_pool1d(x[:, None], 2).repeat(1, 1, 2)[:, 0]


def stretched(x: Tensor) -> Tensor:
    return F.interpolate(x[:, :2, None], 2).flatten(1)


def padded_with_minus_infinity(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0), value=-torch.inf)[:, 1:]


# What the model computes between its layers, and what that does to path values; activations have shape (batch, 4).
OPERATORS: list[tuple[str, Map, Map]] = [
    ("relu", F.relu, same),
    ("exp", torch.exp, same),
    ("positive power", lambda x: x.abs() ** 1.5, same),
    ("negation", lambda x: -x, same),
    ("cast", lambda x: x.to(torch.float32).contiguous(), same),
    ("clamp", lambda x: x.clamp(min=0.1), same),
    ("functional swish", lambda x: x * torch.sigmoid(x), same),
    ("swish with a slope", lambda x: x * torch.sigmoid(1.702 * x), same),
    ("hard swish", lambda x: x * F.relu6(x + 3), same),
    ("constant factor", lambda x: x * CONSTANT, times_constant),
    ("constant cast to an activation's type", lambda x: x * CONSTANT.to(x), times_constant),
    ("constant in an activation's shape", lambda x: x * CONSTANT.expand_as(x), times_constant),
    ("rounding", lambda x: x.round() + torch.floor(x), lambda x: 2 * x),
    ("median", lambda x: x.median(1, keepdim=True)[0].expand(-1, 4), lambda x: x.mean(1, keepdim=True).expand(-1, 4)),
    ("constant divisor", lambda x: x / CONSTANT, lambda x: x / CONSTANT.abs().to(x.dtype)),
    ("number", lambda x: -3 * x / 2, lambda x: 1.5 * x),
    ("added constant", lambda x: x + CONSTANT - 5, same),
    ("subtraction", lambda x: x - 2 * x.flip(1), lambda x: x + 2 * x.flip(1)),
    ("alpha", lambda x: torch.add(x, x.roll(1, 1), alpha=-3), lambda x: x + 3 * x.roll(1, 1)),
    ("maximum", lambda x: torch.maximum(x, x.flip(1)), lambda x: x + x.flip(1)),
    ("path over path", lambda x: x / (1 + x.flip(1).abs()), same),
    ("divisor", lambda x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1), same),
    ("learnt-free inverse", lambda x: x * (2 / (1 + x.abs())), lambda x: 2 * x),
    ("normalize", lambda x: F.normalize(x, dim=1), same),
    ("mean", lambda x: x.mean(1, keepdim=True).expand(-1, 4), lambda x: x.mean(1, keepdim=True).expand(-1, 4)),
    ("amax", lambda x: x.amax(1, keepdim=True).expand(-1, 4), lambda x: x.mean(1, keepdim=True).expand(-1, 4)),
    ("max", lambda x: x.max(1, keepdim=True)[0].expand(-1, 4), lambda x: x.mean(1, keepdim=True).expand(-1, 4)),
    ("std", lambda x: x.std(1, keepdim=True).expand(-1, 4), lambda x: x.mean(1, keepdim=True).expand(-1, 4)),
    ("norm", lambda x: x.norm(dim=1, keepdim=True).expand(-1, 4), lambda x: x.mean(1, keepdim=True).expand(-1, 4)),
    ("sum", lambda x: x.sum(1, keepdim=True).expand(-1, 4), lambda x: x.sum(1, keepdim=True).expand(-1, 4)),
    ("cumsum", lambda x: x.cumsum(1), lambda x: x.cumsum(1)),
    ("stack", lambda x: torch.stack([x, torch.ones_like(x)], 1).sum(1), same),
    ("split", lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), lambda x: torch.cat([x[:, 1:], x[:, :1]], 1)),
    ("gather", lambda x: x[:, [2, 0, 1, 3]], lambda x: x[:, [2, 0, 1, 3]]),
    ("masked_fill", filled, zero_second),
    ("where", lambda x: torch.where(torch.tensor([True, False, True, True]), x, 1e9), zero_second),
    ("written part", written, zero_second),
    ("padding with -inf", padded_with_minus_infinity, lambda x: F.pad(x, (1, 0))[:, 1:]),
    ("constant matrix", lambda x: x @ torch.diag(CONSTANT[0]), times_constant),
    ("einsum with a constant", lambda x: torch.einsum("bi,i->bi", x, CONSTANT[0]), times_constant),
    ("functional convolution", lambda x: F.conv1d(x[:, None], CONSTANT[None, :, 1:2])[:, 0], lambda x: 2 * x),
    ("layer norm function", lambda x: F.layer_norm(x, (4,), CONSTANT[0]), times_constant),
    ("addcmul", lambda x: torch.addcmul(x, x.flip(1), CONSTANT), lambda x: x + times_constant(x.flip(1))),
    ("average pool", average_pairs, average_pairs),
    ("max pool", maximum_of_pairs, average_pairs),
    ("interpolation", stretched, stretched),
    ("dropout", lambda x: F.dropout(x, 0.5, False), same),
]  # fmt: skip


class Between(nn.Module):
    def __init__(self, operation: Map) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.operation(self.first(x)))


CASES = [row[1:] for row in OPERATORS]


@pytest.mark.parametrize(
    ("operation", "rule"), some(CASES, lambda case: case in CASES[::3]), ids=[row[0] for row in OPERATORS]
)
def test_an_operator_carries_paths_as_its_rule_says(operation: Map, rule: Map) -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Between(operation).eval(), torch.randn(2, 3))
    paths = path_products(net)
    first, second = (
        net.layers[name].parameter.detach().double().abs().requires_grad_() for name in ("first", "second")
    )
    total = F.linear(rule(F.linear(torch.ones(1, 3, dtype=torch.float64), first)), second).sum()
    total.backward()
    scale = math.exp(paths.log_scale)
    torch.testing.assert_close(paths.scores["first"] * scale, first.grad, rtol=1e-12, atol=0)
    torch.testing.assert_close(paths.scores["second"] * scale, second.grad, rtol=1e-12, atol=0)
    assert math.isclose(paths.log_total, math.log(total.item()), rel_tol=1e-12)


def test_an_operator_without_a_rule_is_named_with_its_source_line() -> None:
    def wave(x: Tensor) -> Tensor:
        return torch.cumprod(x, 1)

    net = growfx.wrap(Between(wave).eval(), torch.randn(2, 3))
    with pytest.raises(
        growfx.UnsupportedOperatorError, match=r"`cumprod` \(node `\w+`, .*test_path_rules.py:\d+ in wave\)"
    ):
        path_products(net)


def test_a_module_class_that_changes_its_forward_is_followed_inside() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name of the original
            return 2 * super().forward(input)

    net = growfx.wrap(nn.Sequential(Doubled(3, 2)).eval(), torch.randn(2, 3))
    torch.testing.assert_close(path_products(net).scores["0"], torch.full((2, 3), 2.0, dtype=torch.float64))


def test_a_module_class_that_changes_only_its_construction_follows_its_base() -> None:
    class Square(nn.Linear):
        def __init__(self, size: int) -> None:
            super().__init__(size, size)

    net = growfx.wrap(nn.Sequential(Square(3)).eval(), torch.randn(2, 3))
    torch.testing.assert_close(path_products(net).scores["0"], torch.ones(3, 3, dtype=torch.float64))


def test_an_empty_sequence_is_an_identity() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 2), nn.Sequential()).eval(), torch.randn(2, 3))
    torch.testing.assert_close(path_products(net).scores["0"], torch.ones(2, 3, dtype=torch.float64))


def part_written(x: Tensor) -> Tensor:
    x = x + 1
    x[:, :2].mul_(3)
    return x


def test_a_write_into_a_part_of_a_tensor_reaches_the_whole() -> None:
    torch.manual_seed(0)
    written = growfx.wrap(Between(part_written).eval(), torch.randn(2, 3))
    torch.manual_seed(0)
    scaled = growfx.wrap(Between(lambda x: x * torch.tensor([3.0, 3.0, 1.0, 1.0])).eval(), torch.randn(2, 3))
    one, other = path_products(written), path_products(scaled)
    for name, score in one.scores.items():
        torch.testing.assert_close(score, other.scores[name], rtol=1e-12, atol=0)


def test_a_graph_that_still_writes_into_a_part_read_again_is_refused() -> None:
    net = growfx.wrap(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).eval(), torch.randn(2, 3))
    graph = fx.Graph()
    whole = graph.call_module("0", (graph.placeholder("x"),))
    graph.call_method("mul_", (graph.call_method("narrow", (whole, 1, 0, 2)), 3))
    graph.output(graph.call_module("1", (whole,)))
    with pytest.raises(growfx.UnsupportedOperatorError, match=r"`mul_` .*part of a tensor"):
        PathGraph(net, graph).run((torch.randn(1, 3),))


@pytest.mark.parametrize("name", [key for key in path_rules.MODULES if isinstance(key, str)])
def test_every_library_class_in_the_table_exists(name: str) -> None:
    module, _, cls = name.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), cls), type)
