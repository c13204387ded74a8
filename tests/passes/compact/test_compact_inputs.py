"""Compaction where layers see something else than batches of real features: vectors, complex numbers, tuples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compact_nets import agree
from torch import Tensor, nn

import growfx
from growfx.passes.compact.network import Compacted, compact
from growfx.passes.trials import with_rows
from growfx.recorded.inputs import Inputs


def compacted(model: nn.Module, x: Tensor, *layers: str) -> Compacted:
    """The result, checked, for a net whose units 1 and 2 in `layers` have no incoming weight."""
    net = growfx.wrap(model.eval(), x).eval()
    with torch.no_grad():
        for name in layers:  # what has a mask or not (complex weights have none)
            net.shell.get_parameter(f"{name}.weight")[[1, 2]] = 0
            if name in net.layers:
                net.layers[name].mask[[1, 2]] = False
    net.settle()
    result = compact(net)
    assert not result.report.refusal, result.report.refusal
    agree(net, result.model, x, torch.randn_like(x))
    return result


def left(result: Compacted) -> dict[str, int]:
    return {change.layer: change.before - change.after for change in result.report.layers}


class Vector(nn.Module):
    """Layers over one row of the batch, over a parameter, and over a mean of the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 3), nn.Linear(8, 6)
        self.token = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "row":
            return self.b(torch.relu(self.a(x[0])))
        if self.kind == "mean":
            return self.b(torch.relu(self.a(x.mean(0))))
        if self.kind == "constant":
            return self.b(torch.relu(self.a(x))) + self.c(torch.ones(8)).sum()
        return self.b(torch.relu(self.a(x)) * torch.sigmoid(self.c(self.token)))


@pytest.mark.parametrize("kind", ["row", "mean", "constant", "parameter"])
def test_a_layer_may_be_called_on_a_vector(kind: str) -> None:
    result = compacted(Vector(kind), torch.randn(2, 8), "a")
    assert left(result)["a"] == (0 if kind == "parameter" else 2), str(result.report)


class Complex(nn.Module):
    """Complex layers between real ones."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        kind: Any = (lambda i, o: nn.Conv2d(i, o, 3, dtype=torch.complex64)) if convolution else None
        kind = kind or (lambda i, o: nn.Linear(i, o, dtype=torch.complex64))
        self.first = nn.Conv2d(4, 5, 1) if convolution else nn.Linear(4, 5)
        self.a, self.b, self.last = kind(5, 6), kind(6, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.first(x).to(torch.complex64))).abs()
        return self.last(x.mean((2, 3)) if x.ndim == 4 else x)


@pytest.mark.parametrize("convolution", [False, True])
def test_complex_layers_are_compacted_or_kept_but_never_fail(convolution: bool) -> None:
    x = torch.randn(2, 4, 8, 8) if convolution else torch.randn(2, 4)
    compacted(Complex(convolution), x, "first", "a")


def test_complex_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 6, dtype=torch.complex64), nn.Linear(6, 3, dtype=torch.complex64))
    net = growfx.wrap(model.eval(), torch.randn(2, 4, dtype=torch.complex64)).eval()
    with torch.no_grad():
        net.shell.get_parameter("0.weight")[1] = 0
        net.shell.get_parameter("1.weight")[:, 3] = 0
    result = compact(net)
    x = torch.randn(3, 4, dtype=torch.complex64)
    assert left(result)["0"] == 1  # the unit that nothing reads
    with torch.no_grad():
        torch.testing.assert_close(result.model(x), net(x))


class PairConv(nn.Conv2d):
    """A convolution that takes and returns a pair."""

    def forward(self, pair: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, other = pair
        return super().forward(x), other


class KeywordConv(nn.Conv2d):
    """A convolution that takes a keyword and returns a dict."""

    def forward(self, *, x: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return {"y": super().forward(x)}


class Odd(nn.Module):
    """A chain of plain convolutions around odd ones."""

    def __init__(self, kind: type[nn.Conv2d]) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.a, self.b, self.last = nn.Conv2d(3, 6, 3), kind(6, 6, 3), kind(6, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        if self.kind is PairConv:
            x, other = self.b(self.a((x, x)))
            return self.last(x) + other.mean()
        return self.last(self.b(x=self.a(x=x)["y"])["y"])


@pytest.mark.parametrize("kind", [PairConv, KeywordConv])
def test_convolutions_over_tuples_and_keywords_stay_whole(kind: type[nn.Conv2d]) -> None:
    compacted(Odd(kind), torch.randn(2, 3, 10, 10), "a", "first")


class Unreached(nn.Module):
    """Layers that are fed by constants only, of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)
        self.c, self.d, self.e = nn.Linear(5, 4), nn.Conv2d(1, 4, 3), nn.MultiheadAttention(8, 2, batch_first=True)
        self.query = nn.Parameter(torch.randn(1, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        constant = self.c(torch.ones(5)).sum() + self.d(torch.ones(1, 5, 5)).sum()
        return self.b(torch.relu(self.a(x))) + constant + self.e(self.query, self.query, self.query)[0].mean()


def test_layers_that_the_input_does_not_reach_stay_and_the_others_are_cut() -> None:
    result = compacted(Unreached(), torch.randn(2, 8), "a", "c", "d")
    assert left(result)["a"] == 2


def test_large_inputs_are_observed_in_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv3d(1, 4, 3, stride=3), nn.Conv3d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.numel())
            return self.b(torch.relu(self.a(x)))

    x = torch.randn(1, 1, 24, 24, 24)
    limit = 3 * x.numel()
    monkeypatch.setattr("growfx.passes.compact.liveness._ELEMENTS", limit)
    monkeypatch.setattr("growfx.passes.trials.comparison._ELEMENTS", limit)
    result = compacted(Watched(), x, "a")
    assert left(result)["a"] == 2
    assert 2 * x.numel() <= max(seen) <= limit


def test_vectors_have_no_rows() -> None:
    assert with_rows(Inputs((torch.randn(8),), {}), 2).args[0].shape == (8,)
    assert with_rows(Inputs((torch.randn(3, 8),), {}), 2).args[0].shape == (2, 8)
    images, times = with_rows(Inputs((torch.randn(1, 3, 4, 4), torch.rand(1)), {}), 2).args
    assert (images.shape[0], times.shape[0]) == (2, 2)


class Stored(nn.Module):
    """Layers in float32 beside a parameter or buffer of another type, that comes first."""

    def __init__(self, dtype: torch.dtype, trained: bool) -> None:
        super().__init__()
        table = torch.eye(3).to(dtype)
        if trained:
            self.table = nn.Parameter(table, requires_grad=dtype.itemsize > 1)
        else:
            self.register_buffer("table", table)
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) @ self.table.float()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16])
def test_tensors_of_another_type_may_stand_beside_the_layers(dtype: torch.dtype, trained: bool) -> None:
    assert left(compacted(Stored(dtype, trained), torch.randn(2, 8), "a"))["a"] == 2
