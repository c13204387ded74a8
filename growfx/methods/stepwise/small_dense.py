"""A narrower dense network, as masks: the control that asks whether sparsity is worth anything at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from growfx.analysis.connectivity import Connectivity
from growfx.analysis.weight_layout import canonical, from_canonical
from growfx.errors import ConfigError
from growfx.masked.layers import MaskedLayer
from growfx.methods.stepwise.course import Course
from growfx.methods.stepwise.sparse_start import StaticMasks
from growfx.passes.connect.interpreter import connect
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["SmallDense"]

_FIRST = 1e-9  # ranks of first units lie below it, all others above


@dataclass(frozen=True)
class SmallDense(StaticMasks):
    """Keeps the first units of every layer, and all edges between units that are kept (Evci et al., RigL, ICML 2020).

    One width factor w holds for the whole network: of n units that may be removed the first ``ceil(w n)`` stay, and
    always one. Units that are coupled (by a residual sum, an elementwise product, a depthwise convolution) stay or go
    together; of heads of attention, and of halves that a gate splits, all are kept and each is made narrower. Inputs,
    outputs, and what cannot be followed stay whole. A plain chain computes exactly what the narrower chain does.

    w grows unit by unit until the density is reached; of the last unit only as many edges are there, in data-flow
    order, as the exact number allows, so it may lead nowhere. A density that is not enough for one unit everywhere is a
    `ConfigError`.

    Deviations: 1. norms over units (layer norm, group norm) still count those that are gone, as zeros plus their shift;
    2. a layer that can be made narrower on neither side, as one over positions, is thinned at random to w squared.

    Attributes:
        seed: of that thinning; without such layers nothing is drawn.
    """

    name: ClassVar[str] = "small-dense"
    off_path: ClassVar[str] = "left"

    def _start(self, course: Course) -> Mapping[str, Tensor]:
        edges = course.edges_at(self.density)
        connected = connect(course.net)
        ranks = _unit_ranks(connected)
        steps, levels = np.unique(ranks, return_inverse=True)
        keys = EdgeKeys(self.seed, "small-dense")
        found = {
            name: _edge_levels(connected, name, layer, levels.reshape(-1), steps, keys)
            for name, layer in course.layers.items()
        }
        self._require_one_unit(course, edges, found, int(np.searchsorted(steps, _FIRST)))
        return self._initialised(course, _lowest(found, edges))

    def _require_one_unit(self, course: Course, edges: int, levels: Mapping[str, Tensor], first: int) -> None:
        """Raise `ConfigError` where a network with one unit in every layer has more than `edges` edges."""
        fewest = sum(int((level < first).sum()) for level in levels.values())
        if edges < fewest:
            least = self.density + (fewest - edges) / course.scope.numel
            raise ConfigError(
                f"`density` is {self.density:.4g}; the narrowest network, with one unit wherever units can be removed, "
                f"has {least:.4g}, so allowed are densities from there up"
            )


def _unit_ranks(connected: Connectivity) -> np.ndarray:
    """Return for every unit the width factor above which it is kept, with a little more from layer to layer.

    Shape (units + 1,); 0 for units that stay. The little more lets the layers grow in turn instead of all at once, so
    that only one of them has a unit with a part of its edges; it is smaller than any difference of two ranks.
    """
    group = connected.group.numpy()
    own: dict[int, float] = {}
    for layer in connected.layers.values():
        units = layer.outputs.numpy()
        first = units[group[units] == units]
        own |= {int(unit): place / len(first) for place, unit in enumerate(first)}
    for frame in reversed(connected.frames):  # the first one, where a value is later seen in another order
        inner = np.arange(frame.shape[-1]) / frame.shape[-1]
        members, places = group[frame.numpy()].reshape(-1), np.broadcast_to(inner, tuple(frame.shape)).reshape(-1)
        own |= {int(unit): float(place) for unit, place in zip(members, places, strict=True)}
    turn, step = {}, 1e-10 / max(1, len(connected.layers))
    for number, layer in enumerate(connected.layers.values(), start=1):
        for unit in group[layer.outputs.numpy()].tolist():
            turn.setdefault(unit, number * step)
    ranks = np.zeros(len(group))
    for unit, rank in own.items():
        if unit not in connected.pinned and unit in turn:
            ranks[unit] = rank + turn[unit]
    return ranks[group]


def _edge_levels(
    connected: Connectivity, name: str, layer: MaskedLayer, levels: np.ndarray, steps: np.ndarray, keys: EdgeKeys
) -> Tensor:
    """Return for every edge which step of the growth of w brings it in: int64 of the weight's shape, on the CPU."""
    groups, outputs, inputs, taps = canonical(layer, layer.mask).shape
    units = connected.layers.get(name)
    if units is not None and (len(units.outputs), len(units.sources)) == (groups * outputs, groups * inputs):
        out = levels[units.outputs.numpy()]
        into = np.where(units.sources.numpy() > 0, levels[np.maximum(units.sources.numpy(), 0)], 0)
        if out.any() or into.any():
            pairs = np.maximum(out.reshape(groups, outputs, 1), into.reshape(groups, 1, inputs))
            every_tap = torch.from_numpy(pairs)[..., None].expand(groups, outputs, inputs, taps)
            return from_canonical(layer, every_tap)
    drawn = np.sqrt(keys.uniform(name, 0, layer.mask.numel()))
    return torch.from_numpy(np.searchsorted(steps, drawn)).reshape(layer.mask.shape)


def _lowest(levels: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Mark the `count` edges of lowest level; of the last level the first ones, layer by layer."""
    highest = max(int(level.max()) for level in levels.values())
    sizes = sum(torch.bincount(level.reshape(-1), minlength=highest + 1) for level in levels.values())
    assert isinstance(sizes, Tensor)
    last = int(torch.searchsorted(sizes.cumsum(0), count))
    spare = count - int(sizes[:last].sum())
    masks = {}
    for name, level in levels.items():
        flat = level.reshape(-1)
        mask = flat < last
        partly = (flat == last).nonzero().flatten()[:spare]
        mask[partly] = True
        spare -= len(partly)
        masks[name] = mask.reshape(level.shape)
    return masks
