"""Choose exactly k edges over all layers at once: the best by score, or a random draw proportional to score.

All methods choose edges here. Counts are exact, and the same edges are chosen whether this process holds whole scores
or each rank a shard of them.
"""

from collections.abc import Mapping

from torch import Tensor

from growfx.distributed.sharded import is_sharded
from growfx.errors import ConfigError
from growfx.selection import sharded, whole
from growfx.selection.edge_keys import EdgeKeys
from growfx.selection.result import Selection

__all__ = ["draw", "top"]


def draw(
    scores: Mapping[str, Tensor], k: int, keys: EdgeKeys, allowed: Mapping[str, Tensor] | None = None
) -> Selection:
    """Draw `k` edges without replacement, each draw with probability proportional to score among the rest.

    `scores`: finite, non-negative tensors per layer, any shape; score 0 is never drawn. `allowed`: bool
    tensors per layer, of the same shapes; a layer not in it is allowed whole. With fewer than `k` allowed
    edges of positive score all of them are taken (`count` says how many).
    Scores that are sharded (`fully_shard`) are so for all layers, and every rank calls this; the masks are whole.
    Raises `ConfigError` for a negative `k`, a negative or non-finite score, or shapes that differ.
    """
    _check_types(scores, keys)
    kind = sharded if any(map(is_sharded, scores.values())) else whole
    return kind.draw(scores, k, keys, allowed)


def top(
    scores: Mapping[str, Tensor],
    k: int,
    keys: EdgeKeys,
    allowed: Mapping[str, Tensor] | None = None,
    *,
    largest: bool = True,
) -> Selection:
    """Choose the `k` edges of largest (or smallest) score; equal scores are ordered at random by `keys`.

    Arguments as in `draw`, except that scores may be negative or infinite. With fewer than `k` allowed edges
    all are taken. Raises `ConfigError` for a negative `k`, a NaN score, or shapes that differ.
    """
    _check_types(scores, keys)
    kind = sharded if any(map(is_sharded, scores.values())) else whole
    return kind.top(scores, k, keys, allowed, largest=largest)


def _check_types(scores: object, keys: object) -> None:
    """Raise `ConfigError` unless these are scores by layer name, and keys to order equal ones by."""
    if not isinstance(scores, Mapping) or not all(isinstance(score, Tensor) for score in scores.values()):
        raise ConfigError(f"`scores`: expected a dict of tensors by layer name, got {type(scores).__name__}")
    if not isinstance(keys, EdgeKeys):
        raise ConfigError(f"`keys`: expected `growfx.selection.EdgeKeys(seed, stream)`, got {type(keys).__name__}")
