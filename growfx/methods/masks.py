"""Change masks together with what the optimizer knows, and collect the gradients of absent edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from growfx.distributed import ranks
from growfx.distributed.sharded import is_sharded, local_shard, part_of, reshard
from growfx.errors import ConfigError
from growfx.masked.agreement import require_same_masks
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.masked.optimizers import clear_state, hold, optimizers_of
from growfx.masked.shared import is_shared
from growfx.methods.base import Method
from growfx.methods.registry import kind_of, names

__all__ = ["change_masks", "collect_gradients", "dense_gradients", "find_shards"]


def find_shards(method: Method, net: MaskedGraph) -> None:
    """Find out whether `fully_shard` spread the weights of `net`, and let its layers know.

    Raises `ConfigError` where it did in a way that masks cannot follow, or `method` needs weights whole.
    """
    reshard(net)
    net.find_shards()
    spread = [name for name, layer in net.layers.items() if is_sharded(layer.trained)]
    if not spread:
        return
    if method.needs_whole:
        allowed = ", ".join(f"`{name}`" for name in names() if not kind_of(name).needs_whole)
        raise ConfigError(
            f"the weights of `{spread[0]}` are spread over processes (`fully_shard`), which method `{method.name}` "
            f"does not work with: {method.needs_whole}; allowed are {allowed}, or `DistributedDataParallel`, which "
            "keeps weights whole"
        )
    whole = [name for name in net.layers if name not in spread]
    if whole:
        raise ConfigError(
            f"the weights of `{spread[0]}` are spread over processes (`fully_shard`), those of `{whole[0]}` are not; "
            "masked layers are all spread or none, so call `fully_shard` on the network itself last"
        )
    net.settle()


# -- masks ----------------------------------------------------------------------------------------------------


def change_masks(net: MaskedGraph, optimizer: Optimizer, masks: Mapping[str, Tensor]) -> int:
    """Set `masks`; at every changed position the weight, its gradient and the optimizer's state are zero. Returns how
    many changed.

    Optimizer state is any floating-point tensor of the parameter's shape in `optimizer.state[parameter]`, of
    `optimizer` and of every other one that steps the parameter (one inside a wrapper, say). Ranks that train the
    network together compare their masks then; `MaskError` where they differ.
    """
    changed = 0
    for name, mask in masks.items():
        layer = net.layers[name]
        if layer.present is not None:
            hold(optimizer, layer)  # its state moves with the edges
            layer.settle()
            changed += int((mask.to(layer.mask.device) ^ layer.mask).sum())
            continue
        differs = mask.to(layer.mask.device) ^ layer.mask
        count = int(differs.sum())
        if count:
            for each in (layer.parameter, layer.parameter.grad):
                if each is not None and not each.is_sparse:
                    local_shard(each).masked_fill_(part_of(differs, each), 0.0)
            for each in {optimizer, *optimizers_of(layer.trained)}:
                clear_state(each, layer.parameter, differs)
        changed += count
    net.set_masks(masks)
    if is_shared(net):
        require_same_masks(net.layers)
    return changed


# -- gradients ------------------------------------------------------------------------------------------------


def collect_gradients(layers: Iterable[MaskedLayer], wanted: bool) -> None:
    """Let the next backward passes leave the gradient of absent edges (or not), and forget the last one."""
    for layer in layers:
        layer.collects_gradient = wanted
        layer.forget_dense_gradient()


def dense_gradients(net: MaskedGraph, layers: Mapping[str, MaskedLayer]) -> dict[str, Tensor]:
    """Return the gradient of every weight of some `layers` of `net`, present or absent, of the step just made; shapes
    of the weights.

    Collected since `collect_gradients(..., True)`: of the whole accumulation window, as the optimizer saw it. Zero
    for a layer that took no part in the step. Ranks that train the network together all ask, and all get the mean.
    """
    found = {}
    for name, layer in layers.items():
        if layer.dense_gradient is None and layer.collects_gradient:
            layer.take_dense_gradient()  # an optimizer that is none of torch's, whose step nobody announces
        gradient = layer.dense_gradient
        if gradient is None:
            gradient = torch.zeros_like(
                layer.mask if layer.present is not None else layer.parameter.detach(), dtype=layer.trained.dtype
            )
        found[name] = gradient
    if is_shared(net):
        ranks.average([gradient for name, gradient in found.items() if layers[name].present is not None])
    return found
