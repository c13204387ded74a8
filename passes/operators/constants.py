"""Executing what does not descend from the input, with every parameter, buffer and mode left unchanged."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

__all__ = ["evaluating_copy", "execute"]


def evaluating_copy(module: nn.Module) -> nn.Module:
    """A shallow copy in evaluation mode that shares parameters and buffers: the module's own mode stays."""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_modules"] = {
        name: None if child is None else evaluating_copy(child) for name, child in module._modules.items()
    }
    twin.__dict__["training"] = False
    return twin


def execute(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function or method node on constants."""
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
