"""The comparison that every compaction has to pass: wrong plans are caught, to the rounding of the network itself."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.passes.compact.network import compact
from growfx.passes.trials import difference, working_copy
from growfx.passes.trials.precision import outputs_of, rounded_away, tolerance_of, widened_model
from growfx.recorded.inputs import Inputs

_COMPACT: Any = importlib.import_module("growfx.passes.compact.network")


class Casting(nn.Module):
    """A network whose own code asks for a type, for its activations and for a constant."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.a, self.b, self.dtype = nn.Linear(6, 8), nn.Linear(8, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        x = x if self.dtype is None else x.to(self.dtype) * torch.ones((), dtype=self.dtype)
        return F.linear(x, self.b.weight.to(x.dtype), self.b.bias.to(x.dtype))


def build(dtype: torch.dtype | None = None) -> tuple[growfx.MaskedGraph, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 6)
    return growfx.wrap(Casting(dtype).eval(), x).eval(), x


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-8])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.float32, torch.bfloat16])
def test_a_wrong_plan_is_caught_by_the_values_of_the_outputs(
    dtype: torch.dtype | None, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, _ = build(dtype)
    with torch.no_grad():
        net.shell.get_parameter("b.weight")[:, 2].mul_(scale)
    right = _COMPACT.find_liveness

    def wrong(*args: Any) -> Any:
        known, found = right(*args), args[2]
        units = found.layers["a"].outputs[[2, 5]]
        needed = known.needed.clone()
        needed[units] = False
        edges = {**known.edges, "b": known.edges["b"].clone()}
        edges["b"][:, [2, 5]] = False
        return dataclasses.replace(known, needed=needed, edges=edges)

    monkeypatch.setattr(_COMPACT, "find_liveness", wrong)
    result = compact(net)
    assert result.report.removed == 0
    assert any("outputs would differ" in reason for reasons in result.report.kept.values() for reason in reasons)
    assert result.model.a.weight.shape == (8, 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_model_that_casts_is_run_in_float64_all_the_same(dtype: torch.dtype) -> None:
    model, x = Casting(dtype).eval(), torch.randn(2, 6, dtype=torch.float64)
    plain = Casting(None).eval()
    plain.load_state_dict(model.state_dict())
    work = widened_model(model)
    (got,) = outputs_of(work, Inputs((x,), {}), wide=True)
    (expected,) = outputs_of(plain.double(), Inputs((x,), {}))
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_counts_as_equal_is_a_small_multiple_of_the_rounding_and_no_more(dtype: torch.dtype) -> None:
    model, x = Casting(None).to(dtype).eval(), torch.randn(2, 6, dtype=dtype)
    runs = [(Inputs((x,), {}), outputs_of(model, Inputs((x,), {})))]
    ((limit,),) = rounded_away(model, runs, wide=False)
    eps = torch.finfo(dtype).eps
    assert 8 * eps < limit < 1e4 * eps
    assert limit < tolerance_of(dtype)


def test_rounding_that_the_network_makes_large_is_let_pass() -> None:
    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) + 1e6) - 1e6

    torch.manual_seed(0)
    model = Cancelling().eval()
    runs = [(Inputs((torch.randn(2, 6),), {}), outputs_of(model, Inputs((torch.ones(2, 6),), {})))]
    ((limit,),) = rounded_away(model, runs, wide=False)
    assert limit == tolerance_of(torch.float32)


@pytest.mark.parametrize("change", [1e-6, 1e-10, 1e-12])
def test_a_small_change_of_one_weight_is_seen(change: float) -> None:
    net, x = build(torch.float32)
    work, trials = working_copy(growfx.unwrap(net).eval(), Inputs((x,), {}))
    assert trials[0].wide
    assert difference(work, trials)[1] == ""
    weight = work.get_parameter("b.weight")
    with torch.no_grad():
        weight[0] *= 1 + change
    assert "differ" in difference(work, trials)[1]
