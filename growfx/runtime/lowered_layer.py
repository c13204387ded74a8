"""`LoweredLayer`: a convolution or linear layer of a network that only infers, with an interchangeable kernel."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Kernel", "LoweredLayer", "finish"]


class Kernel(nn.Module, ABC):
    """One way to compute a layer's product. Inference only.

    Attributes:
        choice: what it is called in reports and in the argument of `growfx.passes.lower`.
    """

    choice: ClassVar[str]

    @abstractmethod
    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """The layer's output, plus `residual` of its shape and dtype, then relu where asked for."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of weight, indices and bias."""


class LoweredLayer(nn.Module):
    """A convolution or linear layer computed by a kernel, with what follows it: a sum, a relu.

    Attributes:
        kernel: what computes it; may be exchanged at any time.
    """

    def __init__(self, plain: nn.Module, kernel: Kernel) -> None:
        super().__init__()
        self.kernel = kernel
        # The layer without values, for shapes, and for code that asks for its sizes. In a tuple, or it would be a
        # submodule.
        self._plain = (_without_values(plain),)
        self.training = False

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """The layer's output, plus `residual` of its shape and dtype, then relu where asked for."""
        if x.is_meta:
            return finish(self._plain[0](x), residual, relu)
        return self.kernel.forward(x, residual, relu)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            plain = self.__dict__.get("_plain")
            if plain is None:
                raise
            value = self.kernel._parameters.get(name) if self.kernel.choice == "dense" else None
            return _placeholder(getattr(plain[0], name)) if value is None else value

    def extra_repr(self) -> str:
        """The layer it stands for."""
        return repr(self._plain[0])


def finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """Add and rectify, in the place of `y`, which nobody else holds."""
    if residual is not None:
        y.add_(residual)
    return torch.relu_(y) if relu else y


def _placeholder(value: Any) -> Any:
    """In place of a weight that is packed: its shape, dtype and device without its memory, and no numbers."""
    if not isinstance(value, Tensor) or not value.is_meta:
        return value
    return torch.full((), torch.nan, dtype=value.dtype, device="cpu").expand(value.shape)


def _without_values(plain: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for parameter in plain.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
    return copy.deepcopy(plain, memo)
