"""Compaction: the network without its dead units, a smaller model of the same class with the same outputs.

A unit is dead when the output does not need it, or when its value does not depend on the input and can be added to
the biases of what it feeds. That is judged on the values the weights have now, in evaluation mode: what stands
behind a norm's scale of exactly zero contributes nothing, and leaves, though training might bring it back; so
compaction is the last step, not one between others. Masks inside the weights that stay are as they were.

Every result is compared with the network before it is returned, on two batches and on a second input size where the
model takes one, in float64 where the model runs in it. A removal that the model's own code cannot do without
(sizes written into it) is taken back, by halves, until the rest works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.compaction import CompactionPlan, apply_plan, columns_axis
from growfx.connectivity import Connectivity
from growfx.errors import TraceError
from growfx.inputs import Inputs
from growfx.passes.compact_choice import Chooser, Removal, fold_constants, make_plan
from growfx.passes.compact_liveness import find_liveness
from growfx.passes.compact_report import CompactionReport, LayerChange
from growfx.passes.connect import connect
from growfx.passes.mask import unwrap
from growfx.passes.record import meta_copy

if TYPE_CHECKING:
    from growfx.graph import MaskedGraph

__all__ = ["Compacted", "compact"]

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}

Trial = tuple[Inputs, list[Tensor]]


@dataclass(frozen=True)
class Compacted:
    """A network without its dead units.

    Attributes:
        model: a plain model of the original class in evaluation mode, with smaller modules.
        masks: masked layer -> its mask in the smaller shape; `growfx.wrap(model)` and `set_masks` make a net of it.
        plan: what was left out; makes another instance of the original class as small.
        report: per layer the units before and after and why dead ones stayed; prints as a table.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    plan: CompactionPlan
    report: CompactionReport


def compact(net: MaskedGraph, example_inputs: Tensor | Sequence[Tensor] | None = None) -> Compacted:
    """Leave out all units that the outputs can do without, exactly; `net` is not changed.

    Args:
        net: a masked network with values, in any mode; only its evaluation mode is kept.
        example_inputs: inputs to look at and to compare outputs on; default: as recorded.

    What cannot be compacted comes back whole, and the report says why.

    Raises:
        TraceError: the network has no values (meta device), or does not run on the inputs.
    """
    model = unwrap(net).eval()
    if any(tensor.is_meta for tensor in model.parameters()):
        raise TraceError("the network is on the meta device, so nothing is known of its values; load them first")
    example = _example(net, example_inputs)
    try:
        graph = net.graph_at(*example.args, training=False)
        found = connect(net, example.args)
    except TraceError as refusal:
        return _whole(net, model, f"the network could not be followed: {refusal}")
    work, trials = _working_copy(model, example)
    live = find_liveness(work, graph, found, [inputs for inputs, _ in trials])
    chooser = Chooser(work, found, live)
    groups, problems = _fitting(chooser, trials)
    removal, back = chooser.removal(groups)
    plan, folds = make_plan(chooser, removal)
    reasons = {**chooser.refused, **problems, **back}
    result = _built(model, plan, folds)
    trials = _trials(model, [inputs for inputs, _ in trials])
    error, problem = _difference(result, trials)
    if problem:
        return _whole(net, model, problem)
    report = CompactionReport(
        layers=tuple(_changes(net, found, chooser, removal, reasons)),
        parameters=(_numel(model), _numel(result)),
        largest_error=error,
        checked=tuple(_shape(inputs) for inputs, _ in trials),
    )
    return Compacted(result, _masks(net, removal, result), plan, report)


def _whole(net: MaskedGraph, model: nn.Module, reason: str) -> Compacted:
    masks = {name: layer.mask.detach().clone() for name, layer in net.layers.items()}
    report = CompactionReport((), (_numel(model), _numel(model)), 0.0, (), reason)
    return Compacted(model, masks, CompactionPlan(), report)


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(inputs: Inputs) -> tuple[int, ...]:
    leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    return next((tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)), ())


