"""Saving a network, whole or without its dead units."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from growfx import artifact
from growfx.artifact_info import ArtifactInfo
from growfx.errors import ArtifactError
from growfx.graph import MaskedGraph
from growfx.layers import is_maskable
from growfx.passes.compact import Compacted, compact
from growfx.passes.mask import wrap

__all__ = ["masked", "save"]


def save(
    net: MaskedGraph,
    path: str | Path,
    *,
    dense: bool = False,
    compact: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> ArtifactInfo:
    """Write `net` to the folder `path`, whole or not at all; the same net gives the same bytes.

    Args:
        net: a masked network; weights outside its masks are stored as nothing and load as +0.0.
        path: a new folder, or one to whose other files nothing happens; an artifact in it is replaced.
        dense: also write `model.safetensors`, which timm and others can load, at full size.
        compact: leave out the units that the outputs can do without (`growfx.passes.compact`). The artifact holds a
            plan by which `growfx.load` makes the model as small; where nothing can be left out it is an ordinary one.
        provenance: JSON values to keep beside the weights, for example how the network was trained.

    Returns:
        What was written, as `inspect` would tell.

    Raises:
        ArtifactError: no masked network, a tensor that cannot be stored, a path that cannot be written, or `dense`
            together with `compact`: programs that load the dense file would build the model in its full size.
        TraceError: the network has no values to compact it by.
    """
    if not compact or not isinstance(net, MaskedGraph):
        return artifact.save(net, path, dense=dense, provenance=provenance)
    if dense:
        raise ArtifactError(
            "`dense` and `compact` exclude each other: what loads the dense file builds the model in its full size; "
            "save twice, into two folders"
        )
    small = _compact(net)
    if not small.plan:
        return artifact.save(net, path, provenance=provenance)
    return artifact.save(masked(net, small), path, provenance=provenance, origin=(net, small.plan))


_compact = compact


def masked(net: MaskedGraph, small: Compacted) -> MaskedGraph:
    """A masked network of a compacted model, to train on or to save; layers of `net` without a mask have none."""
    without = [name for name in net.trace_report.unmasked if _is_layer(net, name)]
    result = wrap(small.model, net.example_inputs(), exclude=without)
    result.set_masks({name: mask for name, mask in small.masks.items() if name in result.layers})
    return result


def _is_layer(net: MaskedGraph, name: str) -> bool:
    modules = dict(net.shell.named_modules())
    return name in modules and is_maskable(modules[name])
