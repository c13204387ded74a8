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

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from growfx.analysis.connectivity import Connectivity
from growfx.compaction.apply import apply_plan, columns_axis, select_blocks, sharing_copy
from growfx.compaction.plan import CompactionPlan
from growfx.compaction.widths import state_widths
from growfx.errors import TraceError
from growfx.masked.present.storage import on_whole_weights
from growfx.passes.compact.choice import Chooser, Removal, fold_constants, make_plan
from growfx.passes.compact.liveness import find_liveness
from growfx.passes.compact.report import CompactionReport, LayerChange
from growfx.passes.compact.unused import find_unused
from growfx.passes.compact.widths import find_widths
from growfx.passes.connect.interpreter import connect
from growfx.passes.mask.swap import unwrap
from growfx.passes.record.recording import meta_copy
from growfx.passes.trials.comparison import Trial, difference, example_of, trials_in_types_of, working_copy
from growfx.passes.trials.halving import largest_fitting
from growfx.passes.trials.precision import outputs_of
from growfx.passes.trials.result import PassResult
from growfx.recorded.inputs import Inputs

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Compacted", "compact"]


@dataclass(frozen=True)
class Compacted(PassResult[CompactionReport]):
    """A network without its dead units.

    Attributes:
        net: a plain model of the original class in evaluation mode, with smaller modules.
        masks: masked layer that is still there -> its mask in the smaller shape; `growfx.wrap(model)` and `set_masks`
            make a net of it.
        plan: what was left out; makes another instance of the original class as small.
        report: per layer the units before and after and why dead ones stayed; prints as a table.
    """

    masks: dict[str, Tensor]
    plan: CompactionPlan


@torch.inference_mode(False)
@on_whole_weights
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
    example = example_of(net, example_inputs)
    try:
        graph = net.graph_for(example, look_inside=True)
        found = connect(net, example)
    except TraceError as refusal:
        return _whole(net, model, f"the network could not be followed: {refusal}")
    work, trials = working_copy(model, example)
    live = find_liveness(work, graph, found, [trial.inputs for trial in trials], trials[0].wide)
    chooser = Chooser(work, found, live)
    groups, problems = _fitting(chooser, trials)
    removal, back = chooser.removal(groups)
    plan, folds = make_plan(chooser, removal)
    left_out, unread = find_unused(work, graph, found, net.trace_report.opaque, trials)
    plan = replace(plan, left_out=left_out)
    reasons = {**chooser.refused, **problems, **back}
    result = _built(model, plan, folds)
    trials = trials_in_types_of(example, model, trials)
    error, problem = difference(result, trials)
    if problem:
        return _whole(net, model, problem)
    plan = replace(plan, widths=_widths(model, result, plan, trials))
    state_widths(result, plan.widths)
    report = CompactionReport(
        layers=tuple(_changes(net, found, chooser, removal, reasons)),
        parameters=(_numel(model), _numel(result)),
        largest_error=error,
        checked=tuple(_shape(trial.inputs) for trial in trials),
        left_out=left_out,
        unread=unread,
    )
    return Compacted(result, bool(plan), report, _masks(net, removal, result, left_out), plan)


def _whole(net: MaskedGraph, model: nn.Module, reason: str) -> Compacted:
    masks = {name: layer.mask.detach().clone() for name, layer in net.layers.items()}
    report = CompactionReport((), (_numel(model), _numel(model)), 0.0, (), reason)
    return Compacted(model, False, report, masks, CompactionPlan())


def _numel(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _shape(inputs: Inputs) -> tuple[int, ...]:
    leaves = pytree.tree_leaves((inputs.args, dict(inputs.kwargs)))
    return next((tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)), ())


# -- the removal ------------------------------------------------------------------------------------------------------


