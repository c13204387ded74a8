"""Choose the best k edges, or draw k in proportion to score, from unsharded scores.

Random numbers come from `EdgeKeys`, so a choice depends on the seed, the layer names and the scores alone: not on the
order of the layers, the device, the number of threads or the chunk size.

`draw` is an exponential race: edge i arrives at time `Exp(1) / score_i` and the k earliest win, which is
exactly sequential drawing without replacement with probability proportional to score (Efraimidis & Spirakis
2006; equivalent to the Gumbel top-k trick). Only arrivals before a deadline are computed: as `-log(1 - u)
>= u`, edges with `u > deadline * score` cannot arrive in time and cost neither a logarithm nor memory. The
deadline is a guess from a sample and has no influence on the result: it is moved until at least k edges
arrive.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from growfx.errors import ConfigError
from growfx.selection.edge_keys import EdgeKeys
from growfx.selection.result import Selection, check_count

__all__ = ["draw", "top"]

_CHUNK = 1 << 17  # edges per unit of work: the arrays of a chunk stay in the second-level cache
_SAMPLE = 1 << 15  # edges looked at to guess the deadline
_MAX_THREADS = 8
_BRACKET = 4.0  # standard errors of a sampled rank

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Layer:
    """Flat CPU views of one layer: float scores and which edges may be chosen (None: all)."""

    name: str
    scores: np.ndarray
    allowed: np.ndarray | None


@dataclass(frozen=True)
class _Chunk:
    layer: _Layer
    start: int
    stop: int

    @property
    def scores(self) -> np.ndarray:
        return self.layer.scores[self.start : self.stop]

    @property
    def allowed(self) -> np.ndarray | None:
        return None if self.layer.allowed is None else self.layer.allowed[self.start : self.stop]

    def keys(self, keys: EdgeKeys) -> np.ndarray:
        return keys.uniform(self.layer.name, self.start, self.stop - self.start)


@dataclass(frozen=True)
class _Candidates:
    """Edges of one chunk with the value they compete by: the smallest values win."""

    chunk: _Chunk
    index: np.ndarray
    value: np.ndarray


def draw(
    scores: Mapping[str, Tensor],
    k: int,
    keys: EdgeKeys,
    allowed: Mapping[str, Tensor] | None = None,
    *,
    chunk: int = _CHUNK,
) -> Selection:
    """`growfx.selection.draw` of whole scores; `chunk` (edges) changes speed only."""
    layers = _flatten(scores, allowed)
    chunks = list(_chunks(layers, k, chunk))
    if k == 0 or not chunks:
        return _selection(scores, [], k)
    deadline = _guess_deadline(layers, k)
    while True:
        candidates = _for_each(chunks, lambda part, limit=deadline: _arrivals(part, keys, limit))
        if sum(len(part.index) for part in candidates) >= k or deadline == math.inf:
            return _selection(scores, _smallest(candidates, k), k)
        deadline = deadline * 4 if deadline < 1e300 else math.inf


def top(
    scores: Mapping[str, Tensor],
    k: int,
    keys: EdgeKeys,
    allowed: Mapping[str, Tensor] | None = None,
    *,
    largest: bool = True,
    chunk: int = _CHUNK,
) -> Selection:
    """`growfx.selection.top` of whole scores; `chunk` (edges) changes speed only."""
    layers = _flatten(scores, allowed)
    chunks = list(_chunks(layers, k, chunk))
    counts = _for_each(chunks, _count)
    total = sum(counts)
    k_here = min(k, total)
    if k_here == 0:
        return _selection(scores, [], k)
    edge = _value_at(layers, chunks, k_here if largest else total - k_here + 1, total)
    candidates = _for_each(chunks, lambda part: _better(part, keys, edge, largest))
    return _selection(scores, _smallest(candidates, k), k)


def _flatten(scores: Mapping[str, Tensor], allowed: Mapping[str, Tensor] | None) -> list[_Layer]:
    """Return the layers by name, which is the last order that ties are broken by."""
    layers = []
    for name in sorted(scores):
        may = None if allowed is None else allowed.get(name)
        if may is not None and (may.shape != scores[name].shape or may.dtype != torch.bool):
            raise ConfigError(
                f"`allowed` of layer `{name}` is {may.dtype} of shape {tuple(may.shape)}; "
                f"allowed is torch.bool of the scores' shape {tuple(scores[name].shape)}"
            )
        flat = scores[name].detach().reshape(-1).cpu()
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.double()
        layers.append(_Layer(name, flat.numpy(), None if may is None else may.reshape(-1).cpu().numpy()))
    return layers


def _chunks(layers: list[_Layer], k: int, size: int) -> Iterator[_Chunk]:
    check_count(k)
    for layer in layers:
        for start in range(0, len(layer.scores), size):
            yield _Chunk(layer, start, min(start + size, len(layer.scores)))


def _for_each(chunks: list[_Chunk], work: Callable[[_Chunk], _T]) -> list[_T]:
    """Apply `work` to every chunk, in threads where there is more than one (numpy releases the lock)."""
    threads = min(len(chunks), torch.get_num_threads(), _MAX_THREADS)
    if threads <= 1:
        return [work(chunk) for chunk in chunks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, chunks))


def _arrivals(chunk: _Chunk, keys: EdgeKeys, deadline: float) -> _Candidates:
    """Return the edges of a chunk that arrive by `deadline`, with their arrival times."""
    scores = chunk.scores
    lowest, highest = scores.min(), scores.max()
    if not (lowest >= 0 and highest < math.inf):
        raise ConfigError(
            f"scores of layer `{chunk.layer.name}` reach from {lowest} to {highest}; "
            "allowed are finite numbers from 0 up"
        )
    uniform = chunk.keys(keys)
    with np.errstate(over="ignore", invalid="ignore"):
        # a score of 0 gives 0, or NaN at an infinite deadline: no number in (0, 1) is below either
        index = np.flatnonzero(uniform <= np.multiply(scores, deadline, dtype=np.float64))
        if chunk.allowed is not None:
            index = index[chunk.allowed[index]]
        time = -np.log1p(-uniform[index]) / scores[index].astype(np.float64)
    in_time = time <= deadline
    return _Candidates(chunk, index[in_time], time[in_time])


def _better(chunk: _Chunk, keys: EdgeKeys, edge: np.floating, largest: bool) -> _Candidates:
    """Return the edges beyond the value `edge` (competing with 0) and those equal to it (with their key)."""
    scores = chunk.scores
    index = np.flatnonzero(scores >= edge if largest else scores <= edge)
    if chunk.allowed is not None:
        index = index[chunk.allowed[index]]
    ties = scores[index] == edge
    value = np.zeros(len(index))
    if ties.any():
        value[ties] = chunk.keys(keys)[index[ties]]
    return _Candidates(chunk, index, value)


def _count(chunk: _Chunk) -> int:
    """Return how many edges of a chunk may be chosen; `ConfigError` where one of their scores is NaN."""
    scores = chunk.scores if chunk.allowed is None else chunk.scores[chunk.allowed]
    if np.isnan(scores.max(initial=-math.inf)):
        raise ConfigError("a score is NaN; scores must be numbers")
    return len(scores)


def _value_at(layers: list[_Layer], chunks: list[_Chunk], rank: int, total: int) -> np.floating:
    """Return the score that is number `rank` (from 1) of `total` when allowed edges go from the largest down.

    Only scores between two bounds around it, guessed from a sample, are gathered and ordered; where the guess was
    wrong, all are.
    """
    low, high = _bracket(layers, rank / total)
    while True:
        parts = _for_each(chunks, lambda part, low=low, high=high: _between(part, low, high))
        above = sum(count for count, _ in parts)
        values = np.concatenate([part for _, part in parts])
        if above < rank <= above + len(values):
            place = len(values) - (rank - above)
            values.partition(place)
            return values[place]
        low, high = -math.inf, math.inf


def _between(chunk: _Chunk, low: np.floating | float, high: np.floating | float) -> tuple[int, np.ndarray]:
    """Return how many allowed scores of a chunk are above `high`, and those from `low` to `high`."""
    scores = chunk.scores if chunk.allowed is None else chunk.scores[chunk.allowed]
    above = scores > high
    return int(np.count_nonzero(above)), scores[(scores >= low) & ~above]


def _bracket(layers: list[_Layer], part: float) -> tuple[np.floating | float, np.floating | float]:
    """Return scores between which the one that `part` of all are not below most likely lies."""
    sample, _ = _sample(layers)
    sample.sort()
    place = (1 - part) * len(sample)
    slack = _BRACKET * math.sqrt(len(sample) * part * (1 - part)) + 2
    low, high = math.floor(place - slack), math.ceil(place + slack)
    # bounds keep the dtype of the scores: rounded ones would order layers of different dtypes differently
    return (
        sample[low] if low >= 0 else -math.inf,
        sample[high] if high < len(sample) else math.inf,
    )


def _sample(layers: list[_Layer]) -> tuple[np.ndarray, int]:
    """Return the score of every n-th edge, without those that may not be chosen, and n."""
    stride = max(1, sum(len(layer.scores) for layer in layers) // _SAMPLE)
    parts = []
    for layer in layers:
        part = layer.scores[::stride]
        parts.append(part if layer.allowed is None else part[layer.allowed[::stride]])
    return (np.concatenate(parts) if parts else np.empty(0)), stride


def _guess_deadline(layers: list[_Layer], k: int) -> float:
    """Guess a time by which a few more than `k` edges have arrived, from every n-th score."""
    sample, stride = _sample(layers)
    sample = sample[sample > 0].astype(np.float64)
    target = 1.05 * k / stride + 2.0 * math.sqrt(k / stride)
    if len(sample) <= target:
        return math.inf
    with np.errstate(over="ignore", under="ignore"):
        # the expected arrivals are concave in time, so these steps approach the target from below
        time = target / sample.sum()
        for _ in range(12):
            time *= target / -np.expm1(-time * sample).sum()
    return float(time) if 0.0 < time < math.inf else math.inf


def _smallest(candidates: list[_Candidates], k: int) -> list[_Candidates]:
    """Return the `k` smallest values; equal ones by layer name and index (chunks come in that order)."""
    if not candidates:  # no layers
        return candidates
    values = np.concatenate([part.value for part in candidates])
    if len(values) <= k:
        return candidates
    limit = np.partition(values, k - 1)[k - 1]
    spare = k - int(np.count_nonzero(values < limit))
    chosen = []
    for part in candidates:
        keep = part.value < limit
        ties = np.flatnonzero(part.value == limit)[:spare]
        keep[ties] = True
        spare -= len(ties)
        chosen.append(_Candidates(part.chunk, part.index[keep], part.value[keep]))
    return chosen


def _selection(scores: Mapping[str, Tensor], chosen: list[_Candidates], asked: int) -> Selection:
    flat = {name: np.zeros(score.numel(), dtype=bool) for name, score in scores.items()}
    for part in chosen:
        flat[part.chunk.layer.name][part.chunk.start + part.index] = True
    masks = {name: torch.from_numpy(flat[name]).reshape(score.shape).to(score.device) for name, score in scores.items()}
    return Selection(masks, sum(len(part.index) for part in chosen), asked)
