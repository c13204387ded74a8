"""`growfx.load(path, runtime="sparse")` where a call or the caller changes something: nothing of it is lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from breadth import some
from torch import Tensor, nn
from torch.nn import functional as F

import growfx
from growfx.errors import TraceError
from growfx.passes.lower import network as lower_network
from growfx.passes.lower.state import kept_state
from growfx.recorded.inputs import Inputs
from growfx.runtime.native.library import library_status

pytestmark = pytest.mark.skipif(bool(library_status()), reason=library_status() or "the library is there")

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(7))


@pytest.fixture(autouse=True)
def _always_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    monkeypatch.setattr(lower_network, "_CLEAR", float("inf"))  # such small networks take no time at all
    monkeypatch.setattr(lower_network, "_SHORT", 0.0)
    monkeypatch.setattr("growfx.runtime.choice_cache.cache_folder", lambda: tmp_path / "cache")


class Stepped(nn.Module):
    """A function of the model and its input, between two linear layers or before them."""

    def __init__(self, step: Callable[[Any, Tensor], Tensor], first: bool = True) -> None:
        super().__init__()
        self.step, self.first = step, first
        self.near, self.far = nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("total", torch.zeros(6))
        self.calls = 0
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.step(self, x) if self.first else self.step(self, self.near(x))
        return self.far(torch.relu(x))


def both(model: nn.Module, folder: Path, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The network of a model by the sparse runtime, and as a plain module."""
    growfx.save(growfx.wrap(model, X.clone(), density=0.5).eval(), folder)
    options: Any = {"runtime": "sparse", "example_inputs": X.clone(), "dtype": dtype}
    return (
        growfx.load(folder, model=copy.deepcopy(model), **options),
        growfx.load(folder, model=copy.deepcopy(model), dtype=dtype),
    )


def view_of(x: Tensor) -> Tensor:
    x[:, 0] = 5.0
    return x


def part_of(x: Tensor) -> Tensor:
    x.chunk(2, 1)[1].mul_(3)
    return x


def unread(x: Tensor) -> Tensor:
    y = x + 1
    x.zero_()
    return y


def several(x: Tensor) -> Tensor:
    torch._foreach_mul_([x], 2.0)
    return x


WRITES_INTO_ITS_INPUT: dict[str, Callable[[Tensor], Tensor]] = {
    "a method": lambda x: x.mul_(2),
    "an item": view_of,
    "a part": part_of,
    "a function": lambda x: F.relu_(x),
    "a module": nn.ReLU(inplace=True),
    "a module after one that gives its input back": nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
    "an argument for the result": lambda x: torch.add(x, 1, out=x),
    "all of it": lambda x: x.copy_(x * 3),
    "what nobody reads": unread,
    "a view that is returned": lambda x: x.view(-1, 2, 3).add_(1).flatten(1),
    "what is contiguous already": lambda x: x.contiguous().relu_(),
    "what has the type already": lambda x: x.float().relu_(),
    "past the graph of gradients": lambda x: x.detach().mul_(2),
    "past all checks": lambda x: x.data.mul_(2),
    "several at once": several,
}


@pytest.mark.parametrize("kind", some(WRITES_INTO_ITS_INPUT, lambda kind: kind in list(WRITES_INTO_ITS_INPUT)[::4]))
def test_a_network_that_writes_into_its_input_is_not_planned_and_writes_as_ever(kind: str, tmp_path: Path) -> None:
    function = WRITES_INTO_ITS_INPUT[kind]
    fast, plain = both(Stepped(lambda _, x: function(x)), tmp_path / "out")
    assert "its argument 1" in fast.lowering.native
    for given in (X, torch.arange(18.0).reshape(6, 3).T - 9):
        mine, theirs = given.clone(), given.clone()
        torch.testing.assert_close(fast(mine), plain(theirs).detach())
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    with pytest.raises(TraceError, match="argument 1"):
        growfx.export_native(plain, tmp_path / "made", example_inputs=X)
    assert not (tmp_path / "made").exists()


def test_a_network_that_writes_into_its_image_is_no_page(tmp_path: Path) -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(36, 4))
    with pytest.raises(TraceError, match="argument 1"):
        growfx.export_web(model, tmp_path / "made", example_inputs=torch.randn(1, 1, 6, 6))
    assert not (tmp_path / "made").exists()


