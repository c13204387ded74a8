"""Compaction: leaves units out of a model, by a plan.

A plan says for each tensor which indices along which axis stay, and for each module which integers change. It is
found by `growfx.passes.compact.compact`; stored in an artifact it makes the original model the smaller one before
the weights are loaded, without the graph it was found on. A plan that was read is checked against the model
before anything is changed: it can make tensors smaller and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from growfx.compaction.folded_norm import folding_refusal, without_norm
from growfx.compaction.plan import CompactionPlan, Spans, damaged_plan
from growfx.compaction.widths import check_heads, check_widths, state_widths
from growfx.masked.module_copy import copy_modules
from growfx.masked.modules import in_format_of

__all__ = [
    "apply_plan",
    "apply_trusted",
    "columns_axis",
    "hollow",
    "kept_indices",
    "select_blocks",
    "sharing_copy",
    "sizes_after",
    "sizes_of",
    "spans",
    "units_of",
]


def spans(kept: Tensor) -> Spans:
    """The true positions of a bool vector as half-open spans."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept.numpy(), [False]]))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def kept_indices(kept: Spans) -> Tensor:
    """The indices in spans, int64."""
    # Not one arange for each: a file may list millions of spans.
    starts, stops = torch.tensor(kept, dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
    lengths = stops - starts
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device="cpu") + torch.repeat_interleave(starts - before, lengths)


