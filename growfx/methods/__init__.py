"""Methods by name: `create("pwmpr", growth_ratio=1.3)`.

A method's options are the init fields of its frozen dataclass; their ranges stand beside them.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Final

from growfx.errors import ConfigError
from growfx.methods.base import Method

__all__ = ["Method", "create", "kind_of", "names"]

# Module and class of each method; a module is imported when its method is first made.
_METHODS: Final[Mapping[str, str]] = {
    "acdc": "acdc:ACDC",
    "continuous": "continuous:Continuous",
    "gmp": "gradual:GMP",
    "gradient-growth": "gradient_growth:GradientGrowth",
    "granet": "gradual:GraNet",
    "grasp": "at_init:GraSP",
    "grow-prune": "grow_prune:GrowPrune",
    "imp": "imp:IMP",
    "mest": "dynamic:MEST",
    "phew": "phew:PHEW",
    "pwmpr": "pwmpr:PWMPR",
    "random-growth": "random_growth:RandomGrowth",
    "rigl": "dynamic:RigL",
    "rigl-sg": "dynamic:RigLSG",
    "rigl-sm": "dynamic:RigLSM",
    "set": "dynamic:SET",
    "small-dense": "small_dense:SmallDense",
    "snfs": "dynamic:SNFS",
    "snip": "at_init:SNIP",
    "static": "static:Static",
    "sup-tickets": "sup_tickets:SupTickets",
    "synflow": "at_init:SynFlow",
    "ticket": "ticket:Ticket",
}


def names() -> list[str]:
    """Return the names that `create` knows."""
    return sorted(_METHODS)


def kind_of(name: str) -> type[Method]:
    """Return the class of the method `name`; `ConfigError` naming the known ones when there is none."""
    if not isinstance(name, str) or name not in _METHODS:
        allowed = ", ".join(f"`{known}`" for known in names())
        raise ConfigError(f"method `{name}` is unknown; allowed: {allowed}")
    module, _, kind = _METHODS[name].partition(":")
    return getattr(importlib.import_module(f"growfx.methods.{module}"), kind)


def create(name: str, **options: Any) -> Method:
    """Return the method `name`, not yet attached, with `options` over its defaults.

    Raises `ConfigError` for an unknown method or option (naming the allowed ones) or a value out of its
    range.
    """
    kind: Any = kind_of(name)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for option in options:
        if option not in fields:
            allowed = ", ".join(_described(field) for field in fields.values())
            raise ConfigError(f"method `{name}` has no option `{option}`; allowed: {allowed}")
    return kind(**options)


def _described(field: dataclasses.Field[Any]) -> str:
    limits = field.metadata
    if limits.get("choices"):
        return f"`{field.name}` ({' | '.join(limits['choices'])})"
    low, high = limits.get("low"), limits.get("high")
    if low is None and high is None:
        return f"`{field.name}`"
    left = "(-inf" if low is None else f"{'(' if limits['open_low'] else '['}{low}"
    right = "inf)" if high is None else f"{high}{')' if limits['open_high'] else ']'}"
    return f"`{field.name}` in {left}, {right}"
