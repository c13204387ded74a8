"""Which groups of dead units can leave together, and what that makes of every tensor.

A group leaves when all its units are dead and nothing that stays would notice: the columns it stands at are used by
nothing that stays, or always see one constant that the layer's bias can take over. What is left must still be a
model: full rectangles where units stand along several axes, whole groups of a grouped convolution, a unit in each
layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from growfx.analysis.connectivity import Connectivity
from growfx.analysis.signal_graph import Origin, Reach
from growfx.compaction.apply import columns_axis, sizes_after, spans, units_of
from growfx.compaction.plan import CompactionPlan, Spans
from growfx.passes.compact.heads import count_heads
from growfx.passes.compact.liveness import Liveness

__all__ = ["Chooser", "Removal", "fold_constants", "make_plan"]

_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)


@dataclass(frozen=True)
class Removal:
    """Groups that leave.

    Attributes:
        removed: unit -> whether it leaves; index 0 is False.
        outputs: layer -> bool per output unit, whether it stays.
        columns: layer -> bool per input column, whether it stays.
    """

    removed: Tensor
    outputs: dict[str, Tensor]
    columns: dict[str, Tensor]


@dataclass(eq=False)
class Chooser:
    """Finds what can leave.

    Attributes:
        model: the plain model, zeros baked into its weights.
        found: its connectivity.
        live: its liveness.
        refused: group -> why it may not leave.
        owners: group -> the layers that have units in it, in data-flow order.
        dead: unit -> not needed, or not dependent on the input.
    """

    model: nn.Module
    found: Connectivity
    live: Liveness
    refused: dict[int, str] = field(default_factory=dict)
    owners: dict[int, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = self.found
        self.dead = ~self.live.needed | ~self.live.fed
        self.dead[0] = False
        alive = torch.zeros(len(found.group), dtype=torch.bool, device="cpu")
        alive[found.group[~self.dead]] = True
        candidates = ~alive[found.group]
        candidates[0] = False
        self.leads = {
            name: torch.where(layer.sources > 0, found.group[layer.sources.clamp(min=0)], 0)
            for name, layer in found.layers.items()
        }
        self.candidates = candidates  # by unit; all units of a group alike
        for name in found.layers:
            for group in found.coupled(name).unique().tolist():
                self.owners.setdefault(group, []).append(name)
        self.refused.update({**found.counted, **found.pinned})
        self._refuse_whole_layers()

    def _refuse_whole_layers(self) -> None:
        """What has another layout than a convolution or linear layer, and what shares its tensors, is not cut."""
        uses: dict[int, int] = {}
        names = set()
        for kind in (self.model.named_parameters, self.model.named_buffers):
            for name, tensor in kind(remove_duplicate=False):
                names.add(name)
                uses[id(tensor)] = uses.get(id(tensor), 0) + 1
        modules = dict(self.model.named_modules())
        for name, layer in self.found.layers.items():
            module = modules.get(name)
            if module is None or units_of(module) != (len(layer.outputs), len(layer.sources)):
                reason = f"`{name}` is left whole"
            elif any(uses[id(tensor)] > 1 for tensor in module.parameters()):
                reason = f"the weight of `{name}` is tied"
            else:
                continue
            for group in {*self.found.coupled(name).tolist(), *self.leads[name].tolist()} - {0}:
                self.refused.setdefault(group, reason)
        for name, (_, units) in self.found.parameters.items():
            if name not in names or uses[id(_tensor(self.model, name))] > 1:
                reason = f"`{name}` is tied" if name in names else "it meets a tensor that the model makes when it runs"
                for group in set(self.found.group[units].tolist()) - {0}:
                    self.refused.setdefault(group, reason)

    @cached_property
    def idle(self) -> Tensor:
        """Unit -> whether it is dead, or unconnected though something is computed over it."""
        return self.dead | self._unconnected()

    def _unconnected(self) -> Tensor:
        """Units that nothing leads to, or that lead to no weight; what is pinned or counted is never called dead."""
        alone = torch.zeros(len(self.found.group), dtype=torch.bool, device="cpu")
        reaching, used = Origin(self.found.signals), Origin(self.found.signals)
        for name, layer in self.found.layers.items():
            alone[layer.outputs[~self.live.edges[name].any(1)]] = True
            reaching.add(name, torch.ones(len(layer.sources), dtype=torch.bool, device="cpu"))
            used.add(name, self.live.edges[name].any(0))
        return alone | (reaching.units() & ~used.units())

    def clusters(self) -> dict[frozenset[str], list[int]]:
        """The candidates by the layers whose units are in them: what a model's code treats alike."""
        found: dict[frozenset[str], list[int]] = {}
        for group in self.found.group[self.candidates].unique().tolist():
            if group not in self.refused:
                found.setdefault(frozenset(self.owners.get(group, ())), []).append(group)
        return found

    def removal(self, groups: list[int]) -> tuple[Removal, dict[int, str]]:
        """As many of the groups as can leave together, and why the others stay."""
        removed = torch.zeros(len(self.found.group), dtype=torch.bool, device="cpu")
        removed[groups] = True
        back: dict[int, str] = {}
        stable = False
        while not stable:
            stable = True
            for group, reason in self._objections(removed):
                if removed[group]:
                    removed[group], stable = False, False
                    back[group] = reason
        gone = removed[self.found.group]
        outputs = {name: ~gone[layer.outputs] for name, layer in self.found.layers.items()}
        columns = {name: ~removed[lead] for name, lead in self.leads.items()}
        return Removal(gone, outputs, columns), back

    def _objections(self, removed: Tensor) -> Iterator[tuple[int, str]]:
        """Groups that cannot leave together with the others that are to; `removed` may change meanwhile."""
        acting = Reach(self.found.signals, removed[self.found.group] & self.live.needed)
        for name in self.found.layers:
            yield from self._noticed(name, removed, acting)
            yield from self._grouped(name, removed)
            coupled = self.found.coupled(name)
            if len(coupled) and removed[coupled].all():
                yield int(coupled[0]), f"a unit of `{name}` has to stay"
            if len(self.leads[name]) and removed[self.leads[name]].all():
                yield int(self.leads[name][0]), f"an input of `{name}` has to stay"
        for head in self.found.scaled:
            gone = removed[head]
            if gone.any() and not gone.all():
                for group in head[gone].tolist():
                    yield group, "an attention divides by the root of how many there are"
        for frame in self.found.frames:
            kept = ~self._of(removed, frame)
            box = torch.ones_like(kept)
            for axis in range(kept.ndim):
                others = [i for i in range(kept.ndim) if i != axis]
                line = kept.sum(others) > 0
                box &= line.reshape([-1 if i == axis else 1 for i in range(kept.ndim)])
            for group in frame[box & ~kept].unique().tolist():
                yield group, f"units stand in {' x '.join(map(str, frame.shape))} and a full rectangle has to stay"

    @staticmethod
    def _of(removed: Tensor, groups: Tensor) -> Tensor:
        return removed[groups.reshape(-1)].reshape(groups.shape)

    def _noticed(self, name: str, removed: Tensor, acting: Reach) -> Iterator[tuple[int, str]]:
        """Groups whose columns, or whose influence on others, are used by what stays."""
        layer, live, lead = self.found.layers[name], self.live, self.leads[name]
        rows = ~removed[self.found.coupled(name)] & live.needed[layer.outputs]
        used = live.edges[name][rows].any(0)
        gone, constant = removed[lead], live.constant[name]
        unfit = gone & used & (constant != 0)  # nan is unfit too
        if unfit.any():
            problem = self._no_fold(name)
            for column in unfit.nonzero().flatten().tolist():
                if bool(constant[column].isnan()):
                    yield int(lead[column]), f"its constant is not the same everywhere before `{name}`"
                elif problem:
                    yield int(lead[column]), problem
        if layer.mixes_positions:  # units pass it one by one
            return
        touched = ~gone & used & acting.at(name, len(gone))
        if touched.any():
            units = Origin(self.found.signals).add(name, touched)
            for group in self.found.group[units[live.needed[units]]].unique().tolist():
                yield group, f"it acts on other units before `{name}`"

    def _no_fold(self, name: str) -> str:
        """Why a layer's bias cannot take over a constant; "" when it can."""
        module: Any = self.model.get_submodule(name)
        if isinstance(module, nn.Linear):
            return ""
        if type(module).forward not in _FORWARDS or module.groups > 1:
            return f"its constant cannot go into the bias of `{name}`, a {type(module).__name__}"
        padded = module.padding_mode == "zeros" and module.padding not in ("valid", (0,) * len(module.kernel_size))
        if padded and (module.padding != "same" or any(size > 1 for size in module.kernel_size)):
            return f"its constant meets the zero padding of `{name}`"
        return ""

    def _grouped(self, name: str, removed: Tensor) -> Iterator[tuple[int, str]]:
        """The groups of a grouped convolution that stay keep equally many inputs, and equally many outputs."""
        groups = self.found.layers[name].groups
        if groups == 1:
            return
        sides = [units.reshape(groups, -1) for units in (self.found.coupled(name), self.leads[name])]
        gone = [self._of(removed, side) for side in sides]
        stays = ~torch.cat(gone, 1).all(1)
        if not stays.any():
            return
        for units, missing in zip(sides, gone, strict=True):
            kept = (~missing).sum(1)
            most = max(int(kept[stays].max()), 1)
            for group in (stays & (kept < most)).nonzero().flatten().tolist():
                for unit in units[group][missing[group]][: most - int(kept[group])].tolist():
                    yield unit, f"groups of `{name}` would be uneven"


