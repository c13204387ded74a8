"""What a network costs when families of whole units keep so many of theirs.

A layer costs in proportion to the pairs of output units and input columns that stay, so that cost is bilinear in how
many units the families keep. Products of activations cost in proportion to the units that share them, parameters that
are not a layer's weight in proportion to the indices that stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from growfx.passes.plan_channels.units import WholeUnits

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["Cost", "CostTable", "cost_table"]

Floats = NDArray[np.float64]
_ROUNDING = 1e-9  # of a sum of many layers


@dataclass(frozen=True, eq=False)
class Cost:
    """One kind of cost.

    Attributes:
        rates: of one pair of an output unit and an input column, by layer.
        per_unit: of one whole unit beside that, by family.
        fixed: of everything else.
    """

    rates: Floats
    per_unit: Floats
    fixed: float


@dataclass(frozen=True, eq=False)
class CostTable:
    """Costs by the number of units that each family keeps.

    Attributes:
        sizes: of the families.
        outputs, columns: (layers, families): output units and input columns of a layer in one whole unit.
        base: (2, layers): output units and columns that are in no family.
        grouped: number of groups of a grouped convolution that loses whole ones, by layer; 0 for other layers.
        shared: number of groups of other grouped convolutions, 1 for other layers.
        width: columns of one group.
        costs: by name.
    """

    sizes: NDArray[np.int64]
    outputs: Floats
    columns: Floats
    base: Floats
    grouped: Floats
    shared: Floats
    width: Floats
    costs: Mapping[str, Cost]

    def pairs(self, kept: NDArray[np.int64]) -> Floats:
        """Pairs of output units and columns that stay in each layer."""
        out, into = self.base[0] + self.outputs @ kept, self.base[1] + self.columns @ kept
        return np.where(self.grouped > 0, out * self.width, out * into / self.shared)

    def cost(self, name: str, kept: NDArray[np.int64]) -> float:
        """What the network costs."""
        cost = self.costs[name]
        return float(cost.rates @ self.pairs(kept) + cost.per_unit @ kept + cost.fixed)

    def of_one(self, name: str) -> Floats:
        """What one unit of each family costs while all others are there."""
        cost, full = self.costs[name], self.sizes.astype(np.float64)
        out, into = self.base[0] + self.outputs @ full, self.base[1] + self.columns @ full
        # removing one takes its rows and its columns; their crossing is counted once
        plain = (self.outputs * into[:, None] + self.columns * out[:, None] - self.outputs * self.columns) / (
            self.shared[:, None]
        )
        lost = np.where(self.grouped[:, None] > 0, self.outputs * self.width[:, None], plain)
        return cost.rates @ lost + cost.per_unit

    def fits(self, names: tuple[str, ...], kept: NDArray[np.int64], fraction: float) -> bool:
        """Whether each of these costs is at most a fraction of the dense network's."""
        return all(self.cost(name, kept) <= fraction * self.cost(name, self.sizes) * (1 + _ROUNDING) for name in names)


def cost_table(net: MaskedGraph, units: WholeUnits, macs: Mapping[str, float], rest: float) -> CostTable:
    """Count what whole units cost.

    Args:
        net: a masked network.
        units: its whole units.
        macs: multiply-accumulates of each masked layer for one sample.
        rest: those of everything else.
    """
    families, names = units.families, list(units.found.layers)
    sizes = np.array([len(family.units) for family in families], np.int64)
    outputs = _table(names, [family.outputs for family in families])
    columns = _table(names, [family.columns for family in families])
    layers = units.found.layers
    groups = np.array([layers[name].groups for name in names], np.float64)
    in_groups = np.array([name in units.in_groups for name in names], bool)
    total = np.array([[len(layers[name].outputs), len(layers[name].sources)] for name in names], np.float64).reshape(
        -1, 2
    )
    base = np.stack([total[:, 0] - outputs @ sizes, total[:, 1] - columns @ sizes])
    pairs = np.maximum(total[:, 0] * total[:, 1] / groups, 1.0)  # a layer without units costs nothing
    weights = np.array([net.layers[name].numel if name in net.layers else 0.0 for name in names])
    counted = np.array([macs.get(name, 0.0) for name in names])
    vectors, every = _vectors(net, units)
    products = _products(units)
    scale = min(1.0, rest / float(products @ sizes)) if (products @ sizes) > 0 else 0.0
    zero = np.zeros(len(families))
    loose = float(sum(layer.numel for layer in net.layers.values()) - weights.sum())
    costs = {
        "params": Cost(weights / pairs, vectors, every - float(weights.sum() + vectors @ sizes)),
        "weights": Cost(weights / pairs, zero, loose),
        "flops": Cost(
            counted / pairs,
            products * scale,
            rest - float(products @ sizes) * scale + float(sum(macs.values()) - counted.sum()),
        ),
    }
    return CostTable(
        sizes,
        outputs,
        columns,
        base,
        np.where(in_groups, groups, 0.0),
        np.where(in_groups, 1.0, groups),
        total[:, 1] / groups,
        costs,
    )


def _table(names: list[str], shares: list[Mapping[str, int]]) -> Floats:
    place = {name: row for row, name in enumerate(names)}
    table = np.zeros((len(names), len(shares)))
    for column, counts in enumerate(shares):
        for name, count in counts.items():
            table[place[name], column] = count
    return table


def _vectors(net: MaskedGraph, units: WholeUnits) -> tuple[Floats, float]:
    """Elements of parameters beside weights in a unit of each family, and parameters of the whole network."""
    tensors = dict(net.named_parameters())
    per_index = {
        name: tensors[name].numel() / tensors[name].shape[axis]
        for name, (axis, _) in units.found.parameters.items()
        if name in tensors
    }
    biases: dict[str, float] = {}
    for name, layer in units.found.layers.items():
        module = _submodule(net, name)
        for own, tensor in () if module is None else module.named_parameters(recurse=False):
            vector = tensor.ndim and tensor.shape[0] == tensor.numel() == len(layer.outputs)
            if vector and own != "weight" and f"{name}.{own}" not in units.found.parameters:
                biases[name] = biases.get(name, 0.0) + 1.0
    counts = np.zeros(len(units.families))
    for number, family in enumerate(units.families):
        counts[number] = sum(per_index.get(name, 0.0) * count for name, count in family.parameters.items())
        counts[number] += sum(biases.get(name, 0.0) * count for name, count in family.outputs.items())
    return counts, float(sum(tensor.numel() for tensor in tensors.values()))


def _submodule(net: MaskedGraph, name: str) -> nn.Module | None:
    try:
        return net.get_submodule(name)
    except AttributeError:  # a part of an attention that is a parameter, not a module
        return None


def _products(units: WholeUnits) -> Floats:
    """Multiply-accumulates of products of activations that one unit of each family shares."""
    per_unit = torch.zeros(units.count + 1, dtype=torch.float64, device="cpu")
    for macs, groups in units.found.products:
        if len(groups):
            owner = torch.where(groups > 0, units.of_group[groups], -1)
            per_unit.index_add_(
                0, owner + 1, torch.full((len(groups),), macs / len(groups), dtype=torch.float64, device="cpu")
            )
    values = per_unit[1:].numpy()
    return np.array([values[list(family.units)].mean() for family in units.families])
