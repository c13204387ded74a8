"""Whether a model is still what a plan or a recording was made of."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn
from torch.nn.modules import module as of_all_modules

from growfx.masked.modules import chain_tensors

__all__ = ["ModelWatch"]

# Of all modules, whatever model they belong to.
_GLOBAL_HOOKS = (of_all_modules._global_forward_hooks, of_all_modules._global_forward_pre_hooks)


class ModelWatch:
    """Tells whether a model was edited since this was made; asked at every call, so it costs microseconds.

    Seen are modules, parameters and buffers that were added, dropped or exchanged, hooks on forwards, replaced
    forwards and train mode. Numbers and flags in other attributes are not.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._fields = [vars(module) for module in modules]
        self._forwards = [fields.get("forward") for fields in self._fields]
        self._hooks = [h for module in modules for h in (module._forward_hooks, module._forward_pre_hooks)]
        self._own_hooks = list(_held(self._hooks))
        registries = [(module._modules, module._parameters, module._buffers) for module in modules]
        self._registries = [registry for parts in registries for registry in parts]
        self._registered = list(_held(self._registries))
        # Tensors made in inference mode do not count writes.
        self._tensors = [tensor for tensor in chain_tensors(model) if not tensor.is_inference()]
        self._values = self._count_values()

    def is_intact(self) -> bool:
        """Whether the model has the modules and tensors that it had, and nothing that changes what they do."""
        return (
            True not in [fields["training"] for fields in self._fields]
            and self._forwards == [fields.get("forward") for fields in self._fields]
            and _are_same(self._own_hooks, self._hooks)
            and not any(_GLOBAL_HOOKS)
            and _are_same(self._registered, self._registries)
        )

    def has_values(self) -> bool:
        """Whether its tensors hold the values that they held; writes through `.data` into them are not seen."""
        return self._count_values() == self._values

    def _count_values(self) -> list[int]:
        versions = [tensor._version for tensor in self._tensors]
        return [sum(versions), *[tensor.data_ptr() for tensor in self._tensors]]


def _held(registries: Iterable[dict[Any, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, registries))


def _are_same(known: list[Any], registries: list[Any]) -> bool:
    """Whether registries hold these very objects, in this order."""
    return len(known) == sum(map(len, registries)) and all(map(operator.is_, known, _held(registries)))
