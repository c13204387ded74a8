"""Let a layer keep its whole weight or the values of its present edges, for good or for a while."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager

from torch import nn

from growfx.masked.layers import MaskedLayer
from growfx.masked.present.values import PresentValues
from growfx.masked.registry import LAYER_OF, note_replaced
from growfx.masked.stored import Stored

__all__ = ["keep_layer_present", "keep_layer_whole", "whole_layers"]


def keep_layer_present(layer: MaskedLayer, name: str) -> nn.Parameter:
    """Keep the values of present edges only, as the parameter `values`; returns it. `name`: of the layer."""
    layer.settle()
    weight = layer.parameter
    present = PresentValues(name, weight, layer.mask)
    _exchange(layer, weight, "values", present.values)
    layer.present = present
    note_replaced(weight)
    return present.values


def keep_layer_whole(layer: MaskedLayer) -> nn.Parameter:
    """Keep the whole weight as a parameter again; returns it."""
    present = _lend(layer)
    layer._lent, weight = None, layer.parameter
    note_replaced(present.values)
    return weight


@contextmanager
def whole_layers(layers: Iterable[MaskedLayer]) -> Generator[None]:
    """Let the whole weights of all `layers` be parameters for a while, for work that reads or writes them.

    What was changed, masks included, is kept. Optimizers go on knowing the values.
    """
    lent = [layer for layer in layers if layer.present is not None]
    for layer in lent:
        _lend(layer)
    try:
        yield
    finally:
        for layer in lent:
            _take_back(layer)


def _lend(layer: MaskedLayer) -> PresentValues:
    present = layer.present
    assert present is not None
    weight = layer.parameter
    weight.grad = present.whole_gradient(layer.mask)
    layer.present, layer._lent = None, present
    _exchange(layer, present.values, layer.weight_name, weight)
    return present


def _take_back(layer: MaskedLayer) -> None:
    present = layer._lent
    if present is None:  # kept whole in the meantime
        return
    layer.settle()
    weight = layer.parameter
    present.take(weight, layer.mask)
    present.values.requires_grad_(weight.requires_grad)
    _exchange(layer, weight, "values", present.values)
    layer.present, layer._lent = present, None


def _exchange(layer: MaskedLayer, before: nn.Parameter, name: str, after: nn.Parameter) -> None:
    """Put a parameter in the place of another, under its own name."""
    if LAYER_OF.get(id(before)) is layer:
        del LAYER_OF[id(before)]
    entries = [(name, after) if value is before else (key, value) for key, value in layer._parameters.items()]
    layer._parameters.clear()
    layer._parameters.update(entries)
    layer._stored = Stored(after, layer.mask)
    LAYER_OF[id(after)] = layer