def _tensor(model: nn.Module, name: str) -> Tensor:
    way, _, last = name.rpartition(".")
    return getattr(model.get_submodule(way), last)


def make_plan(chooser: Chooser, removal: Removal) -> tuple[CompactionPlan, dict[str, Tensor]]:
    """The plan for a removal, and what each layer's bias takes over (before rows are left out, float64)."""
    model, found = chooser.model, chooser.found
    tensors: dict[str, dict[int, Any]] = {}
    groups: dict[str, int] = {}
    blocks: dict[str, Spans] = {}

    def cut(name: str, axis: int, kept: Tensor) -> None:
        if not kept.all():
            tensors.setdefault(name, {})[axis] = spans(kept)

    for name, layer in found.layers.items():
        outputs, columns = removal.outputs[name], removal.columns[name]
        if outputs.all() and columns.all():
            continue
        module: Any = model.get_submodule(name)
        axis = columns_axis(module)
        if layer.groups > 1:
            first, second = (columns, outputs) if axis == 0 else (outputs, columns)
            inside = second.reshape(layer.groups, -1)
            staying = inside.any(1)
            groups[name] = int(staying.sum())
            cut(f"{name}.weight", 0, first)
            if not inside[staying].all():
                blocks[f"{name}.weight"] = spans(second)
        else:
            cut(f"{name}.weight", axis, columns)
            cut(f"{name}.weight", 1 - axis, outputs)
        for own, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            of_outputs = tensor.ndim and tensor.shape[0] == tensor.numel() == len(outputs)
            if of_outputs and own != "weight" and f"{name}.{own}" not in found.parameters:
                cut(f"{name}.{own}", 0, outputs)
    for name, (axis, units) in found.parameters.items():
        cut(name, axis, ~removal.removed[units])
    folds = dict(_folds(chooser, removal))
    biases = tuple(name for name in folds if model.get_submodule(name)._parameters.get("bias") is None)
    heads = count_heads(model, found, removal.removed)
    return CompactionPlan(tensors, sizes_after(model, tensors, groups, blocks), biases, blocks, heads=heads), folds


def _folds(chooser: Chooser, removal: Removal) -> Iterator[tuple[str, Tensor]]:
    for name, columns in removal.columns.items():
        constant = chooser.live.constant[name]
        gone = ~columns & (constant != 0) & ~constant.isnan()
        if not gone.any() or chooser._no_fold(name):
            continue
        module: Any = chooser.model.get_submodule(name)
        weight = module.weight.detach().double()
        weight = weight.flatten(2).sum(2) if weight.ndim > 2 else weight
        added = weight[:, gone.to(weight.device)] @ constant[gone].to(weight.device)
        if (added != 0).any():
            yield name, added[removal.outputs[name].to(weight.device)]


def fold_constants(model: nn.Module, folds: Mapping[str, Tensor]) -> None:
    """Add to the biases of a compacted model what its layers saw at the columns that are gone."""
    for name, added in folds.items():
        bias: Any = model.get_submodule(name).bias
        bias.data = (bias.data.double() + added).to(bias.dtype)