def select_blocks(weight: Tensor, groups: int, first: Tensor, second: Tensor) -> Tensor:
    """The part of a grouped convolution's weight between channels that stay.

    Args:
        weight: (channels of all groups, channels of one group, *kernel).
        groups: how many there are.
        first: the channels that stay along the first axis, ascending int64.
        second: those of the other side, numbered over all groups; every group keeps as many of each side as the
            other groups do, or none.

    Raises:
        ValueError: they do not.
    """
    height, width = weight.shape[0] // groups, weight.shape[1]
    staying = (first // height).unique()
    counts = [torch.bincount(side, minlength=groups) for side in (first // height, second // width)]
    if any((count[staying] * len(staying) != count.sum()).any() for count in counts):
        raise ValueError("its groups would be uneven")
    rows, columns = first.reshape(len(staying), -1), second.reshape(len(staying), -1)
    where = [staying.reshape(-1, 1, 1), rows.unsqueeze(2) % height, columns.unsqueeze(1) % width]
    return weight.unflatten(0, (groups, height))[tuple(index.to(weight.device) for index in where)].flatten(0, 1)


def columns_axis(module: nn.Module) -> int:
    """The axis of a layer's weight that its input channels or features stand along."""
    return 0 if isinstance(module, _ConvTransposeNd) else 1


def sizes_of(module: nn.Module, groups: int | None = None) -> dict[str, int]:
    """The integers of a layer or norm that follow from its tensors' shapes and its number of groups.

    A module of another kind has none.
    """
    weight = module._parameters.get("weight")
    if isinstance(module, _ConvNd) and weight is not None:
        groups = module.groups if groups is None else groups
        own, other = weight.shape[0], weight.shape[1] * groups
        inputs, outputs = (own, other) if columns_axis(module) == 0 else (other, own)
        return {"in_channels": inputs, "out_channels": outputs, "groups": groups}
    if isinstance(module, nn.Linear) and weight is not None:
        return {"in_features": weight.shape[1], "out_features": weight.shape[0]}
    tensors = (weight, module._buffers.get("running_mean"))
    size = next((tensor.shape[0] for tensor in tensors if tensor is not None and tensor.ndim == 1), None)
    if isinstance(module, _NormBase) and size is not None:
        return {"num_features": size}
    if isinstance(module, nn.PReLU) and size is not None:
        return {"num_parameters": size}
    if isinstance(module, nn.GroupNorm) and size is not None:
        return {"num_channels": size, "num_groups": module.num_groups if groups is None else groups}
    return {}


def units_of(module: nn.Module) -> tuple[int, int] | None:
    """Output units and input columns of a convolution or linear layer; None for modules of another kind."""
    sizes = sizes_of(module) if isinstance(module, (_ConvNd, nn.Linear)) else {}
    if "out_channels" in sizes:
        return sizes["out_channels"], sizes["in_channels"]
    return (sizes["out_features"], sizes["in_features"]) if sizes else None


def sizes_after(
    model: nn.Module,
    tensors: Mapping[str, Mapping[int, Spans]],
    groups: Mapping[str, int],
    blocks: Mapping[str, Spans] | None = None,
) -> dict[str, dict[str, int]]:
    """The integers of modules that change when these indices of their tensors stay.

    Args:
        model: the model before.
        tensors: as in `CompactionPlan`.
        groups: grouped convolutions -> how many of their groups stay.
        blocks: as in `CompactionPlan`.
    """
    trial = _apply(hollow(model), CompactionPlan(tensors, blocks=blocks or {}))
    changed: dict[str, dict[str, int]] = {}
    for name in dict.fromkeys((*(name.rpartition(".")[0] for name in (*tensors, *(blocks or ()))), *groups)):
        module, count = trial.get_submodule(name), groups.get(name)
        if isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels:
            count = module.weight.shape[0]
        sizes = {key: size for key, size in sizes_of(module, count).items() if getattr(module, key) != size}
        changed |= {name: sizes} if sizes else {}
    return changed


def apply_plan(model: nn.Module, plan: CompactionPlan) -> nn.Module:
    """Leave out of `model`, in place, what the plan leaves out; parameters stay the objects they are.

    New biases are zero. Returns the model.

    Raises:
        ArtifactError: the plan is not one of this model; nothing is changed then.
    """
    trial = hollow(model)
    try:
        _apply(trial, plan)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise damaged_plan(f"it does not fit the model ({error})") from error
    _check(model, trial, plan)
    return _apply(model, plan)


def apply_trusted(model: nn.Module, plan: CompactionPlan) -> nn.Module:
    """`apply_plan` for a plan that was just made of this model: it is not tried on a copy before."""
    return _apply(model, plan)


def hollow(model: nn.Module) -> nn.Module:
    """A copy of a model without values."""
    return _copied(model, lambda tensor: torch.empty_like(tensor, device="meta"))


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that can be made smaller; what is not written to is stored once for both."""
    return _copied(model, Tensor.detach)


def _copied(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        new = change(tensor)
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return copy_modules(model, memo)


def _apply(model: nn.Module, plan: CompactionPlan) -> nn.Module:
    _check_names(model, plan)
    for name in dict.fromkeys((*plan.tensors, *plan.blocks)):
        owner, last = _owner(model, name)
        tensor = owner._parameters[last] if last in owner._parameters else owner._buffers[last]
        assert tensor is not None
        small = _selected(plan, name, owner, tensor.detach())
        if last in owner._parameters:
            tensor.data, tensor.grad = small, None
        else:
            owner._buffers[last] = small
    for name in plan.biases:
        module: Any = model.get_submodule(name)
        outputs = module.weight.shape[1 - columns_axis(module)]
        outputs *= module.groups if columns_axis(module) == 0 else 1
        module.bias = nn.Parameter(module.weight.new_zeros(outputs), module.weight.requires_grad)
    for name, sizes in plan.modules.items():
        for attribute, size in sizes.items():
            setattr(model.get_submodule(name), attribute, size)
    state_widths(model, plan.widths)
    state_widths(model, plan.heads)
    for name in plan.norms:
        model.set_submodule(name, without_norm(model.get_submodule(name)))
    for name in plan.left_out:
        owner, last = _owner(model, name)
        owner._modules[last] = None
    return model


def _selected(plan: CompactionPlan, name: str, owner: nn.Module, tensor: Tensor) -> Tensor:
    """What stays of a tensor."""
    axes = plan.tensors.get(name, {})
    for axis, kept in axes.items():
        if axis >= tensor.ndim or kept[-1][1] > tensor.shape[axis]:
            raise damaged_plan(f"`{name}` of shape {tuple(tensor.shape)} has no index {kept[-1][1] - 1} on axis {axis}")
    if name in plan.blocks:
        if not isinstance(owner, _ConvNd) or owner.groups == 1 or not name.endswith("weight") or axes.keys() - {0}:
            raise damaged_plan(
                f"`{name}` is not a weight of a grouped convolution, or is cut along its second axis too"
            )
        if plan.blocks[name][-1][1] > tensor.shape[1] * owner.groups:
            raise damaged_plan(f"`{name}` has {tensor.shape[1] * owner.groups} channels along its second axis")
        rows = kept_indices(axes[0]) if 0 in axes else torch.arange(len(tensor), device="cpu")
        return in_format_of(select_blocks(tensor, owner.groups, rows, kept_indices(plan.blocks[name])), tensor)
    left = tensor
    for axis, kept in axes.items():
        left = left.index_select(axis, kept_indices(kept).to(tensor.device))
    return in_format_of(left, tensor)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    way, _, last = name.rpartition(".")
    return model.get_submodule(way), last


def _check_names(model: nn.Module, plan: CompactionPlan) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    for name, tensor in _all_tensors(model):
        tensors[name] = tensor
        uses[id(tensor)] = uses.get(id(tensor), 0) + 1
    for name in (*plan.tensors, *plan.blocks):
        if name not in tensors:
            raise damaged_plan(f"the model has no tensor `{name}`")
        if uses[id(tensors[name])] > 1:
            raise damaged_plan(f"`{name}` is tied to another tensor of the model")
    for name in {*plan.modules, *plan.biases}:
        if name not in modules:
            raise damaged_plan(f"the model has no module `{name}`")
    for name, sizes in plan.modules.items():
        wrong = sizes.keys() - sizes_of(modules[name]).keys()
        if wrong:
            raise damaged_plan(f"`{name}` has no size `{min(wrong)}` that could change")
    for name in plan.biases:
        module = modules[name]
        if not isinstance(module, (_ConvNd, nn.Linear)) or module.bias is not None:
            raise damaged_plan(f"`{name}` is not a layer without a bias")
    _check_norms(modules, plan)
    check_widths(modules, plan.widths)
    check_heads(modules, plan.heads)
    touched = (*plan.tensors, *plan.blocks, *plan.modules, *plan.biases, *plan.norms, *plan.widths, *plan.heads)
    for name in plan.left_out:
        if not name or name not in modules:
            raise damaged_plan(f"the model has no module `{name}`")
        inside = [other for other in (*touched, *plan.left_out) if other.startswith(f"{name}.")]
        if inside or name in touched or plan.left_out.count(name) > 1:
            raise damaged_plan(f"`{name}` is left out, and changed besides")


def _check_norms(modules: Mapping[str, nn.Module], plan: CompactionPlan) -> None:
    touched = {name.rpartition(".")[0] for name in plan.tensors} | plan.modules.keys() | plan.widths.keys()
    for name in plan.norms:
        if not name or name not in modules:
            raise damaged_plan(f"the model has no module `{name}`")
        refusal = folding_refusal(modules[name])
        if refusal or name in touched:
            raise damaged_plan(f"`{name}` cannot be folded away: {refusal or 'it is made smaller'}")


def _all_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check(model: nn.Module, trial: nn.Module, plan: CompactionPlan) -> None:
    """The integers of every module changed are those of its tensors, and layers of other kinds are whole."""
    touched = {name.rpartition(".")[0] for name in (*plan.tensors, *plan.blocks)} | plan.modules.keys()
    for name in sorted(touched):
        before, after = model.get_submodule(name), trial.get_submodule(name)
        sizes = sizes_of(after)
        wrong = [key for key, size in sizes.items() if getattr(after, key) != size]
        groups = sizes.get("groups", 1)
        if groups < 1 or any(sizes[key] % groups for key in ("in_channels", "out_channels") if key in sizes):
            wrong.append("groups")
        if wrong:
            raise damaged_plan(f"`{wrong[0]}` of `{name}` does not agree with its tensors")
        sizes_before = sizes_of(before)
        if any(sizes[key] > sizes_before[key] for key in sizes):
            raise damaged_plan(f"`{name}` would grow")
        bias, outputs = after._parameters.get("bias"), sizes.get("out_channels", sizes.get("out_features"))
        if bias is not None and outputs is not None and bias.shape != (outputs,):
            raise damaged_plan(f"the bias of `{name}` does not agree with its weight")
