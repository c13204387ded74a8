"""Saving a network, whole, or without what its outputs do not need."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from growfx.artifact import writer as artifact
from growfx.artifact.info import ArtifactInfo
from growfx.compaction.plan import CompactionPlan
from growfx.errors import ArtifactError, TraceError
from growfx.masked.doors import as_masked_graph
from growfx.masked.graph import MaskedGraph
from growfx.masked.present.storage import on_whole_weights
from growfx.masked.twins import is_maskable
from growfx.passes.compact.network import compact
from growfx.passes.compact.report import CompactionReport
from growfx.passes.fold_norm import fold_norm
from growfx.passes.mask.swap import wrap

__all__ = ["SmallNetwork", "check_options", "save", "save_small", "small_network"]


@dataclass(frozen=True)
class SmallNetwork:
    """A network without its dead units, and without the batch norms that layers could take over.

    Attributes:
        net: a masked network of the smaller model.
        plan: makes another instance of the original class as small.
        units: what became of the units of each layer.
        folded: norm -> the layer that took it over.
        kept: norm -> why it stays.
        folding_error: of the outputs, over the largest output, by folding alone.
    """

    net: MaskedGraph
    plan: CompactionPlan
    units: CompactionReport
    folded: Mapping[str, str]
    kept: Mapping[str, str]
    folding_error: float = 0.0

    def __str__(self) -> str:
        """The table of layers that have dead units, and what became of the norms."""
        reasons = [f"{norm} stays: {reason}" for norm, reason in self.kept.items()]
        norms = f"{len(self.folded)} batch norms folded into the layers before them"
        return "\n".join([str(self.units), *reasons, f"{norms}; largest error {self.folding_error:.1e}"])

    def to_json(self) -> dict[str, Any]:
        """The same facts for programs."""
        return {
            "units_left_out": self.units.removed,
            "parameters": list(self.units.parameters),
            "largest_error": max(self.units.largest_error, self.folding_error),
            "left_whole": self.units.refusal,
            "modules_left_out": list(self.units.left_out),
            "unused_modules_kept": dict(self.units.unread),
            "dead_units_kept": {layer: list(reasons) for layer, reasons in self.units.kept.items()},
            "norms_folded": dict(self.folded),
            "norms_kept": dict(self.kept),
        }


@torch.inference_mode(False)
def small_network(net: MaskedGraph) -> SmallNetwork:
    """Compact a network and fold its norms; `net` is not changed.

    Raises:
        TraceError: the network has no values to compact it by.
    """
    small = compact(net)
    result = _masked(net, small.model, small.masks)
    try:
        norms = fold_norm(result)
    except TraceError as refusal:
        return SmallNetwork(result, small.plan, small.report, {}, {"every norm": str(refusal)})
    if not norms.folded:
        return SmallNetwork(result, small.plan, small.report, {}, norms.kept)
    masks = {name: layer.mask for name, layer in result.layers.items()}
    plan = _with_norms(small.plan, result, norms.folded)
    folded = _masked(net, norms.model, masks)
    return SmallNetwork(folded, plan, small.report, norms.folded, norms.kept, norms.largest_error)


def _with_norms(plan: CompactionPlan, net: MaskedGraph, folded: Mapping[str, str]) -> CompactionPlan:
    """The plan that leaves out these norms, too, and does not make them smaller before."""
    gains = [layer for layer in folded.values() if net.shell.get_submodule(layer)._parameters.get("bias") is None]
    return replace(
        plan,
        tensors={name: axes for name, axes in plan.tensors.items() if name.rpartition(".")[0] not in folded},
        modules={name: sizes for name, sizes in plan.modules.items() if name not in folded},
        biases=(*plan.biases, *gains),
        norms=tuple(folded),
        widths={name: numbers for name, numbers in plan.widths.items() if name not in folded},
    )


def _masked(net: MaskedGraph, model: nn.Module, masks: Mapping[str, Tensor]) -> MaskedGraph:
    """A masked network of a smaller model, called as `net`; what has no mask in `net` has none."""
    there = dict(model.named_modules())
    without = [name for name in net.trace_report.unmasked if name in there and _is_layer(net, name)]
    named = [name for name in net.masked_parameters if name in dict(model.named_parameters(remove_duplicate=False))]
    result = wrap(model, net.example(), exclude=without, masked=[glob.escape(name) for name in named])
    result.set_masks({name: mask for name, mask in masks.items() if name in result.layers})
    return result


def _is_layer(net: MaskedGraph, name: str) -> bool:
    modules = dict(net.shell.named_modules())
    return name in modules and is_maskable(modules[name])


@on_whole_weights
def save(
    net: MaskedGraph,
    path: str | Path,
    *,
    dense: bool = False,
    compact: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> ArtifactInfo:
    """Write `net` to the folder `path`, whole or not at all; the same net gives the same bytes.

    But for what it gives on example inputs, which is noted where it can be told: other hardware rounds it differently.

    Args:
        net: a masked network; weights outside its masks are stored as nothing and load as +0.0.
        path: a new folder, or one to whose other files nothing happens; an artifact in it is replaced.
        dense: also write `model.safetensors`, which timm and others can load, at full size.
        compact: leave out the units that the outputs can do without (`growfx.passes.compact`), and fold batch norms
            into the layers before them (`growfx.passes.fold_norm`), for inference. The artifact holds a plan by
            which `growfx.load` makes the model as small; where nothing changes it is an ordinary one.
        provenance: JSON values to keep beside the weights, for example how the network was trained.

    Returns:
        What was written, as `inspect` would tell.

    Raises:
        ArtifactError: no masked network, a tensor that cannot be stored, a path that cannot be written, or `dense`
            together with `compact`: programs that load the dense file would build the model in its full size.
        TraceError: the network has no values to compact it by.

    Example:
        >>> net = growfx.wrap(torch.nn.Sequential(torch.nn.Linear(4, 2)), torch.randn(1, 4), density=0.5)
        >>> info = growfx.save(net, "out")
        >>> info.nnz, info.layers[0].name
        (4, '0')
    """
    net = as_masked_graph(net, "growfx.save")
    if not compact:
        return artifact.save(net, path, dense=dense, provenance=provenance)
    check_options(path, dense=dense, compact=compact)
    return save_small(net, small_network(net), path, provenance=provenance)


def check_options(path: str | Path, *, dense: bool, compact: bool) -> None:
    """Refuse, before anything is computed, what `save` would refuse of these options.

    Raises:
        ArtifactError: `dense` together with `compact`, a path where no folder can be, or a folder with files of others
            under the names to be written.
    """
    if dense and compact:
        raise ArtifactError(
            "`dense` and `compact` exclude each other: what loads the dense file builds the model in its full size; "
            "save twice, into two folders"
        )
    artifact.artifact_target(path, dense=dense)


def save_small(
    net: MaskedGraph, small: SmallNetwork, path: str | Path, *, provenance: Mapping[str, Any] | None = None
) -> ArtifactInfo:
    """Write what was made of `net`, as `save` does.

    Raises:
        ArtifactError: a tensor that cannot be stored, or a path that cannot be written.
    """
    if not small.plan:
        return artifact.save(net, path, provenance=provenance)
    return artifact.save(small.net, path, provenance=provenance, origin=(net, small.plan))
