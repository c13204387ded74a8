"""Products with a layer's weight in every spelling: live units stay, and dead ones leave where it is followed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from breadth import some
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.compact.network import compact
from growfx.passes.connect.interpreter import connect

Form = Callable[[nn.Linear, Tensor], Tensor]

# (batch, positions, features) -> (batch, units, positions). What is followed may lose its dead units.
FOLLOWED: dict[str, Form] = {
    "weight @ x": lambda dt, x: dt.weight @ x.mT + dt.bias[None, :, None],
    "matmul": lambda dt, x: torch.matmul(dt.weight, x.transpose(1, 2)) + dt.bias[:, None],
    "method": lambda dt, x: dt.weight.matmul(x.mT) + dt.bias.unsqueeze(-1),
    "cast": lambda dt, x: dt.weight.to(x.dtype) @ x.mT + dt.bias.float()[None, :, None].to(x.dtype),
    "bmm": lambda dt, x: torch.bmm(dt.weight.expand(len(x), -1, -1), x.mT) + dt.bias[None, :, None],
    "batch of one": lambda dt, x: dt.weight[None] @ x.mT + dt.bias[None, :, None],
    "baddbmm": lambda dt, x: torch.baddbmm(dt.bias[None, :, None], dt.weight.expand(len(x), -1, -1), x.mT),
    "mm of one": lambda dt, x: torch.stack([dt.weight.mm(row.t()) for row in x[:1]]) + dt.bias[None, :, None],
    "right": lambda dt, x: (x @ dt.weight.t() + dt.bias).mT,
    "right, repeated": lambda dt, x: (x @ dt.weight.t().expand(len(x), -1, -1) + dt.bias).mT,
    "einsum": lambda dt, x: torch.einsum("oi,bni->bon", dt.weight, x) + dt.bias[None, :, None],
    "einsum, turned": lambda dt, x: torch.einsum("...i,io->...o", x, dt.weight.t()).mT + dt.bias[None, :, None],
    "linear, swapped": lambda dt, x: torch.stack([F.linear(dt.weight, row) for row in x[:1]]) + dt.bias[:, None],
    "bias in linear": lambda dt, x: F.linear(x, dt.weight, dt.bias).mT,
}
# What is not followed must stay whole.
HELD: dict[str, Form] = {
    "tensordot": lambda dt, x: torch.tensordot(dt.weight, x.mT[0], 1)[None] + dt.bias[None, :, None],
    "heads": lambda dt, x: (dt.weight.view(4, 4, 8) @ x.mT[:, None]).flatten(1, 2) + dt.bias[:, None],
    "stacked": lambda dt, x: (torch.cat([dt.weight, dt.weight]) @ x.mT)[:, :16] + dt.bias[:, None],
    "inner": lambda dt, x: torch.inner(x, dt.weight).mT + dt.bias[:, None],
    "elementwise": lambda dt, x: (dt.weight[None, None] * x[:, :, None]).sum(-1).mT + dt.bias[:, None],
    "transposed twice": lambda dt, x: (x @ torch.mul(1.0, dt.weight).t() + dt.bias).mT,
    "scaled by rows": lambda dt, x: (dt.weight * dt.bias[:, None]) @ x.mT,
    "softmax": lambda dt, x: dt.weight.softmax(0) @ x.mT,
}


class Net(nn.Module):
    """A gate computed in one of the forms, and a branch that it multiplies."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form, self.u, self.dt, self.head = form, nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        dt = F.softplus(self.form(self.dt, x))
        return self.head((self.u(x).transpose(1, 2) * dt).transpose(1, 2))


def build(form: Form, scale: float = 1.0) -> tuple[growfx.MaskedGraph, Tensor]:
    torch.manual_seed(0)
    model = Net(form).eval()
    with torch.no_grad():
        model.dt.weight.mul_(scale)
        model.dt.bias.fill_(0.3)
    x = torch.randn(1, 5, 8)
    return growfx.wrap(model, x).eval(), x


def assert_equal(net: Any, small: nn.Module, x: Tensor) -> None:
    reference, ours = copy.deepcopy(growfx.unwrap(net)).double(), copy.deepcopy(small).double()
    with torch.no_grad():
        expected, got = reference(x.double() * 3), ours(x.double() * 3)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("scale", some([1.0, 1e-4, 1e-9], lambda scale: scale == 1e-4))
@pytest.mark.parametrize("name", [*FOLLOWED, *HELD])
def test_units_that_are_alive_stay(name: str, scale: float) -> None:
    net, x = build({**FOLLOWED, **HELD}[name], scale)
    result = compact(net)
    assert result.report.removed == 0, str(result.report)
    assert not result.report.refusal
    assert_equal(net, result.model, x)


@pytest.mark.parametrize("name", FOLLOWED)
def test_dead_units_leave_where_the_product_is_followed(name: str) -> None:
    net, x = build(FOLLOWED[name])
    for layer in ("u", "dt"):
        net.layers[layer].mask[[1, 4, 5]] = False
    with torch.no_grad():
        net.layers["u"].bias[[1, 4, 5]] = 0.0
    net.settle()
    result = compact(net)
    after = {change.layer: change.after for change in result.report.layers}
    assert (after["u"], after["dt"]) == (13, 13), str(result.report)
    assert_equal(net, result.model, x)


@pytest.mark.parametrize("name", HELD)
def test_dead_units_leave_the_outputs_as_they_are_where_it_is_not(name: str) -> None:
    net, x = build(HELD[name])
    for layer in ("u", "dt"):
        net.layers[layer].mask[[1, 4, 5]] = False
    net.layers["dt"].mask[:, 3] = False
    net.settle()
    result = compact(net)
    assert not result.report.refusal
    assert_equal(net, result.model, x)


def test_a_weight_on_the_left_reads_the_units_before_it() -> None:
    net, _ = build(FOLLOWED["weight @ x"])
    found = connect(net)
    assert found.layers["dt"].sources.tolist() == found.inputs["x"].tolist()
    assert not found.pinned.keys() & set(found.coupled("dt").tolist())


@pytest.mark.parametrize("layers", [("a",), ("a", "b")])
def test_a_weight_that_is_called_and_used_in_a_way_not_followed_keeps_its_columns(layers: tuple[str, ...]) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            gram = torch.tensordot(self.b.weight, self.b.weight, dims=([0], [0]))
            return self.c(torch.relu(self.b(torch.relu(self.a(x)))) + gram.sum(0))

    torch.manual_seed(0)
    x = torch.randn(2, 6)
    net = growfx.wrap(Both(), x).eval()
    for name in layers:
        net.layers[name].mask[[0, 2]] = False
    net.settle()
    result = compact(net)
    assert not result.report.refusal
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), net(x))
