"""Where the weights of a whole network are kept: whole, or for present edges only."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final, ParamSpec, TypeVar

from torch.optim import Optimizer

from growfx.distributed.sharded import is_sharded
from growfx.errors import ConfigError
from growfx.masked.doors import as_masked_graph, is_masked_graph
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.masked.optimizers import optimizers_of
from growfx.masked.parameter import MaskedParameter
from growfx.masked.present.exchange import keep_layer_present, keep_layer_whole
from growfx.masked.present.optimizer_state import check_pointwise, exchange_parameter
from growfx.masked.present.values import scattered

__all__ = ["STORAGES", "follow_masks", "keep_present", "keep_whole", "on_whole_weights", "set_storage", "storage_of"]

STORAGES: Final = ("dense", "present")

_Given = ParamSpec("_Given")
_Found = TypeVar("_Found")


def storage_of(net: MaskedGraph) -> str:
    """Where the weights of `net` are: "present" as soon as one layer keeps its present edges only."""
    return "present" if any(layer.present is not None for layer in net.layers.values()) else "dense"


def set_storage(net: MaskedGraph, storage: str, optimizers: Sequence[Optimizer] = ()) -> dict[str, str]:
    """Keep whole weights ("dense") or values of present edges ("present"); returns as `keep_present`."""
    if storage == "present":
        return keep_present(net, optimizers)
    keep_whole(net, optimizers)
    return {}


def keep_present(net: MaskedGraph, optimizers: Sequence[Optimizer] = ()) -> dict[str, str]:
    """Keep values of present edges only, as the parameter `values` of each layer; what is kept so already stays.

    Args:
        net: changed in place.
        optimizers: that hold the weights, and hold the values afterwards, with their state; those that have made a step
            are known.

    Returns:
        layer -> why its weight stays whole.

    Raises:
        ConfigError: weights that are spread over processes or computed by soft masks, or an optimizer whose step or
            state is not one of single edges; nothing is changed then.
    """
    holders = {name: [*optimizers, *optimizers_of(layer.trained)] for name, layer in net.layers.items()}
    for optimizer in (each for found in holders.values() for each in found):
        check_pointwise(optimizer)
    _check_layers(net)
    whole = _reasons(net)
    _ = net.identity  # found out now: to ask later keeps the model that was wrapped, with its whole weights
    for name, layer in net.layers.items():
        if layer.present is None and name not in whole:
            weight, mask = layer.parameter, layer.mask
            values = keep_layer_present(layer, name)
            for optimizer in holders[name]:
                exchange_parameter(optimizer, weight, values, lambda state, mask=mask: state[mask])
    return whole


def keep_whole(net: MaskedGraph, optimizers: Sequence[Optimizer] = ()) -> None:
    """Keep whole weights, as parameters under their own names; the opposite of `keep_present`."""
    for layer in net.layers.values():
        if layer.present is not None:
            values, mask = layer.present.values, layer.mask
            weight = keep_layer_whole(layer)
            for optimizer in (*optimizers, *optimizers_of(values)):
                exchange_parameter(optimizer, values, weight, lambda state, mask=mask: scattered(state, mask))


def _check_layers(net: MaskedGraph) -> None:
    for name, layer in net.layers.items():
        if is_sharded(layer.trained):
            raise ConfigError(
                f'`storage` = "present" expects whole weights, got those of `{name}` spread over processes '
                "(`fully_shard`), where each rank has rows and no edges of its own; use `DistributedDataParallel`, or "
                '`storage` = "dense"'
            )
        if layer.gate is not None:
            raise ConfigError(
                f'`storage` = "present" expects masks of edges that are there or not, got a soft mask on `{name}`, '
                'which trains all edges; use another method, or `storage` = "dense"'
            )


def _reasons(net: MaskedGraph) -> dict[str, str]:
    """Layer -> why its weight must stay whole."""
    holders: dict[int, int] = {}
    for module in net.shell.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {
        name: reason
        for name, layer in net.layers.items()
        if layer.present is None and (reason := _reason(layer, holders.get(id(layer.trained), 0)))
    }


def _reason(layer: MaskedLayer, holders: int) -> str:
    if isinstance(layer, MaskedParameter):
        return "it is a mask on a parameter of a module that stays what it is"
    if layer.read_directly:
        return "the model reads its weight without calling it"
    if holders != 1:
        return "its weight is that of another module too"
    if hasattr(layer, "values"):
        return "it has `values` of its own"
    return "its weight has no values" if layer.mask.is_meta else ""


def on_whole_weights(function: Callable[_Given, _Found]) -> Callable[_Given, _Found]:
    """Decorate a function whose first argument, `net`, may be a masked network: it runs on whole weights."""

    @functools.wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Found:
        net = args[0] if args else kwargs.get("net")
        if not is_masked_graph(net):
            return function(*args, **kwargs)
        with as_masked_graph(net, function.__name__).whole_weights():
            return function(*args, **kwargs)

    return call


def follow_masks(copied: MaskedGraph, net: MaskedGraph) -> None:
    """Let a copy of `net` that averages its parameters have its edges: new ones at zero, without those dropped."""
    for name, layer in net.layers.items():
        other = copied.layers[name]
        if layer.present is not None:
            layer.settle()
        if other.present is not None and layer.present is not None and other.present.bits is not layer.present.bits:
            other.mask.copy_(layer.mask)
            other.settle()
            other.present.bits = layer.present.bits
