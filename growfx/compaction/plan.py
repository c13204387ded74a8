"""Which units of a model are left out, as plain data; `growfx.compaction` leaves them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from growfx.errors import ArtifactError

__all__ = ["CompactionPlan", "Spans", "Widths", "damaged_plan"]

Spans = tuple[tuple[int, int], ...]
Widths = Mapping[str, Mapping[str, int]]

# A stored plan lists no more spans than this; a model of a million units needs fewer.
_MAX_SPANS = 1 << 22

_OPTIONAL = ("blocks", "norms", "left_out", "widths", "heads")


@dataclass(frozen=True)
class CompactionPlan:
    """What stays of a model.

    Attributes:
        tensors: parameter or buffer -> axis -> the indices that stay, as ascending half-open spans ``(start, stop)``.
        modules: module -> integer attribute -> its new value (`in_channels`, `out_features`, `groups`, ...).
        biases: layers without a bias that get one, for the constants of units that are left out.
        blocks: weight of a grouped convolution -> the channels that stay along its second axis (inputs, or outputs of
            a transposed convolution), numbered over all groups: each group may keep others, of equal number.
        norms: batch norms that the layers before them took over; what else is in them stays, in their place.
        left_out: modules that evaluation never runs; the model has None in their places.
        widths: module -> where it states its own width (`num_features`, `feature_info.0.num_chs`) -> the new one.
        heads: module -> attribute that says how many heads of an attention there are, or how wide all of them are
            together (`num_heads`, `attn_dim`) -> the new number, which its code splits features by.
    """

    tensors: Mapping[str, Mapping[int, Spans]] = field(default_factory=dict)
    modules: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    blocks: Mapping[str, Spans] = field(default_factory=dict)
    norms: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    widths: Widths = field(default_factory=dict)
    heads: Widths = field(default_factory=dict)

    def __bool__(self) -> bool:
        sizes = self.tensors or self.modules or self.blocks or self.widths or self.heads
        return bool(sizes or self.biases or self.norms or self.left_out)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        blocks = {name: [list(span) for span in kept] for name, kept in self.blocks.items()}
        return {
            **({"blocks": blocks} if blocks else {}),
            **({"norms": list(self.norms)} if self.norms else {}),
            **({"left_out": list(self.left_out)} if self.left_out else {}),
            **({"widths": {name: dict(numbers) for name, numbers in self.widths.items()}} if self.widths else {}),
            **({"heads": {name: dict(numbers) for name, numbers in self.heads.items()}} if self.heads else {}),
            "biases": list(self.biases),
            "modules": {name: dict(sizes) for name, sizes in self.modules.items()},
            "tensors": {
                name: {str(axis): [list(span) for span in kept] for axis, kept in axes.items()}
                for name, axes in self.tensors.items()
            },
        }

    @classmethod
    def from_json(cls, value: object) -> CompactionPlan:
        """Read a plan.

        Raises:
            ArtifactError: it has another form.
        """
        if not isinstance(value, dict) or value.keys() - {*_OPTIONAL} != {"biases", "modules", "tensors"}:
            more = ", ".join(f"`{field}`" for field in _OPTIONAL)
            raise damaged_plan(f"a plan has the fields `biases`, `modules`, `tensors`, and at most {more} beside them")
        biases, norms, left_out = (_names(key, value.get(key, [])) for key in ("biases", "norms", "left_out"))
        modules, tensors, blocks = value["modules"], value["tensors"], value.get("blocks", {})
        widths, heads = value.get("widths", {}), value.get("heads", {})
        for key, part in (("modules", modules), ("tensors", tensors), ("widths", widths), ("heads", heads)):
            if not isinstance(part, dict) or not all(isinstance(inner, dict) for inner in part.values()):
                raise damaged_plan(f"`{key}` is not an object of objects")
        if not isinstance(blocks, dict):
            raise damaged_plan("`blocks` is not an object")
        for name, sizes in (*modules.items(), *widths.items(), *heads.items()):
            if not all(_is_count(size) for size in sizes.values()):
                raise damaged_plan(f"`{name}` has a size that is not a positive integer")
        read = {
            name: {_axis(name, axis): _spans(name, kept) for axis, kept in axes.items()}
            for name, axes in tensors.items()
        }
        grouped = {name: _spans(name, kept) for name, kept in blocks.items()}
        every = [kept for axes in read.values() for kept in axes.values()]
        if sum(map(len, (*every, *grouped.values()))) > _MAX_SPANS:
            raise damaged_plan(f"it has more than {_MAX_SPANS} spans")
        sizes, stated, split = (
            {name: dict(inner) for name, inner in part.items()} for part in (modules, widths, heads)
        )
        return cls(read, sizes, biases, grouped, norms, left_out, stated, split)


def damaged_plan(what: str) -> ArtifactError:
    """Return the error of a plan that cannot be right."""
    return ArtifactError(f"the artifact is damaged: its compaction plan: {what}")


def _names(key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise damaged_plan(f"`{key}` is not a list of names")
    if len({*value}) < len(value):
        raise damaged_plan(f"`{key}` has a name twice")
    return tuple(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31


def _axis(name: str, axis: object) -> int:
    if axis not in ("0", "1", "2", "3", "4", "5"):
        raise damaged_plan(f"`{name}` has no axis `{axis}`")
    return int(axis)


def _spans(name: str, kept: object) -> Spans:
    if not isinstance(kept, list) or not kept:
        raise damaged_plan(f"`{name}` keeps no index along an axis")
    last = -1
    for span in kept:
        good = isinstance(span, list) and len(span) == 2
        if not good or not all(isinstance(i, int) and not isinstance(i, bool) for i in span):
            raise damaged_plan(f"`{name}` has a span that is not a pair of integers")
        if not last < span[0] < span[1]:
            raise damaged_plan(f"the spans of `{name}` do not ascend")
        last = span[1]
    return tuple((start, stop) for start, stop in kept)
