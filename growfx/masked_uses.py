"""Masks where a model's own forward reads a masked parameter without calling the layer it belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from growfx.layers import MaskedLayer

__all__ = ["MaskedUses"]


class MaskedUses(TorchFunctionMode):
    """Where a model's own forward reads a masked parameter directly, give it the effective weight."""

    def __init__(self, layers: Iterable[MaskedLayer]):
        super().__init__()
        layers = list(layers)
        self.layer_of = {id(layer.parameter): layer for layer in layers}
        self.gathered = [layer for layer in layers if layer.sharded]  # by parts of the model, in forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def effective(value: Any) -> Any:
            layer = self.layer_of.get(id(value)) if isinstance(value, nn.Parameter) else None
            if layer is None and self.gathered and isinstance(value, nn.Parameter):
                layer = next((layer for layer in self.gathered if layer.parameter is value), None)
            return value if layer is None else layer.effective_weight

        if getattr(func, "__name__", "") in ("__get__", "__set__", "size", "dim"):
            return func(*args, **(kwargs or {}))
        args, kwargs = pytree.tree_map(effective, (tuple(args), kwargs or {}))
        return func(*args, **kwargs)
