"""Max pools of a network that only infers, by maxima of whole tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from growfx.runtime.max_pool import max_pool2d

__all__ = ["replace_max_pools"]

_FUNCTIONS = {F.max_pool2d, torch.max_pool2d}
_NAMES = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def replace_max_pools(module: fx.GraphModule) -> None:
    """Compute two-dimensional max pools by `growfx.runtime.max_pool` where their windows are plain numbers."""
    for node in list(module.graph.nodes):
        given = _arguments(module, node)
        if given is None or given.pop("return_indices"):
            continue
        source, ceil_mode = given.pop("input"), given.pop("ceil_mode")
        windows = [_plain_pair(value) for value in given.values()]
        if None in windows:
            continue
        with module.graph.inserting_before(node):
            pool = module.graph.call_function(max_pool2d, (source, *windows, ceil_mode))
        pool.meta = dict(node.meta)
        node.replace_all_uses_with(pool)
        module.graph.erase_node(node)


def _arguments(module: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a max pool by name, defaults filled in; None for any other operator."""
    given: dict[str, Any] = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    if node.op == "call_module":
        pool = module.get_submodule(str(node.target))
        if type(pool) is not nn.MaxPool2d or pool._forward_hooks or pool._forward_pre_hooks or len(node.args) != 1:
            return None
        given |= {name: getattr(pool, name) for name in _NAMES[1:]} | {"input": node.args[0]}
    elif node.op == "call_function" and node.target in _FUNCTIONS:
        given |= dict(zip(_NAMES, node.args, strict=False)) | node.kwargs
    else:
        return None
    # torch: no stride is one window after the other
    stride = given.get("stride")
    given["stride"] = given["kernel_size"] if stride is None or stride == () else stride
    return {name: given[name] for name in _NAMES}


def _plain_pair(value: Any) -> tuple[int, int] | None:
    pair = value if isinstance(value, (tuple, list)) else (value, value)
    plain = all(isinstance(size, int) for size in pair)
    return (pair[0], pair[-1]) if plain and len(pair) in (1, 2) else None
