"""Executing what does not descend from the input, with every parameter, buffer and mode left as it is."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from growfx.passes.path_rules import is_moving
from growfx.passes.path_values import NoPathRuleError, Weight, raw

__all__ = ["changed_weight", "evaluating_copy", "execute", "writes_in_place"]

_WRITING_FUNCTIONS = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)


def evaluating_copy(module: nn.Module) -> nn.Module:
    """A shallow copy in evaluation mode that shares parameters and buffers: the module's own mode stays."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: None if child is None else evaluating_copy(child) for name, child in module._modules.items()
    }
    twin.__dict__["training"] = False
    return twin


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node changes a tensor that was there before."""
    if node.op == "call_function":
        return node.target in _WRITING_FUNCTIONS
    name = str(node.target)
    return node.op == "call_method" and name.endswith("_") and not name.startswith("__")


def execute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function or method node on constants."""
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)


def changed_weight(
    node: fx.Node, weight: Weight, args: tuple[Any, ...], kwargs: dict[str, Any], shape: torch.Size
) -> Any:
    """A layer's weight moved or transformed by the graph before use: still the layer's weight where that is clear."""
    rest = raw(args[1:])
    options = raw(kwargs)

    def step(tensor: Tensor) -> Any:
        return execute(node, (tensor, *rest), options)

    result = step(weight.tensor)
    moving = is_moving(node.op, node.target)
    if moving and isinstance(result, (tuple, list)):  # chunk, split, unbind: every piece is a part of the weight
        pieces = (_as_float64(lambda tensor, i=i: step(tensor)[i]) for i in range(len(result)))
        return tuple(
            Weight(weight.layer, piece, weight.applied, (*weight.moves, move))
            for piece, move in zip(result, pieces, strict=True)
        )
    if not isinstance(result, Tensor):
        return result
    if moving:
        return Weight(weight.layer, result, weight.applied, (*weight.moves, _as_float64(step)))
    if not weight.moves and result.shape == shape:
        return Weight(weight.layer, result, result)
    raise NoPathRuleError(f"the weight of layer `{weight.layer}` is transformed in a way that hides its edges")


def _as_float64(step: Any) -> Any:
    """A move repeated on magnitudes; casts among the moves do not change their type."""

    def moved(tensor: Tensor) -> Tensor:
        return step(tensor).to(torch.float64)

    return moved
