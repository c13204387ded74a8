"""The arguments of one call of a model: what a recording depends on, and how to vary the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Inputs"]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call of the model."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a recording depends on: everything but the batch size and the values of tensors.

        The batch is dimension 0 of the tensors that are arguments themselves, where all of these agree on it;
        tensors inside containers (the images of a detector) are structure.
        """
        free = self.batch is not None
        named = tuple((key, _signature(value, free)) for key, value in self.kwargs.items())
        return tuple(_signature(value, free) for value in self.args), named

    @property
    def structural(self) -> bool:
        """Whether tensors come inside containers, as the images of a detector do: their number is structure."""
        containers = [value for value in (*self.args, *self.kwargs.values()) if not isinstance(value, Tensor)]
        return any(isinstance(value, Tensor) for value in pytree.tree_leaves(containers))

    @property
    def batch(self) -> int | None:
        """The batch size; None where the arguments do not have one."""
        values = [*self.args, *self.kwargs.values()]
        sizes = {v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim > 0}
        return sizes.pop() if len(sizes) == 1 else None

    def with_batch(self, batch: int) -> Inputs:
        """The same inputs with rows repeated or dropped; unchanged where there is no batch."""
        old = self.batch
        if old is None or old == 0 or old == batch:
            return self

        def resize(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.ndim == 0:
                return value
            return value[torch.arange(batch, device=value.device) % old]

        return Inputs(tuple(map(resize, self.args)), {k: resize(v) for k, v in self.kwargs.items()})

    def redrawn(self, seed: int) -> Inputs:
        """Inputs of the same shapes with other values: noise around the float ones, rows of the others shuffled."""
        generator = torch.Generator().manual_seed(seed)

        def redraw(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.is_meta or value.numel() == 0:
                return value
            if value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator).to(value)
                spread = float(value.float().std()) if value.numel() > 1 else 0.0
                return value + noise * (spread or 1.0)
            if value.ndim == 0:
                return value
            return value.flip(0)

        args, kwargs = pytree.tree_map(redraw, (self.args, dict(self.kwargs)))
        return Inputs(args, kwargs)


def _signature(value: Any, batch_is_free: bool) -> Any:
    if isinstance(value, Tensor):
        shape = tuple(value.shape[1:]) if batch_is_free else tuple(value.shape)
        return value.ndim, shape, value.dtype, value.device
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_signature(v, False) for v in value)
    if isinstance(value, dict):
        return type(value), tuple((k, _signature(v, False)) for k, v in value.items())
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
