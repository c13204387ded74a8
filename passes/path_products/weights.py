"""Layers' weights that the graph uses itself, rather than through their modules, after whatever it does to them.

What is moved are still the layer's edges. What is changed elementwise (standardised, normalised, scaled, rounded) are
edges of the magnitudes that are applied in the end. What is joined, added, multiplied with other weights, or summarised
keeps the edges of all of them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from growfx.passes.operators.constants import execute
from growfx.passes.operators.names import is_moving, operator_name
from growfx.passes.operators.nests import leaves, map_leaves
from growfx.passes.path_products.rules.table import node_rule
from growfx.passes.path_products.run import PathRun
from growfx.passes.path_products.values import Combined, Learned, NoPathRuleError, PathValue, Weight, is_tensor, raw

__all__ = ["CONTRACTIONS", "changed_weights"]

_TIMES = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "__mul__", "__rmul__", "multiply"}
_LAYERS = {
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.conv_transpose1d, torch.conv_transpose2d,
    torch.conv_transpose3d,
}  # fmt: skip
CONTRACTIONS = {
    operator.matmul, torch.matmul, torch.mm, torch.bmm, "matmul", "mm", "bmm", "__matmul__", "__rmatmul__",
    torch.einsum, torch.functional.einsum, *_LAYERS,
}  # fmt: skip
_TURNS = ("T", "mT", "H", "mH")


def changed_weights(run: PathRun, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a node without path values that weights of layers go into.

    Args:
        run: the run of the path graph.
        node: a call of a function or method.
        args: its arguments; weights as `Weight` or `Combined`.
        kwargs: its keyword arguments.

    Returns:
        The result; what is, or is made of, edges of layers as a `Weight` or `Combined`.
    """
    weights = [item for item in leaves((args, kwargs)) if isinstance(item, (Weight, Combined))]
    result = execute(node, raw(args), raw(kwargs))
    if not any(isinstance(item, Tensor) and item.is_floating_point() for item in leaves(result)):
        return result  # a shape, or what is decided by the weight
    first, target = weights[0], operator_name(node.target)
    leads = bool(args) and args[0] is first
    if len(weights) == 1:
        if leads and (is_moving(node.op, node.target) or (target is getattr and args[1] in _TURNS)):
            return _moved(node, first, args, kwargs, result)
        if target in _LAYERS and not leads:  # fed by a constant
            run.constant_fed.update(_layers(first))
            return Learned(result)
    several = len({name for item in weights for name in _layers(item)}) > 1
    own = next((item for item in weights if isinstance(item, Weight)), None)
    changed = None if own is None or several or target in CONTRACTIONS else _applied(run, own, result)
    if changed is not None and target in _TIMES and len(weights) == 1:
        return _where_multiplied(changed, next((item for item in args if is_tensor(item) and item is not own), None))
    return _combined(node, weights, args, kwargs, result) if changed is None else changed


def _layers(item: Weight | Combined) -> tuple[str, ...]:
    return (item.layer,) if isinstance(item, Weight) else item.layers


def _moved(node: fx.Node, weight: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Data movement is repeated on the magnitudes; of chunk, split and unbind every piece is a part of the weight."""
    rest, options = raw(args[1:]), raw(kwargs)

    def step(tensor: Tensor) -> Any:
        moved = execute(node, (tensor, *rest), options)
        # Casts among the moves do not change the type of magnitudes.
        return map_leaves(lambda item: item.to(tensor.dtype) if isinstance(item, Tensor) else item, moved)

    if isinstance(result, Tensor):
        return _followed(weight, result, lambda run, tensor: step(tensor), pure=step)

    def piece(position: int) -> Weight | Combined:
        def take(tensor: Tensor) -> Tensor:
            return step(tensor)[position]

        return _followed(weight, result[position], lambda run, tensor: take(tensor), pure=take)

    return tuple(piece(position) for position in range(len(result)))


def _followed(
    weight: Weight | Combined,
    result: Tensor,
    step: Callable[[PathRun, Tensor], Tensor],
    pure: Callable[[Tensor], Tensor] | None = None,
) -> Weight | Combined:
    """The weight after one more step on its magnitudes; `pure` where it only moves elements."""
    if isinstance(weight, Combined):
        before = weight.size
        return Combined(result, weight.layers, lambda run: step(run, before(run)))
    shifts = weight.shifts if pure is None else (*weight.shifts, pure)
    return Weight(weight.layer, result, weight.applied, (*weight.steps, step), shifts)


def _applied(run: PathRun, weight: Weight, result: Any) -> Weight | None:
    """A weight changed elementwise: edges of the resulting magnitudes. None where that cannot be said."""
    if not isinstance(result, Tensor) or result.shape != weight.tensor.shape:
        return None
    if not weight.shifts:
        return Weight(weight.layer, result, result)
    shape = run.layers[weight.layer].parameter.shape
    places = torch.arange(shape.numel(), device=result.device).reshape(shape)
    for move in weight.shifts:
        places = move(places)
    if places.numel() != shape.numel() or places.unique().numel() != shape.numel():
        return None
    own = torch.empty(shape.numel(), dtype=result.dtype, device=result.device)
    own[places.flatten()] = result.flatten()
    steps = tuple((lambda run, tensor, move=move: move(tensor)) for move in weight.shifts)
    return Weight(weight.layer, result, own.reshape(shape), steps, weight.shifts)


def _where_multiplied(weight: Weight, factor: Any) -> Weight:
    """A factor of zero takes edges out (masks of the model's own): they score zero, present or absent."""
    table = raw(factor)
    if not isinstance(table, Tensor) or bool((table != 0).all()):
        return weight
    there = (table != 0).double()
    return Weight(
        weight.layer, weight.tensor, weight.applied, (*weight.steps, lambda run, size: size * there), weight.shifts
    )


def _combined(node: fx.Node, weights: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """Weights in series are multiplied; for all else the magnitudes follow the operator's path rule."""
    names = tuple(dict.fromkeys(name for item in weights for name in _layers(item)))
    target = operator_name(node.target)
    series = target in _TIMES | CONTRACTIONS
    rule = node_rule(node)
    if not series and rule is None:
        raise NoPathRuleError(f"the weight of layer `{names[0]}` is transformed in a way that hides its edges")

    def sizes(run: PathRun, item: Any) -> Any:
        if isinstance(item, (Weight, Combined)):
            size = run.matrix(item)
            return size if series else PathValue(size)
        counts = series and is_tensor(item) and raw(item).is_floating_point()
        return run.magnitude(item) if counts else item

    def outcome(run: PathRun) -> Any:
        given, options = (map_leaves(lambda item: sizes(run, item), nest) for nest in (args, kwargs))
        if series:
            return execute(node, given, options)
        assert rule is not None
        return raw(rule(run, *given, **options))

    if isinstance(result, Tensor):
        return Combined(result, names, outcome)
    return tuple(
        Combined(item, names, lambda run, at=position: outcome(run)[at]) if item.is_floating_point() else item
        for position, item in enumerate(result)
    )
