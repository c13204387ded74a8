"""Swap the maskable modules of a model for masked twins (`wrap`), and back (`unwrap`)."""

from __future__ import annotations

import copy
import fnmatch
import functools
import gc
import numbers
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from growfx.artifact.remembered_inputs import default_inputs
from growfx.distributed.sharded import HOW_TO_GATHER, require_whole
from growfx.errors import ConfigError, TraceError
from growfx.masked.doors import as_masked_graph
from growfx.masked.graph import MaskedGraph
from growfx.masked.graph.example_call import ExampleCall
from growfx.masked.graph.layer_table import LayerTable
from growfx.masked.graph.plain_state import hide_masks
from growfx.masked.graph.recordings import Recordings
from growfx.masked.isolation import enrolled
from growfx.masked.layers import MaskedLayer
from growfx.masked.module_copy import copy_modules
from growfx.masked.modules import chain_tensors
from growfx.masked.parameter import MaskedParameter
from growfx.masked.present.storage import on_whole_weights
from growfx.masked.registry import LAYER_OF
from growfx.masked.torch_pruning import take_over
from growfx.masked.twins import has_names_of_a_twin, is_maskable, maskable_reason, to_plain, to_twin, weight_name_of
from growfx.masked.weight_reads import WatchedParameters
from growfx.models.build import default_input_shape, identity_of, remember
from growfx.notices import warn_once
from growfx.passes.check_recording import record_checked
from growfx.passes.mask.shadowed_names import shadowed_names
from growfx.passes.mask.shared_memory import refuse_shared_memory
from growfx.recorded.inputs import Inputs, as_inputs
from growfx.recorded.recording import RECORDED_CONSTANT, RecordedGraph
from growfx.recorded.trace_report import TraceReport
from growfx.selection.density import random_masks

__all__ = ["unwrap", "wrap", "wrap_to_infer"]


@torch.inference_mode(False)
def wrap(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    density: float = 1.0,
    exclude: Sequence[str] = (),
    masked: Sequence[str] = (),
    opaque: Sequence[str] = (),
    seed: int = 0,
) -> MaskedGraph:
    """Put masked layers in the place of a model's own, and record the model.

    Args:
        model: any module. Its parameters and buffers are shared with the result; the model's modules are not changed.
            Masks that `torch.nn.utils.prune` put on layers become the network's, and `<weight>_orig` its weight.
        example_inputs: what the model is called with: a tensor, a tuple of arguments, a dict of keyword arguments, or
            a pair (args, kwargs). Default: one input of the size in the model's `pretrained_cfg` (timm), else of
            shape (1, 3, 224, 224).
        density: below 1, masks are drawn at random: Erdos-Renyi-kernel densities, exactly ``round(density * numel)``
            active weights in all.
        exclude: glob patterns of names of layers to leave without a mask.
        masked: glob patterns of full names of parameters to mask that belong to no convolution, linear layer or
            attention (``"*.c_attn.weight"``); each is a layer under that name, its mask `<parameter>_mask`.
        opaque: glob patterns of names of modules to record whole, as one operator: for code that no recorder can
            follow. Layers inside are masked all the same. What takes values out of its data is found without.
        seed: of the random masks.

    Raises:
        TraceError: the model fails on the example inputs, or has masked parts already.
        ConfigError: density outside (0, 1], or so small that no weight is active; density below 1 where no layer can be
            masked, or on the meta device; an `exclude`, `masked` or `opaque` pattern that matches nothing; weights
            spread over processes (`fully_shard`), without a shape yet (lazy modules), made inside
            `torch.inference_mode`, or in one another's memory as separate parameters.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> net = growfx.wrap(model, torch.randn(1, 4), density=0.25)
        >>> list(net.layers), net.nnz, net.numel
        (['0', '2'], 12, 48)
    """
    _check_options(density, seed)
    return _wrapped(model, example_inputs, (exclude, masked, opaque), (density, seed), (False, True))


