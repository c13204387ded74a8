"""Grow at random edges: the control for the value of the path score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from growfx.analysis.paths import PathProducts
from growfx.methods.growth.rounds import Growing
from growfx.methods.growth.state import Growth
from growfx.passes.path_products.products import path_gradients
from growfx.selection.choose import draw
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["RandomGrowth"]


@dataclass(frozen=True)
class RandomGrowth(Growing):
    """PWMPR with every absent edge of a layer on some path equally likely; options as in `Growing`.

    With the same `seed` it starts from the masks that `pwmpr` starts from, and its rounds have as many edges.
    """

    name: ClassVar[str] = "random-growth"
    needs_whole: ClassVar[str] = ""
    reads_gradient: ClassVar[bool] = False

    def _paths(self, net: MaskedGraph) -> PathProducts:
        return path_gradients(net)

    def _grown(self, growth: Growth, paths: PathProducts, count: int, keys: EdgeKeys) -> Mapping[str, Tensor]:
        alike = growth.priced({name: torch.ones(score.shape, device="cpu") for name, score in paths.scores.items()})
        new = draw(alike, count, keys, growth.absent(paths)).masks
        masks = {name: growth.net.layers[name].mask for name in paths.scores}
        return {name: mask | new[name].to(mask.device) for name, mask in masks.items()}
