"""Where units begin and where they cannot be followed: inputs, embeddings, constants, and what data selects."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from growfx.masked.layers import MaskedLayer
from growfx.passes.connect.run import UnitRun
from growfx.passes.connect.signals import MIX, UNIT, filled, narrowed, numbers, tidy
from growfx.passes.connect.values import Ids, Token, Unknown, WeightPart
from growfx.passes.operators.nests import leaves, map_leaves

__all__ = ["begin", "begin_behind", "lose", "pin_layers", "selects", "source"]

_MIDDLE = (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d)
_BY_INDEX = frozenset(
    {"getitem", "__getitem__", "gather", "index_select", "take", "take_along_dim", "masked_select", "repeat_interleave"}
)
_FILLING = frozenset({"where", "masked_fill", "masked_fill_"})


def begin(run: UnitRun, node: fx.Node, value: Any) -> Any:
    """An input: units along the channels of images, the features of all else; batch 1 where it is an argument."""
    alone = isinstance(value, Tensor)

    def start(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        part = item[:1] if alone and item.ndim and not (run.flat and item.is_floating_point()) else item
        if not item.is_floating_point() and not item.is_complex():
            return Token(part) if item.dtype != torch.bool else part
        name = str(node.target)
        name = name if name not in run.inputs else f"{name}.{len(run.inputs)}"
        return source(run, name, part.shape, _axis(run, node, part, alone))

    return map_leaves(start, value)


def begin_behind(run: UnitRun, node: fx.Node, result: Any) -> Any:
    """Units of the data that a node makes of an input's integers: along the same axes as those of an input."""

    def start(item: Any) -> Any:
        if not isinstance(item, Tensor) or not item.is_floating_point():
            return item
        name = node.name if node.name not in run.inputs else f"{node.name}.{len(run.inputs)}"
        return source(run, name, item.shape, _axis(run, node, item, True))

    return map_leaves(start, result)


def _axis(run: UnitRun, node: fx.Node, tensor: Tensor, alone: bool) -> int:
    axes = tensor.ndim if alone else tensor.ndim + 1  # images in a list have no batch axis
    middle = axes > 3 or (axes == 3 and alone and _is_convolved(run, node))
    return (1 if alone else 0) if middle else tensor.ndim - 1


def source(run: UnitRun, name: str, shape: Any, axis: int) -> Ids:
    """Units along one axis where paths begin."""
    if not len(shape):
        units = run.inputs[name] = run.signals.fresh(1, UNIT)
        run.signals.pin(units, "it is an input of the network")
        return Ids(filled(units, ()))
    units = run.inputs[name] = run.signals.fresh(shape[axis], UNIT)
    run.signals.pin(units, "it is an input of the network")
    return Ids(
        tidy(filled(units, [-1 if at == axis % len(shape) else 1 for at in range(len(shape))]).expand(tuple(shape)))
    )


def _is_convolved(run: UnitRun, node: fx.Node) -> bool:
    """Whether the first layer after a three-dimensional input takes its middle axis for channels."""
    modules = (run.net.get_submodule(str(user.target)) for user in node.users if user.op == "call_module")
    return any(isinstance(module, _MIDDLE) for module in modules)


def selects(run: UnitRun, args: Any, kwargs: Any) -> bool:
    """Whether an operator looks at data to decide what it returns, or is given what came of that."""
    items = list(leaves((args, kwargs)))
    if any(isinstance(item, Unknown) for item in items):
        return run.name not in _FILLING or not any(isinstance(item, Ids) for item in items)
    return run.name in _BY_INDEX and any(isinstance(item, Ids) for item in leaves((args[1:], kwargs)))


def lose(run: UnitRun, node: fx.Node, args: Any, kwargs: Any) -> Unknown:
    """What data selects: all units involved stay, and so do those of layers that work on it."""
    for item in leaves((args, kwargs)):
        if isinstance(item, Ids):
            run.signals.pin(numbers(narrowed(item.tensor)), f"data selects among it in {run.place}")
        if isinstance(item, WeightPart):
            run.signals.pin(run.layers[item.layer].units, "it works on what data selects")
    if node.op == "call_module":
        target = str(node.target)
        for name in pin_layers(run, run.net.get_submodule(target), target, "it works on what data selects"):
            layer = run.layers[name]
            run.feeds(name, np.arange(layer.columns), np.repeat(run.signals.fresh(1, MIX), layer.columns))
    return Unknown()


def pin_layers(run: UnitRun, module: nn.Module, target: str, reason: str) -> list[str]:
    """The layers in a module, their units pinned."""
    found = []
    for name, part in module.named_modules(prefix=target):
        if isinstance(part, (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, MaskedLayer)):
            found.append(run.layer_name(part, name))
            run.register(found[-1], part)
            run.signals.pin(run.layers[found[-1]].units, reason)
    return found
