"""Shapes and dtypes of a network's example inputs, and what it gave on such, as an artifact stores both.

Independent of torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["MOST_INPUTS", "MOST_SAMPLES", "GivenOutputs", "InputSpec", "input_complaint", "outputs_complaint"]

MOST_INPUTS = 64
# Outputs, and numbers kept of each.
_MOST_OUTPUTS, MOST_SAMPLES = 64, 16
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


@dataclass(frozen=True)
class GivenOutputs:
    """What a network gave on its example inputs when it was saved, so that another network is not taken for it.

    Attributes:
        outputs: of each tensor: its shape, its largest magnitude, and some of its numbers, spread evenly.
        tolerance: as a fraction of that magnitude, how far another machine may be off.
    """

    outputs: tuple[tuple[tuple[int, ...], float, tuple[float, ...]], ...]
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """As in the manifest."""
        listed = [{"largest": top, "samples": list(some), "shape": list(shape)} for shape, top, some in self.outputs]
        return {"tolerance": self.tolerance, "values": listed}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> GivenOutputs:
        """Read one in which `outputs_complaint` found nothing wrong."""
        values = [(tuple(v["shape"]), float(v["largest"]), tuple(map(float, v["samples"]))) for v in entry["values"]]
        return cls(tuple(values), float(entry["tolerance"]))

    def difference(self, other: Sequence[tuple[tuple[int, ...], float, tuple[float, ...]]], tolerance: float) -> str:
        """How the outputs of another network differ; "" where they do not.

        Args:
            other: its outputs, as `outputs`.
            tolerance: of the place where they were computed.
        """
        shapes, found = [shape for shape, _, _ in self.outputs], [shape for shape, _, _ in other]
        if shapes != found:
            return f"outputs of shape {found}, not {shapes}"
        allowed, most = max(tolerance, self.tolerance), 0.0
        for (_, top, some), (_, _, others) in zip(self.outputs, other, strict=True):
            if len(some) != len(others):
                return "outputs that are not finite where they were, or are where they were not"
            scale = top or 1.0
            most = max([most, *(abs(a - b) / scale for a, b in zip(some, others, strict=True))])
        return f"outputs that are up to {most:.1e} of the largest off" if most > allowed else ""


def outputs_complaint(entry: object) -> str | None:
    """Return what is wrong with outputs in JSON form, or None."""
    if not isinstance(entry, dict) or entry.keys() != {"tolerance", "values"} or not _is_number(entry["tolerance"]):
        return "it has not a tolerance and values"
    values = entry["values"]
    if not isinstance(values, list) or not 0 < len(values) <= _MOST_OUTPUTS:
        return f"it is not a list of up to {_MOST_OUTPUTS} outputs"
    for value in values:
        if not isinstance(value, dict) or value.keys() != {"largest", "samples", "shape"}:
            return "an output has not a shape, a largest magnitude and samples"
        shape, samples = value["shape"], value["samples"]
        sizes = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
        if not sizes or len(shape) > _MAX_RANK or not _is_number(value["largest"]):
            return "an output has a shape or a magnitude that none can have"
        if not isinstance(samples, list) or len(samples) > MOST_SAMPLES or not all(map(_is_number, samples)):
            return f"the samples of an output are not up to {MOST_SAMPLES} numbers"
    return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
