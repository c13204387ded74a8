"""The table of path rules: which rule an operator on a path value follows.

Keys are exact: the function object, the name of the tensor method, or the module's class (as a dotted name for classes
and operators of the model libraries, which are not imported here). A class without its own row follows its base
only when it changes nothing but construction and printing. There is no default: an operator without a row is an error.

Rules that do the same to the places of elements are a *family* (`FAMILIES`). By it `connect` finds its own rules, so
that an operator stands in one table only. A rule with parameters is a `partial` of its function.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from growfx.passes.operators.classes import row_of
from growfx.passes.operators.names import is_moving, operator_name
from growfx.passes.path_products.rules import (
    arithmetic,
    attention,
    layers,
    norm,
    products,
    recurrent,
    reduce,
    sampling,
    scatter,
    selection,
    shape,
    spectral,
)

__all__ = [
    "FUNCTIONS",
    "METHODS",
    "MODULES",
    "carries_steps",
    "family_of",
    "function_rule",
    "method_rule",
    "module_rule",
    "node_rule",
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


_FILES = (arithmetic, products, reduce, scatter, selection, shape, spectral)
FUNCTIONS: dict[Any, Rule] = _merged("FUNCTIONS", *_FILES, norm, attention, sampling, recurrent)
METHODS: dict[str, Rule] = _merged("METHODS", *_FILES)
MODULES: dict[Any, Rule] = _merged("MODULES", products, layers, norm, attention, recurrent, sampling)
_FAMILY: dict[Any, str] = {
    rule: family
    for file in (arithmetic, attention, layers, norm, products, reduce, sampling, selection, shape)
    for family, rules in file.FAMILIES.items()
    for rule in rules
}
_SEES_ENDS = selection.SEES_ENDS | sampling.SEES_ENDS | scatter.SEES_ENDS | products.SEES_ENDS

_CONTAINERS = (dict, list, tuple, collections.OrderedDict)
_RATES = {"mean", "sum", torch.mean, torch.sum}


def function_rule(target: Any) -> Rule | None:
    """The rule of a function, or the construction of a container class."""
    rule = FUNCTIONS.get(operator_name(target))
    if rule is None and isinstance(target, type):
        named_tuple = issubclass(target, tuple) and hasattr(target, "_fields")
        if target in _CONTAINERS or is_dataclass(target) or named_tuple:
            return partial(shape.building, target)
    return rule


def method_rule(name: str) -> Rule | None:
    """The rule of a tensor method."""
    return METHODS.get(name)


def node_rule(node: fx.Node) -> Rule | None:
    """The rule of a node that calls a function or method."""
    return function_rule(node.target) if node.op == "call_function" else method_rule(str(node.target))


def module_rule(module: nn.Module) -> Rule | None:
    """The rule of a module's class; a masked twin follows the class it stands for."""
    return row_of(MODULES, getattr(type(module), "twin_of", type(module)))


def family_of(rule: Rule | None) -> str:
    """What operators with a rule do to elements, for passes that ask no more; "" where none does so."""
    return _FAMILY.get(rule.func if isinstance(rule, partial) else rule, "")


def sees_ends(rule: Rule) -> bool:
    """Whether a rule handles compared or selected values specially, not as constants."""
    return rule in _SEES_ENDS


def carries_steps(operation: str, target: Any) -> bool:
    """Whether an operator on spikes gives spikes or their rates: it moves, joins, sums or averages elements."""
    return is_moving(operation, target) or target in _RATES or target in shape.JOINING
