"""A run of a graph on unit numbers as its rules see it: layers, what feeds them, and what is known of units."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from growfx.errors import TraceError
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.passes.connect.operations import of_shapes, on_meta
from growfx.passes.connect.results import LayerInputs
from growfx.passes.connect.signals import MIX, SLOT, UNIT, Ints, Signals, filled, narrowed, numbers
from growfx.passes.connect.values import Ids, Named, Unknown, WeightPart, real, slots_in, whole
from growfx.passes.operators.nests import leaves, map_leaves

__all__ = ["UnitRun"]


class UnitRun(ABC):
    """One run of a recorded graph on unit numbers.

    Attributes:
        signals: what is known of units and of what is made of them.
        layers: name -> units, and what feeds its columns.
        name: the operator being passed: function or method name, or the module's class.
        place: the node and its source line, for reasons.
        module: the module being called, under `target`, known as `layer`; `applied` when it transforms its weight.
        flat: whether the inputs are vectors, which have features and no batch.
    """

    def __init__(self, net: MaskedGraph) -> None:
        self.net = net
        self.signals = Signals()
        self.layers: dict[str, LayerInputs] = {}
        self.inputs: dict[str, Ints] = {}
        self.frames: dict[bytes, Tensor] = {}
        self.name = self.place = self.target = self.layer = ""
        self.module: Any = None
        self.applied = self.flat = False
        self.model_dtype = next(net.parameters(), torch.empty(0)).dtype
        self._masked = {id(layer.parameter): name for name, layer in net.layers.items()}
        self._weights = {id(m.weight): n for n, m in net.shell.named_modules() if isinstance(m, (_ConvNd, nn.Linear))}
        self.parameters: dict[int, tuple[str, Tensor, Named]] = {}
        self._held: dict[str, str] = {}

    @abstractmethod
    def call(self, module: nn.Module, target: str, *args: Any, **kwargs: Any) -> Any:
        """Apply a module's rule."""

    def outputs(self, layer: str, units: int, columns: int, groups: int = 1) -> Ints:
        """The output units of a layer, new at its first use."""
        if layer not in self.layers:
            self.layers[layer] = LayerInputs(self.signals.fresh(units, UNIT), columns, groups)
        return self.layers[layer].units

    def feeds(self, layer: str, columns: Ints, signals: Ints) -> None:
        """Note what stands at a layer's columns."""
        known = self.layers[layer]
        known.at.append(columns)
        known.signals.append(signals)
        if len(known.at) > 1:  # used again: a column has to suit all uses
            self.couple_columns(np.concatenate(known.at), np.concatenate(known.signals))
        mixes = self.signals.kind[signals] == MIX
        if len(np.unique(signals[mixes])) > 1:
            inside = [
                self.signals.members[mix] for mix in np.unique(signals[mixes]).tolist() if mix in self.signals.members
            ]
            for members in inside:
                self.signals.pin(members, f"`{layer}` has a column for each of several mixes of it")
        if mixes.any():
            beside = np.isin(columns, columns[mixes])
            self.signals.pin(signals[beside & ~mixes], f"`{layer}` sees it where it sees a mix of units elsewhere")

    def couple_columns(self, columns: Ints, signals: Ints) -> None:
        """Couple what stands at the same column at different positions."""
        plain = self.signals.plain(signals)
        order = np.argsort(columns[plain > 0], kind="stable")
        columns, plain = columns[plain > 0][order], plain[plain > 0][order]
        alike = columns[1:] == columns[:-1]
        self.signals.couple(plain[1:][alike], plain[:-1][alike])

    def mixes_positions(self, layer: str) -> None:
        """Note that a layer runs over positions."""
        self.layers[layer].mixes_positions = True
        self.signals.pin(self.layers[layer].units, "it is a position")

    def frame(self, tensor: Tensor) -> None:
        """Note units that stand along several axes."""
        small = narrowed(tensor)
        if sum(size > 1 for size in small.shape) < 2 or small.numel() > len(self.signals.kind):
            return
        ids = self.signals.plain(numbers(small))
        if (ids > 0).all() and len(np.unique(ids)) == len(ids):
            shape = [size for size in small.shape if size > 1]
            kept = torch.from_numpy(ids).reshape(shape)
            self.frames.setdefault(repr(shape).encode() + ids.tobytes(), kept)

    def layer_name(self, module: nn.Module, target: str) -> str:
        """Under which name a layer is known: that of its weight's masked layer, or its own."""
        weight = module.parameter if isinstance(module, MaskedLayer) else None
        return self._masked.get(id(weight), target)

    def places(self, part: WeightPart) -> tuple[Tensor, Tensor]:
        """Output unit and input column of every element of a layer's weight."""
        layer = self.layers[part.layer]
        module: Any = self.net.get_submodule(part.layer)
        shape = (module.parameter if isinstance(module, MaskedLayer) else module.weight).shape
        taps = int(np.prod(shape[2:]))
        first, second = part.places // (taps * shape[1]), part.places // taps % shape[1]
        if isinstance(module, _ConvTransposeNd):
            first, second = second, first
        return torch.from_numpy(layer.units)[first], second

    def parameter(self, name: str, tensor: Tensor, beside: Named | None = None) -> Named:
        """A parameter or buffer with a slot per element; it shares those of the one it is always used beside."""
        found = self.parameters.get(id(tensor))
        if found is None:
            slots = beside.ids if beside is not None else None
            if slots is None:
                slots = filled(self.signals.fresh(tensor.numel(), SLOT), tensor.shape)
            found = self.parameters[id(tensor)] = (name, tensor, Named(tensor.detach(), slots))
        return found[2]

    def hold(self, nest: Any, reason: str) -> None:
        """Keep the layers whole whose weights are in `nest`: their units, and all that any use of them is fed."""
        for item in leaves(nest):
            if isinstance(item, WeightPart):
                self._held.setdefault(item.layer, reason)

    def shapes(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Shapes of an operation's results, found without values."""
        own = next(self.module.parameters(), None) if isinstance(self.module, nn.Module) else None
        of_ids = self.model_dtype if own is None else own.dtype

        def emptied(item: Any) -> Any:
            if isinstance(item, WeightPart):
                return torch.empty(item.places.shape, dtype=self.model_dtype, device="meta")
            tensor = item.tensor if isinstance(item, (Ids, Named)) else item
            if not isinstance(tensor, Tensor):
                return torch.device("meta") if isinstance(item, torch.device) else item
            dtype = of_ids if isinstance(item, Ids) else tensor.dtype
            return torch.empty(tensor.shape, dtype=dtype, device="meta")

        result = on_meta(op, map_leaves(emptied, args), map_leaves(emptied, kwargs))
        return map_leaves(lambda item: item.shape if isinstance(item, Tensor) else item, result)

    def unknown(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What is not understood: all units in it stay, and its results are a mix of them."""
        values = [item for item in leaves((args, kwargs)) if isinstance(item, Ids)]
        reason = f"not followed through {self.place}"
        for value in (*values, *map(Ids, slots_in((args, kwargs)))):
            self.signals.pin(numbers(narrowed(value.tensor)), reason)
        self.hold((args, kwargs), reason)
        mix = whole(self.signals, [value.tensor for value in values])
        try:
            shapes = self.shapes(op, args, kwargs)
        except Exception:  # its shape depends on data
            return Unknown()
        return of_shapes(
            shapes, lambda shape: Ids(torch.tensor(float(mix), dtype=torch.float64, device="cpu").expand(shape))
        )

    def judged(self, op: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A comparison or the like: no unit is in its result, whose values are unknown."""
        result = op(*real(args), **real(kwargs))
        return map_leaves(lambda item: Unknown() if isinstance(item, Tensor) else item, result)

    def register(self, name: str, module: Any) -> None:
        """A layer's units, where it is not called as usual."""
        if isinstance(module, nn.Linear):
            self.outputs(name, module.out_features, module.in_features)
        elif isinstance(module, nn.MultiheadAttention):
            self.outputs(name, 3 * module.embed_dim, module.embed_dim)
        elif isinstance(module, _ConvNd) or hasattr(module, "weight_shape"):
            self.outputs(name, module.out_channels, module.in_channels, module.groups)
        else:
            raise TraceError(f"the weight of `{name}`, a `{type(module).__name__}`, has no known units")
