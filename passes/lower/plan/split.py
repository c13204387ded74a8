"""Plan a whole network as calls of the native runtime, with torch's operators in between where it has no kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.errors import TraceError, UnsupportedOperatorError
from growfx.passes.lower.plan.builder import Builder, NoKernelError
from growfx.passes.lower.plan.calls import Call, Calls, Reference, record_calls
from growfx.passes.lower.plan.file import network_bytes
from growfx.passes.lower.plan.graph import INPUT, Node
from growfx.passes.lower.plan.network import ConstantMasks, plan_of
from growfx.passes.lower.plan.rules import RULES
from growfx.passes.lower.plan.rules.shapes import RULES as SHAPE_RULES
from growfx.passes.operators.nests import leaves, map_leaves
from growfx.recorded.inputs import Inputs
from growfx.runtime.native.plan import Constant
from growfx.runtime.native.run import NativeCall, NetworkRun, Slot, TorchCall
from growfx.runtime.native.sessions import Sessions

__all__ = ["plan_run"]

# Kernels know no numbers but float32, in which these give 1 and 0 for true and false; sums of booleans are another
# matter.
_BOOLEAN: Final = frozenset(SHAPE_RULES) | {
    f"aten.{name}"
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "where", "logical_not", "logical_and", "logical_or", "isnan")
}
# What these give depends on where their input lies in memory, which is not recorded.
_OF_MEMORY = ("aten.as_strided", "aten.as_strided_", "aten.as_strided_copy", "aten._reshape_alias", "aten.set_")
_STRANGE_TAGS: Final = {
    torch.Tag.dynamic_output_shape: "the shape of its result depends on the data",
    torch.Tag.nondeterministic_seeded: "it draws random numbers",
}


def plan_run(model: nn.Module, masks: Mapping[str, Tensor], inputs: Inputs) -> NetworkRun:
    """A network for any batch size: parts with kernels as one call each, and the other operators by torch.

    Args:
        model: a plain model in evaluation mode with values in float32 on the CPU; torch's operators share its tensors.
        masks: name of a parameter -> bool tensor of its shape; what is false is not computed with.
        inputs: example inputs whose tensors have the batch as their first axis.

    Raises:
        UnsupportedOperatorError: there is a kernel for nothing, or an operator that has none cannot be run by itself.
        TraceError: the operators depend on the data.
        ConfigError: there is no library, or it cannot take the network.
    """
    # Of tensors inside containers and objects nobody would see that they are others in the next call.
    if inputs.batch is None or inputs.structural or inputs.signature is None:
        raise TraceError(
            "the native runtime takes tensors of one batch size, and plain values; the network takes others"
        )
    calls = record_calls(model, inputs, only_floats=False)
    assert calls.form is not None
    work = _Split(calls, ConstantMasks(model, masks))
    made = tuple(work.calls())
    if not any(isinstance(call, NativeCall) for call in made):
        raise UnsupportedOperatorError("the native runtime has a kernel for no operator that the network computes")
    spec, values = calls.form
    return NetworkRun(inputs.signature, tuple(calls.inputs), made, spec, tuple(map(work.filled, values)))


class _Split:
    """Shares the operators of a network between the native runtime and torch."""

    def __init__(self, calls: Calls, masks: ConstantMasks) -> None:
        self._calls, self._masks, self._returned = calls, masks, set(calls.outputs)
        self._needed = {number for number in calls.outputs if number not in calls.constants}
        self._alive = self._alive_calls()
        computed = {number for call in self._alive for number in call.results}
        if not self._needed <= {*calls.inputs, *computed}:
            raise TraceError("the network returns a tensor that no operator computes")
        # Of the results, those that are no input and no constant, each once.
        self._calls = replace(calls, outputs=[n for n in dict.fromkeys(calls.outputs) if n in computed])
        # Those that torch computes, by their place.
        self._by_torch = {place for place, call in enumerate(self._alive) if not self._has_kernel_numbers(call)}

    def _alive_calls(self) -> list[Call]:
        """The calls that an output needs, and in `_needed` all that they read."""
        alive: list[Call] = []
        for call in reversed(self._calls.calls):
            if any(number in self._needed for number in call.results):
                alive.append(call)
                self._needed.update(self._reads(call))
        return alive[::-1]

    def _reads(self, call: Call) -> Iterator[int]:
        """The computed tensors among the arguments."""
        for value in leaves(call.arguments):
            if isinstance(value, Reference) and value.number not in self._calls.constants:
                yield value.number

    def _has_kernel_numbers(self, call: Call) -> bool:
        """Whether what it reads and gives is of the types that kernels compute with, and not empty."""
        results, read = [n for n in call.results if n in self._needed], list(self._reads(call))
        allowed = {torch.float32, torch.bool} if call.operator in _BOOLEAN else {torch.float32}
        if not {self._calls.dtypes[number] for number in results} <= allowed:
            return False
        if not {self._calls.dtypes[number] for number in read} <= {torch.float32, torch.bool}:
            return False
        return all(size != (0, 0) for number in (*results, *read) for size in self._calls.shapes[number])

    # -- who computes what --------------------------------------------------------------------------------------------

    def calls(self) -> list[NativeCall | TorchCall]:
        """All calls in the order in which they run."""
        whole = self._try_kernels()
        if not self._by_torch:
            return self._freeing([self._native_call(whole, self._calls.inputs, self._calls.outputs)])
        while True:
            parts = self._parts()
            try:
                plans = [None if is_torch else self._plan(places) for is_torch, places in parts]
            except _WithoutKernelError as refused:
                self._by_torch.add(refused.place)
                continue
            break
        made = list[NativeCall | TorchCall]()
        for (_, places), plan in zip(parts, plans, strict=True):
            made += [plan] if plan is not None else [self._torch_call(self._alive[place]) for place in places]
        return self._freeing(made)

    def _try_kernels(self) -> Builder:
        """Find the calls that have no kernel, each as if all before it had one or came from outside.

        Returns the builder that has made the nodes of the others.
        """
        builder = Builder(self._calls, self._masks.of, RULES)
        for place, call in enumerate(self._alive):
            try:
                if place in self._by_torch:
                    raise NoKernelError("")
                self._build(builder, call)
            except NoKernelError:
                self._by_torch.add(place)
                for number in call.results:
                    if number is not None:
                        builder.keep(number, Node(INPUT, [], self._calls.shapes[number]))
        return builder

    def _build(self, builder: Builder, call: Call) -> None:
        """Make the nodes of a call.

        Raises:
            NoKernelError: there is no kernel for this form of it, or not for all results that are needed.
        """
        rule = RULES.get(call.operator)
        if rule is None:
            raise NoKernelError("")
        shapes = [self._calls.shapes[number] for number in call.results if number is not None]
        made = rule(builder, call.arguments, shapes)
        listed = [made] if isinstance(made, (Node, Constant)) else made
        for number, operand in itertools.zip_longest(call.results, listed):
            if number is not None and operand is not None:
                builder.keep(number, operand)
            elif number in self._needed:
                raise NoKernelError("with further results than the first")

    def _parts(self) -> list[tuple[bool, list[int]]]:
        """Places of calls that run together, and whether torch computes them: as few parts as can follow each other.

        A call joins the first part of its kind that comes after those that it reads from.
        """
        stages, parts = dict.fromkeys(self._calls.inputs, 0), dict[int, list[int]]()
        for place, call in enumerate(self._alive):
            by_torch = place in self._by_torch
            after = max((stages[number] for number in self._reads(call)), default=0)
            stage = after + (after % 2 != by_torch)
            stages |= {number: stage for number in call.results if number is not None}
            parts.setdefault(stage, []).append(place)
        return [(stage % 2 == 1, parts[stage]) for stage in sorted(parts)]

    # -- calls --------------------------------------------------------------------------------------------------------

    def _plan(self, places: Sequence[int]) -> NativeCall:
        """A part as one call of the native runtime."""
        part = [self._alive[place] for place in places]
        made = {number for call in part for number in call.results if number is not None}
        read = dict.fromkeys(number for call in part for number in self._reads(call) if number not in made)
        inputs = list(read) or self._calls.inputs[:1]  # a network that is not read from has no batch size
        inside = set(places)
        outside = {n for place, call in enumerate(self._alive) if place not in inside for n in self._reads(call)}
        outputs = [number for number in made if number in outside or number in self._calls.outputs]
        builder = Builder(replace(self._calls, calls=part, inputs=inputs, outputs=outputs), self._masks.of, RULES)
        for place, call in zip(places, part, strict=True):
            try:
                self._build(builder, call)
            except NoKernelError as refusal:
                raise _WithoutKernelError(place) from refusal
        return self._native_call(builder, inputs, outputs)

    def _native_call(self, builder: Builder, inputs: Iterable[int], outputs: Iterable[int]) -> NativeCall:
        sessions = Sessions(network_bytes(plan_of(builder.finished()), compressed=False))
        return NativeCall(sessions, tuple(inputs), tuple((number, self._calls.dtypes[number]) for number in outputs))

    def _torch_call(self, call: Call) -> TorchCall:
        """The same operator by torch.

        Raises:
            UnsupportedOperatorError: one that cannot be run by itself.
        """
        function: Any = call.function
        schema = function._schema
        reasons = [why for tag, why in _STRANGE_TAGS.items() if tag in function.tags]
        if call.operator in _OF_MEMORY:
            reasons.append("its result depends on where its input lies in memory")
        written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
        if written not in ([], [0]):
            reasons.append("it writes into its arguments")
        if reasons:
            raise UnsupportedOperatorError(f"`{call.operator}` has no kernel, and {reasons[0]}")
        filled = {name: self.filled(value) for name, value in call.arguments.items()}
        args = tuple(filled[a.name] for a in schema.arguments if not a.kwarg_only)
        kwargs = {a.name: filled[a.name] for a in schema.arguments if a.kwarg_only}
        outputs = tuple(
            (n, self._calls.shapes[n]) if n is not None and n in self._needed else None for n in call.results
        )
        return TorchCall(call.operator, function, args, kwargs, outputs, bool(written))

    def filled(self, nest: Any) -> Any:
        """A nest with a `Slot` for each tensor that is computed, and the tensor for each that is constant."""

        def one(value: Any) -> Any:
            if not isinstance(value, Reference):
                return value
            constant = self._calls.constants.get(value.number)
            return Slot(value.number) if constant is None else constant.detach()

        return map_leaves(one, nest)

    def _freeing(self, made: Sequence[NativeCall | TorchCall]) -> list[NativeCall | TorchCall]:
        """The same calls, each with the tensors that nobody needs after it."""
        kept, freed = set(self._returned), list[NativeCall | TorchCall]()
        for call in reversed(made):
            touched = dict.fromkeys([*_read(call), *_given(call)])
            frees = tuple(number for number in touched if number not in kept)
            kept.update(frees)
            freed.append(replace(call, frees=frees))
        return freed[::-1]


class _WithoutKernelError(Exception):
    """The call at this place has no kernel where others before it come from outside."""

    def __init__(self, place: int) -> None:
        super().__init__(place)
        self.place = place


def _read(call: NativeCall | TorchCall) -> Iterable[int]:
    if isinstance(call, NativeCall):
        return call.inputs
    return (x.number for x in pytree.tree_leaves((call.args, call.kwargs)) if isinstance(x, Slot))


def _given(call: NativeCall | TorchCall) -> Iterable[int]:
    return (output[0] for output in call.outputs if output is not None)
