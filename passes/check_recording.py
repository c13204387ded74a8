"""Record a model and compare the graph with it: outputs, and gradients where the operators do not tell them.

Everything runs on copies that share the model's values, in a mode that is set flag by flag: nothing of the model, its
arguments or the process is touched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from growfx.errors import TraceError
from growfx.masked.isolation import (
    caches_bypassed,
    clock_shifted,
    generators_restored,
    python_randomness,
    tables_restored,
)
from growfx.masked.layers import MaskedLayer
from growfx.masked.modules import chain_tensors
from growfx.masked.weight_reads import ModelCode
from growfx.passes.free_batch import free_batch
from growfx.passes.list_unmasked import list_unmasked
from growfx.passes.record.call import can_be_written
from growfx.passes.record.meta_shapes import short_shapes
from growfx.passes.record.recording import (
    DataDependentError,
    NeedsValuesError,
    Recording,
    cuda_devices,
    meta_copy,
    record,
    working_copy,
)
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RECORDED_CONSTANT, RecordedGraph, compiled
from growfx.recorded.trace_report import TraceReport

__all__ = ["Recorded", "record_checked"]

_SEEDS = (0, 1, 2)
_Named = tuple[str, Any]  # what is compared, and its value
_REDRAWN = (1, 2)  # seeds of inputs under which a value read from data has to be the same


class Recorded(Protocol):
    """What recordings are made for: a masked network, or a program of the sparse runtime."""

    trace_report: TraceReport

    def recordings_in_mode(self, training: bool) -> Iterable[RecordedGraph]:
        """What was recorded in train or evaluation mode so far."""
        ...

    @property
    def shell(self) -> nn.Module:
        """The model that is recorded."""
        ...

    @property
    def masked_parameters(self) -> Mapping[str, MaskedLayer]:
        """Masked layers that are not among the shell's modules."""
        ...

    def note_direct_read(self, name: str) -> None:
        """Take note that the weight of the masked layer `name` is read without a call of the layer."""
        ...


def record_checked(
    net: Recorded,
    inputs: Inputs,
    training: bool,
    model: nn.Module | None = None,
    holds_for_values: bool = False,
    look_inside: bool = False,
) -> RecordedGraph:
    """Record the net's shell in the given mode and compare the graph with the model's own forward.

    Args:
        net: the net whose report is filled in.
        inputs: what to record for; recorded with two rows, compared with another number of them.
        training: the mode.
        model: the model that came in; later recordings are compared with the net's own shell.
        holds_for_values: record what the model does on these very values, whatever it takes out of them, and compare
            on them alone.
        look_inside: in eval mode, record what autograd functions compute; gradients are not compared then.

    Raises:
        TraceError: the model fails on the inputs.
    """
    work = _Work(net, training, model or net.shell, look_inside)
    if holds_for_values:
        made = dataclasses.replace(work.finished(work.with_values(inputs), batch_is_free=False), holds_for_values=True)
        difference = work.difference(made, [inputs]) or work.unseen(made, inputs)
    else:
        made, difference = work.recorded(inputs)
        if made.holds is not None:
            branches = net.trace_report.branches
            branches += [read for read in work.branches if read not in branches]
    if difference:
        net.trace_report.notes.append(f"{'train' if training else 'eval'} mode: {difference}")
    return dataclasses.replace(made, faithful=made.faithful and not difference)


