"""How many heads an attention has after a removal, where its own modules state that."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from growfx.analysis.connectivity import Connectivity
from growfx.compaction.widths import stated_heads

__all__ = ["count_heads"]


def count_heads(model: nn.Module, found: Connectivity, removed: Tensor) -> dict[str, dict[str, int]]:
    """The numbers of heads, and the widths of all heads together, that modules must state anew.

    A number is looked for in the modules around the layers whose units are in the heads, in the nearest that states
    one. An attention counts when some of its heads are gone whole.

    Args:
        model: the model before the removal.
        found: its connectivity.
        removed: unit -> whether it leaves.

    Returns:
        Module -> attribute -> the new number.
    """
    if not found.heads:
        return {}
    head_of = torch.zeros(len(found.group), dtype=torch.int64, device="cpu")
    for number, head in enumerate(found.heads, start=1):
        head_of[head] = number
    gone = torch.zeros(len(found.heads) + 1, dtype=torch.bool, device="cpu")
    for number, head in enumerate(found.heads, start=1):
        gone[number] = bool(removed[head].all())
    if not gone.any():
        return {}
    result: dict[str, dict[str, int]] = {}
    for name in found.layers:
        heads, counts = head_of[found.coupled(name)].unique(return_counts=True)
        inside = heads[heads > 0]
        if not gone[inside].any():
            continue
        before, after = len(inside), int((~gone[inside]).sum())
        around, stated = _nearest(model, name, before, _parts(counts[heads > 0]))
        if stated:
            result.setdefault(around, {}).update({key: after * features for key, features in stated.items()})
    return result


def _nearest(model: nn.Module, name: str, heads: int, parts: list[int]) -> tuple[str, dict[str, int]]:
    """The module nearest around a layer that states how many heads there are, and what `stated_heads` says of it."""
    while name:
        name = name.rpartition(".")[0]
        module, stated = model.get_submodule(name), {}
        for features in parts:
            stated |= stated_heads(module, heads, heads * features)
        if stated:
            return name, stated
    return "", {}


def _parts(counts: Tensor) -> list[int]:
    """The features that one head may have, as a layer gives each of them queries, keys or values, or all three."""
    rows = int(counts.max())
    return [rows // parts for parts in (3, 2, 1) if rows % parts == 0]
