"""A deep copy of a module tree, several times faster than `copy.deepcopy` on networks of many small modules."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from growfx.layers import MaskedLayer

__all__ = ["copy_modules"]

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_ATOMS = (int, float, bool, str, type(None), type)


def copy_modules(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """What ``copy.deepcopy(module, memo)`` gives.

    Args:
        module: the root.
        memo: id -> what stands for that object in the copy; parameters found there are shared or replaced.
    """
    parts = list(module.modules())
    if not all(map(_copies_plainly, parts)):
        return copy.deepcopy(module, memo)
    # All modules are known before any attribute is copied: an attribute may name a module anywhere in the tree.
    for part in parts:
        memo[id(part)] = type(part).__new__(type(part))
    for part in parts:
        state = memo[id(part)].__dict__
        for name, value in part.__dict__.items():
            if name in _REGISTRIES:
                state[name] = type(value)((key, copy.deepcopy(item, memo)) for key, item in value.items())
            elif name == "_settled" and isinstance(part, MaskedLayer):
                state[name] = None  # what was seen of the original says nothing of its copy
            elif isinstance(value, _ATOMS):
                state[name] = value
            elif type(value) is OrderedDict and not value:  # a dozen of hooks in every module, nearly always empty
                state[name] = OrderedDict()
            else:
                state[name] = copy.deepcopy(value, memo)
    memo.setdefault(id(memo), []).append(parts)  # as deepcopy does: an id is good while its object lives
    return memo[id(module)]


def _copies_plainly(part: nn.Module) -> bool:
    kind = type(part)
    if hasattr(kind, "__deepcopy__") or kind.__getstate__ is not nn.Module.__getstate__:
        return False
    return isinstance(part, MaskedLayer) or kind.__reduce_ex__ is nn.Module.__reduce_ex__
