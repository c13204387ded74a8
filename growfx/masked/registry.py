"""Which masked layer a parameter belongs to, and which parameters no layer has any more."""

from __future__ import annotations

import weakref

from torch import nn

__all__ = ["LAYER_OF", "is_replaced", "note_replaced"]

# The masked layer of a parameter, by the parameter's id; entries vanish with their layer.
LAYER_OF: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
_REPLACED: dict[int, weakref.ref[nn.Parameter]] = {}


def note_replaced(parameter: nn.Parameter) -> None:
    """Remember that another parameter stands in the place of this one; an optimizer may still hold it."""
    key = id(parameter)
    _REPLACED[key] = weakref.ref(parameter, lambda _: _REPLACED.pop(key, None))


def is_replaced(parameter: nn.Parameter) -> bool:
    """Whether `note_replaced` was told of it."""
    found = _REPLACED.get(id(parameter))
    return found is not None and found() is parameter
