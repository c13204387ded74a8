"""State dicts of layers that keep values of present edges: with the whole weight, under its own name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["load_whole", "saved_whole"]


def saved_whole(layer: Any, save: Callable[..., None], destination: Any, prefix: str, weight: Tensor) -> None:
    """Write the entries of `layer` to `destination`, `weight` in the place of the values."""
    own: dict[str, Any] = {}
    save(own, prefix, weight.requires_grad)
    for key, value in own.items():
        if key == f"{prefix}values":
            destination[f"{prefix}{layer.weight_name}"] = weight
        else:
            destination[key] = value


def load_whole(
    layer: Any,
    load: Callable[..., None],
    state: Mapping[str, Any],
    prefix: str,
    metadata: Mapping[str, Any],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Load the entries of `layer`, of its whole weight those at the edges of the mask that comes with it.

    As `nn.Module._load_from_state_dict`; nothing of the weight or mask is changed where one of them does not fit.
    """
    key, mask_key = f"{prefix}{layer.weight_name}", f"{prefix}{layer.mask_name}"
    given = {name: value for name, value in state.items() if name != key}
    weight, mask = state.get(key), state.get(mask_key, layer.mask)
    if weight is None:
        if strict:
            missing.append(key)
    elif weight.shape != layer.mask.shape:
        errors.append(
            f"size mismatch for {key}: copying a param with shape {weight.shape} from checkpoint, the shape in current "
            f"model is {layer.mask.shape}."
        )
        given.pop(mask_key, None)
    elif mask.shape == layer.mask.shape:
        with torch.no_grad():
            layer.mask.copy_(mask)
            layer.present.take(weight.to(layer.mask.device), layer.mask)
    given.setdefault(mask_key, layer.mask)
    given[f"{prefix}values"] = layer.present.values.detach()
    # Written into, never put in place: the layer knows its own mask and values.
    load(given, prefix, {**metadata, "assign_to_params_buffers": False}, strict, missing, unexpected, errors)
