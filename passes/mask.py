"""Swap the maskable modules of a model for masked twins (`wrap`), and back (`unwrap`)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from growfx.density import random_masks
from growfx.errors import ConfigError, TraceError
from growfx.graph import MaskedGraph, RecordedGraph, chain_tensors, compiled, in_mode
from growfx.inputs import Inputs
from growfx.layers import MaskedLayer, is_maskable, maskable_reason, to_plain, to_twin
from growfx.meta_shapes import short_shapes
from growfx.models import default_input_shape, identity_of, remember
from growfx.module_copy import copy_modules
from growfx.passes.list_unmasked import list_unmasked
from growfx.passes.record import DataDependentError, NeedsValuesError, meta_copy, record
from growfx.recorded_call import RECORDED_CONSTANT, can_be_written
from growfx.shards import HOW_TO_GATHER, require_whole
from growfx.trace_report import TraceReport

__all__ = ["unwrap", "wrap"]


@torch.inference_mode(False)
def wrap(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    *,
    density: float = 1.0,
    exclude: Sequence[str] = (),
    opaque: Sequence[str] = (),
    seed: int = 0,
) -> MaskedGraph:
    """Record a model into a masked graph.

    Args:
        model: any module. Its parameters and buffers are shared with the result; the model's modules are not changed.
        example_inputs: what the model is called with: a tensor or a tuple of arguments. Default: one input of the
            size in the model's `pretrained_cfg` (timm), else of shape (1, 3, 224, 224).
        density: below 1, masks are drawn at random: Erdos-Renyi-kernel densities, exactly ``round(density * numel)``
            active weights in all.
        exclude: glob patterns of names of layers to leave without a mask.
        opaque: glob patterns of names of modules to record whole, as one operator: for code that no recorder can
            follow. Layers inside are masked all the same. What takes values out of its data is found without.
        seed: of the random masks.

    Raises:
        TraceError: the model fails on the example inputs.
        ConfigError: density outside (0, 1], an `exclude` or `opaque` pattern that matches nothing, weights spread over
            processes (`fully_shard`), or tensors made inside `torch.inference_mode`.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"growfx.wrap takes an nn.Module; a {type(model).__name__} arrived")
    if isinstance(model, MaskedGraph):
        raise TraceError("the model is a MaskedGraph already; change its masks with `net.set_masks`")
    if not 0 < density <= 1:
        raise ConfigError(f"density is {density}; it must lie in (0, 1]")
    for parameter in model.parameters():
        require_whole(
            parameter, "a recording needs it whole; wrap the model first, then call `fully_shard` on the result"
        )
    if any(tensor.is_inference() for tensor in chain_tensors(model)):
        raise ConfigError(
            "the model's tensors were made inside `torch.inference_mode`, so nothing can train them or see them "
            "change; build the model outside of it"
        )
    example = _example(model, example_inputs)
    shared: dict[int, Any] = {id(t): t for t in chain_tensors(model)}
    shell = copy_modules(model, shared)
    report = TraceReport()
    _swap_in(shell, exclude, report)
    _declare_opaque(shell, opaque, report)
    first = functools.partial(record_checked, model=model, copied=None if _on_meta(shell) else meta_copy(shell))
    net = MaskedGraph(shell, example, first, report, functools.partial(identity_of, model))
    recordings = [net._recording(example, training=False)]
    try:
        recordings.append(net._recording(example, training=True))
    except TraceError as refusal:
        # Detectors want targets to train on: a call with them will run.
        report.notes.append(f"train mode was not recorded: {refusal}")
    net._recorder = record_checked
    for recording in recordings:
        report.unmasked |= list_unmasked(shell, recording.graph)
    _name_layers(net, list(dict.fromkeys(name for recording in recordings for name in recording.called)))
    report.faithful = all(recording.faithful for recording in recordings)
    if not report.faithful:
        report.opaque.setdefault("", " ".join(report.notes))
    if density < 1:
        net.set_masks(random_masks({n: tuple(m.mask.shape) for n, m in net.layers.items()}, density, seed=seed))
    return net


@torch.inference_mode(False)
def unwrap(net: MaskedGraph) -> nn.Module:
    """The plain model of the original class, a copy, with weights outside the masks +0.0.

    Raises:
        ConfigError: the weights are spread over processes (`fully_shard`).
    """
    if not isinstance(net, MaskedGraph):
        raise TraceError(f"growfx.unwrap takes a MaskedGraph; a {type(net).__name__} arrived")
    for parameter in net.parameters():
        require_whole(parameter, f"a plain model has whole ones; {HOW_TO_GATHER}")
    net.settle()
    model = copy.deepcopy(net.shell)
    model.train(net.training)
    for name, module in net.shell.named_modules():
        model.get_submodule(name).training = module.training
    for module in list(model.modules()):
        if isinstance(module, MaskedLayer):
            to_plain(module)
    for name in [n for n in model._buffers if n.startswith(RECORDED_CONSTANT)]:
        del model._buffers[name]
        model._non_persistent_buffers_set.discard(name)
    if net.identity is not None:
        remember(model, net.identity)
    return model


