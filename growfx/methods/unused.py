"""Warn of options that a method was given and that have no effect where it is used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from growfx.methods.base import Method
from growfx.notices import warn_once
from growfx.options import Unused, given_options, unused_options

__all__ = ["Use", "stages_of", "unused_of", "warn_of_unused"]


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
    tables = [vars(kind).get("unused") for kind in type(use.method).__mro__]
    # A method of others may have an option of that name.
    rows: list[Unused] = [row for table in tables if isinstance(table, tuple) for row in table]
    return unused_options(given_options(use.method), rows, use)


def stages_of(method: Any) -> tuple[str, ...] | None:
    """Return the kinds of the stages that a run of a method may have; None where they are not known.

    They are not where a class chooses stages (`next_stage`) and does not say which: those of the class it is derived
    from may be others.
    """
    for kind in type(method).__mro__ if isinstance(method, Method) else ():
        if "stages" in vars(kind):
            stages = vars(kind)["stages"]
            return stages if isinstance(stages, tuple) else None  # an option of that name, of a method of others
        if "next_stage" in vars(kind):
            return None
    return None


def warn_of_unused(use: Use) -> None:
    """Warn of each option of the method that was given and has no effect."""
    for message in dict.fromkeys(unused_of(use).values()):
        warn_once(message, [])