@torch.inference_mode(False)
def wrap_to_infer(model: nn.Module, example_inputs: Any = None) -> MaskedGraph:
    """The same for a network that only infers: layers that evaluation never calls get no mask.

    Train mode is not recorded, which takes as long as the rest.
    """
    return _wrapped(model, example_inputs, ((), (), ()), (1.0, 0), (False,))


def _wrapped(
    model: nn.Module,
    example_inputs: Any,
    patterns: tuple[Sequence[str], Sequence[str], Sequence[str]],
    drawn: tuple[float, int],
    modes: Sequence[bool],
) -> MaskedGraph:
    """`wrap` with its `exclude`, `masked` and `opaque`, `density` and `seed`, recorded in these modes."""
    exclude, masked, opaque = patterns
    density, seed = drawn
    notes: list[str] = []
    model = _original(model, notes)
    for parameter in model.parameters():
        require_whole(
            parameter, "a recording needs it whole; wrap the model first, then call `fully_shard` on the result"
        )
    _check_tensors(model)
    example = _example(model, example_inputs)
    shared_names = _masked_already(model)
    shared: dict[int, Any] = {id(t): t for t in chain_tensors(model)}
    shell = copy_modules(model, shared)
    report = TraceReport(notes=notes)
    layers, pruned = _swap_in(shell, exclude, report)
    handles = {**layers, **_masked_parameters(shell, masked)}
    twins = [part for part in shell.modules() if isinstance(part, MaskedLayer)]
    refuse_shared_memory(shell, [*twins, *handles.values()])
    _declare_opaque(shell, opaque, report)
    with enrolled(model, shell):
        table = LayerTable(shell, handles)
        recordings = _recorded(table, report, example, modes, model)
        net = MaskedGraph(table, recordings, ExampleCall(example, shell), functools.partial(identity_of, model))
        _warn_of_hidden_names(net, notes)
        _warn_of_another_net(shared_names, notes)
        if density < 1:
            _draw(net, density, seed)
        if pruned and density < 1:
            warn_once(
                f"masks were drawn at density {density} in the place of those of torch.nn.utils.prune; wrap the model "
                "at density 1 to keep these",
                notes,
            )
        elif pruned:
            warn_once("the masks of torch.nn.utils.prune were taken over as the network's own", notes)
    return net


def _recorded(
    table: LayerTable, report: TraceReport, example: Inputs, modes: Sequence[bool], model: nn.Module
) -> Recordings:
    """Record evaluation and, if asked, train mode, name the layers in the order of the data, and report."""
    recordings = Recordings(table, report, functools.partial(record_checked, model=model))
    made = [recordings.make(example, training=False)]
    try:
        made += [recordings.make(example, training=True)] if True in modes else []
    except TraceError as refusal:
        # Detectors want targets to train on: a call with them will run.
        report.notes.append(f"train mode was not recorded: {refusal}")
    recordings.record = record_checked  # what is recorded later is compared with the net's own shell
    _name_layers(table, report, _positions(made, table))
    report.faithful = all(recording.faithful for recording in made)
    if not report.faithful:
        report.opaque.setdefault("", " ".join(report.notes))
    _note_direct_reads(table, report)
    return recordings


def _check_options(density: Any, seed: Any) -> None:
    if not isinstance(density, numbers.Real) or isinstance(density, bool) or not 0 < float(density) <= 1:
        raise ConfigError(f"density is {density!r}; it must be a number in (0, 1]")
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool):
        raise ConfigError(f"seed is {seed!r}; it must be a whole number")


def _patterns(option: str, value: Any) -> list[str]:
    patterns: list[Any] = [value] if isinstance(value, str) or not isinstance(value, Iterable) else [*value]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{option} is {value!r}; it must be a glob pattern of names, or a list of them")
    return patterns


