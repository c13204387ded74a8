"""Choose edges by sharded scores, the same ones as `growfx.selection` would, without gathering the scores.

To find the k best of all ranks they exchange histograms of the values, finer and finer around the last one chosen, and
finally the few values that share its bin. Then which edges were chosen, one bit an edge, as masks are whole on every
rank. Values are numbers whose order as unsigned integers is that of the scores, so the last one is found exactly; equal
scores are ordered as `growfx.selection` orders them: by seeded keys, then by layer name and index.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from growfx.distributed import ranks
from growfx.distributed.sharded import local_shard, part_of, rows_a_rank
from growfx.errors import ConfigError
from growfx.selection.edge_keys import EdgeKeys
from growfx.selection.result import Selection, check_count

__all__ = ["Part", "World", "choose_drawn", "choose_top", "draw", "top"]

_BITS = 11  # of a value that one histogram tells apart: 16 KiB
_FEW = 256  # values in the last bin that are gathered rather than told apart by another histogram
_SIGN = np.uint64(1 << 63)


class World(Protocol):
    """The collective operations that selection needs. Shapes agree between ranks."""

    @property
    def rank(self) -> int:
        """The index of this rank, from 0."""
        ...

    def total(self, counts: np.ndarray) -> np.ndarray:
        """Sum whole numbers (int64) over the ranks."""
        ...

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Return the values of every rank, one row each."""
        ...


class _Group:
    """The ranks of the process group."""

    @property
    def rank(self) -> int:
        return ranks.rank()

    def total(self, counts: np.ndarray) -> np.ndarray:
        return ranks.total(torch.from_numpy(counts)).numpy()

    def gather(self, values: np.ndarray) -> np.ndarray:
        return ranks.gather(torch.from_numpy(values)).numpy()


@dataclass(frozen=True)
class Part:
    """The local shard of one layer, flat.

    name: of the layer. size: edges of the whole layer. span: edges in each rank's part, but for those at the end, which
    have fewer. start: index in the layer of the first edge here. scores: float. allowed: bool, None for all.
    """

    name: str
    size: int
    span: int
    start: int
    scores: np.ndarray
    allowed: np.ndarray | None

    @property
    def candidates(self) -> np.ndarray:
        """Indices of the edges here that may be chosen."""
        return np.arange(len(self.scores)) if self.allowed is None else np.flatnonzero(self.allowed)


@dataclass(frozen=True)
class _Rivals:
    """Edges of one part, and the values they compete by (uint64): the smallest win."""

    index: np.ndarray
    values: np.ndarray

    def among(self, chosen: np.ndarray) -> _Rivals:
        return _Rivals(self.index[chosen], self.values[chosen])


# -- as in growfx.selection ---------------------------------------------------------------------------------------


def top(
    scores: Mapping[str, Tensor],
    k: int,
    keys: EdgeKeys,
    allowed: Mapping[str, Tensor] | None = None,
    *,
    largest: bool = True,
) -> Selection:
    """Choose as `growfx.selection.top` does, of sharded `scores`; `allowed` and the masks returned are whole.

    Every rank calls this, and gets the same masks. Raises as the other does, on every rank.
    """
    parts = _parts(scores, allowed)
    return _selection(scores, choose_top(parts, k, keys, _Group(), largest=largest), k)


def draw(
    scores: Mapping[str, Tensor], k: int, keys: EdgeKeys, allowed: Mapping[str, Tensor] | None = None
) -> Selection:
    """Draw as `growfx.selection.draw` does, of sharded `scores`; `allowed` and the masks returned are whole.

    Every rank calls this, and gets the same masks. Raises as the other does, on every rank.
    """
    return _selection(scores, choose_drawn(_parts(scores, allowed), k, keys, _Group()), k)


