"""Exchange edges layer by layer with exact counts: drop the worst of those present, grow the best of those absent.

Pure functions over masks and scores by layer. Counts are exact for any scores: equal scores, all-zero
gradients among them, are ordered by seeded keys (`growfx.selection`), so that a result depends on seed, layer names and
scores alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from growfx.distributed import ranks
from growfx.distributed.sharded import is_sharded, local_shard
from growfx.errors import ConfigError
from growfx.selection.choose import top
from growfx.selection.density import layer_densities
from growfx.selection.edge_keys import EdgeKeys

__all__ = ["apportion", "drop_to", "exchange", "finite_magnitudes", "grow_to", "keep_largest", "mean_of_active"]

Scores = Mapping[str, Tensor]
Counts = Mapping[str, int]


def exchange(
    masks: Scores, keep: Counts, target: Counts, drop: Scores, grow: Scores | None, seed: int, stream: str
) -> dict[str, Tensor]:
    """Return new masks: `keep` edges of largest `drop` score stay in each layer, then it grows to `target` edges.

    An edge just dropped may grow again: it is then as if nothing had happened to it. `grow` None grows at random.

    Args:
        masks: bool by layer. keep, target: how many edges of each layer stay, and how many it has in the end.
        drop, grow: scores by layer, of the masks' shapes; the largest are kept and grown.
        seed, stream: of ties and random growth.
    """
    kept = drop_to(masks, keep, drop, EdgeKeys(seed, f"drop {stream}"))
    return grow_to(kept, target, grow, EdgeKeys(seed, f"grow {stream}"))


def keep_largest(masks: Scores, edges: int, scores: Scores, spread: str, keys: EdgeKeys) -> dict[str, Tensor]:
    """Return masks with `edges` edges in all, those of largest score of the ones present.

    `spread`: "global" compares all layers with one another; a name of `DISTRIBUTIONS` in `growfx.selection.density`
    first shares the edges out among the layers, none getting more than it has, and compares within each.
    """
    if spread == "global":
        return top(scores, edges, keys, masks).masks
    sizes = {name: mask.numel() for name, mask in masks.items()}
    share = layer_densities(
        {name: tuple(mask.shape) for name, mask in masks.items()}, edges / sum(sizes.values()), spread
    )
    room = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    counts = apportion(edges, {name: share[name] * sizes[name] for name in sizes}, room)
    return drop_to(masks, counts, scores, keys)


def drop_to(masks: Scores, counts: Counts, scores: Scores, keys: EdgeKeys) -> dict[str, Tensor]:
    """Return masks with the `counts` edges of largest score in each layer, of those present."""
    result = {}
    for name, mask in masks.items():
        active = int(mask.count_nonzero())
        if not 0 <= counts[name] <= active:
            raise ValueError(f"layer `{name}` has {active} edges; it cannot drop to {counts[name]}")
        full = counts[name] == active
        result[name] = mask.clone() if full else _top_of(name, scores[name], counts[name], keys, mask)
    return result


def grow_to(masks: Scores, counts: Counts, scores: Scores | None, keys: EdgeKeys) -> dict[str, Tensor]:
    """Return masks with `counts` edges in each layer: those present, and the absent ones of largest score.

    `scores` None: every set of absent edges is equally likely.
    """
    result = {}
    for name, mask in masks.items():
        active = int(mask.count_nonzero())
        missing = counts[name] - active
        if not 0 <= missing <= mask.numel() - active:
            raise ValueError(f"layer `{name}` has {active} of {mask.numel()} edges; it cannot grow to {counts[name]}")
        # among equal scores the seeded keys decide, each edge with the same chance
        score = torch.zeros(mask.shape, device="cpu") if scores is None else scores[name]
        result[name] = mask | _top_of(name, score, missing, keys, ~mask).to(mask.device) if missing else mask.clone()
    return result


def _top_of(name: str, scores: Tensor, count: int, keys: EdgeKeys, allowed: Tensor) -> Tensor:
    return top({name: scores}, count, keys, {name: allowed}).masks[name]


def apportion(total: int, weights: Mapping[str, float], capacity: Counts) -> dict[str, int]:
    """Return whole numbers that sum to `total`, in proportion to `weights` (from 0 up), none above its `capacity`.

    What full layers cannot take goes to the others, again by weight; and when all of positive weight are full, to the
    rest by their capacity. Fractions by largest remainder, equal ones by name, so the order of layers has no influence.
    Raises `ValueError` where the capacities sum to less than `total`.
    """
    if not 0 <= total <= sum(capacity.values()):
        raise ValueError(f"{total} edges do not fit into layers with room for {sum(capacity.values())}")
    counts = dict.fromkeys(capacity, 0)
    room = {name: count for name, count in capacity.items() if count}
    left = total
    while left:
        share = {name: weights[name] for name in room}
        scale = math.fsum(share.values())
        if not scale > 0:
            share = {name: float(count) for name, count in room.items()}
            scale = math.fsum(share.values())
        wanted = {name: left * (share[name] / scale) for name in room}
        full = [name for name in room if wanted[name] >= room[name]]
        for name in full:
            counts[name] = room.pop(name)
        left = total - sum(counts.values())
        if not full:
            return counts | _whole(wanted, left)
    return counts


def _whole(wanted: Mapping[str, float], total: int) -> dict[str, int]:
    """Round numbers that sum to `total` by largest remainder; none of them moves by one or more."""
    counts = {name: math.floor(value) for name, value in wanted.items()}
    spare = total - sum(counts.values())
    for name in sorted(wanted, key=lambda name: (counts[name] - wanted[name], name))[:spare]:
        counts[name] += 1
    return counts


def mean_of_active(values: Scores, masks: Scores) -> dict[str, float]:
    """Return the mean magnitude of the present edges of each layer; 0 for a layer without edges."""
    means = {}
    for name, mask in masks.items():
        active = values[name].detach()[mask.to(values[name].device)]
        means[name] = float(active.abs().double().mean()) if active.numel() else 0.0
    return means


def finite_magnitudes(values: Scores, what: str | None = None) -> dict[str, Tensor] | None:
    """Return magnitudes by layer, or None when one of them is infinite or NaN.

    With `what` (say, "weights") that is a `ConfigError` instead, which names the layer.
    """
    magnitudes = {name: value.detach().abs() for name, value in values.items()}
    # a maximum is NaN where one value is
    parts = {name: local_shard(value) for name, value in magnitudes.items()}
    fine = {name: torch.isfinite(part.max()) for name, part in parts.items() if part.numel()}
    all_fine = not fine or bool(torch.stack(list(fine.values())).all())
    wrong = [] if all_fine else [name for name in fine if not bool(fine[name])]
    if any(map(is_sharded, magnitudes.values())):
        wrong = [name for of_rank in ranks.everyone(wrong) for name in of_rank]
    if not wrong:
        return magnitudes
    if what is None:
        return None
    raise ConfigError(f"{what} of layer `{wrong[0]}` are not finite; lower the learning rate or clip the gradient")
