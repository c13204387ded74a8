"""A mask on a parameter of a module that growfx knows nothing of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from growfx.masked.layers import MaskedLayer
from growfx.masked.registry import LAYER_OF
from growfx.masked.stored import Stored

__all__ = ["MaskedParameter"]


class MaskedParameter(MaskedLayer):
    """A mask on a parameter of a module that stays what it is: what `net.layers` has where there is no masked twin.

    For parameters that belong to no layer growfx knows (`masked=` of `growfx.wrap`), and for layers that have a `mask`
    or other names of a masked twin themselves. The mask is a buffer of the parameter's module, `<parameter>_mask`
    (`<parameter>_mask_` where the module has something of that name itself); the module reads the parameter itself, so
    it counts as read directly. It shares the registries of that module and is not part of the model.

    Attributes:
        owner: the module.
    """

    owner: nn.Module
    read_directly = True
    twin_of = nn.Module

    def __init__(self, owner: nn.Module, weight_name: str, mask_name: str | None = None) -> None:
        super().__init__()
        self.owner = owner
        for registry in ("_parameters", "_buffers"):
            self.__dict__[registry] = owner.__dict__[registry]
        self.weight_name, self.mask_name = weight_name, mask_name or _free_name(owner, f"{weight_name}_mask")
        weight = self.parameter
        if mask_name is None:
            owner.register_buffer(self.mask_name, torch.ones_like(weight, dtype=torch.bool))
        self._stored = Stored(weight, self.mask)
        self._collects = torch.zeros((), dtype=torch.bool, device=weight.device)
        LAYER_OF[id(weight)] = self

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # nothing of it is to be registered with the parameter's module

    @property
    def mask(self) -> Tensor:
        """The bool buffer `<parameter>_mask` of the parameter's module."""
        mask = self._buffers[self.mask_name]
        assert mask is not None
        return mask

    @mask.setter
    def mask(self, mask: Tensor) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._take_mask(mask)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter."""
        return self.parameter

    @property
    def training(self) -> bool:
        """The mode of the parameter's module."""
        return self.owner.training if "owner" in self.__dict__ else True

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Set by `nn.Module`; the mode is that of the parameter's module."""

    def remove(self) -> None:
        """Take the mask away, +0.0 in its place."""
        self.settle()
        if self._stored.hook is not None:
            self._stored.hook.remove()
        if LAYER_OF.get(id(self.parameter)) is self:
            del LAYER_OF[id(self.parameter)]
        del self._buffers[self.mask_name]

    def __deepcopy__(self, memo: dict[int, Any]) -> MaskedParameter:
        clone = MaskedParameter(copy.deepcopy(self.owner, memo), self.weight_name, self.mask_name)
        clone.gate = copy.deepcopy(self.gate, memo)
        return clone


def _free_name(owner: nn.Module, name: str) -> str:
    """`name`, or that with underscores after it where the module has something of the name itself."""
    while hasattr(owner, name):
        name += "_"
    return name