class _Work:
    """One recording of a net's shell in one mode."""

    def __init__(self, net: Recorded, training: bool, model: nn.Module, look_inside: bool = False) -> None:
        self.net, self.training, self.model = net, training, model
        self.look_inside = look_inside and not training
        self.shell, self.report = net.shell, net.trace_report
        self.flags = _flags(self.shell, training)
        self.on_meta = _on_meta(self.shell)
        self.drew = False  # whether a run drew random numbers on the CPU
        self.writes = True  # whether a run may write into parameters, which is not known before one was recorded
        self.pinned = ""  # why the model itself was recorded for the values that it reads from its data, and these
        self.branches: list[str] = []

    # -- recording ------------------------------------------------------------------------------------------------

    def recorded(self, inputs: Inputs) -> tuple[RecordedGraph, str]:
        """A recording with a free batch where the model has one, and how it differs from the model."""
        small = inputs.with_batch(2)
        made, difference, refusal = None, "", None
        try:
            made, difference = self._by_shapes_or_values(small, self._trials(inputs))
        except TraceError as error:
            refusal = error
        if made is not None and not difference:
            return made, ""
        if made is not None and made.batch_is_free and small.batch is not None:
            freed = self._with_free_batch(inputs)
            if freed is not None:
                return freed, ""
        if inputs.batch is not None:
            # What is first in these inputs is not a batch, or the forward is another one for every size of it.
            given = self._as_given(inputs)
            if given is not None:
                return given, ""
        if made is not None and self.pinned:  # and for other sizes it reads others
            self.report.opaque.setdefault("", self.pinned)
            return self._run(small, batch_is_free=False), ""
        if made is not None:
            return made, difference
        assert refusal is not None
        return self._unrecorded(inputs, refusal), ""

    def _as_given(self, inputs: Inputs) -> RecordedGraph | None:
        """A faithful recording for these very shapes; None where there is none."""
        try:
            made, difference = self._by_shapes_or_values(inputs, [inputs.redrawn(1), inputs], batch_is_free=False)
        except TraceError:
            return None
        return None if difference or not made.faithful else made

    def _unrecorded(self, inputs: Inputs, refusal: TraceError) -> RecordedGraph:
        """What stands for the recording of a model that runs, but not while it is recorded.

        Raises:
            TraceError: it does not run at all.
        """
        copied = working_copy(self.shell, own_values=True)
        _set_flags(copied, self.flags)
        names = {id(module): name for name, module in copied.named_modules()}
        called: dict[str, None] = {}
        for module in copied.modules():
            module.register_forward_pre_hook(lambda module, _: called.setdefault(names[id(module)]) and None)
        try:
            with (
                generators_restored(cuda_devices(self.shell), copied),
                tables_restored(copied, self.shell),
                torch.no_grad(),
            ):
                given = inputs.copied()
                copied(*given.args, **given.kwargs)
        except Exception:
            raise refusal from refusal.__cause__
        self.report.opaque.setdefault("", f"it cannot be recorded: {refusal}")
        graph = fx.Graph()
        graph.output(None)
        function, code = compiled(graph)
        called.pop("", None)
        return RecordedGraph(graph, list(called), False, function, code, batch_is_free=False)

    def _by_shapes_or_values(
        self, inputs: Inputs, trials: list[Inputs], batch_is_free: bool = True
    ) -> tuple[RecordedGraph, str]:
        """Record without values, which most need not, and with them where that fails or differs from the model."""
        if not self.on_meta:
            with contextlib.suppress(NeedsValuesError):
                made = self._run(inputs, batch_is_free, without_values=True)
                difference = self.difference(made, trials)
                if not difference:
                    return made, ""
        made = self._run(inputs, batch_is_free)
        return made, self.difference(made, trials)

    def _run(self, inputs: Inputs, batch_is_free: bool, without_values: bool = False) -> RecordedGraph:
        """Record the shell; what takes values out of data is noted in the report and recorded whole."""
        while "" not in self.report.opaque:
            try:
                made = self._record(inputs, without_values=without_values)
            except DataDependentError as stop:
                pinned = None if stop.module else self._pinned(inputs, batch_is_free, stop.reason)
                if pinned is not None:
                    return pinned
                self.report.opaque[stop.module] = stop.reason
            else:
                return self.finished(made, batch_is_free)
        # Where the model itself reads data there is nothing left to record whole: the graph is only to look at.
        made = self.finished(self.with_values(inputs), batch_is_free=False)
        return dataclasses.replace(made, faithful=False, holds_for_values=True)

    def _pinned(self, inputs: Inputs, batch_is_free: bool, reason: str) -> RecordedGraph | None:
        """A recording in which values that the model itself reads from its data are constants that the graph checks.

        None where other inputs give other values, so that it would hold for these alone, or where what it reads cannot
        be a constant.
        """
        if self.on_meta:
            return None
        opaque = dict(self.report.opaque)
        while True:
            try:
                recording = self._record(inputs, without_values=False, pinned=True)
            except DataDependentError as stop:
                if stop.module:
                    self.report.opaque[stop.module] = stop.reason
                    continue
                self.report.opaque.clear()
                self.report.opaque.update(opaque)
                return None
            break
        made = self.finished(recording, batch_is_free)
        # Outputs are compared by the caller; what decides here is whether others read the same.
        others = [inputs.copied(_negated), *(inputs.redrawn(seed) for seed in _REDRAWN)]
        if any(_reads(made.run, self.training, self.shell, other) is False for other in others):
            return None
        self.pinned, self.branches = reason, recording.branches
        holds = functools.partial(_reads, made.run, self.training)
        return dataclasses.replace(made, holds=holds)

    def _record(self, inputs: Inputs, *, without_values: bool, pinned: bool = False) -> Recording:
        run_on = meta_copy(self.shell) if without_values else working_copy(self.shell, own_values=self.writes)
        _set_flags(run_on, self.flags)
        made = record(
            self.shell,
            inputs.args,
            inputs.kwargs,
            opaque=self.report.opaque,
            run_on=run_on,
            without_values=without_values,
            look_inside=self.look_inside,
            pinned=pinned,
        )
        self.writes = made.writes_parameters
        return made

    def with_values(self, inputs: Inputs) -> Recording:
        """Record what the shell does on these very values, whatever it takes out of them."""
        run_on = working_copy(self.shell, own_values=self.writes)
        _set_flags(run_on, self.flags)
        return record(
            self.shell, inputs.args, inputs.kwargs, allow_data=True, run_on=run_on, look_inside=self.look_inside
        )

    def unseen(self, made: RecordedGraph, inputs: Inputs) -> str:
        """Whether the graph holds a constant that other inputs make another one: what no operator computed."""
        ours = self._constants(made.graph)
        if not ours:
            return ""
        try:
            other = self.with_values(inputs.redrawn(1))
        except TraceError:
            return ""
        theirs = self._constants(other.graph)
        for name in theirs:
            del self.shell._buffers[name]
            self.shell._non_persistent_buffers_set.discard(name)
        # Another branch has other constants, of which nothing is known.
        same = len(ours) == len(theirs) and len(made.graph.nodes) == len(other.graph.nodes)
        if same and any(not _equal(a, b) for a, b in zip(ours.values(), theirs.values(), strict=True)):
            return "a value comes from code that is not seen (TorchScript, an extension), so the graph misses paths"
        return ""

    def _constants(self, graph: fx.Graph) -> dict[str, Tensor]:
        names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
        return {name: self.shell.get_buffer(name) for name in names if name.startswith(RECORDED_CONSTANT)}

    def finished(self, made: Recording, batch_is_free: bool) -> RecordedGraph:
        """The recording in use; what it met goes into the report."""
        for name in made.read:
            self.net.note_direct_read(name)
        for effect in made.side_effects:
            if effect not in self.report.side_effects:
                self.report.side_effects.append(effect)
        for kind in made.left_out:
            note = f"the output holds a `{kind}`, which the graph leaves out"
            if note not in self.report.notes:
                self.report.notes.append(note)
        unmasked = list_unmasked(self.shell, made, self.net.masked_parameters.values())
        self.report.unmasked |= {name: why for name, why in unmasked.items() if name not in self.report.unmasked}
        function, code = compiled(made.graph)
        return RecordedGraph(
            made.graph,
            made.called,
            faithful=True,
            run=function,
            code=code,
            batch_is_free=batch_is_free,
            own_gradient=made.own_gradient,
            used=tuple(made.used),
        )

    def _with_free_batch(self, inputs: Inputs) -> RecordedGraph | None:
        """The recording with numbers that follow the batch made to do so; None where that gives no faithful one."""
        for without_values in (True, False) if not self.on_meta else (False,):
            try:
                two, three = (self._record(inputs.with_batch(rows), without_values=without_values) for rows in (2, 3))
            except (NeedsValuesError, DataDependentError, TraceError):
                continue
            if free_batch(two.graph, three.graph):
                freed = self.finished(two, batch_is_free=True)
                trials = [inputs.with_batch(rows).redrawn(1) for rows in (1, 5, 4, 2)]
                trials = trials[1:] if self.training else trials
                if not self.difference(freed, trials):
                    return freed
        return None

    # -- comparison -----------------------------------------------------------------------------------------------

    def _trials(self, inputs: Inputs) -> list[Inputs]:
        """Inputs to compare on, best first: a model may refuse another batch size, or other values."""
        # A single row is cheapest, but batch statistics need several.
        other, recorded = inputs.with_batch(3 if self.training else 1), inputs.with_batch(2)
        return [other.redrawn(seed=1), recorded.redrawn(seed=1), recorded]

    def difference(self, made: RecordedGraph, trials: list[Inputs]) -> str:
        """How the graph differs from the model on the first inputs the model takes; "" if it does not."""
        if not made.faithful or self._is_proven(made):
            return ""
        for given in trials:
            try:
                expected = self._outcome(self.model, None, given, _SEEDS[0], made.own_gradient)
            except Exception:
                continue
            return self._compared(made, given, expected)
        return "the model fails when called a second time, so the graph cannot be compared with it"

    def _is_proven(self, made: RecordedGraph) -> bool:
        """The very same operators as in the other mode, which were compared already, need no second comparison."""
        return not made.own_gradient and any(
            recording.faithful and recording.code.src == made.code.src and not recording.own_gradient
            for recording in self.net.recordings_in_mode(not self.training)
        )

    def _compared(self, made: RecordedGraph, given: Inputs, expected: list[_Named]) -> str:
        for seed in _SEEDS if self.drew else _SEEDS[:1]:
            if seed != _SEEDS[0]:
                expected = self._outcome(self.model, None, given, seed, made.own_gradient)
            try:
                got = self._outcome(self.shell, made.run, given, seed, made.own_gradient)
            except Exception as error:
                return f"the graph fails where the model does not: {type(error).__name__}: {error}"
            difference = _first_difference(expected, got)
            if difference:
                return difference
        return ""

    def _outcome(
        self, module: nn.Module, run: Callable[..., Any] | None, given: Inputs, seed: int, gradients: bool
    ) -> list[_Named]:
        """Outputs, and gradients of a sum over them."""
        gradients = gradients and not self.look_inside and not self.on_meta and self._obeys()
        copied = working_copy(module, trained=gradients, own_values=self.writes)
        _set_flags(copied, self.flags)
        function = copied if run is None else functools.partial(run, copied)
        given = given.copied()
        with (
            generators_restored(cuda_devices(self.shell), copied),
            caches_bypassed(copied),
            tables_restored(copied, module),
            ModelCode(),
            clock_shifted() if run is None else contextlib.nullcontext(),
            torch.set_grad_enabled(gradients),
            short_shapes() if self.on_meta else contextlib.nullcontext(),
        ):
            torch.manual_seed(seed)
            np.random.seed(seed)  # noqa: NPY002 - what models draw from
            random.seed(seed)
            before = torch.get_rng_state(), python_randomness()
            found = list(_leaves(function(*given.args, **given.kwargs)))
            self.drew |= not torch.equal(before[0], torch.get_rng_state()) or before[1] != python_randomness()
            outputs = [(f"output {place}", value) for place, value in enumerate(found)]
            return [*outputs, *_gradients(copied, found)] if gradients else outputs

    def _obeys(self) -> bool:
        """Whether all weights are zero outside their masks, so that a step in train mode writes nothing."""
        return all(layer.obeys() for layer in self.shell.modules() if isinstance(layer, MaskedLayer))


