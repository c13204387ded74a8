"""Grow and exchange: every round also drops its weakest edges for more new ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from growfx.analysis.paths import PathProducts
from growfx.analysis.weight_layout import by_unit, from_units
from growfx.masked.layers import MaskedLayer
from growfx.methods.growth.pwmpr import PathGrowth
from growfx.methods.growth.state import Growth
from growfx.options import option
from growfx.selection.choose import top
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["GrowPrune", "droppable"]


@dataclass(frozen=True)
class GrowPrune(PathGrowth):
    """PWMPR whose rounds exchange edges besides growing; options as in `PathGrowth`, and

    Attributes:
        exchange_fraction: of a layer's edges, those of smallest magnitude, that a round may give up.

    A hybrid named as an open question by Yao & Dovrolis (arXiv 2509.25665); all of how it works is decided here:

    1. A round draws, in proportion to the path score, the edges `pwmpr` would draw and as many more as it gives up, so
       that its rounds have as many edges as those of `pwmpr`.
    2. Given up are the edges of smallest magnitude layer by layer, as magnitudes of different layers do not compare;
       where the new edges go is for the draw over all layers to say.
    3. New edges are drawn from those absent before, and given up are edges present before: none is given up before it
       was trained for a round, and none comes back in the round it went.
    4. The strongest edge of every input unit and of every output unit of a layer stays, so that no unit loses its last
       edge. Layers that no path crosses keep their masks.
    5. Where too few absent edges are on a path for all, fewer are given up.

    The trace says how many were `exchanged` at the end of each round.
    """

    name: ClassVar[str] = "grow-prune"
    needs_whole: ClassVar[str] = "it ranks whole weights and path products together"

    exchange_fraction: float = option(0.1, low=0, high=1, open_low=True, open_high=True)

    def _grown(self, growth: Growth, paths: PathProducts, count: int, keys: EdgeKeys) -> Mapping[str, Tensor]:
        layers = {name: growth.net.layers[name] for name in paths.scores}
        drop_keys = EdgeKeys(keys.seed, f"{keys.stream}, given up")
        weak = {name: droppable(name, layer, self.exchange_fraction, drop_keys) for name, layer in layers.items()}
        spare = sum(int(mask.sum()) for mask in weak.values())
        new = self._by_score(growth, paths, count + spare, keys)
        exchanged = max(new.count - count, 0)
        growth.trace[-1]["exchanged"] = exchanged
        magnitudes = {name: layer.parameter.detach().abs() for name, layer in layers.items()}
        gone = top(magnitudes, exchanged, drop_keys, weak, largest=False).masks
        return {name: layer.mask & ~gone[name] | new.masks[name] for name, layer in layers.items()}


def droppable(name: str, layer: MaskedLayer, fraction: float, keys: EdgeKeys) -> Tensor:
    """Return the `fraction` of a layer's edges of smallest magnitude, without the strongest edge of any unit.

    Bool in the weight's shape; fewer edges than that fraction where the others are the strongest of a unit.
    """
    magnitude = layer.parameter.detach().abs()
    loose = layer.mask & ~_strongest(layer, magnitude, True) & ~_strongest(layer, magnitude, False)
    return top({name: magnitude}, int(fraction * layer.nnz), keys, {name: loose}, largest=False).masks[name]


def _strongest(layer: MaskedLayer, magnitude: Tensor, by_output: bool) -> Tensor:
    """Return the strongest edge of each output (input) unit; a unit without edges marks an absent one."""
    # absent edges lose even against edges of weight zero
    worth = by_unit(layer, magnitude.masked_fill(~layer.mask, -1.0), by_output)
    first = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, worth.argmax(1, keepdim=True), True)
    return from_units(layer, first, by_output)