def _example(model: nn.Module, example_inputs: Any) -> Inputs:
    if example_inputs is None:
        tensor = next(chain_tensors(model), torch.empty(0))
        dtype = tensor.dtype if tensor.is_floating_point() else torch.float32
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(default_input_shape(model), generator=generator)
        return Inputs((values.to(device=tensor.device, dtype=dtype),), {})
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, tuple):
        return Inputs(example_inputs, {})
    raise TraceError(f"example_inputs is a {type(example_inputs).__name__}; give a tensor or a tuple of arguments")


def _swap_in(shell: nn.Module, exclude: Sequence[str], report: TraceReport) -> None:
    patterns = [exclude] if isinstance(exclude, str) else list(exclude)
    unmatched = dict.fromkeys(patterns)
    masks: dict[int, Tensor] = {}
    for name, module in list(shell.named_modules()):
        if not is_maskable(module):
            continue
        hits = [p for p in patterns if fnmatch.fnmatchcase(name, p)]
        for pattern in hits:
            unmatched.pop(pattern, None)
        reason = f"excluded by `{hits[0]}`" if hits else maskable_reason(module)
        if not name:
            reason = "it is the model itself: wrap it in nn.Sequential to mask it"
        if reason is not None:
            report.unmasked[name] = reason
            continue
        twin = to_twin(module)
        # Layers that share a weight share its mask.
        twin._buffers["mask"] = masks.setdefault(id(twin.parameter), twin.mask)
    if unmatched:
        raise ConfigError(f"exclude: no convolution, linear layer or attention is named like {list(unmatched)}")


def _declare_opaque(shell: nn.Module, opaque: Sequence[str], report: TraceReport) -> None:
    names = [name for name, _ in shell.named_modules() if name]
    for pattern in [opaque] if isinstance(opaque, str) else opaque:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ConfigError(f"opaque: no module is named like `{pattern}`")
        report.opaque |= dict.fromkeys(hits, f"named by `{pattern}`")


def _name_layers(net: MaskedGraph, called: list[str]) -> None:
    """Order the layers by data flow, drop those never called, and tie those that share a weight."""
    report = net.trace_report
    by_weight: dict[int, list[tuple[str, MaskedLayer]]] = {}
    twins = {name: m for name, m in net.shell.named_modules() if isinstance(m, MaskedLayer)}
    order = {name: i for i, name in enumerate(called)}
    # Attention reads its output projection without calling it; what an opaque module calls may depend on data.
    attentions = [name for name, m in twins.items() if isinstance(m, nn.MultiheadAttention) and name in order]
    whole_modules = [*report.opaque, *attentions]
    for name, twin in sorted(twins.items(), key=lambda item: order.get(item[0], len(order))):
        if name not in order and not any(name.startswith(f"{whole}." if whole else "") for whole in whole_modules):
            report.unmasked[name] = "never called"
            to_plain(twin)
            continue
        group = by_weight.setdefault(id(twin.parameter), [])
        if group:
            report.tied[name] = group[0][0]
        else:
            net.layers[name] = twin
        group.append((name, twin))
    net._tied[0].extend([twin for _, twin in group] for group in by_weight.values() if len(group) > 1)
    report.layers = list(net.layers)


# -- recording, checked against the model -----------------------------------------------------------------------------


def record_checked(
    net: MaskedGraph,
    inputs: Inputs,
    model: nn.Module | None = None,
    copied: nn.Module | None = None,
    holds_for_values: bool = False,
) -> RecordedGraph:
    """Record the net's shell in its current mode and compare the graph with the model's own forward.

    Args:
        net: the net whose report is filled in.
        inputs: what to record for; recorded with two rows, compared with another number of them.
        model: the model that came in; later recordings are compared with the net's own shell.
        copied: a `meta_copy` of the shell; made when not given.
        holds_for_values: record what the model does on these very values, whatever it takes out of them, and compare
            on them alone.
    """
    shell, report = net.shell, net.trace_report
    if holds_for_values:
        made = _with_values(shell, inputs)
        trials = [inputs]
    else:
        # Shapes are all that most recordings need; one that turns out to need values, or to differ, is made with them.
        if not _on_meta(shell):
            with contextlib.suppress(NeedsValuesError):
                made = _recorded(net, inputs, copied or meta_copy(shell))
                if not _difference(model or shell, shell, made.run, _trials(net, inputs, made)):
                    return made
        made = _recorded(net, inputs, None)
        trials = _trials(net, inputs, made)
    difference = _difference(model or shell, shell, made.run, trials)
    if difference:
        report.notes.append(f"{'train' if shell.training else 'eval'} mode: {difference}")
    return dataclasses.replace(made, faithful=made.faithful and not difference)


