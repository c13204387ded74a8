"""`growfx.load(path, runtime="sparse")` through the native runtime: what it computes, and what it leaves to torch."""

from __future__ import annotations

import copy
import os
import threading
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import some
from lower_nets import NETS, same, saved
from native_nets import Function
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import growfx
from growfx.passes.lower import native as lower_native
from growfx.passes.lower import network as lower_network
from growfx.runtime.native.library import library_status
from growfx.runtime.native.run import NetworkRun

pytestmark = pytest.mark.skipif(bool(library_status()), reason=library_status() or "the library is there")

X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _always_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    monkeypatch.setattr(lower_network, "_CLEAR", float("inf"))  # such small networks take no time at all
    monkeypatch.setattr(lower_network, "_SHORT", 0.0)
    # Built once for all tests, but what is timed belongs to one.
    monkeypatch.setattr("growfx.runtime.choice_cache.cache_folder", lambda: tmp_path / "cache")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def load(folder: Path, kind: str = "residual", **options: Any) -> Any:
    return growfx.load(folder, model=NETS[kind](), runtime="sparse", **{"example_inputs": X[:1], **options})


class Layers(nn.Module):
    """Two linear layers with a function of tensors between them."""

    def __init__(self, function: Callable[..., Any] = lambda x: x, inputs: int = 6, middle: int = 6) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 6), nn.Linear(middle, 4)
        self.function = function

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Any:
        return self.last(self.function(torch.relu(self.first(x)), *others, **named))


def through(model: nn.Module, folder: Path, *inputs: Tensor, density: float = 0.5) -> tuple[Any, nn.Module]:
    """The network of a model by the sparse runtime, and densely."""
    net = growfx.wrap(model, inputs, density=density).eval()
    growfx.save(net, folder)
    got: Any = growfx.load(folder, model=copy.deepcopy(model), runtime="sparse", example_inputs=inputs)
    return got, growfx.unwrap(net).eval()