def choose_top(
    parts: Sequence[Part], k: int, keys: EdgeKeys, world: World, *, largest: bool = True
) -> dict[str, np.ndarray]:
    """Return which edges of each layer `top` chooses: whole layers, flat, bool. `parts` are in order of names."""
    check_count(k)
    rivals = []
    wrong = 0
    for part in parts:
        index = part.candidates
        scores = part.scores[index].astype(np.float64)
        wrong += int(np.isnan(scores).sum())
        rivals.append(_Rivals(index, _ordered(-scores if largest else scores)))
    if world.total(np.array([wrong]))[0]:
        raise ConfigError("a score is NaN; scores must be numbers")

    def tie_keys(part: Part, index: np.ndarray) -> np.ndarray:
        return _ordered(keys.uniform(part.name, part.start, len(part.scores))[index])

    return _whole(parts, _smallest(parts, rivals, k, world, tie_keys), world)


def choose_drawn(parts: Sequence[Part], k: int, keys: EdgeKeys, world: World) -> dict[str, np.ndarray]:
    """Return which edges of each layer `draw` chooses: whole layers, flat, bool. `parts` are in order of names."""
    check_count(k)
    wrong = np.array([not (np.isfinite(part.scores) & (part.scores >= 0)).all() for part in parts], dtype=np.int64)
    for part, count in zip(parts, world.total(wrong), strict=True):
        if count:
            raise ConfigError(
                f"scores of layer `{part.name}` are negative or not finite on {count} of the ranks; allowed are finite "
                "numbers from 0 up"
            )
    rivals = []
    for part in parts:
        index = part.candidates
        index = index[part.scores[index] > 0]
        uniform = keys.uniform(part.name, part.start, len(part.scores))[index]
        with np.errstate(over="ignore"):
            rivals.append(_Rivals(index, _ordered(-np.log1p(-uniform) / part.scores[index].astype(np.float64))))
    return _whole(parts, _smallest(parts, rivals, k, world, None), world)


# -- the k smallest of all ranks ----------------------------------------------------------------------------------


