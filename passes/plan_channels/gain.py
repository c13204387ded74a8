"""What whole units are worth: the paths through them, their magnitude, or a first-order change of the loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from growfx.analysis.paths import PathVisits
from growfx.analysis.weight_layout import by_unit
from growfx.passes.path_products.products import path_visits
from growfx.passes.plan_channels.units import WholeUnits

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph
    from growfx.masked.layers import MaskedLayer

__all__ = ["SCORES", "magnitudes", "path_masses", "taylor", "unit_visits"]

SCORES: Final = ("paths", "magnitude", "taylor")


def unit_visits(net: MaskedGraph) -> PathVisits:
    """Visits of paths; a weight, norm or scale that is zero throughout counts as one, as a gain that starts at zero."""
    return path_visits(net, zeros_as_one=True)


def path_masses(units: WholeUnits, paths: PathVisits) -> Tensor:
    """Return how often a path visits each whole unit, in any of its layers. Shape (whole units,), float64."""
    mass = torch.zeros(units.count, dtype=torch.float64, device="cpu")
    for name, visits in paths.visits.items():
        if name in units.outputs:
            _add(mass, units.outputs[name], visits)
    return mass


def magnitudes(net: MaskedGraph, units: WholeUnits) -> Tensor:
    """Return the Euclidean norm of all weights into and out of each whole unit, as a share of its family's sum.

    Depgraph's group magnitude (Fang et al., CVPR 2023), which divides by the family's mean; over the cost of a unit
    that ranks as a share of the sum does over that of the family. Shape (whole units,), float64.
    """
    squares = torch.zeros(units.count, dtype=torch.float64, device="cpu")
    for name, layer in net.layers.items():
        if name not in units.outputs:
            continue
        weight = _present(layer, layer.parameter.detach().double()).square()
        for owner, by_output in ((units.outputs[name], True), (units.columns[name], False)):
            rows = by_unit(layer, weight, by_output=by_output).sum(1)
            if len(rows) == len(owner):
                _add(squares, owner, rows)
    norms = squares.sqrt()
    for family in units.families:
        members = list(family.units)
        norms[members] /= float(norms[members].sum()) or 1.0
    return norms


def taylor(net: MaskedGraph, units: WholeUnits, gradients: Mapping[str, Tensor]) -> Tensor:
    """Return the change of the loss to first order when each whole unit's incoming weights become zero, unsigned.

    The magnitude of the sum of weight times gradient (Molchanov et al., CVPR 2019, without the square). Shape (whole
    units,), float64.

    Args:
        net: a masked network.
        units: its whole units.
        gradients: layer -> gradient of its weight.
    """
    change = torch.zeros(units.count, dtype=torch.float64, device="cpu")
    for name, gradient in gradients.items():
        layer = net.layers[name]
        if name in units.outputs:
            product = layer.parameter.detach().double() * gradient.double() * layer.mask
            _add(change, units.outputs[name], by_unit(layer, product.nan_to_num(0.0, 0.0, 0.0), by_output=True).sum(1))
    return change.abs()


def _present(layer: MaskedLayer, values: Tensor) -> Tensor:
    """Values of a layer's edges, zero for those that are absent."""
    return values if bool(layer.mask.all()) else values * layer.mask


def _add(total: Tensor, owner: Tensor, values: Tensor) -> None:
    inside = owner >= 0
    total.index_add_(0, owner[inside], values.cpu()[inside])
