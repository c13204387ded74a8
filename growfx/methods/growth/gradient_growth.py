"""Grow by gradient: the control that scores edges with data, where `pwmpr` scores without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from growfx.analysis.paths import PathProducts
from growfx.masked.layers import MaskedLayer
from growfx.methods.growth.rounds import Growing
from growfx.methods.growth.snapshots import DRAWS
from growfx.methods.growth.state import Growth
from growfx.options import option
from growfx.passes.path_products.products import path_gradients
from growfx.selection.choose import draw, top
from growfx.selection.edge_keys import EdgeKeys

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["GradientGrowth"]


@dataclass(frozen=True)
class GradientGrowth(Growing):
    """PWMPR with the magnitude of the loss's gradient as the score of absent edges; options as in `Growing`, and

    Attributes:
        draw: "top" takes the edges of largest gradient, as RigL grows (Evci et al., ICML 2020); "sampled" draws in
            proportion to it, which leaves the score as the only difference from `pwmpr`.

    With the same `seed` it starts from the masks that `pwmpr` starts from, and its rounds have as many edges.
    Deviations: 1. the gradient is that of one step, the last of the round, at the round's lowest learning rate. 2. a
    gradient that is not finite counts as 0, and where too few edges have a gradient the others are equally likely, so
    that a round always has its number of edges.
    """

    name: ClassVar[str] = "gradient-growth"
    needs_whole: ClassVar[str] = ""
    reads_gradient: ClassVar[bool] = True

    draw: str = option("top", choices=DRAWS)

    def _paths(self, net: MaskedGraph) -> PathProducts:
        return path_gradients(net)

    def _grown(self, growth: Growth, paths: PathProducts, count: int, keys: EdgeKeys) -> Mapping[str, Tensor]:
        masks = {name: growth.net.layers[name].mask for name in paths.scores}
        layers = {name: growth.net.layers[name] for name in masks}
        scores = {name: _magnitudes(growth.gradients.get(name), layer) for name, layer in layers.items()}
        scores = growth.priced(scores)
        absent = growth.absent(paths)
        if self.draw == "top":
            new = top(scores, count, keys, absent).masks
            return {name: mask | new[name] for name, mask in masks.items()}
        drawn = draw(scores, count, keys, absent)
        # edges of gradient 0 are never drawn; among equal scores `top` leaves the choice to the keys
        left = {name: absent[name] & ~drawn.masks[name] for name in masks}
        rest = top(scores, count - drawn.count, keys, left).masks
        return {name: mask | drawn.masks[name] | rest[name] for name, mask in masks.items()}


def _magnitudes(gradient: Tensor | None, layer: MaskedLayer) -> Tensor:
    if gradient is None:  # a full layer
        return torch.zeros_like(layer.parameter.detach())
    return gradient.detach().abs().nan_to_num(nan=0.0, posinf=0.0)
