"""What may leave a network: options of plans of whole units, and how they are written as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from growfx.errors import ConfigError

__all__ = ["PlanOptions", "read_floors", "read_patterns"]


@dataclass(frozen=True)
class PlanOptions:
    """What may leave.

    Attributes:
        floor: the fraction of every family of units that stays at least, and one unit.
        floors: glob pattern of layer names -> the fraction for their units instead; the largest that matches counts.
        round_to: layers that lose units keep a multiple of this many.
        exclude: glob patterns of layers that keep all of their output units.
    """

    floor: float = 0.1
    floors: Mapping[str, float] = field(default_factory=dict)
    round_to: int = 1
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("floor", self.floor), *((f"floors[{key!r}]", v) for key, v in self.floors.items())):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"`{name}` is {value!r}; allowed are fractions in [0, 1]")
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise ConfigError(f"`round_to` is {self.round_to!r}; allowed are whole numbers from 1 up")


def read_floors(text: str) -> dict[str, float]:
    """Read ``PATTERN=FRACTION,...``.

    Raises:
        ConfigError: it has another form.
    """
    floors: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        pattern, equals, number = part.rpartition("=")
        try:
            floors[pattern] = float(number)
        except ValueError:
            equals = ""
        if not equals or not pattern:
            raise ConfigError(f"`floors` expects PATTERN=FRACTION between commas, got `{part}`")
    return floors


def read_patterns(text: str) -> tuple[str, ...]:
    """Read glob patterns between commas."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))