def test_the_argument_that_is_written_into_is_named(tmp_path: Path) -> None:
    class Two(Stepped):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
            return self.far(torch.relu(self.near(x) * scale.mul_(2)))

    growfx.save(growfx.wrap(model := Two(lambda _, x: x), {"x": X, "scale": X + 1}), tmp_path / "out")
    given = {"x": X, "scale": X + 1}
    fast: Any = growfx.load(tmp_path / "out", model=model, runtime="sparse", example_inputs=given)
    assert "its argument `scale`" in fast.lowering.native
    assert torch.equal(given["scale"], X + 1), "loading wrote into the example"


def fresh_part(x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 12)
    y[:, :6] = x
    y[:, 6:].add_(1)
    return y[:, 3:9]


def copied(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 1.0
    return y


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x * 2).add_(1),
        lambda x: F.relu_(x + 1),
        lambda x: nn.ReLU(inplace=True)(x - 1),
        lambda x: torch.add(x.detach(), 1, out=torch.empty(x.shape)),
        lambda x: nn.Dropout(inplace=True).eval()(x),
        fresh_part,
        copied,
    ],
)
def test_writes_into_what_the_network_made_itself_are_planned(function: Any, first: bool, tmp_path: Path) -> None:
    fast, plain = both(Stepped(lambda _, x: function(x), first), tmp_path / "out")
    assert fast.lowering.taken == "native", fast.lowering
    given = X.clone()
    torch.testing.assert_close(fast(given), plain(X.clone()).detach())
    assert torch.equal(given, X)


# -- what a model keeps -----------------------------------------------------------------------------------------------


def counts(model: Any, x: Tensor) -> Tensor:
    model.calls += 1
    return x * 2


def counts_in_place(model: Any, x: Tensor) -> Tensor:
    model.total += 1
    return x * 2


def averages(model: Any, x: Tensor) -> Tensor:
    model.total.lerp_(x.mean(0), 0.1)
    return x


def assigns_a_buffer(model: Any, x: Tensor) -> Tensor:
    model.total = model.total + x.mean(0)
    return x


def remembers(model: Any, x: Tensor) -> Tensor:
    model.last = x * 2
    return x


def collects(model: Any, x: Tensor) -> Tensor:
    model.seen.append(x.sum(0))
    return x


