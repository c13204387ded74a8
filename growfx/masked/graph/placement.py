"""Notice that a model was operated on after it was wrapped: masked layers that were replaced, weights taken away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from growfx.errors import MaskError
from growfx.masked.layers import MaskedLayer
from growfx.masked.parameter import MaskedParameter

__all__ = ["Places"]


class Places:
    """Where the masked layers of a model are.

    Args:
        shell: the model.
        layers: its masked layers, by name.
    """

    def __init__(self, shell: nn.Module, layers: Mapping[str, MaskedLayer]) -> None:
        self._shell, self._layers = shell, layers
        # Every step from the root to a layer: a forward looks at each, so as few as there are.
        self._steps = _steps(shell, self._modules())

    def check(self) -> None:
        """Check that every layer is still there, with its weight.

        Raises:
            MaskError: it is not; names the layer.
        """
        for registry, key, child in self._steps:
            if registry.get(key) is not child:
                self._refuse()
        for layer in self._layers.values():
            if not layer.has_parameter():
                self._refuse()

    def _modules(self) -> dict[str, nn.Module]:
        """The module of every masked layer, by the module's name."""
        names = {id(module): name for name, module in self._shell.named_modules()}
        owners = [_owner(layer) for layer in self._layers.values()]
        return {names[id(owner)]: owner for owner in owners if id(owner) in names}

    def _refuse(self) -> None:
        modules = {id(module) for module in self._shell.modules()}
        for name, layer in self._layers.items():
            if id(_owner(layer)) not in modules:
                raise MaskError(
                    f"the masked layer `{name}` was replaced since the model was wrapped, so its mask is of no use; "
                    "change the model first, then wrap it (growfx.unwrap(net) before gives the plain model)"
                )
            if not layer.has_parameter():
                raise MaskError(
                    f"`{name}.{layer.weight_name}` was taken away since the model was wrapped (a parametrization, "
                    "torch.nn.utils.prune or spectral_norm?); change the model first, then wrap it"
                )


def _owner(layer: MaskedLayer) -> nn.Module:
    return layer.owner if isinstance(layer, MaskedParameter) else layer


def _steps(shell: nn.Module, modules: Mapping[str, Any]) -> list[tuple[dict[str, Any], str, nn.Module]]:
    """(registry, key, module) of every step from the root to one of the modules."""
    found: dict[str, tuple[dict[str, Any], str, nn.Module]] = {}
    for name in modules:
        part, path = shell, ""
        for key in name.split(".") if name else ():
            path = f"{path}.{key}"
            child = part._modules[key]
            assert child is not None
            found.setdefault(path, (part._modules, key, child))
            part = child
    return list(found.values())
