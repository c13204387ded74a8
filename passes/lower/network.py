"""A whole network for the sparse runtime: recorded, norms folded, kernels chosen by timing, and checked."""

from __future__ import annotations

import copy
import hashlib
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from growfx.errors import TraceError
from growfx.machine import processor
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.masked.module_copy import copy_modules
from growfx.masked.modules import chain_tensors
from growfx.passes.check_recording import record_checked
from growfx.passes.fold_norm import fold_norm
from growfx.passes.lower.layers import lower, lowerable, swap_layers
from growfx.passes.lower.timing import time_layers
from growfx.passes.mask.swap import unwrap, wrap
from growfx.passes.trials.comparison import Trial, difference
from growfx.passes.trials.precision import outputs_of, tolerance_of
from growfx.passes.trials.result import PassResult
from growfx.recorded.inputs import Inputs
from growfx.recorded.recording import RecordedGraph, compiled
from growfx.runtime import sparse_kernel
from growfx.runtime.choice_cache import read_choices, write_choices
from growfx.runtime.layer_kernels import CHOICES, make_kernel, sparse_choices
from growfx.runtime.lowered_layer import LoweredLayer
from growfx.runtime.program import Program
from growfx.runtime.report import LayerLowering, LoweringReport, is_time_table
from growfx.runtime.timing import interleaved_minima
from growfx.version import __version__

__all__ = ["lower_network"]

_ROUNDS, _SECONDS = 10, 1.0
# Times whose median is further above the least than this were taken while the machine did something else as well.
_NOISY = 0.25
# The least of so many noisy runs is as good as one on a quiet machine.
_RUNS = 5


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


