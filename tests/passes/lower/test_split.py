"""Networks shared between the native runtime and torch: who computes what, in how many parts, and what is recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_nets import Classifier, Function
from torch import Tensor, nn

import growfx
from growfx.passes.lower.plan import calls as recorded_calls
from growfx.passes.lower.plan import plan_run, split
from growfx.passes.lower.plan.builder import NoKernelError
from growfx.passes.lower.plan.calls import Reference, record_calls
from growfx.passes.lower.plan.graph import INPUT
from growfx.passes.lower.plan.rules import RULES
from growfx.passes.operators.nests import leaves
from growfx.recorded.inputs import Inputs
from growfx.runtime.native.library import library_status
from growfx.runtime.native.run import UNSERVED, NativeCall, NetworkRun, TorchCall

has_library = pytest.mark.skipif(bool(library_status()), reason=library_status() or "the library is there")


def run_of(function: Any, *inputs: Tensor) -> NetworkRun:
    return plan_run(Function(function).eval(), {}, Inputs(inputs, {}))


def computes(run: NetworkRun, function: Any, *inputs: Tensor) -> None:
    torch.testing.assert_close(run(inputs, {}), function(*inputs))


@has_library
def test_calls_run_together_that_do_not_wait_for_each_other() -> None:
    def two(x: Tensor) -> Tensor:
        first, second = torch.cumprod(x * 2, 1), torch.logcumsumexp(x.sin(), 1)
        return (first + 1) * (second.exp() + x)

    run = run_of(two, torch.randn(1, 4))
    assert [type(call) for call in run.calls] == [NativeCall, TorchCall, TorchCall, NativeCall]
    assert run.torch_steps == {"aten.cumprod": 1, "aten.logcumsumexp": 1}
    for rows in (1, 3):
        computes(run, two, torch.randn(rows, 4))


@has_library
def test_a_kernel_that_is_there_in_the_whole_but_not_in_a_part_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def picky(builder: Any, arguments: Any, shapes: Any) -> Any:
        if getattr(builder.operand(arguments["self"]), "kernel", "") == INPUT:
            raise NoKernelError("of an input")
        return RULES["aten.mul"](builder, arguments, shapes)

    def function(x: Tensor) -> Tensor:
        y = x.relu()
        return (y * torch.cumprod(x, 1)).exp()

    monkeypatch.setattr(split, "RULES", {**RULES, "aten.mul": picky})
    run = run_of(function, torch.randn(2, 4))
    assert run.torch_steps == {"aten.cumprod": 1, "aten.mul": 1}
    computes(run, function, torch.randn(5, 4))


@has_library
def test_tensors_are_let_go_after_their_last_use() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            x = torch.cumprod(x + 1, 1).tanh()
        return x, x.neg()

    run = run_of(function, torch.randn(2, 4))
    gone: set[int] = set()
    for call in run.calls:
        read = call.inputs if isinstance(call, NativeCall) else [a.number for a in call.args if hasattr(a, "number")]
        assert not gone & set(read)
        assert not gone & set(call.frees)
        gone |= set(call.frees)
    assert len(gone) == len(run.calls) - 1 + 1  # what is handed from call to call, and the input
    computes(run, function, torch.randn(3, 4))


@has_library
@pytest.mark.parametrize(
    "inputs", [(torch.randn(2, 5),), (torch.randn(2, 4).double(),), (torch.randn(2, 4), 1), (torch.randn(0, 4),)]
)
def test_inputs_of_another_kind_are_not_served(inputs: tuple[Any, ...]) -> None:
    run = run_of(lambda x, *_: x + 1, torch.randn(2, 4))
    assert run(inputs, {}) is UNSERVED
    assert run(inputs[:1], {"more": 1}) is UNSERVED


class Holder:
    """An object with a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda x, more: x + more[0], (torch.randn(2, 4), [torch.randn(2, 4)])),
        (lambda x, more: x + more["y"], (torch.randn(2, 4), {"y": torch.randn(4)})),
        (lambda x, more: x + more.tensor, (torch.randn(2, 4), Holder(torch.randn(4)))),
        (lambda x, y: x + y, (torch.randn(2, 4), torch.randn(3, 4)[:1])),
        (lambda x: x + 1, (torch.tensor(1.0),)),
    ],
)
def test_tensors_inside_of_others_and_inputs_without_a_batch_are_refused(function: Any, inputs: Any) -> None:
    with pytest.raises(growfx.TraceError, match="one batch size"):
        run_of(function, *inputs)


def test_a_network_without_any_kernel_is_refused() -> None:
    with pytest.raises(growfx.UnsupportedOperatorError, match="no operator"):
        run_of(lambda x: torch.cumprod(x, 1), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: torch.rand_like(x) + x, "random"),
        (lambda x: x.masked_select(x > 0).sum() + x, "depends on the data"),
    ],
)
def test_operators_that_cannot_be_run_by_themselves_are_refused(function: Any, words: str) -> None:
    with pytest.raises(growfx.TraceError, match=words):
        run_of(function, torch.randn(2, 4))


class Mixed(nn.Module):
    """Attention, norms of several kinds, a table of positions, pooling and a recurrence of views."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, stride=4), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.places = nn.Parameter(torch.randn(1, 16, 8))
        self.group, self.head = nn.GroupNorm(2, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.max_pool2d(self.patches(x), 1).flatten(2).transpose(1, 2) + self.places
        x = x + self.attention(*[self.norm(x)] * 3, need_weights=False)[0]
        order = torch.arange(16).flip(0)
        return self.head(self.group(x[:, order].transpose(1, 2)).mean(2)), x.argmax(1)


@pytest.mark.parametrize("model", [Classifier(), Mixed()])
def test_what_is_recorded_does_not_depend_on_whether_numbers_are_computed(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs((torch.randn(1, 3, 16, 16),), {})
    found = record_calls(model.eval(), inputs, only_floats=False)
    asked: list[str] = []

    def computed(function: Any, args: Any, kwargs: Any) -> Any:
        asked.append(str(function))
        return function(*args, **kwargs)

    monkeypatch.setattr(recorded_calls, "_shaped", computed)
    expected = record_calls(model, inputs, only_floats=False)
    assert asked
    assert found.calls == expected.calls
    # What a norm keeps for a gradient has no size without numbers, and nobody reads it.
    read = {x.number for call in found.calls for x in leaves(call.arguments) if isinstance(x, Reference)}
    for number in read | {*found.inputs, *found.outputs}:
        assert found.shapes[number] == expected.shapes[number]
        assert found.dtypes[number] == expected.dtypes[number]
    assert (found.inputs, found.outputs, found.form) == (expected.inputs, expected.outputs, expected.form)
    assert found.constants.keys() == expected.constants.keys()
    assert all(torch.equal(value, expected.constants[number]) for number, value in found.constants.items())


def test_numbers_are_computed_where_an_operator_refuses_to_run_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(function: Any, args: Any, kwargs: Any) -> Any:
        raise RuntimeError("singular")

    monkeypatch.setattr(recorded_calls, "_shaped", refusing)
    made = record_calls(Classifier().eval(), Inputs((torch.randn(1, 3, 16, 16),), {}))
    assert "aten.convolution" in {call.operator for call in made.calls}
