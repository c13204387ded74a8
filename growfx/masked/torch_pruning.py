"""Take over what `torch.nn.utils.prune` did to a model: its masks, and checkpoints of models that it pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from growfx.masked.twins import weight_name_of

__all__ = ["take_over", "translated"]


def take_over(part: nn.Module, times: Mapping[int, int]) -> Tensor | None:
    """Give a layer that was pruned its weight back as a parameter.

    Args:
        part: a maskable module of a copy of the model; `<weight>_orig`, `<weight>_mask` and the hook that multiplies
            them go.
        times: how many modules hold the parameter of an id.

    Returns:
        A bool tensor of the weight's shape, what pruning left; None where the layer was not pruned, or where the mask
        cannot be the parameter's: another module reads it without, it is not a real one, or the mask has factors.
    """
    weight = weight_name_of(part)
    whole = part._parameters.get(f"{weight}_orig")
    if whole is None or not whole.is_floating_point() or times[id(whole)] > 1:
        return None
    for key, hook in list(part._forward_pre_hooks.items()):
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == weight:
            if _has_factors(part._buffers[f"{weight}_mask"]):
                return None
            del part._forward_pre_hooks[key]
            part.__dict__.pop(weight, None)
            part._parameters[weight] = part._parameters.pop(f"{weight}_orig")
            mask = part._buffers.pop(f"{weight}_mask")
            assert mask is not None
            return mask != 0
    return None


def translated(state: Mapping[str, Any], layers: Iterable[tuple[str, str, str]]) -> Mapping[str, Any]:
    """A state dict with the entries of pruned layers under the names of masked ones; the same where there are none.

    Args:
        state: what is to be loaded.
        layers: (name of the module, of its weight, of its mask) of every masked layer.
    """
    found = dict(state)
    for name, weight, mask in layers:
        prefix = f"{name}." if name else ""
        own, kept = f"{prefix}{weight}_orig", f"{prefix}{weight}_mask"
        if own in state and kept in state and f"{prefix}{weight}" not in state:
            factors = torch.as_tensor(found.pop(kept))
            values = found.pop(own)
            found[f"{prefix}{weight}"] = values * factors if _has_factors(factors) else values
            found[f"{prefix}{mask}"] = factors != 0
    return found if found.keys() != state.keys() else state


def _has_factors(mask: Any) -> bool:
    """Whether torch's mask, which may be any numbers, has others than 0 and 1."""
    return mask is not None and not bool(((mask == 0) | (mask == 1)).all())
