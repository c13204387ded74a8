"""A whole network for the sparse runtime: planned for one call, or given the fastest kernels, and checked."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from growfx.errors import TraceError
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.masked.module_copy import copy_modules
from growfx.masked.modules import cast_floating, chain_tensors
from growfx.passes.check_recording import record_checked
from growfx.passes.fold_norm import fold_norm
from growfx.passes.lower.kept import Kept, choice_key, keep, kept_choice
from growfx.passes.lower.layers import lower, lowerable, swap_layers
from growfx.passes.lower.native import PlannedModel, plan_native
from growfx.passes.lower.state import kept_state
from growfx.passes.lower.timing import time_layers
from growfx.passes.mask.swap import unwrap, wrap_to_infer
from growfx.passes.trials.comparison import Trial, difference
from growfx.passes.trials.precision import outputs_of, tolerance_of
from growfx.passes.trials.result import PassResult
from growfx.recorded.inputs import Inputs, as_inputs
from growfx.recorded.recording import RecordedGraph, compiled
from growfx.runtime import sparse_kernel
from growfx.runtime.layer_kernels import likely_choice, make_kernel
from growfx.runtime.lowered_layer import LoweredLayer
from growfx.runtime.native.run import NetworkRun
from growfx.runtime.program import Program
from growfx.runtime.report import LayerLowering, LoweringReport
from growfx.runtime.timing import interleaved_minima

__all__ = ["lower_network"]

_ROUNDS, _SECONDS = 10, 1.0
# Where the native runtime takes at most this part of the plain network's time nothing else comes near: to fold norms
# and fuse sums gives less, and sparse kernels one by one have the same work to do. A few rounds tell.
_CLEAR, _FEW_ROUNDS, _SHORT = 0.7, 2, 0.1

_NAMED = 3  # so many names in a note


@dataclass
class _Work:
    """A network on its way.

    Attributes:
        plain: as loaded, in the target dtype.
        folded: a plain model of the same class with norms folded, whose weights those of `network` are.
        network: the same with lowered layers, all of them dense at first.
        layers: those, by name.
        masks: by layer.
        inputs: to time on.
        key: what the choice depends on.
        stays: layers that cannot be lowered -> why.
        notes: for the report.
        native: a run of the network by the native runtime; None where there is none.
        refusal: why there is none.
    """

    plain: nn.Module
    folded: nn.Module
    network: Program
    layers: dict[str, LoweredLayer]
    masks: dict[str, Tensor]
    inputs: Inputs
    key: dict[str, Any]
    stays: dict[str, str]
    notes: list[str]
    native: NetworkRun | None = None
    refusal: str = ""


def lower_network(
    plain: nn.Module,
    masks: Mapping[str, Tensor],
    dtype: torch.dtype,
    example_inputs: Any = None,
    batch: int | None = None,
) -> PassResult[LoweringReport]:
    """The fastest of: the native runtime, layers by their fastest kernels, all dense with norms folded, unchanged.

    Where the native runtime is clearly the fastest, nothing else is timed; what it does not compute, such as inputs of
    another size, layers with sparse kernels do then.

    Args:
        plain: a network with values on a CPU, in eval mode; it may become a part of the result.
        masks: layer -> bool tensor of its weight's shape.
        dtype: to compute in, float32 or bfloat16.
        example_inputs: as of `growfx.wrap`.
        batch: rows to time on.

    Raises:
        TraceError: the network fails on the example inputs.
    """
    # Norms are folded in float32, whatever the network is to compute in.
    wide = plain if _is_all(plain, torch.float32) else copy.deepcopy(plain).float()
    example = None if example_inputs is None else _cast(as_inputs(example_inputs), torch.float32)
    net = wrap_to_infer(wide, example).eval()
    net.set_masks({name: mask for name, mask in masks.items() if name in net.layers})
    inputs = net.example() if example is None else example
    recording = net.recording(inputs, training=False)
    target = _cast(inputs, dtype)
    target = target if batch is None else target.with_batch(batch)
    if not recording.faithful or recording.holds is not None:
        report = net.trace_report
        reason = report.opaque.get("", "") or " ".join((*report.branches, *report.notes))
        note = f"the network runs unchanged, since it could not be recorded: {reason}"
        return _result(cast_floating(plain, dtype), _report("plain", target, dtype, (note,)))
    kept = kept_state(wide, inputs)
    if kept:
        note = f"the network runs unchanged, since every call changes {_listed(kept)}"
        return _result(cast_floating(plain, dtype), _report("plain", target, dtype, (note,)))
    native, note = None, f"it computes in float32, and the network in {str(dtype).removeprefix('torch.')}"
    if dtype is torch.float32:
        native, note = plan_native(wide, recording, masks, target)
    race = None if native is None else _race(wide, net, recording, target, native)
    if native is not None and race is not None and race.is_clear:
        return _by_native(wide, net, recording, target, native, race, note)
    work = _prepared(plain, net, recording, target, dtype)
    work.native, work.refusal = native, note if native is None else ""
    return _decide(work, dtype)


def _listed(names: Sequence[str]) -> str:
    named = ", ".join(f"`{name}`" for name in names[:_NAMED])
    return named + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


# -- the native runtime alone -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Race:
    """Times of the native runtime and of the plain network; whether they were read; what to note."""

    times: Mapping[str, float]
    cached: bool
    note: str

    @property
    def is_clear(self) -> bool:
        """Whether nothing else needs to be timed."""
        return self.times["native"] <= _CLEAR * self.times["plain"]


def _race(plain: nn.Module, net: MaskedGraph, recording: RecordedGraph, inputs: Inputs, native: NetworkRun) -> _Race:
    """Time a run against the plain network."""
    ways = {"native": PlannedModel(native), "plain": plain}
    named = [name for name, reason in lowerable(plain, recording.graph).items() if not reason]
    key = {**choice_key(plain, named, net.mask_digest(), recording, inputs, torch.float32), "of": "native and plain"}
    known = kept_choice(key, ways, plain, ())
    if known is not None and known.settled:
        return _Race(known.network, True, "")
    spreads: list[float] = []
    times = _time_networks(ways, inputs, spreads, _FEW_ROUNDS, _SHORT)
    if known is not None:
        times = {name: min(time, known.network[name]) for name, time in times.items()}
    runs, spread = 1 + (known.runs if known else 0), statistics.median(spreads) if spreads else 0.0
    return _Race(times, False, keep(key, Kept(times, runs, spread)))


def _by_native(
    plain: nn.Module,
    net: MaskedGraph,
    recording: RecordedGraph,
    inputs: Inputs,
    native: NetworkRun,
    race: _Race,
    note: str,
) -> PassResult[LoweringReport]:
    """The network run by the native runtime, with sparse kernels for inputs that it does not compute."""
    stays, masks = lowerable(plain, recording.graph), _masks_of(net)
    shell = copy_modules(plain, _tensors_of(plain))
    layers: dict[str, Any] = {name: plain.get_submodule(name) for name, reason in stays.items() if not reason}
    choices = {name: likely_choice(layer, _density(masks.get(name))) for name, layer in layers.items()}
    packed = swap_layers(shell, choices, masks)
    network = Program(shell, _record_lowered)
    network.settle(native)
    rows = tuple(_native_layers(plain, stays, masks, native, packed))
    report = replace(
        _report("native", inputs, torch.float32, tuple(filter(None, (note, race.note)))),
        layers=rows,
        microseconds=race.times,
        nbytes=(_plain_bytes(plain, stays), native.nbytes + sum(row.nbytes for row in rows)),
        cached=race.cached,
        **_native_facts(native),
    )
    return _result(network, report)


def _native_layers(
    plain: nn.Module,
    names: Iterable[str],
    masks: Mapping[str, Tensor],
    native: NetworkRun,
    packed: Mapping[str, LoweredLayer],
) -> Iterable[LayerLowering]:
    """The layers of a network that the native runtime runs; `nbytes` are those for inputs that it does not compute."""
    for name in names:
        layer: Any = plain.get_submodule(name)
        weight = layer._parameters.get("weight")
        shape = () if weight is None else tuple(weight.shape)
        density = _density(masks.get(name))
        by_torch = weight is not None and native.is_read_by_torch(weight)
        choice, reason = ("dense", "its operator has no kernel in the native runtime") if by_torch else ("native", "")
        nbytes = packed[name].kernel.nbytes if name in packed else _nbytes(layer)
        yield LayerLowering(name, shape, density, choice=choice, reason=reason, nbytes=nbytes)


def _native_facts(native: NetworkRun) -> dict[str, Any]:
    return {"native_calls": native.native_calls, "torch_steps": dict(native.torch_steps)}


def _masks_of(net: MaskedGraph) -> dict[str, Tensor]:
    return {name: module.mask for name, module in net.shell.named_modules() if isinstance(module, MaskedLayer)}


# -- kernels for each layer -------------------------------------------------------------------------------------------


def _prepared(
    plain: nn.Module, net: MaskedGraph, recording: RecordedGraph, inputs: Inputs, dtype: torch.dtype
) -> _Work:
    opaque = net.trace_report.opaque.items()
    notes = [f"`{name}` runs unchanged, since it was recorded whole: {why}" for name, why in opaque]
    try:
        folded = fold_norm(net, _cast(inputs, torch.float32)).model
    except TraceError as refusal:
        notes.append(f"norms were not folded: {refusal}")
        folded = unwrap(net)
    folded = cast_floating(folded.eval(), dtype)
    stays = lowerable(folded, recording.graph)
    masks = _masks_of(net)
    shell = copy_modules(folded, _tensors_of(folded))
    layers = swap_layers(shell, {name: "dense" for name, reason in stays.items() if not reason}, {})
    network = Program(shell, _record_lowered)
    key = choice_key(folded, layers, net.mask_digest(), recording, inputs, dtype)
    return _Work(cast_floating(plain, dtype), folded, network, layers, masks, inputs, key, stays, notes)


def _record_lowered(program: Program, inputs: Inputs, **options: Any) -> RecordedGraph:
    """A checked recording in which lowered layers take over what follows them."""
    made = record_checked(program, inputs, **options)
    if not made.faithful:
        return made
    graph = lower(fx.GraphModule(program.shell, made.graph), {}).graph
    function, code = compiled(graph)
    return replace(made, graph=graph, run=function, code=code)


def _cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return Inputs(*pytree.tree_map(cast, (inputs.args, dict(inputs.kwargs))))


def _is_all(model: nn.Module, dtype: torch.dtype) -> bool:
    return all(t.dtype == dtype for t in chain_tensors(model) if t.is_floating_point())


def _tensors_of(model: nn.Module) -> dict[int, Any]:
    """What makes a copy of the model share its tensors."""
    return {id(tensor): tensor for tensor in chain_tensors(model)}


# -- the choice -------------------------------------------------------------------------------------------------------


def _decide(work: _Work, dtype: torch.dtype) -> PassResult[LoweringReport]:
    expected = outputs_of(work.plain, work.inputs)
    ways = ("lowered", "dense", "plain") if work.native is None else ("native", "lowered", "dense", "plain")
    known = kept_choice(work.key, ways, work.folded, work.layers)
    kept = known if known is not None and known.settled else None
    spreads: list[float] = []
    found = (
        kept.layers
        if kept
        else time_layers(
            *(work.network, work.layers, work.masks, work.folded, work.inputs),
            before=known.layers if known else None,
            spreads=spreads,
        )
    )
    dense = copy.deepcopy(work.network, _tensors_of(work.network))
    for name, facts in found.items():
        if facts.choice != "dense":
            source: Any = work.folded.get_submodule(name)
            work.layers[name].kernel = make_kernel(source, work.masks.get(name), facts.choice)
    trial = Trial(work.inputs, expected, [tolerance_of(dtype, reordered=True)] * len(expected), wide=False)
    error, problem = difference(work.network, [trial])
    if problem:
        work.notes.append(f"{problem}, so the network runs unchanged")
        return _result(work.plain, _finished(work, found, "plain", dtype))
    work.notes.append(f"outputs differ from the plain network's by {error:.1e} of the largest")
    networks: dict[str, nn.Module] = {"lowered": work.network, "dense": dense, "plain": work.plain}
    if work.native is not None:
        networks["native"] = PlannedModel(work.native)
    of_network: list[float] = []
    times = kept.network if kept else _time_networks(networks, work.inputs, of_network, _ROUNDS, _SECONDS)
    if not kept:
        spread = max(statistics.median(part) if part else 0.0 for part in (spreads, of_network))
        refusal = keep(work.key, Kept(times, 1 + (known.runs if known else 0), spread, found))
        work.notes += [refusal] if refusal else []
    taken = min(times, key=lambda name: times[name])
    if taken == "native":
        networks["native"] = work.network
    made = networks[taken]
    if isinstance(made, Program):
        made.settle(work.native if taken == "native" else None)
    return _result(made, _finished(work, found, taken, dtype, times, cached=bool(kept)))


def _result(network: nn.Module, report: LoweringReport) -> PassResult[LoweringReport]:
    return PassResult(network, report.taken != "plain", report)


def _time_networks(
    networks: Mapping[str, nn.Module], inputs: Inputs, spreads: list[float], rounds: int, seconds: float
) -> dict[str, float]:
    def bound(model: nn.Module) -> Any:
        return lambda: outputs_of(model, inputs)

    # No inference mode: what a model keeps from a run (anchors, masks) it may write into later.
    calls = {name: bound(model) for name, model in networks.items()}
    return interleaved_minima(calls, least_rounds=rounds, seconds=seconds, spreads=spreads)


def _finished(
    work: _Work,
    found: Mapping[str, LayerLowering],
    taken: str,
    dtype: torch.dtype,
    times: Mapping[str, float] | None = None,
    cached: bool = False,
) -> LoweringReport:
    layers: list[LayerLowering] = []
    for name, reason in work.stays.items():
        source: Any = work.folded.get_submodule(name)
        if name not in found:
            shape = () if source._parameters.get("weight") is None else tuple(source.weight.shape)
            density = _density(work.masks.get(name))
            layers.append(LayerLowering(name, shape, density, reason=reason, nbytes=_nbytes(source)))
        elif taken in ("lowered", "native"):
            layers.append(replace(found[name], nbytes=work.layers[name].kernel.nbytes))
        else:
            layers.append(replace(found[name], choice="dense", nbytes=_nbytes(source)))
    after, facts = sum(layer.nbytes for layer in layers), dict[str, Any]()
    if taken == "native" and work.native is not None:
        rows = _native_layers(work.plain, work.stays, work.masks, work.native, work.layers)
        named = {layer.name: layer for layer in layers}
        layers = [replace(named[row.name], choice=row.choice, reason=row.reason) for row in rows]
        after, facts = after + work.native.nbytes, _native_facts(work.native)
    return replace(
        _report(taken, work.inputs, dtype, tuple(work.notes)),
        layers=tuple(layers),
        microseconds=dict(times or {}),
        nbytes=(_plain_bytes(work.plain, work.stays), after),
        cached=cached,
        native=work.refusal,
        **facts,
    )


def _report(taken: str, inputs: Inputs, dtype: torch.dtype, notes: tuple[str, ...]) -> LoweringReport:
    shapes = tuple(tuple(v.shape) for v in inputs.values if isinstance(v, Tensor))
    return LoweringReport(
        layers=(),
        taken=taken,
        inputs=shapes,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        kernel=sparse_kernel.kernel_status(),
        notes=notes,
    )


def _density(mask: Tensor | None) -> float:
    return 1.0 if mask is None else float(mask.sum()) / max(mask.numel(), 1)


def _plain_bytes(plain: nn.Module, layers: Iterable[str]) -> int:
    return sum(_nbytes(plain.get_submodule(name)) for name in layers)


def _nbytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in layer.parameters())
