"""Shapes and dtypes of a network's example inputs, as stored in an artifact; independent of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["MOST_INPUTS", "InputSpec", "input_complaint"]

MOST_INPUTS = 64
# Elements of one input; larger ones are not remembered.
_MAX_NUMEL = 1 << 28
_MAX_RANK = 64
_LONGEST_TEXT = 256


@dataclass(frozen=True)
class InputSpec:
    """One argument of a network's forward: a tensor by its dtype and shape, or a plain value.

    Attributes:
        keyword: None for a positional argument.
        dtype: safetensors' name of it; None for a plain value.
        shape: of a tensor.
        value: None, a truth value, a number or a text.
    """

    keyword: str | None
    dtype: str | None = None
    shape: tuple[int, ...] = ()
    value: Any = None

    def to_json(self) -> dict[str, Any]:
        """As in the manifest."""
        if self.dtype is None:
            return {"keyword": self.keyword, "value": self.value}
        return {"dtype": self.dtype, "keyword": self.keyword, "shape": list(self.shape)}

    def __str__(self) -> str:
        name = "" if self.keyword is None else f"{self.keyword}="
        if self.dtype is None:
            return f"{name}{self.value!r}"
        return f"{name}{'x'.join(map(str, self.shape)) or 'scalar'} {self.dtype}"

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> InputSpec:
        """Read one in which `input_complaint` found nothing wrong."""
        if "value" in entry:
            return cls(entry["keyword"], value=entry["value"])
        return cls(entry["keyword"], entry["dtype"], tuple(entry["shape"]))


def input_complaint(entry: object, dtypes: Any) -> str | None:
    """Return what is wrong with an input in JSON form, or None.

    Args:
        entry: what should be one.
        dtypes: the names allowed.
    """
    if not isinstance(entry, dict) or entry.keys() not in ({"keyword", "value"}, {"dtype", "keyword", "shape"}):
        return "it has neither a shape and a dtype nor a value"
    keyword = entry["keyword"]
    named = keyword is None or (isinstance(keyword, str) and keyword.isidentifier() and len(keyword) < _LONGEST_TEXT)
    if not named:
        return "its keyword is not a name"
    if "value" in entry:
        value = entry["value"]
        numeric = isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))
        short = isinstance(value, str) and len(value) < _LONGEST_TEXT
        within = not isinstance(value, int) or abs(value) < 1 << 63
        return None if value is None or short or (numeric and within) else "its value is not a number or a short text"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
        return "its dtype is unknown"
    shape = entry["shape"]
    sizes = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape)
    if not sizes or len(shape) > _MAX_RANK or prod(max(n, 1) for n in shape) > _MAX_NUMEL:
        return "its shape is none that an input can have"
    return None
