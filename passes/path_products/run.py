"""A run of a path graph as its rules see it: what layers' weights, learned factors and other constants count for."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from growfx.analysis.weight_layout import by_unit, from_units
from growfx.masked.layers import MaskedLayer
from growfx.passes.operators.classes import APPLIED, row_of
from growfx.passes.operators.constants import evaluating_copy
from growfx.passes.path_products.values import Combined, ComparedValue, Learned, NoPathRuleError, Token, Weight

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["PathRun"]

# Hooks of `torch.nn.utils.weight_norm` and `spectral_norm`.
_COMPUTE_WEIGHTS = (WeightNorm, SpectralNorm)
# A layer, the axis of its input, and what stands along it where that is not all of the layer's units in order.
_Watch = tuple[str, int, tuple[Tensor, int] | None]


class PathRun(ABC):
    """One run of a path graph, as path rules see it: the magnitudes in it, and the rules of other modules.

    It also notes which input units of layers the backward pass finds on a path.

    Args:
        net: the masked graph; its parameters and buffers are read, never changed.
        norm: "fold" or "identity".
        power: exponent of every learned factor.
        magnitudes: layer name -> edge magnitudes to use in place of the layer's own (the weight's shape).
        unit_scales: count learned scales and unmasked weights as one.
        zeros_as_one: count layers' weights and learned scales that are zero throughout as one.
        visits: count the paths through output units rather than those through edges, where a layer's rule can.

    Attributes:
        leaves: layer name -> magnitude leaves in use; their gradients add up to the score.
        unit_leaves: layer name -> a factor of one for each output unit, whose gradient is the paths through it.
        alive_in: layer name -> bool per input unit, filled by the backward pass.
        constant_fed: layers that were run on constants only.
        unfed: layers that were run on empty tensors only: in the recording, nothing was selected for them.
    """

    def __init__(
        self,
        net: MaskedGraph,
        *,
        norm: str = "fold",
        power: float = 1,
        magnitudes: Mapping[str, Tensor] | None = None,
        unit_scales: bool = False,
        zeros_as_one: bool = False,
        visits: bool = False,
    ) -> None:
        self.net, self.norm, self.power, self.unit_scales = net, norm, power, unit_scales
        self.zeros_as_one, self.visits = zeros_as_one, visits
        self.magnitudes = magnitudes or {}
        self.layers: Mapping[str, MaskedLayer] = net.layers
        first = next(iter(self.layers.values())).parameter
        self.device, self.model_dtype = first.device, first.dtype
        self.leaves: dict[str, list[Tensor]] = {}
        self.unit_leaves: dict[str, Tensor] = {}
        self.alive_in: dict[str, Tensor] = {}
        self.constant_fed: set[str] = set()
        self.unfed: set[str] = set()
        self._layer_names = {id(layer.parameter): name for name, layer in self.layers.items()}
        self._watched: dict[int, tuple[weakref.ref[Tensor], list[_Watch]]] = {}

    @abstractmethod
    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Apply a module's rule."""

    def layer_of(self, module: nn.Module) -> str | None:
        """The name under which the module's weight is a masked layer (tied weights: once); None when unmasked."""
        return self._layer_names.get(id(module.parameter)) if isinstance(module, MaskedLayer) else None

    def layer_at(self, value: object) -> str | None:
        """The name of the masked layer whose weight a parameter is."""
        return self._layer_names.get(id(value))

    def learned(self, parameter: Tensor) -> Tensor:
        """What a learned factor counts for: its magnitude to the given power, or one."""
        if self.unit_scales:
            return torch.ones_like(parameter, dtype=torch.float64, device=self.device, requires_grad=False)
        magnitude = self.size_of(parameter)
        return magnitude if self.power == 1 else magnitude**self.power

    def size_of(self, parameter: Tensor) -> Tensor:
        """Magnitude of a learned factor, in float64."""
        magnitude = parameter.detach().abs().to(self.device, torch.float64)
        return torch.ones_like(magnitude) if self.zeros_as_one and not bool(magnitude.any()) else magnitude

    def magnitude(self, value: Any) -> float | Tensor:
        """What a constant counts for as a factor."""
        if isinstance(value, Weight):
            leaf = self._leaf(value.layer, value.applied)
            for step in value.steps:
                leaf = step(self, leaf)
            return leaf
        if isinstance(value, Combined):
            return value.size(self)
        if isinstance(value, Learned) and not isinstance(value, Token):
            return self.learned(value.tensor)
        if isinstance(value, (Token, ComparedValue)):
            value = value.tensor
        if isinstance(value, Tensor):
            value = value.detach().abs() if value.is_complex() else value.detach()
            return value.to(self.device, torch.float64).abs()
        if isinstance(value, (int, float, complex)):
            return float(abs(value))
        raise NoPathRuleError(f"a factor of type `{type(value).__name__}` has no path rule")

    def matrix(self, value: Any) -> Tensor:
        """What a constant tensor counts for."""
        magnitude = self.magnitude(value)
        if not isinstance(magnitude, Tensor):
            raise NoPathRuleError("a number stands where a tensor is needed")
        return magnitude

    def signed(self, module: Any) -> Tensor:
        """The effective weight of a module, zero outside its mask, without gradient."""
        if isinstance(module, MaskedLayer):
            with torch.no_grad():
                full = module.mask.is_meta or module.nnz == module.numel
                return module.parameter.detach() if full else torch.where(module.mask, module.parameter, 0)
        name = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        return getattr(_computed(module), name).detach()

    def weight(self, module: nn.Module) -> Tensor:
        """Edge magnitudes of a module with a weight: a leaf for masked layers, a constant for others."""
        name = self.layer_of(module)
        if name is not None:
            return self._leaf(name)
        applied = row_of(APPLIED, type(module))
        weight = self.signed(module)
        behind = self._behind(module, weight)
        if behind is not None:
            return self._leaf(behind, weight if applied is None else applied(module, weight.to(torch.float64)))
        return self.learned(weight if applied is None else applied(module, weight.to(torch.float64)))

    def produced(self, module: nn.Module, axis: int, apply: Callable[[Tensor], Tensor]) -> Tensor:
        """What a layer makes of its magnitudes, given as a function of these; its output units stand along `axis`.

        Where visits are counted, the magnitudes are constants: one gradient for each unit costs less than one for each
        edge.
        """
        name = self.layer_of(module)
        if name is None or not self.visits:
            return apply(self.weight(module))
        assert isinstance(module, MaskedLayer)
        with torch.no_grad():
            sizes = self._sizes(name)
        output = apply(sizes)
        if name not in self.unit_leaves:
            ones = torch.ones(output.shape[axis], dtype=torch.float64, device=self.device)
            self.leaves.setdefault(name, [])
            self.unit_leaves[name] = ones.requires_grad_()
        return output * self.unit_leaves[name].reshape(-1, *(1,) * (-axis - 1))

    def _behind(self, module: nn.Module, weight: Tensor) -> str | None:
        """The masked parameter that a module computes its weight from, element by element (weight norm)."""
        if "weight" in module._parameters:
            return None
        own = [p for p in module.parameters() if p.shape == weight.shape and id(p) in self._layer_names]
        return self._layer_names[id(own[0])] if len(own) == 1 else None

    def watch(self, layer: str | None, tensor: Tensor, dim: int, units: tuple[Tensor, int] | None = None) -> None:
        """Note, in the backward pass, which units along `dim` of a layer's input lie on a path.

        `units`: the input unit of the layer at each index along `dim`, and how many it has; default: all in order.
        """
        if layer is None:
            return
        if not tensor.numel():
            self.unfed.add(layer)
        if self.visits:
            return
        known = self._watched.get(id(tensor))
        if known is not None and known[0]() is tensor:
            known[1].append((layer, dim % tensor.ndim, units))
            return
        waiting = [(layer, dim % tensor.ndim, units)]
        self._watched[id(tensor)] = weakref.ref(tensor), waiting
        # Neither the tensor nor this run, which holds the output: a hook that leads back to its tensor is never freed.
        reached, alive_in = tensor.detach() > 0, self.alive_in

        def note(gradient: Tensor) -> None:
            crossed = reached.logical_and(gradient > 0)
            for name, axis, places in waiting:
                alive = crossed.transpose(0, axis).flatten(1).any(1) if crossed.ndim > 1 else crossed
                if places is not None:
                    marks = torch.zeros(places[1], dtype=torch.bool, device=alive.device)
                    marks[places[0][alive]] = True
                    alive = marks
                alive_in[name] = alive | alive_in[name] if name in alive_in else alive

        if tensor.requires_grad:
            tensor.register_hook(note)

    def watch_use(self, weight: Any, axis: int, tensor: Tensor, dim: int) -> None:
        """Do so where `dim` of a value is contracted with `axis` of a weight that the graph uses itself.

        Nothing is noted where the axis does not run over the layer's input units, as in the transposed use of a tied
        autoencoder: units are alive by the edges that paths cross, whichever way.
        """
        if not isinstance(weight, Weight):
            return
        layer = self.layers[weight.layer]
        if not weight.shifts and weight.tensor.ndim == layer.parameter.ndim:
            inputs = 0 if isinstance(layer, _ConvTransposeNd) else 1
            if axis % weight.tensor.ndim == inputs and not hasattr(layer, "weight_shape"):
                self.watch(weight.layer, tensor, dim)
            return
        rows = by_unit(layer, layer.mask, by_output=False)
        units = torch.arange(len(rows), device=self.device)[:, None].expand(rows.shape)
        places = from_units(layer, units, by_output=False)
        for move in weight.shifts:
            places = move(places)
        lines = places.movedim(axis, 0).flatten(1) if places.ndim > 1 else places[:, None]
        if lines.shape[0] == tensor.shape[dim] and bool((lines == lines[:, :1]).all()):
            self.watch(weight.layer, tensor, dim, (lines[:, 0], len(rows)))

    def _leaf(self, name: str, applied: Tensor | None = None) -> Tensor:
        """The magnitude leaf of a layer; a weight transformed by the graph has its own leaf."""
        known = self.leaves.setdefault(name, [])
        if known and applied is None:
            return known[0]
        with torch.no_grad():
            leaf = self._sizes(name, applied)
        leaf.requires_grad_()
        known.append(leaf) if applied is not None else known.insert(0, leaf)
        return leaf

    def _sizes(self, name: str, applied: Tensor | None = None) -> Tensor:
        """A new tensor of a layer's magnitudes."""
        if name in self.magnitudes:
            return self.magnitudes[name].detach().to(self.device, torch.float64, copy=True)
        return self._own_magnitudes(self.layers[name], applied)

    def _own_magnitudes(self, layer: MaskedLayer, applied: Tensor | None) -> Tensor:
        transform = row_of(APPLIED, layer.twin_of)
        if applied is None and transform is None:
            magnitude = self.signed(layer).to(torch.float64, copy=True).abs_()
        else:
            weight = self.signed(layer).to(torch.float64) if applied is None else applied.to(torch.float64)
            weight = weight if transform is None else transform(layer, weight)
            magnitude = torch.where(layer.mask, weight.abs(), 0)
        if self.zeros_as_one and not bool(magnitude.amax() > 0):
            magnitude = layer.mask.to(torch.float64)
        return magnitude if self.power == 1 else magnitude.pow_(self.power)


def _computed(module: nn.Module) -> nn.Module:
    """The module, or a shallow copy whose weight is that of the moment where a hook computes it before each call."""
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, _COMPUTE_WEIGHTS)]
    if not hooks:
        return module
    twin: Any = evaluating_copy(module)
    with torch.no_grad():
        for hook in hooks:
            hook(twin, ())
    return twin
