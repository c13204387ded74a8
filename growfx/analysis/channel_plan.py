"""Which whole units of a network leave to meet a budget: a plan, as plain facts.

A plan is found by `growfx.plan_channels` and carried out by the method `channel-prune`. It names units by their place
in the layers, so that it fits every network with the layers it was made for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from growfx.analysis.weight_layout import canonical, from_canonical
from growfx.errors import ConfigError

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["KINDS", "Budget", "ChannelPlan", "UnitFamily", "UnitGroup", "unit_masks"]

KINDS: Final = ("params", "flops", "time")
_VERSION: Final = 1
_SHOWN: Final = 3


@dataclass(frozen=True)
class Budget:
    """What a network may cost: a fraction of what the dense network does.

    Attributes:
        kind: "params" (parameters, and the weights of masked layers alone), "flops" (multiply-accumulates of one
            sample's forward pass) or "time" (of that pass on this machine).
        fraction: in (0, 1].
    """

    kind: str
    fraction: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            allowed = ", ".join(f"`{kind}`" for kind in KINDS)
            raise ConfigError(f"`budget` is in `{self.kind}`, which is unknown; allowed: {allowed}")
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"`budget` is {self.kind}={self.fraction:g}; allowed are fractions of the dense network in (0, 1]"
            )

    @classmethod
    def parse(cls, text: object) -> Budget:
        """Read ``KIND=FRACTION``.

        Raises:
            ConfigError: it has another form, an unknown kind or a fraction outside (0, 1].
        """
        if isinstance(text, Budget):
            return text
        kind, equals, number = text.partition("=") if isinstance(text, str) else ("", "", "")
        try:
            fraction = float(number)
        except ValueError:
            fraction = math.nan
        if not equals or math.isnan(fraction):
            kinds = ", ".join(f"`{kind}`" for kind in KINDS)
            raise ConfigError(
                f"`budget` expects KIND=FRACTION, such as `flops=0.5`, with KIND one of {kinds}; got {text!r}"
            )
        return cls(kind.strip(), fraction)

    def __str__(self) -> str:
        return f"{self.kind}={self.fraction:g}"


@dataclass(frozen=True)
class UnitGroup:
    """One group of units that leave together or not at all.

    Attributes:
        layers: layer -> its output units in the group.
        params, macs: what it costs while all others are there: parameters, and multiply-accumulates of one sample.
        gain: what it is worth by the plan's score; None where that was not asked, because it stays anyway.
        kept: whether it stays.
        reason: why it has to; "" where it was free to leave.
    """

    layers: Mapping[str, tuple[int, ...]]
    params: float
    macs: float
    gain: float | None
    kept: bool
    reason: str = ""


@dataclass(frozen=True)
class UnitFamily:
    """Groups of units made by the same layers and read by the same layers: alike in cost, not in gain.

    Attributes:
        outputs: layer -> for every group its output units.
        readers: layer -> how many of its input columns a group feeds.
        params, macs: cost of one group while all others are there.
        gains: of every group; empty where all of them have to stay.
        removed: groups that leave, ascending.
        reason: why all of them have to stay; "" where they are free to leave.
    """

    outputs: Mapping[str, tuple[tuple[int, ...], ...]]
    readers: Mapping[str, int]
    params: float
    macs: float
    gains: tuple[float, ...] = ()
    removed: tuple[int, ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        """The layers it has units in, the first few."""
        names = list(self.outputs)
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        return " + ".join(names[:_SHOWN]) + more

    @property
    def size(self) -> int:
        """How many groups there are."""
        return len(next(iter(self.outputs.values())))

    @property
    def kept(self) -> int:
        """How many of them stay."""
        return self.size - len(self.removed)

    def groups(self) -> Iterator[UnitGroup]:
        """Its groups, in order."""
        gone = set(self.removed)
        for i in range(self.size):
            layers = {name: units[i] for name, units in self.outputs.items()}
            gain = self.gains[i] if self.gains else None
            yield UnitGroup(layers, self.params, self.macs, gain, i not in gone, self.reason)


@dataclass(frozen=True)
class ChannelPlan:
    """Which whole units of a network leave; prints as a table.

    Attributes:
        budget: what was to be met.
        score: what gains are of.
        families: all groups of units, those made and read by the same layers together.
        outputs, columns: layer -> output units and input columns that leave, ascending; layers that lose none are
            left out.
        shapes: of the weights of these layers.
        dense, planned: by kind of cost, what the dense network costs and what the planned one does: `params`, `weights`
            (those of masked layers), `flops` (multiply-accumulates), and `time` (seconds) where that is the budget.
    """

    budget: Budget
    score: str
    families: tuple[UnitFamily, ...]
    outputs: Mapping[str, tuple[int, ...]]
    columns: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    dense: Mapping[str, float]
    planned: Mapping[str, float]
    notes: tuple[str, ...] = field(default=())

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """All groups of units."""
        return tuple(group for family in self.families for group in family.groups())

    @property
    def refused(self) -> dict[str, str]:
        """Family -> why all of its units stay."""
        return {family.name: family.reason for family in self.families if family.reason}

    @property
    def removed(self) -> int:
        """How many groups of units leave."""
        return sum(len(family.removed) for family in self.families)

    def share(self, kind: str) -> float:
        """What the planned network costs over what the dense one does.

        Raises:
            ConfigError: this cost was not counted.
        """
        if kind not in self.dense:
            known = ", ".join(f"`{name}`" for name in self.dense)
            raise ConfigError(f"`{kind}` was not counted for this plan; allowed: {known}")
        return self.planned[kind] / self.dense[kind] if self.dense[kind] else 1.0

    def masks(self, net: MaskedGraph, before: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The masks of the layers that lose units, without the edges of these.

        Args:
            net: a masked network with the layers that the plan is about.
            before: masks to cut instead of those that it has.

        Raises:
            ConfigError: `net` has other layers.
        """
        self.check(net)
        return {
            name: (net.layers[name].mask if before is None else before[name])
            & unit_masks(net.layers[name], self.outputs.get(name, ()), self.columns.get(name, ()))
            for name in self.shapes
        }

    def check(self, net: MaskedGraph) -> None:
        """Raise `ConfigError` unless `net` has the layers that the plan is about."""
        for name, shape in self.shapes.items():
            if name not in net.layers:
                raise ConfigError(
                    f"the plan is of another network: it cuts `{name}`, which is not a masked layer here; plan anew "
                    "with `growfx.plan_channels`"
                )
            own = tuple(net.layers[name].parameter.shape)
            if own != tuple(shape):
                raise ConfigError(
                    f"the plan is of another network: the weight of `{name}` has shape {own} here and {tuple(shape)} "
                    "there; plan anew with `growfx.plan_channels`"
                )

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "version": _VERSION,
            "budget": str(self.budget),
            "score": self.score,
            "dense": dict(self.dense),
            "planned": dict(self.planned),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "outputs": {name: list(units) for name, units in self.outputs.items()},
            "columns": {name: list(columns) for name, columns in self.columns.items()},
            "notes": list(self.notes),
            "families": [
                {
                    "outputs": {name: [list(units) for units in groups] for name, groups in family.outputs.items()},
                    "readers": dict(family.readers),
                    "params": family.params,
                    "macs": family.macs,
                    "gains": list(family.gains),
                    "removed": list(family.removed),
                    "reason": family.reason,
                }
                for family in self.families
            ],
        }

    @classmethod
    def from_json(cls, value: object) -> ChannelPlan:
        """Read what `to_json` gave, as JSON values or as their text.

        Raises:
            ConfigError: it is something else.
        """
        try:
            read: Any = json.loads(value) if isinstance(value, (str, bytes)) else value
            if read["version"] != _VERSION:
                raise ConfigError(
                    f"the plan is of version {read['version']}, which this growfx cannot read; plan anew with "
                    "`growfx.plan_channels`"
                )
            plan = cls(
                budget=Budget.parse(read["budget"]),
                score=str(read["score"]),
                families=tuple(map(_family, read["families"])),
                outputs=_indices(read["outputs"], read["shapes"], 0),
                columns=_indices(read["columns"], read["shapes"], 1),
                shapes={name: tuple(map(int, shape)) for name, shape in read["shapes"].items()},
                dense={kind: float(cost) for kind, cost in read["dense"].items()},
                planned={kind: float(cost) for kind, cost in read["planned"].items()},
                notes=tuple(map(str, read["notes"])),
            )
            _require_agreement(plan)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            raise ConfigError(f"expected a channel plan as `ChannelPlan.to_json` gives it; {reason}") from error
        return plan

    def __str__(self) -> str:
        from tabulate import tabulate

        rows = [
            (
                family.name,
                f"{family.size}",
                f"{family.kept}",
                f"{family.params:,.0f}",
                f"{family.macs:,.0f}",
                f"{_lost(family):.1%}" if family.gains else "",
                family.reason,
            )
            for family in self.families
        ]
        headers = ("units of", "groups", "kept", "params each", "MACs each", "gain lost", "stays because")
        table = tabulate(rows, headers, disable_numparse=True, colalign=("left", *["right"] * 5, "left"))
        shares = ", ".join(f"{kind} {self.share(kind):.1%}" for kind in self.dense)
        return "\n".join([table, *self.notes, f"budget {self.budget}, by {self.score}; of the dense network: {shares}"])


