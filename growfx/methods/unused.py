"""Warn of options that a method was given and that have no effect where it is used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from growfx.methods.base import Method
from growfx.notices import warn_once
from growfx.options import Unused, given_options, unused_options

__all__ = ["Use", "unused_of", "warn_of_unused"]


@dataclass(frozen=True)
class Use:
    """Where a method is used: what the rows of its `unused` are asked about.

    Attributes:
        method: with its options.
        total_steps: optimizer steps of the training; None where that is not known yet.
        own_loop: whether the user attaches it, and not `growfx.train`.
    """

    method: Any
    total_steps: int | None = None
    own_loop: bool = False


def unused_of(use: Use) -> dict[str, str]:
    """Return a message for each option of the method that was given and has no effect; none for one of others."""
    if not (isinstance(use.method, Method) and dataclasses.is_dataclass(use.method)):
        return {}
    rows: list[Unused] = [row for kind in type(use.method).__mro__ for row in vars(kind).get("unused", ())]
    return unused_options(given_options(use.method), rows, use)


def warn_of_unused(use: Use) -> None:
    """Warn of each option of the method that was given and has no effect."""
    for message in dict.fromkeys(unused_of(use).values()):
        warn_once(message, [])