# -- inputs and comparison --------------------------------------------------------------------------------------------


def _example(net: MaskedGraph, example_inputs: Any) -> Inputs:
    if example_inputs is None:
        return Inputs(net.example_inputs(), {})
    return Inputs((example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs), {})


def _working_copy(model: nn.Module, example: Inputs) -> tuple[nn.Module, list[Trial]]:
    """A copy of the model in float64, or in its own type where it does not run in that, and inputs with outputs."""
    candidates = [example.with_batch(2).redrawn(seed) for seed in (1, 2)]
    larger = _larger(candidates[0])
    if larger is not None:
        candidates.append(larger)
    try:
        work = copy.deepcopy(model).double()
        return work, _trials(work, [_as_double(inputs) for inputs in candidates])
    except Exception:  # types written into the model
        return model, _trials(model, candidates)


def _as_double(inputs: Inputs) -> Inputs:
    double = lambda v: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    return Inputs(*pytree.tree_map(double, (inputs.args, dict(inputs.kwargs))))


def _larger(inputs: Inputs) -> Inputs | None:
    """Images half as large again, in steps of 32 where they are such themselves."""
    generator = torch.Generator().manual_seed(3)

    def larger(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim < 4:
            return value
        sizes = [n + max(n // 2 // 32 * 32, min(n, 32)) for n in value.shape[2:]]
        return torch.randn((*value.shape[:2], *sizes), generator=generator).to(value)

    args = tuple(map(larger, inputs.args))
    changed = any(new is not old for new, old in zip(args, inputs.args, strict=True))
    return Inputs(args, inputs.kwargs) if changed and not inputs.structural else None


def _trials(model: nn.Module, candidates: Sequence[Inputs]) -> list[Trial]:
    """Inputs that the model takes, with its outputs; the first has to be one."""
    first = next(iter(model.parameters()), torch.empty(0))
    move = lambda v: v.to(first.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v  # noqa: E731
    trials: list[Trial] = []
    for inputs in candidates:
        inputs = Inputs(*pytree.tree_map(move, (inputs.args, dict(inputs.kwargs))))
        try:
            trials.append((inputs, _outputs(model, inputs)))
        except Exception as error:
            if not trials:
                raise TraceError(f"the network does not run on the example inputs: {_first_line(error)}") from error
    return trials


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        result = model(*inputs.args, **inputs.kwargs)
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _difference(model: nn.Module, trials: Sequence[Trial]) -> tuple[float, str]:
    """The largest error of the outputs over the largest output, and what is wrong, if anything is."""
    largest = 0.0
    for inputs, expected in trials:
        try:
            got = _outputs(model, inputs)
        except Exception as error:
            return largest, f"the model fails without it: {_first_line(error)}"
        if [value.shape for value in got] != [value.shape for value in expected]:
            return largest, "the outputs would have another shape"
        for ours, theirs in zip(got, expected, strict=True):
            if theirs.is_meta or not theirs.numel():
                continue
            scale = float(theirs.abs().double().nan_to_num().max()) or 1.0
            error = float((ours.double() - theirs.double()).abs().nan_to_num().max()) / scale
            tolerance = _TOLERANCE.get(theirs.dtype, 1e-2)
            if error > tolerance or bool((ours.isnan() != theirs.isnan()).any()):
                return error, f"the outputs would differ by {error:.2g} of the largest"
            largest = max(largest, error)
    return largest, ""


# -- the removal ------------------------------------------------------------------------------------------------------


def _fitting(chooser: Chooser, trials: Sequence[Trial]) -> tuple[list[int], dict[int, str]]:
    """The candidates that the model's code can do without, and what is wrong with the others."""
    clusters = list(chooser.clusters().values())
    problems: dict[int, str] = {}
    shapes = _on_meta(chooser.model, trials)
    if shapes is not None:
        clusters, wrong = _largest(clusters, lambda groups: _problem(chooser, groups, *shapes))
        problems |= wrong
    clusters, wrong = _largest(clusters, lambda groups: _problem(chooser, groups, chooser.model, trials))
    return [group for cluster in clusters for group in cluster], problems | wrong


def _on_meta(model: nn.Module, trials: Sequence[Trial]) -> tuple[nn.Module, list[Trial]] | None:
    """The model and the trials without values, where the model runs on shapes alone."""
    hollow = meta_copy(model)
    move = lambda v: v.to("meta") if isinstance(v, Tensor) else v  # noqa: E731
    try:
        moved = [Inputs(*pytree.tree_map(move, (inputs.args, dict(inputs.kwargs)))) for inputs, _ in trials]
        return hollow, [(inputs, _outputs(hollow, inputs)) for inputs in moved]
    except Exception:  # it reads its data
        return None


def _largest(
    clusters: list[list[int]], problem_of: Callable[[list[int]], str]
) -> tuple[list[list[int]], dict[int, str]]:
    """As many clusters as work together: those of a half that does not are tried by halves again."""
    accepted: list[list[int]] = []
    wrong: dict[int, str] = {}

    def visit(part: list[list[int]]) -> None:
        if not part:
            return
        problem = problem_of([group for cluster in (*accepted, *part) for group in cluster])
        if not problem:
            accepted.extend(part)
        elif len(part) == 1:
            wrong.update(dict.fromkeys(part[0], problem))
        else:
            visit(part[: len(part) // 2])
            visit(part[len(part) // 2 :])

    visit(clusters)
    return accepted, wrong


def _problem(chooser: Chooser, groups: list[int], model: nn.Module, trials: Sequence[Trial]) -> str:
    removal, _ = chooser.removal(groups)
    plan, folds = make_plan(chooser, removal)
    hollow = all(value.is_meta for _, outputs in trials for value in outputs)
    return _difference(_built(model, plan, {} if hollow else folds), trials)[1] if plan else ""


def _built(model: nn.Module, plan: CompactionPlan, folds: dict[str, Tensor]) -> nn.Module:
    small = copy.deepcopy(model)
    apply_plan(small, plan)
    fold_constants(small, folds)
    return small


def _masks(net: MaskedGraph, removal: Removal, model: nn.Module) -> dict[str, Tensor]:
    """The masks of the layers in their smaller shapes."""
    masks = {}
    for name, layer in net.layers.items():
        mask = layer.mask.detach().clone()
        if name in removal.outputs and mask.shape != _weight(model, name, layer).shape:
            rows, columns = removal.outputs[name].to(mask.device), removal.columns[name].to(mask.device)
            axis = columns_axis(layer)
            grouped = getattr(layer, "groups", 1) > 1
            if not grouped or axis == 0:
                mask = mask.index_select(axis, columns.nonzero().flatten())
            if not grouped or axis == 1:
                mask = mask.index_select(1 - axis, rows.nonzero().flatten())
        masks[name] = mask
    return masks


def _weight(model: nn.Module, name: str, layer: Any) -> Tensor:
    return getattr(model.get_submodule(name), layer.weight_name)


def _changes(
    net: MaskedGraph, found: Connectivity, chooser: Chooser, removal: Removal, reasons: dict[int, str]
) -> list[LayerChange]:
    """Per layer what left and why dead units stayed."""
    changes = []
    for name, layer in found.layers.items():
        stays = removal.outputs[name]
        idle = stays & chooser.idle[layer.outputs]
        groups = found.coupled(name)[idle].tolist()
        why = [reasons.get(g) or f"coupled with a live unit{_of_others(found, g, name)}" for g in groups]
        changes.append(LayerChange(name, len(stays), int(stays.sum()), len(groups), tuple(dict.fromkeys(why))))
    return changes


def _of_others(found: Connectivity, group: int, name: str) -> str:
    others = [other for other in found.layers if other != name and bool((found.coupled(other) == group).any())]
    return f" of `{others[0]}`" if others else ""
