"""What follows a lowered layer, taken over by it: a sum with something else, then a relu."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.dropout import _DropoutNd

from growfx.passes.operators.names import changes_in_place, writes_in_place
from growfx.runtime.lowered_layer import LoweredLayer

__all__ = ["drop_identities", "fuse_into_layers"]

_RELU_FUNCTIONS = {F.relu, F.relu_, torch.relu, torch.relu_}
_RELU_METHODS = {"relu", "relu_"}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_ADD_METHODS = {"__add__", "__iadd__", "__radd__", "add", "add_"}


def drop_identities(module: fx.GraphModule) -> None:
    """Leave out calls of modules that hand on their input: identities, and dropouts outside training."""
    for node in list(module.graph.nodes):
        if node.op != "call_module" or len(node.args) != 1 or node.kwargs:
            continue
        target = module.get_submodule(str(node.target))
        idle = type(target) is nn.Identity or (isinstance(target, _DropoutNd) and not target.training)
        if idle and not _has_hooks(target):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def fuse_into_layers(module: fx.GraphModule) -> None:
    """Give lowered layers the sums and relus that follow them, where nobody else sees what is between."""
    # From the end: of two layers that are added, the later one takes over the sum, since both are there by then.
    for node in reversed(list(module.graph.nodes)):
        if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), LoweredLayer):
            _fuse(module, node)


def _fuse(module: fx.GraphModule, layer: fx.Node) -> None:
    while len(layer.users) == 1:
        (user,) = layer.users
        extra = _taken_over(module, layer, user)
        if extra is None or not _can_wait(module, layer, user):
            return
        # In the user's place: there the other summand is read when it was, whatever happened to it before.
        with module.graph.inserting_before(user):
            merged = module.graph.call_module(str(layer.target), layer.args, {**layer.kwargs, **extra})
        merged.meta = {**layer.meta, "shape": user.meta.get("shape")}
        user.replace_all_uses_with(merged)
        for gone in (user, layer):
            module.graph.erase_node(gone)
        layer = merged


def _taken_over(module: fx.GraphModule, layer: fx.Node, user: fx.Node) -> dict[str, Any] | None:
    """The arguments by which a layer does what its user does; None where it cannot."""
    if layer.kwargs.get("relu"):
        return None
    if _is(module, user, _RELU_FUNCTIONS, _RELU_METHODS, nn.ReLU) and user.args[:1] == (layer,):
        return {"relu": True}
    if "residual" in layer.kwargs or not _is(module, user, _ADD_FUNCTIONS, _ADD_METHODS, None):
        return None
    if len(user.args) != 2 or user.kwargs:
        return None
    first, second = user.args
    other = second if first is layer else first
    if not isinstance(other, fx.Node) or other is layer or other.op == "get_attr":
        return None
    if _writes(module, user) and first is not layer:
        return None
    ours, theirs = ([node.meta.get(fact) for fact in ("shape", "dtype")] for node in (layer, other))
    return {"residual": other} if None not in ours and ours == theirs else None


def _is(
    module: fx.GraphModule, node: fx.Node, functions: set[Callable[..., Any]], methods: set[str], kind: type | None
) -> bool:
    if node.op == "call_function":
        return node.target in functions
    if node.op == "call_method":
        return node.target in methods
    target = module.get_submodule(str(node.target)) if node.op == "call_module" and kind is not None else None
    return target is not None and type(target) is kind and not _has_hooks(target)


def _can_wait(module: fx.GraphModule, layer: fx.Node, user: fx.Node) -> bool:
    """Whether a layer may be computed where its user is: nothing in between may change its input."""
    node = layer.next
    while node is not user:
        if _writes(module, node):
            return False
        node = node.next
    return True


def _writes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operator may change its arguments; yes where that is not known."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        known = isinstance(target, LoweredLayer) or type(target).__module__.startswith("torch.nn.")
        return not known or _is_inplace(target)
    if "out" in node.kwargs or node.kwargs.get("inplace") or True in node.args:
        return True
    unknown = node.op == "call_function" and changes_in_place(str(getattr(node.target, "__name__", "_")))
    return unknown or writes_in_place(node)


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _is_inplace(module: nn.Module) -> bool:
    return bool(vars(module).get("inplace"))