def _fitting(chooser: Chooser, trials: Sequence[Trial]) -> tuple[list[int], dict[int, str]]:
    """The candidates that the model's code can do without, and what is wrong with the others."""
    clusters = list(chooser.clusters().values())
    problems: dict[int, str] = {}
    shapes = _on_meta(chooser.model, trials)
    if shapes is not None:
        clusters, wrong = largest_fitting(clusters, lambda groups: _problem(chooser, groups, *shapes))
        problems |= wrong
    clusters, wrong = largest_fitting(clusters, lambda groups: _problem(chooser, groups, chooser.model, trials))
    return [group for cluster in clusters for group in cluster], problems | wrong


def _on_meta(model: nn.Module, trials: Sequence[Trial]) -> tuple[nn.Module, list[Trial]] | None:
    """The model and the trials without values, where the model runs on shapes alone."""
    hollow = meta_copy(model)
    move = lambda v: v.to("meta") if isinstance(v, Tensor) else v  # noqa: E731
    try:
        moved = [Inputs(*pytree.tree_map(move, (trial.inputs.args, dict(trial.inputs.kwargs)))) for trial in trials]
        wide = trials[0].wide
        runs = [(inputs, outputs_of(hollow, inputs, wide)) for inputs in moved]
        return hollow, [Trial(*run, [math.inf] * len(run[1]), wide) for run in runs]
    except Exception:  # it reads its data
        return None


def _problem(chooser: Chooser, groups: list[int], model: nn.Module, trials: Sequence[Trial]) -> str:
    removal, _ = chooser.removal(groups)
    plan, folds = make_plan(chooser, removal)
    hollow = all(value.is_meta for trial in trials for value in trial.outputs)
    return difference(_built(model, plan, {} if hollow else folds), trials)[1] if plan else ""


def _built(model: nn.Module, plan: CompactionPlan, folds: dict[str, Tensor]) -> nn.Module:
    small = sharing_copy(model)
    apply_plan(small, plan)
    fold_constants(small, folds)
    return small


def _widths(
    model: nn.Module, result: nn.Module, plan: CompactionPlan, trials: Sequence[Trial]
) -> dict[str, dict[str, int]]:
    """The widths that the smaller model must state anew; those stay that its code computes other outputs with."""
    measured = find_widths(model, result, trials[0].inputs)
    found = [(place, width) for place, width in measured.items() if place[1] not in plan.heads.get(place[0], ())]

    def chosen(indices: Iterable[int]) -> dict[str, dict[str, int]]:
        widths: dict[str, dict[str, int]] = {}
        for (name, where), number in (found[index] for index in indices):
            widths.setdefault(name, {})[where] = number
        return widths

    def problem(indices: list[int]) -> str:
        return difference(state_widths(sharing_copy(result), chosen(indices)), trials)[1]

    good, _ = largest_fitting([[index] for index in range(len(found))], problem)
    return chosen(sorted(index for part in good for index in part))


def _masks(net: MaskedGraph, removal: Removal, model: nn.Module, left_out: Sequence[str]) -> dict[str, Tensor]:
    """The masks of the layers in their smaller shapes."""
    masks = {}
    for name, layer in net.layers.items():
        if any(name == other or name.startswith(f"{other}.") for other in left_out):
            continue
        mask = layer.mask.detach().clone()
        if name in removal.outputs and mask.shape != _weight(model, name, layer).shape:
            rows, columns = removal.outputs[name].to(mask.device), removal.columns[name].to(mask.device)
            axis = columns_axis(layer)
            groups = getattr(layer, "groups", 1)
            sides = [rows.nonzero().flatten(), columns.nonzero().flatten()]
            first, second = reversed(sides) if axis == 0 else sides
            if groups > 1:
                mask = select_blocks(mask, groups, first, second)
            else:
                mask = mask.index_select(0, first).index_select(1, second)
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
        why = [reasons.get(g) or f"coupled with a live unit{_of_others(chooser.owners[g], name)}" for g in groups]
        changes.append(LayerChange(name, len(stays), int(stays.sum()), len(groups), tuple(dict.fromkeys(why))))
    return changes


def _of_others(owners: list[str], name: str) -> str:
    other = next((owner for owner in owners if owner != name), None)
    return f" of `{other}`" if other else ""