def _original(model: Any, notes: list[str]) -> nn.Module:
    """The module that was compiled, or the one that came in."""
    inner = getattr(model, "_orig_mod", None) if isinstance(model, nn.Module) else None
    compiled_parts = isinstance(model, nn.Module) and any(
        part.__dict__.get("_compiled_call_impl") is not None for part in model.modules()
    )
    if isinstance(inner, nn.Module) or compiled_parts:
        warn_once("the model was compiled; its original is masked, so compile the result: torch.compile(net)", notes)
    model = inner if isinstance(inner, nn.Module) else model
    if not isinstance(model, nn.Module):
        raise TraceError(f"growfx.wrap expects an nn.Module, got {type(model).__name__}")
    if isinstance(model, MaskedGraph):
        raise TraceError("the model is a MaskedGraph already; change its masks with `net.set_masks`")
    for name, part in model.named_modules():
        if isinstance(part, (MaskedGraph, MaskedLayer)):
            kind = "MaskedGraph" if isinstance(part, MaskedGraph) else "masked layer"
            raise TraceError(
                f"`{name}` of the model is a {kind} already, and would get a second mask beside its own; put "
                "growfx.unwrap(net), the plain model with zeros in place, where the net is, and set masks on the result"
            )
    return model


def _check_tensors(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
            raise ConfigError(
                f"`{name}` has no shape before the first call (a lazy module); call the model once on an input, then "
                "wrap it"
            )
        if tensor.is_inference():
            raise ConfigError(
                "the model's tensors were made inside `torch.inference_mode`, so nothing can train them or see them "
                "change; build the model outside of it"
            )


def _masked_already(model: nn.Module) -> list[str]:
    """Names of the parameters that are masked by another network already."""

    def found() -> list[str]:
        layers = ((name, p, LAYER_OF.get(id(p))) for name, p in model.named_parameters())
        return [name for name, p, layer in layers if layer is not None and layer.parameter is p]

    if found():
        gc.collect()  # one that nobody holds any more
    return found()


def _warn_of_another_net(names: list[str], notes: list[str]) -> None:
    if names:
        listed = ", ".join(f"`{name}`" for name in names[:3]) + (", ..." if len(names) > 3 else "")
        warn_once(
            f"another net masks parameters of this model already ({listed}), and what the masks of one of them leave "
            "out is zero in both; wrap a copy of the model (copy.deepcopy) for masks that are independent",
            notes,
        )


def _warn_of_hidden_names(net: MaskedGraph, notes: list[str]) -> None:
    hidden = shadowed_names(net)
    if hidden:
        listed = ", ".join(f"`{name}`" for name in hidden)
        warn_once(
            f"the model has {listed}, which on the net name something else; the model's are `net.shell.<name>`", notes
        )


def _draw(net: MaskedGraph, density: float, seed: int) -> None:
    """Random masks of exactly the given density."""
    if not net.layers:
        seen = "; ".join(f"`{name}` ({reason})" for name, reason in list(net.trace_report.unmasked.items())[:5])
        raise ConfigError(
            f"density is {density}, but there is no layer to mask: {seen or 'the model has no weights'}; wrap it at "
            "density 1"
        )
    if round(density * net.numel) == 0:
        raise ConfigError(
            f"density {density} of {net.numel} weights leaves none active; the smallest is {0.5 / net.numel:.2g}"
        )
    if any(layer.mask.is_meta for layer in net.layers.values()):
        raise ConfigError(
            f"density is {density}, but the model is on the meta device, where masks have no values; wrap it at "
            "density 1 and load a state dict with masks: `net.load_state_dict(state, assign=True)`"
        )
    shapes = {name: tuple(layer.mask.shape) for name, layer in net.layers.items()}
    net.set_masks(random_masks(shapes, float(density), seed=int(seed)))


def _note_direct_reads(table: LayerTable, report: TraceReport) -> None:
    """Layers whose weight is read without their call: seen in a recording, or possible where nobody looked.

    A weight that another kind of module shares (an embedding) is read by that module. What a module reads that was
    recorded whole may depend on data. torch's encoder layer hands its weights to one fused operator where nothing
    watches, and calls its layers while it is recorded.
    """
    owners: dict[int, str] = {}
    for name, layer in table.layers.items():
        owners[id(layer.parameter)] = name
        whole = any(not whole or name.startswith(f"{whole}.") for whole in report.opaque)
        if whole and not layer.read_directly:
            table.note_direct_read(name)
    for part in table.shell.modules():
        read: list[nn.Parameter | None] = []
        if isinstance(part, nn.TransformerEncoderLayer):
            read += [layer.parameter for layer in part.modules() if isinstance(layer, MaskedLayer)]
        if not isinstance(part, MaskedLayer):
            read += part._parameters.values()
        for name in [owners[id(parameter)] for parameter in read if id(parameter) in owners]:
            if not table.layers[name].read_directly:
                table.note_direct_read(name)


@on_whole_weights
@torch.inference_mode(False)
def unwrap(net: MaskedGraph) -> nn.Module:
    """The plain model of the original class, a copy, with weights outside the masks +0.0.

    Raises:
        ConfigError: the weights are spread over processes (`fully_shard`).
        MaskError: a masked layer was replaced since the model was wrapped.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> model = growfx.unwrap(net)
        >>> type(model).__name__, int(model[0].weight.count_nonzero())
        ('Sequential', 4)
    """
    net = as_masked_graph(net, "growfx.unwrap")
    for parameter in net.parameters():
        require_whole(parameter, f"a plain model has whole ones; {HOW_TO_GATHER}")
    _ = net.layers  # checks that all are there
    memo: dict[int, Any] = {}
    model = copy_modules(net.shell, memo)
    model.training = net.training
    for layer in net.masked_parameters.values():
        copy.deepcopy(layer, memo).remove()
    for module in list(model.modules()):
        if isinstance(module, MaskedLayer):
            to_plain(module)
    hide_masks(model)
    for module in model.modules():
        if type(module._parameters) is WatchedParameters:
            module.__dict__["_parameters"] = dict(module._parameters)
    for name in [n for n in model._buffers if n.startswith(RECORDED_CONSTANT)]:
        del model._buffers[name]
        model._non_persistent_buffers_set.discard(name)
    if net.identity is not None:
        remember(model, net.identity)
    with enrolled(net.shell, model):
        return model


def _example(model: nn.Module, example_inputs: Any) -> Inputs:
    if example_inputs is not None:
        return as_inputs(example_inputs)
    known = default_inputs(model)
    if known is not None:
        return known
    tensor = next(chain_tensors(model), torch.empty(0))
    dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(default_input_shape(model), generator=generator, device="cpu")
    return Inputs((values.to(device=tensor.device, dtype=dtype),), {})


def _swap_in(
    shell: nn.Module, exclude: Sequence[str], report: TraceReport
) -> tuple[dict[str, MaskedParameter], list[str]]:
    """Turn the maskable layers into masked twins.

    Returns:
        Those that cannot be one, with a mask on their parameter; and the names of those that torch pruned, whose masks
        are now the layers' own.
    """
    handles: dict[str, MaskedParameter] = {}
    pruned: list[str] = []
    times = Counter(id(p) for part in shell.modules() for p in part._parameters.values() if p is not None)
    patterns = _patterns("exclude", exclude)
    unmatched = dict.fromkeys(patterns)
    masks: dict[int, Tensor] = {}
    for name, module in list(shell.named_modules()):
        if not is_maskable(module):
            continue
        hits = [p for p in patterns if fnmatch.fnmatchcase(name, p)]
        for pattern in hits:
            unmatched.pop(pattern, None)
        reason = f"excluded by `{hits[0]}`" if hits else None
        if not name:
            reason = "it is the model itself: wrap it in nn.Sequential to mask it"
        left = take_over(module, times) if reason is None else None
        reason = reason or maskable_reason(module)
        if reason is not None:
            report.unmasked[name] = reason
            continue
        if has_names_of_a_twin(module):
            layer: MaskedLayer = handles.setdefault(name, MaskedParameter(module, weight_name_of(module)))
        else:
            layer = to_twin(module)
            # Layers that share a weight share its mask.
            layer._buffers["mask"] = masks.setdefault(id(layer.parameter), layer.mask)
            layer.adopt()
        if left is not None:
            pruned.append(name)
            layer.mask.copy_(left)
            layer.settle()
    if unmatched:
        raise ConfigError(f"exclude: no convolution, linear layer or attention is named like {list(unmatched)}")
    return handles, pruned


def _masked_parameters(shell: nn.Module, patterns: Sequence[str]) -> dict[str, MaskedParameter]:
    """Masks on the parameters that the caller names."""
    taken = {id(part.parameter) for part in shell.modules() if isinstance(part, MaskedLayer)}
    every = list(shell.named_parameters(remove_duplicate=False))
    candidates = {name: p for name, p in every if p.is_floating_point() and id(p) not in taken}
    named: set[int] = set()
    handles: dict[str, MaskedParameter] = {}
    for pattern in _patterns("masked", patterns):
        hits = fnmatch.filter(candidates, pattern)
        if not hits:
            masked_already = fnmatch.filter([name for name, _ in every], pattern)
            why = f"`{masked_already[0]}` has a mask already" if masked_already else "no parameter is named like it"
            raise ConfigError(f"masked: `{pattern}` names nothing to mask: {why}")
        for name in hits:
            if id(candidates[name]) in named:  # another name of a tied one
                continue
            named.add(id(candidates[name]))
            owner, _, leaf = name.rpartition(".")
            handles[name] = MaskedParameter(shell.get_submodule(owner), leaf)
    return handles


def _declare_opaque(shell: nn.Module, opaque: Sequence[str], report: TraceReport) -> None:
    names = [name for name, _ in shell.named_modules() if name]
    for pattern in _patterns("opaque", opaque):
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ConfigError(f"opaque: no module is named like `{pattern}`")
        report.opaque |= dict.fromkeys(hits, f"named by `{pattern}`")


def _positions(recordings: Sequence[RecordedGraph], table: LayerTable) -> dict[str, int]:
    """The position of every module and parameter in the recorded runs."""
    called = dict.fromkeys(name for recording in recordings for name in recording.called)
    order = {name: i for i, name in enumerate(called)}
    for name in dict.fromkeys(name for recording in recordings for name in recording.used):
        order[name] = order.get(name.rpartition(".")[0], len(order))
    first_names = {id(parameter): name for name, parameter in table.shell.named_parameters()}
    for name, handle in table.parameters.items():  # which may go by another of the names of a tied parameter
        first = first_names[id(handle.parameter)]
        if first in order:
            order.setdefault(name, order[first])
    return order


def _name_layers(table: LayerTable, report: TraceReport, order: dict[str, int]) -> None:
    """Order the layers by data flow, drop those never called, and tie those that share a weight.

    `order`: position of every module and parameter in the recorded runs.
    """
    handles = table.parameters
    by_weight: dict[int, list[tuple[str, MaskedLayer]]] = {}
    twins = {name: m for name, m in table.shell.named_modules() if isinstance(m, MaskedLayer)} | handles
    # Attention reads its output projection without calling it; what an opaque module calls may depend on data.
    attentions = [name for name, m in twins.items() if isinstance(m, nn.MultiheadAttention) and name in order]
    whole_modules = [*report.opaque, *attentions]
    layers: dict[str, MaskedLayer] = {}
    for name, twin in sorted(twins.items(), key=lambda item: order.get(item[0], len(order))):
        if name not in order and not any(name.startswith(f"{whole}." if whole else "") for whole in whole_modules):
            report.unmasked[name] = "never called"
            twin.remove() if isinstance(twin, MaskedParameter) else to_plain(twin)
            continue
        group = by_weight.setdefault(id(twin.parameter), [])
        if group:
            report.tied[name] = group[0][0]
        else:
            layers[name] = twin
        group.append((name, twin))
    tied = [[twin for _, twin in group] for group in by_weight.values() if len(group) > 1]
    for name in handles:
        report.unmasked.pop(name, None)
    table.name(layers, tied)
    report.layers = list(layers)
