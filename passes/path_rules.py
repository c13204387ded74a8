"""The table of path rules: which rule an operator on a path value follows.

Keys are exact: the function object, the name of the tensor method, or the module's class (as a dotted name for classes
and operators of the model libraries, which are not imported here). A class without a row of its own follows its base
only when it changes nothing but construction and printing. There is no default: an operator without a row is an error.
"""

from __future__ import annotations

import collections
import operator
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import nn

from growfx.layer_classes import row_of
from growfx.passes import (
    path_rules_arithmetic,
    path_rules_attention,
    path_rules_layers,
    path_rules_norm,
    path_rules_products,
    path_rules_recurrent,
    path_rules_reduce,
    path_rules_sampling,
    path_rules_scatter,
    path_rules_selection,
    path_rules_shape,
    path_rules_spectral,
)

__all__ = [
    "APPLIED",
    "FUNCTIONS",
    "METHODS",
    "MODULES",
    "carries_steps",
    "function_rule",
    "is_moving",
    "method_rule",
    "module_rule",
    "operator_name",
    "row_of",
    "sees_ends",
]

Rule = Callable[..., Any]


def _merged(name: str, *sources: Any) -> dict[Any, Any]:
    """One table of all rule files; two rules for one operator are a mistake in this library."""
    table: dict[Any, Any] = {}
    for source in sources:
        rows = getattr(source, name)
        twice = table.keys() & rows.keys()
        assert not twice, f"two path rules for {twice}"
        table.update(rows)
    return table


_FILES = (
    path_rules_arithmetic,
    path_rules_products,
    path_rules_reduce,
    path_rules_scatter,
    path_rules_selection,
    path_rules_shape,
    path_rules_spectral,
)
_FUNCTIONS_ALONE = (path_rules_norm, path_rules_attention, path_rules_sampling, path_rules_recurrent)
FUNCTIONS: dict[Any, Rule] = _merged("FUNCTIONS", *_FILES, *_FUNCTIONS_ALONE)
METHODS: dict[str, Rule] = _merged("METHODS", *_FILES)
MODULES: dict[Any, Rule] = _merged(
    "MODULES",
    path_rules_products,
    path_rules_layers,
    path_rules_norm,
    path_rules_attention,
    path_rules_recurrent,
    path_rules_sampling,
)
APPLIED = path_rules_layers.APPLIED
_SEES_ENDS = (
    path_rules_selection.SEES_ENDS
    | path_rules_sampling.SEES_ENDS
    | path_rules_scatter.SEES_ENDS
    | path_rules_products.SEES_ENDS
)

_CONTAINERS = (dict, list, tuple, collections.OrderedDict)
_CASTS = {"to", "type_as", "float", "double", "contiguous", "clone", "detach", "type"}
_RATES = {"mean", "sum", torch.mean, torch.sum}
_SUMS = {"sum", "cumsum", "nansum", torch.sum, torch.cumsum, torch.nn.functional.fold}


def operator_name(target: Any) -> Any:
    """The key of a function in the table: itself, or the dotted name of an operator that a library registered."""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    return str(target) if isinstance(target, torch._ops.OpOverloadPacket) else target


def function_rule(target: Any) -> Rule | None:
    """The rule of a function, or the construction of a container class."""
    rule = FUNCTIONS.get(operator_name(target))
    if rule is None and isinstance(target, type):
        named_tuple = issubclass(target, tuple) and hasattr(target, "_fields")
        if target in _CONTAINERS or is_dataclass(target) or named_tuple:
            return lambda run, *args, **kwargs: target(*args, **kwargs)
    return rule


def method_rule(name: str) -> Rule | None:
    """The rule of a tensor method."""
    return METHODS.get(name)


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of a module's class; a masked twin follows the class it stands for."""
    return row_of(MODULES, getattr(type(module), "twin_of", type(module)))


def sees_ends(rule: Rule) -> bool:
    """Whether a rule treats what data judged or selected in its own way, not as a constant."""
    return rule in _SEES_ENDS


def carries_steps(operation: str, target: Any) -> bool:
    """Whether an operator on spikes gives spikes or their rates: it moves, joins, sums or averages elements."""
    return is_moving(operation, target) or target in _RATES or target in path_rules_shape.JOINING


def is_moving(operation: str, target: Any) -> bool:
    """Whether an operator only moves elements or changes their type."""
    if operation == "call_method":
        return target in _CASTS or (target in path_rules_shape.MOVING_METHODS and target not in _SUMS)
    return target is operator.getitem or (target in path_rules_shape.MOVING_FUNCTIONS and target not in _SUMS)
