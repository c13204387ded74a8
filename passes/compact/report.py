"""What compaction did to each layer, and why dead units stayed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["CompactionReport", "LayerChange"]

_SHOWN = 2


@dataclass(frozen=True)
class LayerChange:
    """One layer: output units before and after, how many of those that stayed are dead, and why they stayed."""

    layer: str
    before: int
    after: int
    dead: int
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class CompactionReport:
    """What compaction did; prints as a table of the layers with dead units.

    Attributes:
        layers: all layers in data-flow order.
        parameters: number of parameters of the dense model before and after.
        largest_error: of the outputs, over the largest output, in the model's own precision.
        checked: shapes of the inputs that outputs were compared on.
        left_out: modules that evaluation never runs, and that are gone.
        unread: module that evaluation never runs, and that stayed -> why.
        refusal: why the network was left whole; "" when it was worked on.
    """

    layers: tuple[LayerChange, ...]
    parameters: tuple[int, int]
    largest_error: float
    checked: tuple[tuple[int, ...], ...]
    refusal: str = ""
    left_out: tuple[str, ...] = ()
    unread: Mapping[str, str] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """Units that left, over all layers."""
        return sum(change.before - change.after for change in self.layers)

    @property
    def kept(self) -> dict[str, tuple[str, ...]]:
        """Layer -> why dead units of it stayed; layers without such units are left out."""
        return {change.layer: change.reasons for change in self.layers if change.reasons}

    def __str__(self) -> str:
        if self.refusal:
            return f"left whole: {self.refusal}"
        shown = [change for change in self.layers if change.before > change.after or change.dead]
        units = sum(change.before for change in self.layers)
        last = (
            f"{self.removed} of {units} units left out; {self.parameters[0]} parameters before, "
            f"{self.parameters[1]} after; largest error {self.largest_error:.1e} of the outputs on inputs of "
            f"{', '.join('x'.join(map(str, shape)) for shape in dict.fromkeys(self.checked))}"
        )
        notes = [f"`{name}` is left out: evaluation never runs it" for name in self.left_out]
        notes += [f"`{name}` stays, though evaluation did not run it: {why}" for name, why in self.unread.items()]
        last = "\n".join([*notes, last])
        if not shown and self.left_out:
            return last
        if not shown:
            return f"nothing to leave out: every unit is on a path from input to output\n{last}"
        rows = [("layer", "units", "after", "dead, kept", "because"), *map(_row, shown)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, last])


def _row(change: LayerChange) -> tuple[str, ...]:
    reasons = "; ".join(change.reasons[:_SHOWN])
    more = len(change.reasons) - _SHOWN
    reasons += f"; and {more} more" if more > 0 else ""
    return change.layer, str(change.before), str(change.after), str(change.dead or ""), reasons