def _lost(family: UnitFamily) -> float:
    total = sum(family.gains)
    return sum(family.gains[i] for i in family.removed) / total if total else 0.0


def _require_agreement(plan: ChannelPlan) -> None:
    """Raise `ValueError` where parts of a plan contradict each other: one is carried out, the others are shown."""
    gone: dict[str, set[int]] = {}
    for family in plan.families:
        if family.gains and len(family.gains) != family.size:
            raise ValueError(f"the family `{family.name}` has {len(family.gains)} gains for {family.size} groups")
        for name, groups in family.outputs.items():
            for i in family.removed:
                gone.setdefault(name, set()).update(groups[i])
    for name in sorted({*plan.outputs, *gone} & {*plan.shapes}):
        if {*plan.outputs.get(name, ())} != gone.get(name, set()):
            raise ValueError(f"`outputs` of `{name}` are not those that its families remove; plan anew")
    if plan.planned.keys() != plan.dense.keys():
        raise ValueError("`planned` and `dense` count other kinds of cost")


def _family(value: Any) -> UnitFamily:
    outputs = {
        name: tuple(tuple(map(int, units)) for units in groups) for name, groups in dict(value["outputs"]).items()
    }
    sizes = {len(groups) for groups in outputs.values()}
    removed = tuple(map(int, value["removed"]))
    if len(sizes) != 1 or any(not 0 <= i < max(sizes) for i in removed):
        raise ValueError("a family has groups that are not there")
    return UnitFamily(
        outputs,
        {name: int(count) for name, count in value["readers"].items()},
        float(value["params"]),
        float(value["macs"]),
        tuple(map(float, value["gains"])),
        removed,
        str(value["reason"]),
    )


