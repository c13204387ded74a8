"""Which masked layer a parameter belongs to."""

from __future__ import annotations

import weakref

from torch import nn

__all__ = ["LAYER_OF"]

# The masked layer of a parameter, by the parameter's id; entries vanish with their layer.
LAYER_OF: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
