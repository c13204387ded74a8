"""The artifact: sparse weights and a manifest, as bytes on disk."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growfx.artifact.arrays import to_numpy as to_numpy
    from growfx.artifact.arrays import to_scipy as to_scipy
    from growfx.artifact.reader import inspect as inspect
    from growfx.artifact.reader import load_masks as load_masks
    from growfx.artifact.reader import load_state as load_state

# Fetched when first used: arrays are read without torch.
_HOME = {
    "inspect": "reader",
    "load_masks": "reader",
    "load_state": "reader",
    "to_numpy": "arrays",
    "to_scipy": "arrays",
}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'growfx.artifact' has no attribute {name!r}")
    return getattr(importlib.import_module(f"growfx.artifact.{_HOME[name]}"), name)
