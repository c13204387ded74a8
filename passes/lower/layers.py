"""Lower a network for inference: layers get the kernels chosen for them, and take over what follows them.

A convolution or linear layer whose output only feeds a sum, and that only a relu, computes all of it in one call.
The graph computes the same sums over the active weights in another order, and nothing else changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from growfx.errors import ConfigError
from growfx.passes.lower.fuse import drop_identities, fuse_into_layers
from growfx.passes.lower.pools import replace_max_pools
from growfx.passes.operators.classes import APPLIED, row_of
from growfx.passes.path_products.rules.layers import convolution, linear
from growfx.passes.path_products.rules.table import module_rule
from growfx.runtime.layer_kernels import CHOICES, KernelRefusedError, make_kernel, padding_of
from growfx.runtime.lowered_layer import LoweredLayer

__all__ = ["lower", "lowerable", "swap_layers"]


def lower(
    module: fx.GraphModule, choices: Mapping[str, str], masks: Mapping[str, Tensor] | None = None
) -> fx.GraphModule:
    """The network with the named layers lowered; `module` is not changed, and shares its other modules.

    Args:
        module: a recorded network in evaluation mode. Layers in it that are lowered already take over what follows
            them, too.
        choices: layer -> `dense`, `csr` or `direct`.
        masks: layer -> bool tensor of its weight's shape; a layer without one has all its weights active.

    Raises:
        ConfigError: a name that is not a layer of the graph or cannot be lowered, an unknown choice, or one that cannot
            be had here.
    """
    _check(lowerable(module, module.graph), choices)
    lowered = fx.GraphModule(module, copy.deepcopy(module.graph))
    swap_layers(lowered, choices, masks or {})
    drop_identities(lowered)
    fuse_into_layers(lowered)
    replace_max_pools(lowered)
    lowered.recompile()
    return lowered


def swap_layers(model: nn.Module, choices: Mapping[str, str], masks: Mapping[str, Tensor]) -> dict[str, LoweredLayer]:
    """Put lowered layers in the place of the named ones, under all their names, in place; returns them by name.

    Raises:
        ConfigError: a choice that cannot be had here; nothing is changed then.
    """
    made: dict[str, LoweredLayer] = {}
    for name, choice in choices.items():
        plain: Any = model.get_submodule(name)
        try:
            made[name] = LoweredLayer(plain, make_kernel(plain, masks.get(name), choice))
        except KernelRefusedError as refusal:
            raise ConfigError(f"`{name}` cannot be lowered to `{choice}`: {refusal}") from refusal
    layers = {id(model.get_submodule(name)): layer for name, layer in made.items()}
    for name, plain in list(model.named_modules(remove_duplicate=False)):
        if id(plain) in layers:
            model.set_submodule(name, layers[id(plain)])
    return made


def lowerable(model: nn.Module, graph: fx.Graph) -> dict[str, str]:
    """The convolutions and linear layers that a graph calls, in data-flow order: "" or why each stays unchanged.

    Args:
        model: whose modules the graph names.
        graph: a recording of it.
    """
    reads = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    found: dict[str, str] = {}
    for node in graph.nodes:
        if node.op == "call_module" and str(node.target) not in found:
            layer = model.get_submodule(str(node.target))
            if isinstance(layer, (_ConvNd, nn.Linear)):
                found[str(node.target)] = _refusal(layer) or _read(str(node.target), reads)
        elif node.op == "get_attr":  # a layer with its own forward, or hooks that change values, is recorded through
            name = str(node.target).rpartition(".")[0]
            layer = model.get_submodule(name)
            if not isinstance(layer, (_ConvNd, nn.Linear)):
                continue
            if type(layer).forward not in _FORWARDS:
                found.setdefault(name, f"a `{type(layer).__name__}` has its own forward")
            elif layer._forward_hooks or layer._forward_pre_hooks:
                found.setdefault(name, "it has hooks")
    return found


_FORWARDS = {kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}


def _read(name: str, reads: Iterable[str]) -> str:
    return "its weight is used without a call of it" if any(read.startswith(f"{name}.") for read in reads) else ""


def _refusal(layer: nn.Module) -> str:
    kind, rule = type(layer).__name__, module_rule(layer)
    if rule not in (convolution, linear) or row_of(APPLIED, type(layer)) is not None:
        return f"a `{kind}` has its own forward"
    if layer._parameters.get("weight") is None:
        return "its weight is computed at each use"
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    if rule is linear:
        return ""
    if not isinstance(layer, nn.Conv2d):
        return f"a `{kind}` has no sparse kernel"
    if layer.groups > 1:
        return f"it has {layer.groups} groups"
    if layer.padding_mode != "zeros":
        return f"it pads with `{layer.padding_mode}`"
    try:
        padding_of(layer)
    except KernelRefusedError as refusal:
        return str(refusal)
    return ""


def _check(layers: Mapping[str, str], choices: Mapping[str, str]) -> None:
    for name, choice in choices.items():
        if choice not in CHOICES:
            raise ConfigError(f"unknown choice `{choice}` for `{name}`; allowed: {', '.join(CHOICES)}")
        if name not in layers:
            raise ConfigError(f"`{name}` is not a convolution or linear layer that the graph calls")
        if layers[name]:
            raise ConfigError(f"`{name}` cannot be lowered: {layers[name]}")
