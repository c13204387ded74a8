"""What a forward pass of a stored network costs, as the manifest keeps it. Needs no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["StoredCost", "cost_complaint"]


@dataclass(frozen=True)
class StoredCost:
    """Multiply-accumulates of one sample's forward pass when the network was saved.

    `layers`: (dense, under the mask) by masked layer. `rest`: of everything that no mask touches.
    """

    layers: Mapping[str, tuple[float, float]]
    rest: float

    def totals(self) -> tuple[float, float]:
        """Those of all masked layers together, dense and under the masks."""
        dense, sparse = zip(*self.layers.values(), strict=True) if self.layers else ((), ())
        return sum(dense), sum(sparse)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values as `Cost.to_json` gives them, sums over the network included."""
        dense, sparse = self.totals()
        layers = {name: {"dense": pair[0], "sparse": pair[1]} for name, pair in self.layers.items()}
        return {"layers": layers, "rest": self.rest, "dense": dense + self.rest, "sparse": sparse + self.rest}

    def to_json(self) -> dict[str, Any]:
        """As in the manifest."""
        return {"layers": {name: list(pair) for name, pair in self.layers.items()}, "rest": self.rest}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], order: Collection[str]) -> StoredCost:
        """Read one in which `cost_complaint` found nothing wrong; layers in the given order."""
        layers = entry["layers"]
        return cls({name: (float(layers[name][0]), float(layers[name][1])) for name in order}, float(entry["rest"]))


def cost_complaint(entry: object, names: Collection[str]) -> str | None:
    """What is wrong with a cost as JSON, of a network with the masked layers `names`; None where nothing is."""
    if not isinstance(entry, dict) or entry.keys() != {"layers", "rest"} or not isinstance(entry["layers"], dict):
        return "it does not have the parts `layers` and `rest`"
    if entry["layers"].keys() != set(names):
        return "its layers are not the masked layers"
    if not _is_count(entry["rest"]):
        return "its rest is not a number from 0 up"
    for name, pair in entry["layers"].items():
        if not isinstance(pair, list) or len(pair) != 2 or not all(map(_is_count, pair)) or pair[1] > pair[0]:
            return f"that of `{name}` is not a dense number and a sparse one, no larger"
    return None


def _is_count(value: object) -> bool:
    """Whether `value` is a finite number from 0 up."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return 0 <= value < 1e30  # not true of NaN
