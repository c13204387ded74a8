"""The integers in which a model's own modules state how wide something in them is, beside those of its layers.

Models keep such numbers (the width before a head, the channels of the stages that features are taken from) for what
is built later: a new head, a decoder. A model that was made smaller states what is there now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from growfx.compaction.plan import Widths, damaged_plan

__all__ = ["check_heads", "check_widths", "state_widths", "stated_heads", "stated_widths"]

_WIDTHS = {"features", "channels", "channel", "chs", "chans", "planes", "inplanes", "hidden", "embed", "dim", "width"}
# Parts of a width that attention or a norm splits, and numbers of other things.
_OTHERS = {"head", "heads", "key", "qk", "value", "group", "groups", "class", "classes", "ratio"}
# In the names of numbers of heads, and of what all heads of an attention are wide together.
_HEADS = {"head", "heads", "nhead", "nheads"}
_ALL_HEADS = {*_HEADS, "attn", "attention", "inner", "hidden", "all"}


def stated_widths(module: nn.Module) -> Iterator[tuple[str, int, str]]:
    """The widths that one module states in its own attributes, without those of the modules in it.

    Yields:
        Where the number stands (``attribute``, or ``attribute.index.key`` in a list of descriptions), the number, and
        the name, relative to `module`, of the module whose width it is; "" where nothing says.
    """
    for attribute, value in vars(module).items():
        if _is_width(attribute, value):
            yield attribute, value, ""
        if not isinstance(value, list) or not value or "." in attribute:
            continue
        for index, entry in enumerate(value):
            if isinstance(entry, dict) and isinstance(entry.get("module"), str) and entry["module"]:
                for key, number in entry.items():
                    if isinstance(key, str) and "." not in key and _is_width(key, number):
                        yield f"{attribute}.{index}.{key}", number, entry["module"]


def _is_width(name: str, value: object) -> bool:
    words = {*name.lower().split("_")}
    named = bool(words & _WIDTHS) and ("hidden" in words or not words & _OTHERS)
    return named and type(value) is int and value > 1


def stated_heads(module: nn.Module, heads: int, width: int) -> dict[str, int]:
    """The attributes of a module that state how many heads it has, or how wide they are together.

    Args:
        module: what holds the layers of an attention.
        heads: how many heads there are.
        width: features of all of them.

    Returns:
        Attribute -> 1 for a number of heads, or the features of one head.
    """
    found: dict[str, int] = {}
    for attribute, value in vars(module).items():
        words = {*attribute.lower().split("_")}
        if type(value) is not int or value < 2:
            continue
        if value == heads and words & _HEADS:
            found[attribute] = 1
        elif value == width and words & _ALL_HEADS:
            found[attribute] = width // heads
    return found


def check_heads(modules: Mapping[str, nn.Module | None], heads: Widths) -> None:
    """Check that the model states these numbers of heads, and that they shrink.

    Raises:
        ArtifactError: a module is not there, states no such number, or a smaller one.
    """
    for name, numbers in heads.items():
        module = modules.get(name)
        if module is None:
            raise damaged_plan(f"the model has no module `{name}`")
        for attribute, number in numbers.items():
            value = vars(module).get(attribute)
            named = bool({*attribute.lower().split("_")} & _ALL_HEADS)
            if not named or type(value) is not int or number > value:
                raise damaged_plan(f"`{name}` states no number of heads `{attribute}` that could become {number}")


def state_widths(model: nn.Module, widths: Widths) -> nn.Module:
    """Write widths where `model` states them, in place; lists are replaced, not written into. Returns the model."""
    for name, numbers in widths.items():
        module = model.get_submodule(name)
        for where, number in numbers.items():
            attribute, *inside = where.split(".")
            if not inside:
                setattr(module, attribute, number)
                continue
            entries: list[Any] = [*getattr(module, attribute)]
            entries[int(inside[0])] = {**entries[int(inside[0])], inside[1]: number}
            setattr(module, attribute, entries)
    return model


def check_widths(modules: Mapping[str, nn.Module | None], widths: Widths) -> None:
    """Check that the model states these widths, and that they shrink.

    Raises:
        ArtifactError: a module is not there, states no such width, or a smaller one.
    """
    for name, numbers in widths.items():
        module = modules.get(name)
        if module is None:
            raise damaged_plan(f"the model has no module `{name}`")
        known = {where: number for where, number, _ in stated_widths(module)}
        for where, number in numbers.items():
            if number > known.get(where, 0):
                raise damaged_plan(f"`{name}` states no width `{where}` that could become {number}")
