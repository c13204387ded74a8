"""How many units each family keeps within a budget: those of smallest gain per cost leave first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from growfx.passes.plan_channels.cost import CostTable
from growfx.selection.budget import largest_within

__all__ = ["Choice", "Limits", "choose", "least_kept"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Limits:
    """What each family may lose.

    Attributes:
        least: how many units it keeps at least.
        step: units leave so many at a time, after as many as make the rest a multiple of that.
    """

    least: Ints
    step: Ints

    def chunks(self, family: int, size: int) -> list[int]:
        """How many units leave at a time, in order."""
        step, least = int(self.step[family]), int(self.least[family])
        sizes = [size % step] if size % step else []
        while size - sum(sizes) - step >= least:
            sizes.append(step)
        return sizes if size - sum(sizes) >= least else []


@dataclass(frozen=True, eq=False)
class Choice:
    """How many units each family keeps, and whether that is within the budget; if not, no fewer can be kept."""

    kept: Ints
    reached: bool


def choose(
    table: CostTable,
    kinds: tuple[str, ...],
    fraction: float,
    gains: Sequence[Floats],
    limits: Limits,
) -> Choice:
    """Let units leave until the network costs at most `fraction` of the dense one, and no fewer than need be.

    Chunks of units leave in the order of their gain over their cost in the dense network. Then those whose gain is
    largest come back, as long as one fits: in the end none does.

    Args:
        table: what the network costs.
        kinds: the costs that have to be within the budget; the first one ranks.
        gains: of each family's units, ascending; empty where all of them stay. Below 0 for those that never come back.
        limits: what families may lose.
    """
    price = table.of_one(kinds[0])
    order: list[tuple[float, int, int, int]] = []  # worth, family, its chunk, units in that
    for family, values in enumerate(gains):
        begin, worth = 0, -math.inf
        for chunk, size in enumerate(limits.chunks(family, len(values))) if len(values) else ():
            gain = values[begin] if size == 1 else values[begin : begin + size].mean()
            own = float(gain) / price[family] if price[family] > 0 else math.inf
            worth, begin = max(worth, own), begin + size
            worth = -math.inf if values[begin - 1] < 0 else worth
            order.append((worth, family, chunk, size))
    order = [item for item in sorted(order) if item[0] < math.inf]
    families = np.array([item[1] for item in order], np.int64)
    amounts = np.array([item[3] for item in order], np.int64)

    def kept_after(count: int) -> Ints:
        lost = np.bincount(families[:count], amounts[:count], minlength=len(table.sizes))
        return table.sizes - lost.astype(np.int64)

    if not table.fits(kinds, kept_after(len(order)), fraction):
        return Choice(kept_after(len(order)), False)
    # of the chunks in reverse order, as many come back as the budget allows
    back = largest_within(
        lambda count: 0.0 if table.fits(kinds, kept_after(len(order) - count), fraction) else 1.0, 0.5, len(order)
    )
    gone = max(len(order) - back, sum(item[0] == -math.inf for item in order))
    kept = kept_after(gone)
    lost: dict[int, list[int]] = {}
    for _, family, _, size in order[:gone]:
        lost.setdefault(family, []).append(size)
    for worth, family, chunk, _ in reversed(order[:gone]):
        if worth >= 0 and len(lost[family]) == chunk + 1:  # the last of those that are gone
            trial = kept.copy()
            trial[family] += lost[family][-1]
            if table.fits(kinds, trial, fraction):
                kept = trial
                lost[family].pop()
    return Choice(kept, True)


def least_kept(sizes: Ints, floor: Floats) -> Ints:
    """How many units families keep at least: the fractions `floor`, and one."""
    return np.maximum(np.ceil(np.round(floor * sizes, 9)).astype(np.int64), np.minimum(sizes, 1))
