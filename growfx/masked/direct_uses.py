"""Apply masks when a model uses a layer's weight directly, e.g. `F.linear(x, self.qkv.weight)`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from growfx.masked.layers import MaskedLayer

__all__ = ["MaskedUses"]


_TRANSPOSED = {"T", "mT", "H", "mH"}


class MaskedUses(TorchFunctionMode):
    """Replace masked parameters among the arguments of torch's functions by the effective weights of their layers.

    Most of the time the stored parameter is the effective weight and nothing has to be replaced; this is for layers
    where it is not (`MaskedLayer.can_be_read`).
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
        if name in ("__set__", "size", "dim") or (name == "__get__" and func.__self__.__name__ not in _TRANSPOSED):
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(effective, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)
