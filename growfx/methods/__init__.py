"""Methods by name: `create("pwmpr", growth_ratio=1.3)`.

A method's options are the init fields of its frozen dataclass; their ranges stand beside them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

from growfx.errors import ConfigError
from growfx.methods.base import Method
from growfx.methods.pwmpr import PWMPR
from growfx.methods.static import Static

__all__ = ["Method", "create", "names"]

_METHODS: Final[Mapping[str, type[Method]]] = {kind.name: kind for kind in (PWMPR, Static)}


def names() -> list[str]:
    """Return the names that `create` knows."""
    return sorted(_METHODS)


def create(name: str, **options: Any) -> Method:
    """Return the method `name`, not yet attached, with `options` over its defaults.

    Raises `ConfigError` for an unknown method or option (naming the allowed ones) or a value out of its
    range.
    """
    if name not in _METHODS:
        allowed = ", ".join(f"`{known}`" for known in names())
        raise ConfigError(f"method `{name}` is unknown; allowed: {allowed}")
    kind: Any = _METHODS[name]
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