def lower_network(
    plain: nn.Module,
    masks: Mapping[str, Tensor],
    dtype: torch.dtype,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    batch: int | None = None,
) -> PassResult[LoweringReport]:
    """The fastest of: layers by their fastest kernels, all layers dense with norms folded, the network unchanged.

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
    example = None if example_inputs is None else _example(example_inputs, torch.float32)
    net = wrap(wide, example).eval()
    net.set_masks({name: mask for name, mask in masks.items() if name in net.layers})
    inputs = net.example() if example is None else Inputs(example, {})
    recording = net.recording(inputs, training=False)
    target = Inputs(_example(inputs.args, dtype), {})
    target = target if batch is None else target.with_batch(batch)
    if not recording.faithful or recording.holds is not None:
        report = net.trace_report
        reason = report.opaque.get("", "") or " ".join((*report.branches, *report.notes))
        note = f"the network runs unchanged, since it could not be recorded: {reason}"
        return _result(plain.to(dtype), _report("plain", target, dtype, (note,)))
    work = _prepared(plain, net, recording, target, dtype)
    return _decide(work, dtype)


def _prepared(
    plain: nn.Module, net: MaskedGraph, recording: RecordedGraph, inputs: Inputs, dtype: torch.dtype
) -> _Work:
    opaque = net.trace_report.opaque.items()
    notes = [f"`{name}` runs unchanged, since it was recorded whole: {why}" for name, why in opaque]
    try:
        folded = fold_norm(net, _example(inputs.args, torch.float32)).model
    except TraceError as refusal:
        notes.append(f"norms were not folded: {refusal}")
        folded = unwrap(net)
    folded = folded.eval().to(dtype)
    stays = lowerable(folded, recording.graph)
    masks = {name: module.mask for name, module in net.shell.named_modules() if isinstance(module, MaskedLayer)}
    shell = copy_modules(folded, _tensors_of(folded))
    layers = swap_layers(shell, {name: "dense" for name, reason in stays.items() if not reason}, {})
    network = Program(shell, _record_lowered)
    key = _key(folded, layers, net.mask_digest(), recording, inputs, dtype)
    return _Work(plain.to(dtype), folded, network, layers, masks, inputs, key, stays, notes)


def _record_lowered(program: Program, inputs: Inputs, **options: Any) -> RecordedGraph:
    """A checked recording in which lowered layers take over what follows them."""
    made = record_checked(program, inputs, **options)
    if not made.faithful:
        return made
    graph = lower(fx.GraphModule(program.shell, made.graph), {}).graph
    function, code = compiled(graph)
    return replace(made, graph=graph, run=function, code=code)


def _example(args: Any, dtype: torch.dtype) -> tuple[Any, ...]:
    cast = lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return pytree.tree_map(cast, (args,) if isinstance(args, Tensor) else args)


def _is_all(model: nn.Module, dtype: torch.dtype) -> bool:
    return all(t.dtype == dtype for t in chain_tensors(model) if t.is_floating_point())


def _tensors_of(model: nn.Module) -> dict[int, Any]:
    """What makes a copy of the model share its tensors."""
    return {id(tensor): tensor for tensor in chain_tensors(model)}


# -- the choice -------------------------------------------------------------------------------------------------------


def _decide(work: _Work, dtype: torch.dtype) -> PassResult[LoweringReport]:
    expected = outputs_of(work.plain, work.inputs)
    known = _kept(work)
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
    networks = {"lowered": work.network, "dense": dense, "plain": work.plain}
    of_network: list[float] = []
    times = kept.network if kept else _time_networks(networks, work.inputs, of_network)
    if not kept:
        value = {
            "layers": [asdict(facts) for facts in found.values()],
            "network": times,
            "runs": 1 + (known.runs if known else 0),
            "spread": max(statistics.median(part) if part else 0.0 for part in (spreads, of_network)),
        }
        refusal = write_choices(work.key, value)
        work.notes += [refusal] if refusal else []
    taken = min(times, key=lambda name: times[name])
    return _result(networks[taken], _finished(work, found, taken, dtype, times, cached=bool(kept)))


def _result(network: nn.Module, report: LoweringReport) -> PassResult[LoweringReport]:
    return PassResult(network, report.taken != "plain", report)


def _time_networks(networks: Mapping[str, nn.Module], inputs: Inputs, spreads: list[float]) -> dict[str, float]:
    def bound(model: nn.Module) -> Any:
        return lambda: outputs_of(model, inputs)

    # No inference mode: what a model keeps from a run (anchors, masks) it may write into later.
    calls = {name: bound(model) for name, model in networks.items()}
    return interleaved_minima(calls, least_rounds=_ROUNDS, seconds=_SECONDS, spreads=spreads)


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
            density = float(work.masks[name].float().mean()) if name in work.masks else 1.0
            layers.append(LayerLowering(name, shape, density, reason=reason, nbytes=_nbytes(source)))
        elif taken == "lowered":
            layers.append(replace(found[name], nbytes=work.layers[name].kernel.nbytes))
        else:
            layers.append(replace(found[name], choice="dense", nbytes=_nbytes(source)))
    report = _report(taken, work.inputs, dtype, tuple(work.notes))
    before = sum(_nbytes(work.plain.get_submodule(name)) for name in work.stays)
    after = sum(layer.nbytes for layer in layers)
    return replace(report, layers=tuple(layers), microseconds=dict(times or {}), nbytes=(before, after), cached=cached)


def _report(taken: str, inputs: Inputs, dtype: torch.dtype, notes: tuple[str, ...]) -> LoweringReport:
    shapes = tuple(tuple(v.shape) for v in pytree.tree_leaves(inputs.args) if isinstance(v, Tensor))
    return LoweringReport(
        layers=(),
        taken=taken,
        inputs=shapes,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        kernel=sparse_kernel.kernel_status(),
        notes=notes,
    )


def _nbytes(layer: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in layer.parameters())


# -- what is kept from an earlier run ---------------------------------------------------------------------------------


def _key(
    folded: nn.Module,
    layers: Mapping[str, LoweredLayer],
    digest: str,
    recording: RecordedGraph,
    inputs: Inputs,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What the fastest choice depends on."""
    structure = hashlib.sha256(recording.code.src.encode())
    for name in layers:
        structure.update(f"{name}: {folded.get_submodule(name)};".encode())
    return {
        "dtype": str(dtype),
        "growfx": __version__,
        "inputs": repr((inputs.signature, inputs.batch)),
        "kernel": sparse_kernel.kernel_status(),
        "masks": digest,
        "processor": processor(),
        "structure": structure.hexdigest(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


class _Kept(NamedTuple):
    """What was chosen and timed before: `spread` as of `interleaved_minima`, the least of so many `runs`."""

    layers: dict[str, LayerLowering]
    network: dict[str, float]
    runs: int
    spread: float

    @property
    def settled(self) -> bool:
        """Whether nothing else ran meanwhile, or it was tried so often that it makes no difference."""
        return self.spread <= _NOISY or self.runs >= _RUNS


def _kept(work: _Work) -> _Kept | None:
    """What was chosen and timed before; None where it does not fit these layers, or does not say how noisy it was."""
    value = read_choices(work.key)
    if not isinstance(value, dict) or not isinstance(value.get("layers"), list):
        return None
    times, rows = value.get("network"), [LayerLowering.from_json(row) for row in value["layers"]]
    found = {row.name: row for row in rows if row is not None}
    if found.keys() != work.layers.keys() or len(rows) != len(found):
        return None
    if not isinstance(times, dict) or times.keys() != {"lowered", "dense", "plain"} or not is_time_table(times):
        return None
    for name, facts in found.items():
        source: Any = work.folded.get_submodule(name)
        if facts.choice not in CHOICES or sparse_choices(source).get(facts.choice):
            return None
    runs, spread = value.get("runs"), value.get("spread")
    if not is_time_table({"spread": spread}) or not isinstance(runs, int) or isinstance(runs, bool) or runs < 1:
        return None
    return _Kept({name: found[name] for name in work.layers}, times, runs, float(spread))  # type: ignore[arg-type]
