"""Leave the outputs of linear layers as their kernels lay them out, all rows of a feature one after another.

Where nothing but pointwise functions lies between a linear layer and the next ones, what comes between stays in that
layout too, and none of it is turned to torch's and back. Which layers these are the recorded graph says; what the
model does otherwise finds torch's layout, made when it is asked for.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

__all__ = ["InnerRows", "rows_are_inner", "rows_kept"]

# What computes each value from values at the same place alone.
_MODULES = {
    *(nn.GELU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Identity),
}
_FUNCTIONS: set[Any] = {
    *(F.gelu, F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.silu, F.mish, F.softplus, F.sigmoid, F.tanh),
    *(F.hardswish, F.hardsigmoid, F.hardtanh, torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.square),
    *(torch.add, torch.mul),
}
_METHODS = ("relu", "relu_", "sigmoid", "tanh", "square", "add", "add_", "mul", "mul_")
_OPERATORS = ("__add__", "__iadd__", "__radd__", "__mul__", "__imul__", "__rmul__")
_IN_GRAPHS: set[Any] = {*_FUNCTIONS, *_METHODS, operator.add, operator.iadd, operator.mul, operator.imul}
_TOLD = ("requires_grad", "is_cpu", "is_meta", "is_leaf", "layout")  # by properties, without values
_CALLED: set[Any] = {
    *_FUNCTIONS,
    *(getattr(torch.Tensor, name) for name in (*_METHODS, *_OPERATORS)),
    *(getattr(torch.Tensor, name).__get__ for name in _TOLD),
}


def rows_are_inner(x: Tensor) -> bool:
    """Whether a tensor (..., C) lies with all rows of a feature one after another."""
    rows = 1
    for size, stride in zip(x.shape[-2::-1], x.stride()[-2::-1], strict=True):
        if stride != rows:
            return False
        rows *= size
    return x.dim() > 1 and rows > 1 and x.shape[-1] > 1 and x.stride(-1) >= rows


def rows_kept(graph: fx.Graph, root: nn.Module, layers: Container[str]) -> dict[str, frozenset[str]]:
    """Linear layers whose outputs nothing reads but pointwise functions on the way to further linear layers: to which.

    Args:
        graph: recorded from `root`.
        root: the model.
        layers: names of the linear layers that have kernels.
    """
    modules = dict(root.named_modules(remove_duplicate=False))

    def is_layer(node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target) in layers

    kept: set[fx.Node] = set()
    for node in graph.nodes:
        if is_layer(node) or (_is_pointwise(node, modules) and kept.issuperset(node.all_input_nodes)):
            kept.add(node)
    lost = kept
    while lost:
        lost = {n for n in kept if not n.users or not all(is_layer(user) or user in kept for user in n.users)}
        kept = kept - lost
    called = [node for node in graph.nodes if is_layer(node)]
    lost = {str(node.target) for node in called if node not in kept}
    found: dict[str, frozenset[str]] = {}
    reached: dict[fx.Node, frozenset[str]] = {}
    for node in reversed(graph.nodes):
        if node in kept:
            ways = (frozenset({str(u.target)}) if is_layer(u) else reached[u] for u in node.users)
            reached[node] = frozenset[str]().union(*ways)
            if is_layer(node) and str(node.target) not in lost:
                found[str(node.target)] = found.get(str(node.target), frozenset()) | reached[node]
    return found


def _is_pointwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        module = modules.get(str(node.target))
        return type(module) in _MODULES or (type(module) is nn.Dropout and module.p == 0)
    return node.op in ("call_function", "call_method") and node.target in _IN_GRAPHS


class InnerRows:
    """The tensors of one call of a network that have their rows innermost: all rows of a feature one after another.

    To turn one is to lay it out in memory as torch does, all features of a row one after another.
    """

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}

    def __bool__(self) -> bool:
        return bool(self._known)

    def add(self, value: Tensor) -> None:
        """Remember a tensor with its rows innermost; it is no view, so that it can be turned."""
        self._known[id(value)] = weakref.ref(value)

    def before(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Turn what `func` is given, unless it is pointwise and takes it with its rows innermost: then True."""
        tensors = _tensors(args, kwargs)
        taken = self._among(tensors)
        if taken and _takes_any_layout(func, args, kwargs) and self._lie_alike(tensors, taken):
            return True
        for value in taken:
            self._turn(value)
        return False

    def after(self, found: Any, *given: Any) -> None:
        """Remember the result of a pointwise function too, where it is a tensor of its own."""
        if isinstance(found, Tensor) and not any(found is value for value in _tensors(*given)):
            self.add(found)

    def finish(self, outputs: Any) -> None:
        """Turn what the network returns."""
        for value in self._among(list(_held(outputs, set()))):
            self._turn(value)
        self._known.clear()

    def _among(self, tensors: list[Tensor]) -> list[Tensor]:
        """Those with their rows innermost."""
        known = [value for value in tensors if id(value) in self._known]
        return [value for value in dict.fromkeys(known) if self._known[id(value)]() is value]

    def _lie_alike(self, tensors: list[Tensor], taken: list[Tensor]) -> bool:
        """Whether the result will have its rows innermost as what is given, and nobody will read it unseen.

        Beside another layout the result's is a mixture. Where gradients are off for a tensor that has one, the forward
        of an autograd function may keep it for its backward pass, which runs when nobody asks any more.
        """
        if not all(value.dim() == 0 or any(value is inner for inner in taken) for value in tensors):
            return False
        return torch.is_grad_enabled() or not any(value.requires_grad for value in taken)

    def _turn(self, value: Tensor) -> None:
        """Turn a tensor, which stays the same tensor to autograd, whatever has read it already."""
        del self._known[id(value)]
        with torch.inference_mode(value.is_inference()):
            value.data = value.detach().contiguous()


def _tensors(*values: Any) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _held(values: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors that an output holds, also where it is an object of a class of its own, such as a dataclass."""
    for value in pytree.tree_leaves(values):
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, (nn.Module, type)):
            seen.add(id(value))
            yield from _held(_attributes(value), seen)


def _attributes(value: Any) -> list[Any]:
    """What an object holds in its dict and in slots."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name) for name in names if hasattr(value, name))]


def _takes_any_layout(func: Any, args: Any, kwargs: Any) -> bool:
    if kwargs.get("out") is not None:
        return False
    if func is F.dropout:  # where it draws, what is drawn would lie otherwise
        probability = args[1] if len(args) > 1 else kwargs.get("p", 0.5)
        return probability == 0
    return func in _CALLED
