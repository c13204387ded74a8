"""Which layers a method may change: those whose weights are trained and that its rule can rank.

One place for all methods. Frozen layers (`requires_grad=False` on the weight) keep their masks and count neither in the
method's density nor in its number of edges, as if `growfx.wrap` had excluded them; `net.density` counts them still.
A layer that is frozen later is left alone from then on, for as long as it is frozen.

Layers that no path crosses keep their masks too, but count in the method's density. Methods that need no paths change
them like any other where they would take more than half of the edges that the density leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from growfx.errors import CheckpointError, ConfigError, TraceError
from growfx.masked.graph import MaskedGraph
from growfx.masked.layers import MaskedLayer
from growfx.masked.shared import unsharded
from growfx.methods.base import Method
from growfx.passes.path_products.products import path_gradients

__all__ = ["Scope", "check_optimizer", "find_scope", "is_frozen", "layers_off_path", "listed"]

_SHOWN = 4


@dataclass(frozen=True)
class Scope:
    """The layers that a method may change, and what a density means for it.

    Attributes:
        net: the network.
        names: layers the method may change, in data-flow order.
        left: layers off every path, which keep their masks but count -> the reason.
    """

    net: MaskedGraph
    names: tuple[str, ...]
    left: Mapping[str, str]

    @property
    def layers(self) -> dict[str, MaskedLayer]:
        """The layers that may change now: frozen ones are left out."""
        return _trained(self.net, self.names)

    @property
    def budget(self) -> dict[str, MaskedLayer]:
        """The layers that a density counts: those that may change, and those off every path."""
        counted = {*self.names, *self.left}
        return _trained(self.net, (name for name in self.net.layers if name in counted))

    @property
    def numel(self) -> int:
        """Edges a density is a fraction of, active or not."""
        return sum(layer.numel for layer in self.budget.values())

    @property
    def nnz(self) -> int:
        """Active edges among them."""
        return sum(layer.nnz for layer in self.budget.values())

    @property
    def density(self) -> float:
        """Active edges over all, of the layers that a density counts."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def is_whole(self) -> bool:
        """Whether a density counts every masked layer of the network."""
        return len(self.budget) == len(self.net.layers)

    def edges_at(self, density: float) -> int:
        """Return how many edges `layers` have where all that count have `density` together.

        Raises `ConfigError` where that leaves none. Where layers were frozen since, it is at least one: training that
        goes well is not to end for that.
        """
        alone = sum(layer.nnz for layer in _trained(self.net, self.left).values())
        edges = round(density * self.numel) - alone
        layers = self.layers
        if edges < 1 and len(layers) == len(self.names):
            raise ConfigError(self._no_room(density, alone))
        return min(max(edges, 1), sum(layer.numel for layer in layers.values()))

    def _no_room(self, density: float, alone: int) -> str:
        total = self.numel
        asked = f"a density of {density:.4g} is {round(density * total)} of {total} edges"
        if not alone:
            return f"{asked}; allowed are densities that leave at least one edge, from about {1 / total:.4g} up"
        return (
            f"{asked}; {alone} of them are in layers no path crosses ({listed(self.left)}), which stay as they are, so "
            f"allowed are densities above {alone / total:.4g} that leave at least one edge; or wrap the model with "
            f"`exclude` (`--exclude` on the command line) for these layers, which are then not counted"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the names, as plain values."""
        return {"layers": list(self.names), "left": dict(self.left)}

    def restored(self, state: Mapping[str, Any] | None) -> Scope:
        """Return the scope of `state_dict()` over this network; None, of a state without one, is this scope.

        Raises `CheckpointError` where the network has no such layers.
        """
        if state is None:
            return self
        names, left = tuple(state["layers"]), dict(state["left"])
        unknown = [name for name in (*names, *left) if name not in self.net.layers]
        if unknown:
            raise CheckpointError(
                "the state is of a network with other layers; resume with the model it came from, which has "
                f"{listed(unknown)}"
            )
        return Scope(self.net, names, left)


def find_scope(method: Method, net: MaskedGraph, density: float | None = None, *, off_path: str | None = None) -> Scope:
    """Return which layers of `net` the method may change.

    `density`: the least that the method aims at, None where that is an outcome. `off_path`: what it does with layers
    off every path, by default its own `off_path`. They are found by the recorded graph; where a network has no faithful
    one, none is known to be.

    Raises `ConfigError` where nothing is left to change, naming what is there.
    """
    if not method.changes_masks:
        return Scope(net, tuple(net.layers), {})
    if not net.layers:
        raise ConfigError(
            f"method `{method.name}` has no masks to choose: the network has no masked layer; its parameters are "
            f"{_parameters(net)}. Wrap the model so that some are masked (`trace_report.unmasked` says why each is not)"
        )
    trained = tuple(name for name, layer in net.layers.items() if not is_frozen(layer))
    if not trained:
        raise ConfigError(
            f"method `{method.name}` has no masks to choose: all masked layers ({listed(net.layers)}) are frozen "
            "(`requires_grad=False`), and frozen layers keep their masks; let at least one be trained"
        )
    rule = off_path or method.off_path
    if rule == "changed":
        return Scope(net, trained, {})
    with unsharded(net), net.whole_weights():
        found = layers_off_path(net)
    left = {name: reason for name, reason in found.items() if name in trained}
    scope = Scope(net, tuple(name for name in trained if name not in left), left)
    if rule == "spare" and _is_crowded(scope, density):
        return Scope(net, trained, {})
    if not scope.names:
        raise ConfigError(
            f"method `{method.name}` has nothing to work on: no path crosses a masked layer that is trained "
            f"({listed(left)})"
        )
    return scope


def _is_crowded(scope: Scope, density: float | None) -> bool:
    """Whether layers off every path would take more than half of the edges, or nothing else is there."""
    alone = sum(scope.net.layers[name].nnz for name in scope.left)
    return not scope.names or (density is not None and 2 * alone > round(density * scope.numel))


def layers_off_path(net: MaskedGraph) -> dict[str, str]:
    """Return the masked layers that no path from input to output can cross -> why; none where paths are unknown."""
    ones = {name: torch.ones_like(layer.mask, dtype=torch.float64) for name, layer in net.layers.items()}
    try:
        return dict(path_gradients(net, ones, norm="identity", unit_scales=True).off_path)
    except TraceError:
        return {}


def is_frozen(layer: MaskedLayer) -> bool:
    """Whether the weight of a layer is not trained."""
    return not layer.trained.requires_grad


def check_optimizer(method: Method, net: MaskedGraph, optimizer: Optimizer) -> None:
    """Raise `ConfigError` unless `optimizer` trains a masked weight of `net`.

    One is enough: others may be in other optimizers, are trained like these, and change their masks like these.
    """
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise ConfigError(
            f"method `{method.name}` expected an optimizer with `param_groups` (a torch.optim.Optimizer), got "
            f"{type(optimizer).__name__}"
        )
    held = {id(parameter) for group in groups for parameter in group["params"]}
    trained = {name: layer for name, layer in net.layers.items() if not is_frozen(layer)}
    if trained and not any(id(layer.trained) in held for layer in trained.values()):
        raise ConfigError(
            f"the optimizer (`{type(optimizer).__name__}`, {len(held)} parameters) trains none of the masked weights "
            f"of this network ({listed(trained)}); make it from `net.parameters()`, after `fully_shard` or anything "
            "else that replaces parameters"
        )


def listed(names: Any) -> str:
    """Return the first few names in backticks, and how many more there are."""
    every = [f"`{name}`" for name in names]
    return ", ".join(every[:_SHOWN]) + (f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else "")


def _trained(net: MaskedGraph, names: Any) -> dict[str, MaskedLayer]:
    return {name: net.layers[name] for name in names if not is_frozen(net.layers[name])}


def _parameters(net: MaskedGraph) -> str:
    found = [f"`{name}` {tuple(value.shape)}" for name, value in net.named_parameters()]
    return ", ".join(found[:_SHOWN]) + (f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "") or "none"
