"""Torch-Pruning (Fang et al., DepGraph, CVPR 2023): cut a model to a share of its cost, and what it was cut from.

Group magnitude, the same ratio of channels in every layer, the output layer left alone, numbers of heads given. The
ratio is looked for so that the cost is met. What the cut is compared with is the same model with every weight zero that
left: removed indices are told by a twin that holds the places of its weights and is cut alike.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Cut", "cut", "version"]

_TRIES = 6
_CLOSE = 0.96  # of the wanted share: the search ends


@dataclass(frozen=True)
class Cut:
    """A pruned model, its share of the dense cost, and the dense model with zeros where it was pruned."""

    small: nn.Module
    share: float
    zeroed: nn.Module


def version() -> str:
    """The installed version."""
    return importlib.metadata.version("torch-pruning")


def cut(model: nn.Module, images: Tensor, share_of: Callable[[nn.Module], float], wanted: float) -> Cut:
    """Prune copies of `model` by several ratios; the one of largest share that is at most `wanted`, else the smallest.

    Raises:
        Exception: what the library raises, or the pruned model when it is called.
    """
    ratio, low, high = 0.3, 0.0, 1.0
    best: tuple[float, Any, nn.Module] | None = None
    for _ in range(_TRIES):
        small = copy.deepcopy(model)
        try:
            pruner = _pruner(small, images, ratio)
            pruner.step()
            _state_heads(small, pruner)
            share = share_of(small)
        except Exception:
            if best is None:
                raise
            break  # an earlier ratio worked
        fits = share <= wanted
        if best is None or (fits, share if fits else -share) > (best[0] <= wanted, best[0] if fits else -best[0]):
            best = share, pruner.DG.pruning_history(), small
        if _CLOSE * wanted <= share <= wanted:
            break
        low, high = (low, ratio) if fits else (ratio, high)
        step = 1 - (1 - ratio) * (0.99 * wanted / share) ** 0.5
        ratio = step if low < step < high else (low + high) / 2
    assert best is not None
    return Cut(best[2], best[0], _zeroed(model, images, best[1]))


def _pruner(model: nn.Module, images: Tensor, ratio: float) -> Any:
    import torch_pruning as tp  # pyright: ignore[reportMissingImports]

    with torch.no_grad():
        classes = _logits(model(images)).shape[1]
    heads = {m.qkv: m.num_heads for m in model.modules() if hasattr(m, "qkv") and hasattr(m, "num_heads")}
    ends = (nn.Linear, nn.Conv2d)
    ignored = [m for m in model.modules() if isinstance(m, ends) and m.weight.shape[0] == classes]
    return tp.pruner.MetaPruner(
        model,
        images,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads=heads,
    )


def _logits(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0] if isinstance(output, (tuple, list)) else next(iter(output.values()))
    return output


def _state_heads(model: nn.Module, pruner: Any) -> None:
    """Tell attentions the widths that their heads have now, as the library's examples do."""
    module: Any
    for module in model.modules():
        if getattr(module, "qkv", None) in pruner.num_heads:
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.weight.shape[0] // 3 // module.num_heads
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.head_dim * module.num_heads


def _zeroed(model: nn.Module, images: Tensor, history: Any) -> nn.Module:
    """A copy with zeros at all weights that a history of pruning removes."""
    twin = copy.deepcopy(model)
    graph = _pruner(twin, images, 0.5).DG
    for parameter in twin.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
    graph.load_pruning_history(history)
    result = copy.deepcopy(model)
    left = dict(twin.named_parameters())
    for name, parameter in result.named_parameters():
        keep = torch.zeros(parameter.numel())
        keep[left[name].detach().flatten().long()] = 1
        parameter.data *= keep.reshape(parameter.shape)
    return result
