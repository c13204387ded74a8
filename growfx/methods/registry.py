"""List the methods, and create one from its name and options."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Final

from growfx.errors import ConfigError, did_you_mean
from growfx.methods.base import Method

__all__ = ["create", "kind_of", "names"]

# Module and class of each method; a module is imported when its method is first made.
_METHODS: Final[Mapping[str, str]] = {
    "acdc": "stepwise.acdc:ACDC",
    "channel-growth": "growth.channel_growth:ChannelGrowth",
    "channel-prune": "stepwise.channel_prune:ChannelPrune",
    "continuous": "staged.continuous:Continuous",
    "gmp": "stepwise.gradual:GMP",
    "gradient-growth": "growth.gradient_growth:GradientGrowth",
    "granet": "stepwise.gradual:GraNet",
    "grasp": "stepwise.at_init:GraSP",
    "grow-prune": "growth.grow_prune:GrowPrune",
    "imp": "staged.imp:IMP",
    "mest": "stepwise.dynamic:MEST",
    "phew": "stepwise.phew:PHEW",
    "pwmpr": "growth.pwmpr:PWMPR",
    "random-growth": "growth.random_growth:RandomGrowth",
    "rigl": "stepwise.dynamic:RigL",
    "rigl-sg": "stepwise.dynamic:RigLSG",
    "rigl-sm": "stepwise.dynamic:RigLSM",
    "set": "stepwise.dynamic:SET",
    "small-dense": "stepwise.small_dense:SmallDense",
    "snfs": "stepwise.dynamic:SNFS",
    "snip": "stepwise.at_init:SNIP",
    "static": "stepwise.static:Static",
    "sup-tickets": "staged.sup_tickets:SupTickets",
    "synflow": "stepwise.at_init:SynFlow",
    "ticket": "stepwise.ticket:Ticket",
}


def names() -> list[str]:
    """Return the names that `create` knows.

    Example:
        >>> "pwmpr" in growfx.methods.names()
        True
    """
    return sorted(_METHODS)


def kind_of(name: str) -> type[Method]:
    """Return the class of the method `name`; `ConfigError` naming the known ones when there is none.

    Example:
        >>> growfx.methods.kind_of("rigl").__name__
        'RigL'
    """
    if not isinstance(name, str) or name not in _METHODS:
        allowed = ", ".join(f"`{known}`" for known in names())
        raise ConfigError(f"method `{name}` is unknown; allowed: {allowed}{did_you_mean(name, _METHODS)}")
    module, _, kind = _METHODS[name].partition(":")
    return getattr(importlib.import_module(f"growfx.methods.{module}"), kind)


def create(name: str, **options: Any) -> Method:
    """Return the method `name`, not yet attached, with `options` over its defaults.

    Raises `ConfigError` for an unknown method or option (naming the allowed ones) or a value out of its
    range.

    Example:
        >>> growfx.methods.create("static", density=0.2, distribution="uniform")
        Static(init='dense', sign_in=0, seed=0, density=0.2, masks='drawn', distribution='uniform')
    """
    kind: Any = kind_of(name)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for option in options:
        if option not in fields:
            allowed = ", ".join(_described(field) for field in fields.values())
            hint = did_you_mean(option, fields)
            raise ConfigError(f"method `{name}` has no option `{option}`; allowed: {allowed}{hint}")
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
