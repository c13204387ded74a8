"""Which layers of a model are masked, which share a weight, and whose weight is read without a call of the layer."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from growfx.distributed.sharded import is_sharded
from growfx.errors import MaskError
from growfx.masked.graph.placement import Places
from growfx.masked.graph.plain_state import hide_masks
from growfx.masked.layers import MaskedLayer
from growfx.masked.parameter import MaskedParameter
from growfx.masked.weight_reads import watch_parameter

__all__ = ["LayerTable", "NamedLayers"]


class NamedLayers(dict[str, MaskedLayer]):
    """Masked layers by name: a dict to read only, for what is written into it would change no model."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise MaskError(
            "`net.layers` is read-only, since growfx.wrap decides which layers are masked (`exclude`, `masked`); "
            "change masks by `net.set_masks({name: mask})`, or wrap the model again"
        )

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # pyright: ignore

    def __reduce__(self) -> tuple[Any, ...]:
        return NamedLayers, (dict(self),)  # a copy of a dict is written to, entry by entry


class LayerTable:
    """Which parts of a model are masked.

    Args:
        shell: the model, with masked twins among its modules.
        parameters: masks on parameters of other modules, by the parameter's name.

    Attributes:
        layers: masked layers by name, in data-flow order once they are named; those with tied weights appear once.
        read_directly: those whose weight the model was seen to read without calling the layer.
    """

    def __init__(self, shell: nn.Module, parameters: Mapping[str, MaskedParameter]) -> None:
        self.shell = shell
        self.layers = NamedLayers(parameters)
        self.read_directly: list[MaskedLayer] = list(parameters.values())
        self._tied: list[list[MaskedLayer]] = []
        self._places: Places | None = None
        self._face: weakref.ref[nn.Module] | None = None
        self._masks_are_placed()

    def shown_by(self, face: nn.Module) -> None:
        """Note the module that shares the registries of the shell's root, so that they stay the same."""
        self._face = weakref.ref(face)

    def name(self, layers: Mapping[str, MaskedLayer], tied: Sequence[list[MaskedLayer]]) -> None:
        """Say which masked layers there are, in data-flow order, and which of them share a weight."""
        self.layers = NamedLayers(layers)
        self._tied = list(tied)
        self._places = None
        masked = {id(layer) for layer in (*layers.values(), *(layer for group in tied for layer in group))}
        read = {id(layer): layer for layer in (*self.read_directly, *self.parameters.values())}
        self.read_directly = [layer for key, layer in read.items() if key in masked]
        self._masks_are_placed()

    @property
    def parameters(self) -> dict[str, MaskedParameter]:
        """Those of `layers` that are masks on parameters of modules that stay what they are."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, MaskedParameter)}

    def check(self) -> None:
        """Check that every masked layer is still where it was, with its weight.

        Raises:
            MaskError: one of them was replaced, or its weight was taken away.
        """
        if self._places is None:
            self._places = Places(self.shell, self.layers)
        self._places.check()

    def note_direct_read(self, name: str) -> None:
        """Remember that the model reads the weight of the masked layer `name` without calling the layer."""
        layer = self.shell.get_submodule(name)
        if isinstance(layer, MaskedLayer) and not layer.read_directly:
            layer.read_directly = True
            self.read_directly.append(layer)
            self._let_readers_find_masks()

    def mask_names(self) -> dict[str, str]:
        """The name of every mask in the state dict -> that of its layer."""
        modules = list(self.shell.named_modules(remove_duplicate=False))
        found = {f"{name}.mask": name for name, module in modules if isinstance(module, MaskedLayer)}
        for label, layer in self.parameters.items():
            for name in (name for name, module in modules if module is layer.owner):
                found[f"{name}.{layer.mask_name}".lstrip(".")] = label
        return found

    def adopt_parameters(self) -> None:
        """Take the parameters and masks that are there now for the layers' own."""
        for first, *others in self._tied:
            for other in others:
                other._buffers["mask"] = first.mask
        for module in (*self.shell.modules(), *self.layers.values()):
            if isinstance(module, MaskedLayer) and not is_sharded(module.trained):
                module.adopt()

    def copied(self, shell: nn.Module, memo: dict[int, Any]) -> LayerTable:
        """The table of a copy of the model, whose copied modules `memo` has."""
        clone = LayerTable.__new__(LayerTable)
        anew = {"shell": shell, "_places": None, "_face": None}
        clone.__dict__.update(copy.deepcopy({k: v for k, v in self.__dict__.items() if k not in anew}, memo), **anew)
        clone._let_readers_find_masks()
        return clone

    def _masks_are_placed(self) -> None:
        self._let_readers_find_masks()
        hide_masks(self.shell, list(self.mask_names()))

    def _let_readers_find_masks(self) -> None:
        """Let modules that hold a weight that is read directly, and are not its layer, find the masked one."""
        layers = {id(layer.parameter): layer for layer in self.read_directly}
        for module in self.shell.modules():
            for name, parameter in list(module._parameters.items()):
                if id(parameter) in layers and not isinstance(module, MaskedLayer):
                    self._share_registry(module, watch_parameter(module, name, layers[id(parameter)]))

    def _share_registry(self, module: nn.Module, registry: dict[str, Any]) -> None:
        face = None if self._face is None else self._face()
        if module is self.shell and face is not None:
            face.__dict__["_parameters"] = registry
        for other in self.parameters.values():
            if other.owner is module:
                other.__dict__["_parameters"] = registry
