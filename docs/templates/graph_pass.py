"""Template of a pass: remove operators that do nothing in evaluation mode, and say which.

A pass is a plain function in `passes/<name>.py`, named after what it does and listed in `growfx.passes.PASSES`. It
leaves the network it is given unchanged, compares outputs before it returns a changed one, and reports what it did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from growfx.errors import TraceError
from growfx.masked.graph import MaskedGraph

__all__ = ["WithoutIdentities", "drop_identities"]

_IDENTITIES: Final = (nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class WithoutIdentities:
    """A program over the layers of the network, in evaluation mode, and the modules it no longer calls."""

    model: fx.GraphModule
    removed: tuple[str, ...]


def drop_identities(net: MaskedGraph, example_inputs: Any) -> WithoutIdentities:
    """Return the evaluation program of `net` without calls of `nn.Identity` and `nn.Dropout`; `net` is not changed.

    Raises:
        TraceError: there is no graph that does all the model does, or outputs for `example_inputs` (a tensor) differ.
    """
    model = net.graph_module(training=False).eval()
    with torch.no_grad():
        expected = model(example_inputs)
    removed: list[str] = []
    for node in list(model.graph.nodes):
        if node.op == "call_module" and type(model.get_submodule(str(node.target))) in _IDENTITIES:
            node.replace_all_uses_with(node.all_input_nodes[0])
            model.graph.erase_node(node)
            removed.append(str(node.target))
    model.recompile()
    with torch.no_grad():
        if not torch.equal(model(example_inputs), expected):
            raise TraceError(f"outputs differ after removing {', '.join(removed)}; keep the network as it was")
    return WithoutIdentities(model, tuple(removed))