def _ordered(values: np.ndarray) -> np.ndarray:
    """Return unsigned integers in the order of float64 numbers; both zeros are the same one."""
    bits = (values + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _smallest(
    parts: Sequence[Part],
    rivals: Sequence[_Rivals],
    k: int,
    world: World,
    tie_keys: Callable[[Part, np.ndarray], np.ndarray] | None,
) -> list[np.ndarray]:
    """Return the indices of the `k` smallest values of all ranks, as far as they are here, by part."""
    if k >= _total(rivals, world):
        return [part.index for part in rivals]
    if k == 0:
        return [part.index[:0] for part in rivals]
    last, spare, equals = _last(rivals, k, world)
    below = [part.index[part.values < last] for part in rivals]
    ties = [part.among(part.values == last) for part in rivals]
    if spare == equals:
        more = [part.index for part in ties]
    elif tie_keys is None:
        more = _first(ties, spare, world)
    else:
        keyed = [_Rivals(tie.index, tie_keys(part, tie.index)) for part, tie in zip(parts, ties, strict=True)]
        more = _smallest(parts, keyed, spare, world, None)
    return [np.concatenate(pair) for pair in zip(below, more, strict=True)]


def _total(rivals: Sequence[_Rivals], world: World) -> int:
    return int(world.total(np.array([sum(len(part.index) for part in rivals)]))[0])


def _last(rivals: Sequence[_Rivals], k: int, world: World) -> tuple[np.uint64, int, int]:
    """Return the `k`-th smallest value (from 1), how many equal to it are among the k smallest, and in all."""
    live = [part.values for part in rivals]
    value, equals, shift = 0, 0, 64
    while shift:
        bits = min(_BITS, shift)
        shift -= bits
        counts = np.zeros(1 << bits, np.int64)
        for part in live:
            counts += np.bincount(_digits(part, shift, bits), minlength=1 << bits)
        counts = world.total(counts)
        digit = int(np.searchsorted(np.cumsum(counts), k))
        k, equals = k - int(counts[:digit].sum()), int(counts[digit])
        value |= digit << shift
        live = [part[_digits(part, shift, bits) == digit] for part in live]
        if shift and equals <= _FEW:
            return _last_of_few(np.concatenate(live), equals, k, world)
    return np.uint64(value), k, equals


def _digits(values: np.ndarray, shift: int, bits: int) -> np.ndarray:
    return ((values >> np.uint64(shift)) & np.uint64((1 << bits) - 1)).astype(np.int64)


def _last_of_few(own: np.ndarray, size: int, k: int, world: World) -> tuple[np.uint64, int, int]:
    """Return what `_last` returns, of `size` values in all."""
    padded = np.zeros(size + 1, np.uint64)
    padded[0], padded[1 : len(own) + 1] = len(own), own
    gathered = world.gather(padded.view(np.int64)).view(np.uint64)
    values = np.sort(np.concatenate([row[1 : int(row[0]) + 1] for row in gathered]))
    last = values[k - 1]
    return last, k - int((values < last).sum()), int((values == last).sum())


def _first(ties: Sequence[_Rivals], count: int, world: World) -> list[np.ndarray]:
    """Return the first `count` of equals of all ranks, by layer and then by index (ranks have rows in their order)."""
    by_rank = world.gather(np.array([len(part.index) for part in ties], dtype=np.int64))
    before = by_rank[: world.rank].sum(0)
    chosen = []
    for number, part in enumerate(ties):
        chosen.append(part.index[: max(0, count - int(before[number]))])
        count = max(0, count - int(by_rank[:, number].sum()))
    return chosen


# -- parts and wholes ---------------------------------------------------------------------------------------------


def _parts(scores: Mapping[str, Any], allowed: Mapping[str, Tensor] | None) -> list[Part]:
    parts = []
    for name in sorted(scores):
        score = scores[name]
        allowed_mask = None if allowed is None else allowed.get(name)
        if allowed_mask is not None and (allowed_mask.shape != score.shape or allowed_mask.dtype != torch.bool):
            raise ConfigError(
                f"`allowed` of layer `{name}`: expected torch.bool of the scores' shape {tuple(score.shape)}, "
                f"got {allowed_mask.dtype} of shape {tuple(allowed_mask.shape)}"
            )
        local = local_shard(score).reshape(-1).cpu()
        if local.dtype not in (torch.float32, torch.float64):
            local = local.double()
        size = score.numel()
        span = rows_a_rank(score) * math.prod(score.shape[1:])
        start = min(score.device_mesh.get_local_rank() * span, size)
        here = None if allowed_mask is None else part_of(allowed_mask, score).reshape(-1).cpu().numpy()
        parts.append(Part(name, size, span, start, local.numpy(), here))
    return parts


def _whole(parts: Sequence[Part], chosen: Sequence[np.ndarray], world: World) -> dict[str, np.ndarray]:
    """Tell all ranks the chosen edges of each, one bit an edge."""
    bits = []
    for part, index in zip(parts, chosen, strict=True):
        flags = np.zeros(part.span, dtype=bool)
        flags[index] = True
        bits.append(np.packbits(flags))
    rows = world.gather(np.concatenate(bits)) if bits else np.empty((1, 0), np.uint8)
    ends = np.cumsum([len(part) for part in bits])[:-1] if bits else []
    whole = {}
    for part, columns in zip(parts, np.split(rows, ends, axis=1), strict=False):
        flags = [np.unpackbits(row, count=part.span) for row in columns]
        whole[part.name] = np.concatenate(flags)[: part.size].astype(bool)
    return whole


def _selection(scores: Mapping[str, Tensor], chosen: Mapping[str, np.ndarray], asked: int) -> Selection:
    masks = {name: torch.from_numpy(chosen[name]).reshape(score.shape) for name, score in scores.items()}
    count = sum(int(mask.sum()) for mask in masks.values())
    return Selection({name: mask.to(scores[name].device) for name, mask in masks.items()}, count, asked)
