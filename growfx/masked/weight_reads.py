"""Give code that reads a masked weight under its name, without calling the layer, the effective weight.

Names are looked up in two places: masked twins have `WeightRead` in their class, other modules that hold a masked
parameter (a tied embedding) have `WatchedParameters` for their registry. What is found depends on who reads, which is
known for each thread.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor, nn

__all__ = ["THREAD", "ModelCode", "WatchedParameters", "WeightRead", "watch_parameter"]


class Readable(Protocol):
    """A masked layer, as far as readers are concerned."""

    def weight_for_reader(self, weight: Tensor) -> Tensor:
        """What stands for the parameter `weight`."""
        ...


class _Thread(threading.local):
    """What runs in this thread.

    `own`: effective weights that layers' own code reads, by the layer's id, innermost last. `calls`: for each call of
    the model's code under way, the ids of the layers whose stored parameter is the effective weight; None: every
    parameter is read as stored.
    """

    def __init__(self) -> None:
        self.own: dict[int, list[Tensor]] = {}
        self.calls: list[Collection[int] | None] = []


THREAD = _Thread()


class ModelCode:
    """A context in which the model's code reads weights, and nothing of the model is written to by reading.

    Args:
        readable: ids of the masked layers whose stored parameter is known to be the effective weight; None: all are
            read as stored.
    """

    __slots__ = ("_readable",)

    def __init__(self, readable: Collection[int] | None = ()) -> None:
        self._readable = readable

    def __enter__(self) -> None:
        THREAD.calls.append(self._readable)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        THREAD.calls.pop()


class WeightRead:
    """The masked parameter of a twin, read under its name.

    Not a data descriptor: what stands in the instance's own dict comes first, and setting goes its usual way.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, kind: type | None = None) -> Any:
        if layer is None:
            return self
        weight = layer._parameters.get(self.name)
        if weight is None and layer.present is not None:
            return layer.built_for_reader()
        if weight is None:
            raise AttributeError(self.name)  # then nn.Module looks, and says what is missing
        return layer.weight_for_reader(weight)


class WatchedParameters(dict[str, Any]):
    """The parameters of a module that holds the parameter of a masked layer and is not a twin itself."""

    layers: dict[str, weakref.ref[Any]] = {}  # noqa: RUF012 - of a copy, until it is watched itself

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        reference = self.layers.get(name)
        layer = None if reference is None else reference()
        if layer is None or layer._parameters.get(layer.weight_name) is not value:  # untied since
            return value
        return layer.weight_for_reader(value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return dict, (dict(self),)  # a copy's layers are others


def watch_parameter(module: nn.Module, name: str, layer: Readable) -> dict[str, Any]:
    """Let reads of `module.<name>` find the effective weight of `layer`; returns the module's registry."""
    registry: Any = module.__dict__["_parameters"]
    if not isinstance(registry, WatchedParameters):
        registry = WatchedParameters(registry)
        registry.layers = {}
        module.__dict__["_parameters"] = registry
    elif not registry.layers:
        registry.layers = {}
    registry.layers[name] = weakref.ref(layer)
    return registry
