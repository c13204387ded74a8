"""Executing what does not descend from the input, with every parameter, buffer and mode left as it is."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn

__all__ = ["evaluating_copy", "execute", "writes_in_place"]

_WRITING_FUNCTIONS = (operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv)


def evaluating_copy(module: nn.Module) -> nn.Module:
    """A shallow copy in evaluation mode that shares parameters and buffers: the module's own mode stays."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
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
