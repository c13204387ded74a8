"""Units that something else than a layer reads: mixed by a product, selected by data, compared, or returned."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.compact import compact


class Net(nn.Module):
    """A layer whose ReLU is silent on usual inputs, two layers over it, and what reads those."""

    def __init__(self, end: Callable[[Any, Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(16, 12)
        self.weight, self.shift = nn.Parameter(torch.randn(12, 3)), nn.Parameter(torch.randn(3))
        self.end = end
        nn.init.constant_(self.first.bias, -30.0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.end(self, x, self.second(hidden), self.third(hidden))


ENDS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "parameter": lambda self, x, a, b: a.relu() @ self.weight,
    "added": lambda self, x, a, b: torch.addmm(self.shift, a[:, 0].relu(), self.weight),
    "mixed": lambda self, x, a, b: a @ b.mT,
    "selected": lambda self, x, a, b: (a @ b.mT).topk(2).values,
    "norm": lambda self, x, a, b: a.pow(2).sum(-1).sqrt(),
    "attention": lambda self, x, a, b: F.scaled_dot_product_attention(a, b, x),
    "gram": lambda self, x, a, b: torch.einsum("bnc,bnd->bcd", a, b).diagonal(dim1=1, dim2=2).sum(-1),
    "distance": lambda self, x, a, b: torch.cdist(a, b),
}


def same(net: growfx.MaskedGraph, small: nn.Module) -> None:
    """Equal on inputs large enough to wake every unit."""
    plain, small = growfx.unwrap(net).double().eval(), small.double()
    for scale in (1, 30, 100):
        x = torch.randn(16, 4, 8, dtype=torch.float64) * scale
        with torch.no_grad():
            torch.testing.assert_close(small(x), plain(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("end", ENDS)
def test_units_that_wake_on_other_inputs_than_those_seen_stay_whatever_reads_them(end: str) -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Net(ENDS[end]), torch.randn(2, 4, 8))
    result = compact(net)
    same(net, result.net)
    assert [(layer.before, layer.after) for layer in result.report.layers[:2]] == [(16, 16), (12, 12)]


@pytest.mark.parametrize("end", ENDS)
def test_what_is_dead_before_them_leaves(end: str) -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Net(ENDS[end]), torch.randn(2, 4, 8))
    mask = torch.ones(16, 8, dtype=torch.bool)
    mask[3:7] = False
    net.set_masks({"first": mask})
    result = compact(net)
    same(net, result.net)
    assert (net.layers["first"].out_features, result.net.first.out_features) == (16, 12)


def test_dims_of_an_attention_that_divides_by_their_number_stay_together() -> None:
    torch.manual_seed(0)
    net = growfx.wrap(Net(ENDS["attention"]), torch.randn(2, 4, 8))
    mask = torch.ones(12, 16, dtype=torch.bool)
    mask[5] = False
    net.set_masks({"second": mask, "third": mask})
    with torch.no_grad():
        for name in ("second", "third"):
            net.get_parameter(f"{name}.bias")[5] = 0
    result = compact(net)
    same(net, result.net)
    assert "divides by the root" in str(result.report)


class Branch(nn.Module):
    """A residual branch that begins at nothing, as in ResNets whose last norms start at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.Conv2d(6, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.out(self.conv(x).relu()))


def test_units_behind_a_scale_that_starts_at_zero_leave_with_a_warning() -> None:
    net = growfx.wrap(Branch(), torch.randn(1, 4, 5, 5)).eval()
    with pytest.warns(growfx.GrowfxWarning, match=r"`norm\.weight`.* left out .*\(5 units in all\)"):
        assert growfx.unwrap(net, compact=True).conv.out_channels == 1
    net = growfx.wrap(Branch(), torch.randn(1, 4, 5, 5)).eval()
    nn.init.ones_(net.shell.norm.weight)
    net.layers["conv"].mask[:2] = False  # which is no reason to warn
    assert growfx.unwrap(net, compact=True).conv.out_channels == 4
