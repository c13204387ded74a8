"""Hooks that every optimizer calls around its step, so that nobody has to tell growfx about theirs."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if TYPE_CHECKING:
    from growfx.layers import MaskedLayer

__all__ = ["CLEARED", "LAYER_OF"]

# The masked layer of a parameter, by the parameter's id; entries vanish with their layer.
LAYER_OF: weakref.WeakValueDictionary[int, MaskedLayer] = weakref.WeakValueDictionary()
# Per optimizer and parameter: the mask (identity, version) its state was last cleared for.
CLEARED: weakref.WeakKeyDictionary[Optimizer, dict[int, tuple[int, int]]] = weakref.WeakKeyDictionary()
_VERSIONS: weakref.WeakKeyDictionary[Optimizer, dict[int, int]] = weakref.WeakKeyDictionary()


def _masked_layers_of(optimizer: Optimizer) -> Iterator[MaskedLayer]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            layer = LAYER_OF.get(id(parameter))
            if layer is not None and layer.parameter is parameter:
                yield layer


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if LAYER_OF:
        versions = {}
        for layer in _masked_layers_of(optimizer):
            layer.optimizer_will_step(optimizer)
            versions[id(layer.parameter)] = layer.parameter._version
        _VERSIONS[optimizer] = versions


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    versions = _VERSIONS.pop(optimizer, None)
    if versions:
        for layer in _masked_layers_of(optimizer):
            layer.optimizer_stepped(versions.get(id(layer.parameter), -1))


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