def _recorded(net: MaskedGraph, inputs: Inputs, run_on: nn.Module | None) -> RecordedGraph:
    """Record the shell; what takes values out of data is noted in the report and recorded whole.

    Args:
        net: the net.
        inputs: recorded with two rows where they have rows.
        run_on: a `meta_copy` of the shell to run instead.
    """
    shell, report = net.shell, net.trace_report
    if run_on is not None:
        for ours, theirs in zip(shell.modules(), run_on.modules(), strict=True):
            theirs.training = ours.training
    small = inputs.with_batch(2)
    while "" not in report.opaque:
        try:
            with _restored(shell), torch.random.fork_rng(_cuda_devices(shell)):
                made = record(shell, small.args, small.kwargs, opaque=report.opaque, run_on=run_on)
        except DataDependentError as stop:
            report.opaque[stop.module] = stop.reason
        else:
            return RecordedGraph(made.graph, made.called, True, *compiled(made.graph))
    # Where the model itself reads data there is nothing left to record whole: the graph is only to look at.
    return dataclasses.replace(_with_values(shell, inputs), faithful=False)


def _with_values(shell: nn.Module, inputs: Inputs) -> RecordedGraph:
    """Record what the shell does on these very values, whatever it takes out of them."""
    with _restored(shell), torch.random.fork_rng(_cuda_devices(shell)):
        made = record(shell, inputs.args, inputs.kwargs, allow_data=True)
    return RecordedGraph(made.graph, made.called, True, *compiled(made.graph))


def _trials(net: MaskedGraph, inputs: Inputs, made: RecordedGraph) -> list[Inputs]:
    """Inputs to compare a recording on; none where there is nothing to compare."""
    other = net.recorded(inputs, not net.shell.training)
    # The very same operators as in the other mode, which were compared already, need no second comparison.
    proven = other is not None and other.faithful and other.code.src == made.code.src
    return [] if proven or not made.faithful else _other_values(inputs, net.shell.training)


def _other_values(inputs: Inputs, training: bool) -> list[Inputs]:
    """Inputs to compare on, best first: a model may refuse another batch size, or other values."""
    # A single row is cheapest, but batch statistics need several.
    other, recorded = inputs.with_batch(3 if training else 1), inputs.with_batch(2)
    return [other.redrawn(seed=1), recorded.redrawn(seed=1), recorded]


def _difference(model: nn.Module, shell: nn.Module, run: Callable[..., Any], trials: list[Inputs]) -> str:
    """How the graph's outputs differ from the model's on the first inputs the model takes; "" if they do not."""
    if not trials:
        return ""

    def outputs(function: Callable[..., Any], module: nn.Module, given: Inputs) -> list[Any]:
        devices = _cuda_devices(shell)
        with in_mode(module, shell.training), _restored(module), torch.random.fork_rng(devices), torch.no_grad():
            torch.manual_seed(0)
            with short_shapes() if _on_meta(shell) else contextlib.nullcontext():
                return list(_leaves(function(*given.args, **given.kwargs)))

    for given in trials:
        try:
            expected = outputs(model, model, given)
        except Exception:
            continue
        try:
            return _first_difference(expected, outputs(functools.partial(run, shell), shell, given))
        except Exception as error:
            return f"the graph fails where the model does not: {type(error).__name__}: {error}"
    return "the model fails when called a second time, so the graph cannot be compared with it"


def _leaves(value: Any) -> Iterator[Any]:
    """The tensors, numbers and names in a nest of containers, in order; objects of the model's own say nothing."""
    if isinstance(value, dict):
        value = value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value).values()
    elif not isinstance(value, (list, tuple)):
        if isinstance(value, Tensor) or (value is not None and can_be_written(value)):
            yield value
        return
    for item in value:
        yield from _leaves(item)


def _first_difference(expected: list[Any], got: list[Any]) -> str:
    if len(expected) != len(got):
        return f"the model returns {len(expected)} values, the graph {len(got)}"
    for i, (a, b) in enumerate(zip(expected, got, strict=True)):
        if not isinstance(a, Tensor):
            if not isinstance(b, Tensor) and a == b:
                continue
            return f"output {i} is {a!r} from the model and {b!r} from the graph"
        if a.shape != b.shape:
            return f"output {i} has shape {tuple(a.shape)} from the model and {tuple(b.shape)} from the graph"
        if a.is_meta or a.numel() == 0 or torch.equal(a, b):
            continue
        scale = float(a.abs().nan_to_num().max())
        if not torch.allclose(a, b, rtol=1e-5, atol=1e-5 * scale, equal_nan=True):
            error = float((a.double() - b.double()).abs().max())
            return f"output {i} differs by {error:.3g} (largest value {scale:.3g}) between the model and the graph"
    return ""


@contextmanager
def _restored(module: nn.Module) -> Generator[None]:
    """Put back the buffers that a forward changes."""
    masks = {id(m.mask) for m in module.modules() if isinstance(m, MaskedLayer)}
    saved = [(b, b.detach().clone()) for b in module.buffers() if id(b) not in masks]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def _on_meta(module: nn.Module) -> bool:
    first = next(chain_tensors(module), None)
    return first is not None and first.is_meta


def _cuda_devices(module: nn.Module) -> list[int]:
    if not torch.cuda.is_initialized():
        return []
    return sorted({t.device.index or 0 for t in chain_tensors(module) if t.device.type == "cuda"})