def native_runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes, for every call of a run from now on, whether it computed something."""
    served: list[bool] = []
    call = NetworkRun.__call__

    def noted(self: NetworkRun, args: Any, kwargs: Any) -> Any:
        made = call(self, args, kwargs)
        served.append(made is not lower_native.UNSERVED)
        return made

    monkeypatch.setattr(NetworkRun, "__call__", noted)
    return served


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["residual", "mixed", "attention"])
def test_a_network_is_one_call_at_any_batch_size(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = saved(kind, tmp_path / "net")
    net = load(folder, kind)
    report = net.lowering
    assert (report.taken, report.native_calls, report.torch_steps, report.native) == ("native", 1, {}, "")
    assert set(report.choices.values()) == {"native"}
    assert "running: native (one call)" in str(report)
    served = native_runs(monkeypatch)
    with torch.no_grad():
        for rows in (1, 2, 7, 1, 16):
            x = torch.randn(rows, 3, 12, 12)
            same(net(x), dense(x))
        same(net(X.transpose(2, 3)), dense(X.transpose(2, 3)))
    with torch.inference_mode():
        same(net(X), dense(X))
    assert served == [True] * 7


@pytest.mark.parametrize("kind", some(["residual", "mixed", "attention"], lambda kind: kind == "mixed"))
def test_other_sizes_are_computed_by_a_kernel_for_each_layer(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, dense = saved(kind, tmp_path / "net")
    net = load(folder, kind)
    served = native_runs(monkeypatch)
    with torch.no_grad():
        for x in (torch.randn(3, 3, 16, 20), X[:, :, :8, :8]):
            same(net(x), dense(x))
        assert net(X[:0]).shape == (0, 5)
    assert served == [False] * 3


def test_nan_reaches_the_outputs_that_weights_connect_it_to(tmp_path: Path) -> None:
    got, _ = through(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), tmp_path, torch.randn(2, 6))
    mask = growfx.artifact.load_masks(tmp_path)["0"]
    mask_2 = growfx.artifact.load_masks(tmp_path)["2"]
    for column in range(6):
        x = torch.randn(1, 6)
        x[0, column] = torch.nan
        reached = (mask_2.float() @ mask[:, column].float()) > 0
        assert got(x).isnan()[0].tolist() == reached.tolist()


def test_operators_without_a_kernel_are_computed_by_torch_and_named(tmp_path: Path) -> None:
    model = Layers(lambda x: F.relu(torch.cumprod(x, 1) + 1) + torch.cumprod(x * 2, 1))
    got, dense = through(model, tmp_path, torch.randn(2, 6))
    report = got.lowering
    assert report.torch_steps == {"aten.cumprod": 2}
    assert report.native_calls == 2
    assert "2 calls; torch computes aten.cumprod (2)" in str(report)
    assert report.choices == {"first": "native", "last": "native"}
    for rows in (1, 2, 5):
        x = torch.randn(rows, 6)
        with torch.no_grad():
            same(got(x), dense(x))


def test_a_layer_that_torch_computes_is_named_dense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growfx.passes.lower.plan.split.RULES", _rules_without("aten.convolution"))
    folder, dense = saved("residual", tmp_path / "net")
    report = load(folder).lowering
    assert report.torch_steps == {"aten.convolution": 4}
    assert report.choices["head"] == "native"
    assert {report.choices[name] for name in ("stem", "first", "shortcut", "second")} == {"dense"}
    assert "no kernel" in report.layers[0].reason
    with torch.no_grad():
        same(load(folder)(X), dense(X))


def _rules_without(*names: str) -> dict[str, Any]:
    from growfx.passes.lower.plan.rules import RULES

    return {name: rule for name, rule in RULES.items() if name not in names}


def _top(x: Tensor) -> Tensor:
    values, places = x.topk(3, 1)
    return torch.zeros_like(x).scatter(1, places, values) + x.gather(1, places).sum(1, keepdim=True)


def _masked(x: Tensor) -> Tensor:
    return torch.where((x > 0.2) | (x < 0.1), x, x.flip(1)) * (x == x.amax(1, keepdim=True))


def _sorted(x: Tensor) -> Tensor:
    return x.sort(1).values + x.argsort(1) + (x > 0.1).sum(1, keepdim=True)


def _double(x: Tensor) -> Tensor:
    return (x.double() * 3).cumsum(1).float()


def _split(x: Tensor) -> Tensor:
    first, second = x.sort(1).values.split(3, 1)
    return torch.cat([second, torch.arange(x.shape[0]).unsqueeze(1) + first, x[:, :0]], 1)


@pytest.mark.parametrize("function", [_top, _masked, _sorted, _double, _split])
def test_numbers_of_other_types_are_torchs(function: Callable[..., Any], tmp_path: Path) -> None:
    got, dense = through(Layers(function), tmp_path, torch.randn(2, 6))
    assert got.lowering.taken == "native"
    assert got.lowering.torch_steps
    for rows in (1, 2, 5):
        x = torch.randn(rows, 6)
        with torch.no_grad():
            same(got(x), dense(x))


class Words(nn.Module):
    """Tokens with a mask, by name, and results of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> dict[str, Any]:
        x = self.table(tokens) * scale
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        y = self.last(torch.relu(self.first(x)).mean(1))
        best = y.argmax(-1)
        return {"logits": y, "best": best, "rows": len(tokens), "more": (None, best == 1, "text"), "table": y[:, :2]}


def test_tokens_and_results_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, mask = torch.randint(9, (2, 5)), torch.rand(2, 5) > 0.3
    got, dense = through(Words(), tmp_path, tokens, mask)
    assert got.lowering.taken == "native", got.lowering
    served = native_runs(monkeypatch)
    for rows in (1, 4):
        tokens, mask = torch.randint(9, (rows, 5)), torch.rand(rows, 5) > 0.3
        expected, found = dense(tokens, mask), got(tokens, mask)
        assert found.keys() == expected.keys()
        assert found["rows"] == rows
        assert (found["more"][0], found["more"][2]) == (None, "text")
        for one, other in ((found["more"][1], expected["more"][1]), (found["best"], expected["best"])):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
        same(found["logits"], expected["logits"].detach())
        same(found["table"], expected["table"].detach())
    assert served == [True] * 2
    with torch.no_grad():
        same(got(tokens, mask, 2.0)["logits"], dense(tokens, mask, 2.0)["logits"])
        same(got(tokens, mask=mask)["logits"], dense(tokens, mask=mask)["logits"])
    assert served == [True] * 2 + [False] * 2