def _reads(run: Callable[..., Any], training: bool, shell: nn.Module, given: Inputs) -> bool | None:
    """Whether a graph that checks the values it reads from its data accepts those of these inputs; None: it fails."""
    copied = working_copy(shell)
    _set_flags(copied, _flags(shell, training))
    given = given.copied()
    try:
        with generators_restored(cuda_devices(shell)), tables_restored(copied, shell), torch.no_grad():
            run(copied, *given.args, **given.kwargs)
    except TraceError:
        return False
    except Exception:  # the model may refuse such inputs, too
        return None
    return True


def _negated(tensor: Tensor) -> Tensor:
    return -tensor.detach() if tensor.is_floating_point() else tensor.clone()


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or torch.equal(a.nan_to_num(), b.nan_to_num()))


def _gradients(module: nn.Module, outputs: list[Any]) -> list[_Named]:
    """Gradients of a weighted sum over the outputs, of every parameter that is trained."""
    trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(0)
    total: Any = 0
    for value in outputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            # Drawn for each of them: model and graph need not agree on constants that ask for a gradient.
            factors = torch.randn(value.shape, generator=generator, device="cpu").to(value)
            total = total + (value * factors).sum() if value.requires_grad else total
    if not isinstance(total, Tensor):
        return []
    found = cast(list[Tensor | None], torch.autograd.grad(total, [*trained.values()], allow_unused=True))
    gradients = (torch.zeros(()) if gradient is None else gradient for gradient in found)
    return [(f"the gradient of `{name}`", gradient) for name, gradient in zip(trained, gradients, strict=True)]


