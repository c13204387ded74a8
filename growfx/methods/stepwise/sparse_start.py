"""Shared parts of methods that choose their masks, or the first ones, before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from growfx.analysis.weight_layout import by_unit, from_units
from growfx.distributed.sharded import local_shard, part_of
from growfx.errors import ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.methods.starting import MASKS, all_edges, given_masks, start_density
from growfx.methods.stepwise.course import Course, Stepwise
from growfx.methods.stepwise.exchange import drop_to, finite_magnitudes
from growfx.options import DefaultFloat, Unused, option
from growfx.selection.density import DISTRIBUTIONS, layer_counts, random_masks
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["INITS", "SparseInit", "SparseStart", "StaticMasks", "scale_to_fan_in", "settle_density"]

INITS = ("dense", "sparse-aware")


@dataclass(frozen=True)
class SparseInit(Stepwise):
    """A stepwise method that chooses masks for the initial weights, or initial weights for the masks.

    Attributes:
        init: "dense" keeps the initial weights; "sparse-aware" scales the weights of each output unit by
            ``sqrt(fan-in / active fan-in)``, so that its activations start with the variance they have in the dense
            network (Evci et al., Gradient Flow in Sparse Neural Networks, AAAI 2022).
        seed: of everything drawn, and of the choice among equal scores.
        sign_in: train each present weight as a product whose scale is reset every so many epochs until the end of
            training, so that signs can flip (`growfx.methods.sign_in`); 0 trains weights as they are. Schedulers of
            learning rates are made after `attach`, which adds the scales to the optimizer.
    """

    init: str = option("dense", choices=INITS)
    sign_in: int = option(0, low=0)
    seed: int = option(0, low=0, high=2**63 - 1)

    def _initialised(self, course: Course, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale the weights to `masks` where `init` asks for it; returns the masks."""
        if self.init == "sparse-aware":
            scale_to_fan_in(course.layers, masks)
        return masks


@dataclass(frozen=True)
class StaticMasks(SparseInit):
    """Masks that are chosen once, before the first step, and never change.

    Attributes:
        density: of all masked layers together that are trained.
    """

    density: float = option(0.1, low=0, high=1, open_low=True)

    def _update(self, course: Course) -> None:
        return None

    def _wants_gradient(self, course: Course, step: int) -> bool:
        return False


@dataclass(frozen=True)
class SparseStart(SparseInit):
    """A stepwise method that starts from sparse masks which it does not choose by looking at the network's outputs.

    Attributes:
        density: of all masked layers together that are trained. None is that of the masks with `masks` = "given",
            where no other is allowed, and 0.1 otherwise.
        masks: "drawn" at random by `distribution`, ignoring the network's masks (a `GrowfxWarning` where that loses
            some); "given" keeps those it has; "magnitude" takes the weights of largest magnitude, layer by layer as
            many as `distribution` says.
        distribution: of the edges over the layers: "erk", "er" or "uniform" (`growfx.selection.density`).
    """

    unused: ClassVar[tuple[Unused, ...]] = (
        Unused(
            ("distribution",),
            lambda use: (
                'with `masks` = "given", which keeps the masks of the network' if use.method.masks == "given" else ""
            ),
        ),
    )

    density: float | None = option(DefaultFloat(0.1), low=0, high=1, open_low=True)
    masks: str = option("drawn", choices=MASKS)
    distribution: str = option("erk", choices=tuple(DISTRIBUTIONS))

    def __post_init__(self) -> None:
        settle_density(self)
        super().__post_init__()

    def _start_masks(self, course: Course, density: float | None) -> dict[str, Tensor]:
        """Return the starting masks by the option `masks`, and initialise for them.

        Those drawn, or of the largest weights, have exactly `density` over all that it counts. The density is noted as
        `course.start["density"]`, and with given masks the edges of each layer as `course.start["counts"]`.
        """
        if self.masks == "given":
            course.start["density"] = start_density(course.scope, density, "density")
            course.start["counts"] = {name: layer.nnz for name, layer in course.layers.items()}
            return self._initialised(course, given_masks(course.layers))
        assert density is not None
        course.start["density"] = density
        share = course.edges_at(density) / course.numel
        if self.masks == "magnitude":
            counts = layer_counts(course.shapes, share, self.distribution)
            course.net.settle()  # absent edges are zero, whatever was stored
            weights = finite_magnitudes(course.weights, "weights") or {}
            masks = drop_to(all_edges(course.layers), counts, weights, EdgeKeys(self.seed, "largest weights"))
        else:
            masks = random_masks(course.shapes, share, self.distribution, self.seed)
        return self._initialised(course, masks)

    def _density(self, course: Course) -> float:
        """The density the method works at: `density`, or that of the given masks."""
        return self.density if self.density is not None else course.start["density"]


def settle_density(method: Any) -> None:
    """Let `density` be None where it was left at its default and given masks have one; refuse None elsewhere."""
    if method.masks == "given" and isinstance(method.density, DefaultFloat):
        object.__setattr__(method, "density", None)
    if method.masks != "given" and method.density is None:
        raise ConfigError(
            f'`density` is None, which is that of given masks; set `masks` = "given", or a density in (0, 1] with '
            f'`masks` = "{method.masks}"'
        )


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
        local_shard(weight).mul_(part_of(from_units(layer, scale, by_output=True).to(weight.dtype), weight))
