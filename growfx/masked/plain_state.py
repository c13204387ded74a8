"""The state dict that a masked model's own methods see: that of the plain model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["hide_masks"]


def hide_masks(shell: nn.Module, names: Sequence[str] = ()) -> None:
    """Leave the named buffers out of the shell's own state dict; none: no longer.

    A method of the model that writes a checkpoint (`save_pretrained`) then writes the plain model's, zeros in place.
    """
    hooks = shell._state_dict_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "func", None) is _without_masks]:
        del hooks[key]
    if names:
        shell._register_state_dict_hook(functools.partial(_without_masks, tuple(names)))


def _without_masks(names: Sequence[str], module: nn.Module, state: Any, prefix: str, _: Any) -> None:
    if "_shell" in module.__dict__:  # the net's own state dict has them
        return
    for name in names:
        state.pop(f"{prefix}{name}", None)