def scales_a_parameter(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        model.far.weight.mul_(0.5)
    return x


STATE = {
    counts: "calls",
    counts_in_place: "total",
    averages: "total",
    assigns_a_buffer: "total",
    remembers: "last",
    collects: "seen",
    scales_a_parameter: "far.weight",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", STATE)
def test_a_network_that_changes_with_every_call_runs_unchanged(step: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    fast, plain = both(Stepped(step), tmp_path / "out", dtype)
    assert fast.lowering.taken == "plain"
    assert any(f"`{STATE[step]}`" in note for note in fast.lowering.notes)
    with torch.no_grad():
        for given in (X.to(dtype), X.to(dtype) + 1):
            assert torch.equal(fast(given), plain(given))
    assert fast.calls == plain.calls
    assert torch.equal(fast.total, plain.total)
    assert len(fast.seen) == len(plain.seen)
    assert (fast.last is None) == (plain.last is None)


@pytest.mark.parametrize("step", STATE)
def test_a_network_that_changes_with_every_call_is_not_exported(step: Any, tmp_path: Path) -> None:
    model = Stepped(step).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TraceError, match=f"`{STATE[step]}`|a parameter, a buffer or an attribute"):
        growfx.export_native(model, tmp_path / "made", example_inputs=X)
    assert not (tmp_path / "made").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.calls
    assert not model.seen


def table(model: Any, x: Tensor) -> Tensor:
    if model.last is None or model.last.shape != x.shape:
        model.last = torch.linspace(0, 1, 6).expand_as(x)
    return x + model.last


def test_equal_values_that_are_kept_in_every_call_are_no_state(tmp_path: Path) -> None:
    def notes(model: Any, x: Tensor) -> Tensor:
        model.calls = x.dim(), x.shape[1:], [x.device, x.dtype], {"sizes": {*x.shape}}
        return x * 2

    model = Stepped(notes).eval()
    assert kept_state(model, Inputs((X,), {})) == []
    growfx.export_native(model, tmp_path / "made", example_inputs=X)
    fast, plain = both(model, tmp_path / "out")
    assert fast.lowering.taken == "native"
    torch.testing.assert_close(fast(X), plain(X).detach())


def test_what_is_kept_for_speed_alone_is_no_state(tmp_path: Path) -> None:
    assert kept_state(Stepped(table).eval(), Inputs((X,), {})) == []
    fast, plain = both(Stepped(table), tmp_path / "out")
    assert fast.lowering.taken == "native"
    for given in (X, X[:1], torch.cat([X, X])):
        torch.testing.assert_close(fast(given), plain(given).detach())


@pytest.mark.parametrize(
    "reads", [lambda x: x.numpy().max(), lambda x: max(x.tolist()[0]), lambda x: x.data_ptr() % 3 + 1]
)
def test_numbers_that_are_read_past_torch_are_no_constants(reads: Any, tmp_path: Path) -> None:
    model = Stepped(lambda _, x: x * float(reads(x * 2)))
    with pytest.raises(TraceError, match="past torch"):
        growfx.export_native(model, tmp_path / "made", example_inputs=X)


# -- what the caller changes ------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.near, self.norm, self.drop, self.far = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.far(self.drop(torch.relu(self.norm(self.near(x)))))


def other_memory(net: Any) -> None:
    net.norm.weight.data = net.norm.weight.data * 2


EDITS: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda net: net.norm.register_forward_hook(lambda *given: given[2] * 2),
    "a hook before": lambda net: net.far.register_forward_pre_hook(lambda _, given: (given[0] * 2,)),
    "another module": lambda net: setattr(net, "far", nn.Identity()),
    "another forward": lambda net: setattr(net.far, "forward", lambda x: x),
    "another parameter": lambda net: setattr(net.norm, "weight", nn.Parameter(torch.full((6,), 3.0))),
    "another buffer": lambda net: setattr(net.norm, "running_mean", torch.full((6,), 3.0)),
    "other memory": other_memory,
    "a write": lambda net: nn.init.constant_(net.norm.bias, 2.0),
    "train mode of a part": lambda net: net.drop.train(),
    "a part less": lambda net: setattr(net, "drop", nn.Identity()),
}


# Norms are folded where layers have kernels of their own: their numbers are no longer those of the model.
OF_NUMBERS = ("another parameter", "another buffer", "other memory", "a write")


@pytest.mark.parametrize(
    ("edit", "way"),
    some(
        [*((edit, "native") for edit in EDITS), *((e, "lowered") for e in EDITS if e not in OF_NUMBERS)],
        lambda case: case[1] == "native",
    ),
)
def test_edits_of_a_loaded_network_count(edit: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "lowered":
        monkeypatch.setattr(lower_network, "plan_native", lambda *_: (None, "not wanted here"))
        monkeypatch.setattr(lower_network, "_time_networks", lambda *_: {"lowered": 1.0, "dense": 2.0, "plain": 3.0})
    fast, plain = both(Small(), tmp_path / "out")
    assert fast.lowering.taken == way
    untouched = copy.deepcopy(fast)
    before = plain(X).detach()
    torch.testing.assert_close(fast(X), before)
    for net in (fast, plain):
        EDITS[edit](net)

    def drawn(net: Any) -> Tensor:
        torch.manual_seed(0)
        return net(X).detach()

    edited = drawn(plain)
    assert torch.equal(edited, before) == (edit == "a part less")
    torch.testing.assert_close(drawn(fast), edited)
    torch.testing.assert_close(drawn(copy.deepcopy(fast)), edited)
    torch.testing.assert_close(untouched(X), before)


def test_hooks_of_all_modules_see_those_of_a_loaded_network(tmp_path: Path) -> None:
    fast, _ = both(Small(), tmp_path / "out")
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        fast(X)
    finally:
        handle.remove()
    assert {"BatchNorm1d", "Dropout"} <= set(seen)


def test_after_a_hook_is_removed_the_plan_runs_again(tmp_path: Path) -> None:
    fast, _ = both(Small(), tmp_path / "out")
    program = fast.network
    calls: list[int] = []
    planned = program.planned
    program.planned = lambda *given: calls.append(1) or planned(*given)
    handle = fast.norm.register_forward_hook(lambda *_: None)
    fast(X)
    assert calls == []
    handle.remove()
    fast(X)
    assert calls == [1]
