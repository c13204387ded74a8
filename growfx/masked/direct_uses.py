"""Apply masks when a model uses a layer's weight directly, e.g. `F.linear(x, self.qkv.weight)`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from growfx.masked.layers import MaskedLayer
from growfx.masked.weight_reads import ModelCode

__all__ = ["MaskedUses", "masked_reads"]


_VALUES = {"T", "mT", "H", "mH", "data"}  # attributes that are tensors of the same values


class MaskedUses(TorchFunctionMode):
    """Replace masked parameters among the arguments of torch's functions by the effective weights of their layers.

    Most of the time the stored parameter is the effective weight and nothing has to be replaced; this is for layers
    where it is not (`MaskedLayer.can_be_read`), and for code that keeps the parameter elsewhere than under a name of a
    module, where growfx.weight_reads would see it (a list, a closure).
    """

    def __init__(self, layers: Iterable[MaskedLayer]):
        super().__init__()
        layers = list(layers)
        self.layer_of = {id(layer.parameter): layer for layer in layers}
        self.gathered = [layer for layer in layers if layer.sharded]  # by parts of the model, in forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def effective(value: Any) -> Any:
            layer = self.layer_of.get(id(value))
            if layer is None and self.gathered and isinstance(value, nn.Parameter):
                layer = next((layer for layer in self.gathered if layer.parameter is value), None)
            return value if layer is None else layer.effective_weight

        name = getattr(func, "__name__", "")
        if name in ("__set__", "size", "dim") or (name == "__get__" and func.__self__.__name__ not in _VALUES):
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(effective, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)


def masked_reads(layers: Iterable[MaskedLayer]) -> AbstractContextManager[Any]:
    """The context in which the model's own code runs: whichever weight it reads is the effective one.

    Args:
        layers: those whose weights are known, or likely, to be read without a call of the layer.
    """
    readable: set[int] = set()
    replaced: list[MaskedLayer] = []
    for layer in layers:
        if not layer.can_be_read():
            replaced.append(layer)
        elif layer.read_directly:  # then its gradient is masked too
            readable.add(id(layer))
    if not replaced:
        return ModelCode(readable)
    stack = ExitStack()
    stack.enter_context(ModelCode(readable))
    stack.enter_context(MaskedUses(replaced))
    return stack
