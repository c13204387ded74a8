"""Follow the paths of a stored network: the share of their mass in each layer, and units that none crosses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from growfx.analysis.paths import PathProducts
from growfx.artifact.info import ArtifactInfo
from growfx.artifact.remembered_inputs import as_example, default_inputs
from growfx.data.loaders import InputFormat
from growfx.errors import ArtifactError, GrowfxError, one_line
from growfx.masked.graph import MaskedGraph
from growfx.models.build import default_image_shape
from growfx.passes.mask.swap import wrap
from growfx.passes.path_products.products import path_products

__all__ = ["LayerPaths", "artifact_paths", "network_paths"]


@dataclass(frozen=True)
class LayerPaths:
    """The paths through one layer.

    Attributes:
        mass: sum over the paths through the layer of the product of their magnitudes, over that of all paths of the
            network; None where the network has no path. Above 1 where paths cross the layer more than once.
        alive_in, alive_out: units on some path from input to output, and all units.
    """

    mass: float | None
    alive_in: tuple[int, int]
    alive_out: tuple[int, int]


def artifact_paths(folder: Path, info: ArtifactInfo) -> tuple[dict[str, LayerPaths], str]:
    """Build the network of an artifact and follow its paths, layer by layer.

    Returns:
        the layers that paths cross, and "" or why the paths could not be followed.
    """
    from growfx.artifact import reader

    try:
        if why := reader.why_no_builder(info.model, info.notes):
            named = info.model is not None and info.model["library"] == "python"  # commands build it for a run
            raise ArtifactError(f"{why}; `growfx inspect` of the run follows them" if named else why)
        model = reader.load(folder)
        net = wrap(model, _example(model, info))
        # The plain model has no masks; a weight that is active and zero carries no path either.
        net.set_masks({name: layer.effective_weight.detach() != 0 for name, layer in net.layers.items()})
        return network_paths(net.eval()), ""
    except GrowfxError as error:
        return {}, one_line(error)


def _example(model: nn.Module, info: ArtifactInfo) -> object:
    known = default_inputs(model)
    if known is not None:
        return as_example(known)
    recorded = info.provenance.get("input")
    shape = InputFormat.from_json(recorded).input_size if recorded else default_image_shape(model)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0), device="cpu")


def network_paths(net: MaskedGraph) -> dict[str, LayerPaths]:
    """Follow the paths of a network, layer by layer; layers that no path can cross are not in the result.

    Raises:
        TraceError: an operator on a path has no path rule.
    """
    with torch.no_grad():
        products = path_products(net)
        # A unit counts as connected whatever the scale of its norm: many models start with the last of a block at 0.
        alive = path_products(net, norm="identity")
    return {
        name: LayerPaths(
            _mass(net, products, name),
            _alive(alive.alive_in, name),
            _alive(alive.alive_out, name),
        )
        for name in net.layers
        if name in products.scores and name in alive.alive_in
    }


def _mass(net: MaskedGraph, products: PathProducts, name: str) -> float | None:
    layer = net.layers[name]
    through = (layer.effective_weight.detach().double().abs() * products.scores[name]).sum().item()
    if not math.isfinite(products.log_total) or not math.isfinite(through):
        return None
    return math.exp(math.log(through) + products.log_scale - products.log_total) if through else 0.0


def _alive(units: Mapping[str, torch.Tensor], name: str) -> tuple[int, int]:
    return int(units[name].sum()), units[name].numel()
