"""The masks that a method starts from: drawn, those the network has, or those of its largest weights.

Also what has to be known about masks that were there before: they are kept only where `masks="given"` asks for it.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from growfx.errors import ConfigError
from growfx.methods.base import Method
from growfx.methods.scope import Scope
from growfx.notices import warn_once

__all__ = ["MASKS", "MASKS_OF_PRUNING", "given_masks", "is_resuming", "resuming", "start_density", "warn_if_replaced"]

MASKS = ("drawn", "given", "magnitude")
MASKS_OF_PRUNING = ("drawn", "given")  # of methods that start with all edges, or those given

_RESUMING: ContextVar[bool] = ContextVar("growfx resuming", default=False)


@contextmanager
def resuming() -> Generator[None]:
    """Attach a method whose masks and state are about to be loaded: those drawn are not the last word."""
    token = _RESUMING.set(True)
    try:
        yield
    finally:
        _RESUMING.reset(token)


def is_resuming() -> bool:
    """Whether what `attach` draws will be replaced by a state."""
    return _RESUMING.get()


def start_density(scope: Scope, density: float | None, option: str, *, at_most: bool = False) -> float:
    """Return the density to work at where the network's own masks are kept; None takes theirs.

    `at_most`: the method prunes from the given masks to `density`.

    Raises `ConfigError` for another density than that of the masks (`at_most`: for a larger one), naming both.
    """
    own = scope.density
    if density is None:
        return own
    wanted, has = round(density * scope.numel), scope.nnz
    same = wanted == has or abs(density - scope.net.density) < 0.5 / scope.net.numel
    if same or (at_most and wanted < has) or is_resuming():
        return density if not same else own
    allowed = "at most that, or None" if at_most else "that, or None"
    raise ConfigError(
        f'`{option}` is {density:.6g}, but `masks` = "given" keeps masks of density {own:.6g} ({has} of {scope.numel} '
        f'edges); allowed is {allowed}, or `masks` = "magnitude" to choose masks of that density'
    )


def given_masks(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of the masks that `layers` have."""
    return {name: layer.mask.clone() for name, layer in layers.items()}


def warn_if_replaced(method: Method, scope: Scope, masks: Mapping[str, Tensor]) -> None:
    """Warn, before they are set, that starting masks replace others, whose edges are then lost.

    `masks` = "given" and "magnitude" are asked for.
    """
    choice = getattr(method, "masks", None)
    if is_resuming() or not method.warns_of_loss or choice not in (None, "drawn"):
        return
    lost = back = 0
    for name, mask in masks.items():
        before = scope.net.layers[name].mask
        after = mask.to(before.device)
        lost += int((before & ~after).sum())
        back += int((after & ~before).sum())
    sparse = any(not bool(scope.net.layers[name].mask.all()) for name in masks)
    if not sparse or not (lost or back):
        return
    instead = 'set `masks="given"`' if choice else 'use a method that has `masks="given"`, such as `static`'
    warn_once(
        f"method `{method.name}` replaced the masks the network had (density {scope.density:.4g} of the layers it may "
        f"change): {lost} of their edges were removed with their weights, {back} absent edges added at weight zero; to "
        f"start from the masks that are there, {instead}",
        scope.net.trace_report.notes,
    )


def all_edges(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return masks with every edge."""
    return {name: torch.ones_like(layer.mask) for name, layer in layers.items()}