def _flags(shell: nn.Module, training: bool) -> dict[str, bool]:
    """The `training` flag of every module in the given mode.

    Set without calling `train`, which may do more (merge weights); where a class has its own, one on a copy without
    values tells what it would set.
    """
    if shell.training == training:
        return {name: module.training for name, module in shell.named_modules()}
    if all(type(module).train is nn.Module.train for module in shell.modules()):
        return {name: training for name, _ in shell.named_modules()}
    copied = meta_copy(shell)
    try:
        copied.train(training)
    except Exception:  # not without values
        return {name: training for name, _ in shell.named_modules()}
    return {name: module.training for name, module in copied.named_modules()}


def _set_flags(module: nn.Module, flags: dict[str, bool]) -> None:
    for name, part in module.named_modules():
        part.training = flags[name]


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors, numbers and names in a nest of containers, in order; objects of the model's own say nothing."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        if isinstance(value, Tensor) or (value is not None and can_be_written(value)):
            yield value
        return
    for item in value:
        yield from _leaves(item)


def _first_difference(expected: list[_Named], got: list[_Named]) -> str:
    if len(expected) != len(got):
        return f"the model returns {len(expected)} values, the graph {len(got)}"
    for (what, a), (_, b) in zip(expected, got, strict=True):
        if not isinstance(a, Tensor):
            if not isinstance(b, Tensor) and a == b:
                continue
            return f"{what} is {a!r} from the model and {b!r} from the graph"
        if not isinstance(b, Tensor) or a.shape != b.shape:
            shape = tuple(b.shape) if isinstance(b, Tensor) else None
            return f"{what} has shape {tuple(a.shape)} from the model and {shape} from the graph"
        if a.is_meta or a.numel() == 0 or torch.equal(a, b):
            continue
        scale = float(a.detach().abs().nan_to_num().max())
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-5 * scale, equal_nan=True):
            error = float((a.detach().double() - b.detach().double()).abs().max())
            return f"{what} differs by {error:.3g} (largest value {scale:.3g}) between the model and the graph"
    return ""


def _on_meta(module: nn.Module) -> bool:
    first = next(chain_tensors(module), None)
    return first is not None and first.is_meta