def test_inputs_that_come_back_and_parameters_that_are_returned(tmp_path: Path) -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.layer(x), x, self.layer.weight * 2, x.flatten(1), x

    got, dense = through(Through(), tmp_path, torch.randn(2, 6))
    x = torch.randn(3, 6)
    for one, other in zip(got(x), dense(x), strict=True):
        same(one, other.detach())


# -- what it does not compute ------------------------------------------------------------------------------------------


UNPLANNED: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[x[:, 0] >= 0],
    lambda x: x[x[:, 0] >= x.mean()].sum(0, keepdim=True) + x,
    lambda x: x * float(x.sum() > 0),
    lambda x: x if torch.equal(x, x.abs() + 1) else x + 1,
    lambda x: x + torch.rand(x.shape[0], 6),
    lambda x: x[::2],
    lambda x: x * (x.shape[0] // 2),
    lambda x: x if x.shape[0] == 1 else x * 2,
]


@pytest.mark.parametrize("function", some(UNPLANNED, lambda function: function in UNPLANNED[::2]))
def test_what_depends_on_the_data_the_batch_or_chance_is_not_planned(
    function: Callable[..., Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    got, dense = through(Layers(function), tmp_path, torch.randn(4, 6))
    assert got.lowering.taken != "native"
    assert got.lowering.native or got.lowering.notes
    for x in (torch.randn(1, 6), torch.randn(5, 6)):
        with torch.no_grad():
            torch.manual_seed(1)
            expected = dense(x)
            torch.manual_seed(1)
            same(got(x), expected)


def test_outputs_that_would_differ_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = lower_native.masks_by_parameter
    monkeypatch.setattr(
        lower_native, "masks_by_parameter", lambda *given: {name: ~mask for name, mask in right(*given).items()}
    )
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    assert net.lowering.taken != "native"
    assert "differ" in net.lowering.native
    with torch.no_grad():
        same(net(X), dense(X))


@pytest.mark.parametrize("reason", ["no C++ compiler: `c++` cannot be run", "compiling failed: error"])
def test_without_the_library_the_report_says_why(reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_native, "library_status", lambda: reason)
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    assert net.lowering.taken != "native"
    assert f"not by the native runtime: {reason}" in str(net.lowering)
    with torch.no_grad():
        same(net(X), dense(X))


def test_bfloat16_is_computed_by_other_kernels(tmp_path: Path) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder, dtype=torch.bfloat16)
    assert "float32" in net.lowering.native
    with torch.no_grad():
        same(net(X.bfloat16()).float(), dense(X), tolerance=0.05)


@pytest.mark.slow
def test_a_network_that_is_not_clearly_faster_is_timed_against_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_network, "_CLEAR", 0.0)
    monkeypatch.setattr(lower_network, "_SECONDS", 0.0)
    folder, dense = saved("residual", tmp_path / "net")
    for best in ("native", "lowered", "dense", "plain"):
        monkeypatch.setattr(
            lower_network,
            "interleaved_minima",
            lambda calls, best=best, **_: {name: 1.0 if name == best else 2.0 for name in calls},
        )
        with growfx.runtime.choice_cache.ignored_choices():
            net = load(folder)
        assert net.lowering.taken == best
        assert set(net.lowering.microseconds) == {"native", "lowered", "dense", "plain"}
        assert ("native" in net.lowering.choices.values()) == (best == "native")
        assert net.lowering.native_calls == int(best == "native")
        assert len(net.lowering.layers) == 5
        with torch.no_grad():
            for x in (X, torch.randn(1, 3, 16, 16)):
                same(net(x), dense(x))


def test_times_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("growfx.passes.lower.kept._NOISY", float("inf"))
    folder, _ = saved("residual", tmp_path / "net")
    assert [load(folder).lowering.cached for _ in range(2)] == [False, True]
    assert not load(folder, batch=2).lowering.cached


# -- as a module -------------------------------------------------------------------------------------------------------


def test_what_watches_torch_sees_operators_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    served = native_runs(monkeypatch)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            same(net(X), dense(X))
        assert counter.get_total_flops() > 0
        other = torch.randn(2, 3, 12, 12)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            traced: Any = torch.jit.trace(net, (X,), check_trace=False)
        same(traced(other), dense(other))
        same(torch.vmap(net)(X[None])[0], dense(X))
        program = torch.export.export(net, (X,))
        same(program.module()(other), dense(other))
    assert net(X) is not None
    assert served == [*[False] * (len(served) - 1), True]


