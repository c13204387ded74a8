"""Which units of a network feed which, and which of them stand and fall together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from growfx.analysis.paths import PathProducts
from growfx.analysis.signal_graph import Origin, SignalGraph

__all__ = ["Connectivity", "LayerUnits"]


@dataclass(frozen=True)
class LayerUnits:
    """The units of one layer.

    Attributes:
        outputs: unit of every output channel or feature (row of the weight), int64.
        sources: unit that feeds every input channel or feature, int64; of several that are added up, the first one in
            data-flow order (they share a group, and `Connectivity.feeding` lists all). 0: only constants arrive
            there; -1: units that do not stand and fall together arrive there (a mean over channels, an attention
            map), or positions do.
        groups: of a grouped convolution; input channel i is in group ``i * groups // len(sources)``, outputs alike.
        mixes_positions: the layer runs over positions, not over units (token mixing): the units of its input stand
            beside its columns and pass through; its own units are positions.
    """

    outputs: Tensor
    sources: Tensor
    groups: int = 1
    mixes_positions: bool = False


@dataclass(frozen=True)
class Connectivity:
    """What `growfx.passes.connect.connect` finds.

    Units are numbered from 1 in data-flow order: first the network's input channels, then the output channels or
    features of its layers, masked or not. Units whose values meet in one place of an elementwise operation, at one
    input column, in one index of a product of activations, or in one element of a parameter are *coupled*: a tensor
    can only lose all of them or none.

    Attributes:
        layers: layer name -> its units, in data-flow order.
        inputs: input name -> unit of every channel or feature.
        group: for every unit the first unit it is coupled with, itself where it is first; index 0 is unused.
        pinned: group -> why no unit of it may be removed: inputs, outputs, what is not understood.
        counted: group -> what is computed over it together with other units (a norm, a softmax, a mean): without
            them the others would change, unless that operator is told to go on counting them.
        parameters: parameter or buffer other than a layer's weight -> (axis, unit of every index along it, 0 for none).
        frames: groups that stand along several axes of one value, such as (heads, dims) or (2, half the channels), in
            that shape. What remains after a removal must be a full rectangle in each, and in the queries, keys and
            values of one attention as many heads.
        signals: how the values between layers are made of units.
        heads: for every head of an attention the groups of its queries, keys and values, each ascending; groups that
            a product of two activations sums over are in one of them.
        scaled: groups that an attention sums over and whose number it divides by a root of, one head each: all of them
            stay, or none.
        products: multiply-accumulates of products of two activations at batch 1 -> the groups that share each, one for
            every part of equal size (0: a part of no unit).
    """

    layers: Mapping[str, LayerUnits]
    inputs: Mapping[str, Tensor]
    group: Tensor
    pinned: Mapping[int, str]
    counted: Mapping[int, str]
    parameters: Mapping[str, tuple[int, Tensor]]
    frames: tuple[Tensor, ...]
    signals: SignalGraph = field(repr=False)
    heads: tuple[Tensor, ...] = ()
    scaled: tuple[Tensor, ...] = ()
    products: tuple[tuple[float, Tensor], ...] = ()

    def coupled(self, layer: str) -> Tensor:
        """The group of every output unit of a layer."""
        return self.group[self.layers[layer].outputs]

    def feeding(self, layer: str) -> tuple[Tensor, Tensor]:
        """All pairs of an input column of a layer and a unit whose value reaches it without crossing another layer.

        Normalization statistics and softmax sums over units are left out: they tie every unit to every other one.
        Layers that mix positions pass on what they are fed, and are crossed; their own units are not followed.

        Returns:
            Columns and units, two int64 tensors of the same length, sorted.
        """
        columns, units = self.signals.pairs(layer)
        return torch.from_numpy(columns), torch.from_numpy(units)

    def alive(self, paths: PathProducts) -> Tensor:
        """For every unit whether a path with a product above zero runs through it; index 0 is False.

        An input unit is alive when one of the columns it feeds is, or when it feeds none. Units of layers without a
        score (off path, or without a mask) count as alive.
        """
        alive = torch.ones(len(self.group), dtype=torch.bool, device="cpu")
        alive[0] = False
        for name, layer in self.layers.items():
            if name in paths.alive_out:
                alive[layer.outputs] = paths.alive_out[name].cpu()
        reached, fed = Origin(self.signals), Origin(self.signals)
        for name, layer in self.layers.items():
            every = torch.ones(len(layer.sources), dtype=torch.bool, device="cpu")
            fed.add(name, every)
            known = paths.alive_in.get(name)
            reached.add(name, every if known is None else known.cpu())
        inputs = torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *self.inputs.values()])
        alive[inputs] = (reached.units() | ~fed.units())[inputs]
        return alive

    def dead_units(self, paths: PathProducts) -> dict[str, Tensor]:
        """Layer name -> indices of its output units that no path crosses; layers without one are left out."""
        alive = self.alive(paths)
        dead = {name: (~alive[layer.outputs]).nonzero().flatten() for name, layer in self.layers.items()}
        return {name: indices for name, indices in dead.items() if len(indices)}

    def removable(self, paths: PathProducts) -> dict[str, Tensor]:
        """Layer name -> bool per output unit: its whole group is dead, and neither pinned nor counted.

        A dead unit may still have a value: a constant one, from biases and shifts, where no path leads in; any value
        where no path leads out. Without it the output stays unchanged once such constants are added to what they feed.
        """
        alive = self.alive(paths)
        kept = torch.zeros(len(self.group), dtype=torch.bool, device="cpu")
        kept[self.group[alive]] = True
        kept[list(self.pinned)] = True
        kept[list(self.counted)] = True
        return {name: ~kept[self.coupled(name)] for name in self.layers}

    def __str__(self) -> str:
        rows = [("layer", "inputs", "outputs", "fed by", "coupled with", "kept because")]
        owner = self._owners()
        for name, layer in self.layers.items():
            sources = layer.sources[layer.sources > 0]
            feeding = "positions" if layer.mixes_positions else _listed(owner[unit] for unit in sources.tolist())
            groups = set(self.coupled(name).tolist())
            others = _listed(dict.fromkeys(owner[unit] for unit in sorted(groups) if owner[unit] != name))
            reasons = _listed(dict.fromkeys(self.pinned.get(g) or self.counted.get(g) or "" for g in sorted(groups)))
            rows.append((name, str(len(layer.sources)), str(len(layer.outputs)), feeding, others, reasons))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def _owners(self) -> list[str]:
        owner = [""] * len(self.group)
        named: dict[str, Any] = {**self.inputs, **{name: layer.outputs for name, layer in self.layers.items()}}
        for name, units in named.items():
            for unit in units.tolist():
                owner[unit] = name
        return owner


def _listed(names: Any, limit: int = 3) -> str:
    """The first few of the names."""
    different = [name for name in dict.fromkeys(names) if name]
    more = f" and {len(different) - limit} more" if len(different) > limit else ""
    return ", ".join(different[:limit]) + more
