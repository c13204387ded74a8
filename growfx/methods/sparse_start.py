"""What methods share that know their masks, or the first of them, before training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from growfx.density import DISTRIBUTIONS, random_masks
from growfx.layers import MaskedLayer
from growfx.methods.stepwise import Course, Stepwise
from growfx.options import option
from growfx.shards import own_part, part_of
from growfx.unit_edges import by_unit, from_units

__all__ = ["INITS", "SparseInit", "SparseStart", "StaticMasks", "scale_to_fan_in"]

INITS = ("dense", "sparse-aware")


@dataclass(frozen=True)
class SparseInit(Stepwise):
    """A stepwise method that chooses masks for the initial weights, or initial weights for the masks.

    Attributes:
        density: of all masked layers together.
        init: "dense" keeps the initial weights as they are; "sparse-aware" scales the weights of each output unit by
            ``sqrt(fan-in / active fan-in)``, so that its activations start with the variance they have in the dense
            network (Evci et al., Gradient Flow in Sparse Neural Networks, AAAI 2022).
        seed: of everything drawn, and of the choice among equal scores.
    """

    density: float = option(0.1, low=0, high=1, open_low=True)
    init: str = option("dense", choices=INITS)
    seed: int = option(0, low=0, high=2**63 - 1)

    def _initialised(self, course: Course, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale the weights to `masks` where `init` asks for it; returns the masks."""
        if self.init == "sparse-aware":
            scale_to_fan_in(course.layers, masks)
        return masks


@dataclass(frozen=True)
class StaticMasks(SparseInit):
    """Masks that are chosen once, before the first step, and never change."""

    def _update(self, course: Course) -> None:
        return None

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False


@dataclass(frozen=True)
class SparseStart(SparseInit):
    """A stepwise method whose first masks are drawn at random.

    Attributes:
        distribution: of the edges over the layers: "erk", "er" or "uniform" (`growfx.density`).
    """

    distribution: str = option("erk", choices=tuple(DISTRIBUTIONS))

    def _random_start(self, course: Course, density: float) -> dict[str, Tensor]:
        """Return random masks with exactly `density` over the whole network, and initialise for them."""
        share = course.edges_at(density) / course.numel
        return self._initialised(course, random_masks(course.shapes, share, self.distribution, self.seed))


def scale_to_fan_in(layers: dict[str, MaskedLayer], masks: dict[str, Tensor]) -> None:
    """Scale the weights of every output unit by ``sqrt(fan-in / active fan-in)``; units without edges stay.

    `masks`: layer name -> bool of the weight's shape, for the layers to scale. A fan-in counts edges, taps included.
    """
    for name, mask in masks.items():
        layer = layers[name]
        active = by_unit(layer, mask.to(layer.mask.device), by_output=True)
        fan_in = active.sum(1, keepdim=True)
        scale = torch.where(fan_in > 0, active.shape[1] / fan_in.double(), 1.0).sqrt().expand(active.shape)
        weight = layer.parameter
        own_part(weight).mul_(part_of(from_units(layer, scale, by_output=True).to(weight.dtype), weight))