def test_a_compiled_network_computes_the_same(tmp_path: Path) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    compiled: Any = torch.compile(load(folder), backend="eager")
    with torch.no_grad():
        for x in (X, torch.randn(3, 3, 12, 12)):
            same(compiled(x), dense(x))


def test_a_gradient_is_refused_and_none_comes_back(tmp_path: Path) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    with pytest.raises(growfx.ConfigError, match="requires a gradient"):
        net(X.clone().requires_grad_())
    assert not net(X).requires_grad
    with torch.no_grad():
        same(net(X.clone().requires_grad_()), dense(X))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net(X).dtype == torch.float32


def test_a_parameter_that_is_written_to_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    twin = copy.deepcopy(net)
    served = native_runs(monkeypatch)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        assert not net(X).any()
        same(twin(X), dense(X))
        assert served == [True]
        assert not copy.deepcopy(net)(X).any()
        for x in (X, torch.randn(1, 3, 16, 16)):
            same(twin(x), dense(x))


def test_threads_are_those_of_torch_when_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from growfx.runtime.native.library import NativeNetwork

    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    asked: list[int] = []
    set_threads = NativeNetwork.set_threads
    monkeypatch.setattr(
        NativeNetwork, "set_threads", lambda self, threads: (asked.append(threads), set_threads(self, threads))[1]
    )
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        with torch.no_grad():
            same(net(X), dense(X))
    assert asked == [1, 2, 1]


def test_many_threads_call_one_network(tmp_path: Path) -> None:
    folder, dense = saved("mixed", tmp_path / "net")
    net = load(folder, "mixed")
    start = threading.Barrier(6)

    def work(seed: int) -> None:
        start.wait()
        generator = torch.Generator().manual_seed(seed)
        for rows in (1, 3, 2, 1):
            x = torch.randn(rows, 3, 12, 12, generator=generator)
            with torch.no_grad():
                same(net(x), dense(x))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")
def test_a_child_of_a_fork_calls_it_too(tmp_path: Path) -> None:
    folder, dense = saved("residual", tmp_path / "net")
    net = load(folder)
    torch.set_num_threads(2)
    with torch.no_grad():
        same(net(X), dense(X))  # threads of the library are there from now on
    torch.set_num_threads(1)
    expected = dense(X).detach()
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.allclose(net(X), expected, atol=1e-5) else 1)
    assert os.waitpid(child, 0)[1] == 0
    with torch.no_grad():
        same(net(X), dense(X))


def test_a_function_of_torch_that_fails_on_an_input_fails_as_it_does_in_torch(tmp_path: Path) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.layer = nn.Embedding(5, 6), nn.Linear(6, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.layer(self.table(tokens).mean(1))

    got, _ = through(Table(), tmp_path, torch.randint(5, (2, 3)))
    assert got.lowering.taken == "native"
    with pytest.raises(IndexError):
        got(torch.tensor([[1, 9, 2]]))


def test_functions_with_parameters_of_their_own(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Function(lambda x, table: x @ table + table.sum(), torch.randn(6, 6)))
    got, dense = through(model.eval(), tmp_path, torch.randn(2, 6))
    x = torch.randn(3, 6)
    same(got(x), dense(x).detach())


class Scaled(nn.Module):
    """Called by keywords alone, one of which has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, *, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(self.first(x).relu()) * scale


@pytest.mark.parametrize("given", [None, {"x": torch.ones(1, 8), "scale": 3.0}])
def test_a_network_that_is_called_by_keywords_is_planned_for_what_they_give(given: Any, tmp_path: Path) -> None:
    call: Any = {"x": torch.ones(1, 8), "scale": 3.0}
    net = growfx.wrap(Scaled(), call, density=0.5).eval()
    growfx.save(net, tmp_path / "a")
    fast = growfx.load(tmp_path / "a", model=Scaled(), runtime="sparse", example_inputs=given)
    assert fast.lowering.taken == "native"
    for rows, scale in ((1, 3.0), (4, 3.0), (4, 0.5)):
        x = torch.randn(rows, 8)
        with torch.no_grad():
            same(fast(x=x, scale=scale), net(x=x, scale=scale))