def _indices(value: Mapping[str, Any], shapes: Mapping[str, Any], side: int) -> dict[str, tuple[int, ...]]:
    read = {name: tuple(map(int, indices)) for name, indices in value.items()}
    for name, indices in read.items():
        if name not in shapes or any(i < 0 for i in indices):
            raise ValueError(f"`{name}` loses {'outputs' if side == 0 else 'columns'} that are not there")
    return read


def unit_masks(layer: Any, outputs: tuple[int, ...], columns: tuple[int, ...]) -> Tensor:
    """A mask without the rows of some output units and the columns of some inputs.

    Args:
        layer: a masked layer.
        outputs: output units that leave.
        columns: input columns that leave, numbered over all groups of a grouped convolution.

    Returns:
        Bool of the weight's shape, on the layer's device.

    Raises:
        ConfigError: the layer has fewer units.
    """
    groups, rows, width, taps = canonical(layer, layer.mask).shape
    keep_rows, keep_columns = (
        torch.ones(groups * rows, dtype=torch.bool, device="cpu"),
        torch.ones(groups * width, dtype=torch.bool, device="cpu"),
    )
    for what, keep, gone in (("output units", keep_rows, outputs), ("input columns", keep_columns, columns)):
        if gone and max(gone) >= len(keep):
            raise ConfigError(f"the plan removes number {max(gone)} of the {len(keep)} {what} of a layer")
        keep[list(gone)] = False
    pairs = keep_rows.reshape(groups, rows, 1) & keep_columns.reshape(groups, 1, width)
    return from_canonical(layer, pairs[..., None].expand(groups, rows, width, taps)).to(layer.mask.device)
