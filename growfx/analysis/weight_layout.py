"""How a layer's weight is laid out: which of its elements join which input unit to which output unit.

Every layout is brought into one canonical shape, (groups, outputs, inputs, taps): outputs and inputs per group, and
all edges between one pair of units along `taps`. Layouts: linear and joint attention projections (out, in);
convolutions (out, in / groups, kernel...); transposed ones (in, out / groups, kernel...); mixtures of convolution
kernels (experts, out * in / groups * kernel); vectors, whose elements are taken to join a pair of units each.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.modules.conv import _ConvTransposeNd

from growfx.masked.layers import MaskedLayer

__all__ = ["by_unit", "canonical", "from_canonical", "from_units", "joined_units"]


def canonical(layer: MaskedLayer, values: Tensor) -> Tensor:
    """Values of the weight's shape as (groups, outputs per group, inputs per group, taps)."""
    if values.ndim < 2:
        return values.reshape(-1, 1, 1, 1)
    groups = int(getattr(layer, "groups", 1))
    kernel = getattr(layer, "weight_shape", None)
    if kernel is not None:  # one row of all kernels per expert
        out, inner, *sides = kernel
        rows = values.reshape(-1, groups, out // groups, inner, math.prod(sides))
        return rows.permute(1, 2, 3, 0, 4).flatten(3)
    grouped = values.reshape(groups, values.shape[0] // groups, values.shape[1], -1)
    return grouped.transpose(1, 2) if isinstance(layer, _ConvTransposeNd) else grouped


def from_canonical(layer: MaskedLayer, values: Tensor) -> Tensor:
    """Undo `canonical`."""
    kernel = getattr(layer, "weight_shape", None)
    if kernel is not None:
        experts = layer.parameter.shape[0]
        values = values.unflatten(3, (experts, -1)).permute(3, 0, 1, 2, 4)
    elif isinstance(layer, _ConvTransposeNd):
        values = values.transpose(1, 2)
    return values.reshape(layer.parameter.shape)


def by_unit(layer: MaskedLayer, values: Tensor, by_output: bool) -> Tensor:
    """Values of the weight's shape as one row per output (or input) unit, units in their order in the network."""
    edges = canonical(layer, values)
    rows = edges if by_output else edges.transpose(1, 2)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1)


def from_units(layer: MaskedLayer, rows: Tensor, by_output: bool) -> Tensor:
    """Undo `by_unit`."""
    groups, outputs, inputs, taps = canonical(layer, layer.parameter.detach()).shape
    if by_output:
        return from_canonical(layer, rows.reshape(groups, outputs, inputs, taps))
    return from_canonical(layer, rows.reshape(groups, inputs, outputs, taps).transpose(1, 2))


def joined_units(layer: MaskedLayer, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Which input units and which output units have a marked edge; `edges` is bool in the weight's shape."""
    pairs = canonical(layer, edges).any(3)
    return pairs.any(1).flatten(), pairs.any(2).flatten()
