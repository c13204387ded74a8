"""The sums over all input-output paths of a network, per edge and per unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["PathProducts", "PathVisits"]


@dataclass(frozen=True)
class PathProducts:
    """What `growfx.path_products` computes.

    Attributes:
        scores: layer name -> float64 tensor of the weight's shape. For every edge i -> j, present or absent, C_i G_j:
            the sum over all paths through it of the product of the *other* edges' magnitudes, divided by
            ``exp(log_scale)``; for a shared weight summed over its positions.
        log_scale: natural logarithm; true score = ``score * exp(log_scale)``, one value for the whole network.
        log_total: natural logarithm of the sum over all paths of the product of all their magnitudes; -inf when the
            masks leave no path.
        off_path: layer name -> why no path can cross it. Such layers have no score and methods leave them alone.
        alive_in: layer name -> bool tensor per input unit (channel or feature): some path with a product above zero
            runs from the network's input through this unit to an output.
        alive_out: the same per output unit, for paths through this layer.
        notes: one sentence for every layer or parameter that is zero throughout and takes all paths through it away.

    Edges outside the masks and edges of weight zero carry no path when units are judged alive or dead.
    """

    scores: Mapping[str, Tensor]
    log_scale: float
    log_total: float
    off_path: Mapping[str, str]
    alive_in: Mapping[str, Tensor]
    alive_out: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PathVisits:
    """How often a path, drawn in proportion to its product, visits each unit.

    Attributes:
        visits: layer name -> float64 per output unit; a path that comes back to a stream visits it again.
        off_path: layer name -> why no path can cross it.
    """

    visits: Mapping[str, Tensor]
    off_path: Mapping[str, str]
