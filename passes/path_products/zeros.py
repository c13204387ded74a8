"""Weights and scales that are zero throughout, as many heads and gains are at first: no path leads through them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from growfx.masked.layers import MaskedLayer

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["zero_factors"]


def zero_factors(net: MaskedGraph, silent: Iterable[fx.Node]) -> tuple[str, ...]:
    """Say which layers and parameters are zero throughout where paths end; masks without any edge are not meant.

    Args:
        net: the masked graph.
        silent: nodes that paths reach and that pass none on.
    """
    found: dict[str, None] = {}
    for node in silent:
        found.update(dict.fromkeys(_zeros_of(net, node)))
    return tuple(
        f"`{name}` is zero throughout: no path leads through it, and the scores of what stands before and behind it "
        "alone are zero. Start it with other values to have it scored"
        for name in found
    )


def _zeros_of(net: MaskedGraph, node: fx.Node) -> Iterator[str]:
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] in ("weight", "in_proj_weight", "gain") and _is_zero(module, parameter):
                yield f"{node.target}.{name}"
        return
    for source in _constants(node):
        way, _, last = str(source.target).rpartition(".")
        owner = net.get_submodule(way) if way else net.shell
        name = owner.weight_name if isinstance(owner, MaskedLayer) and last == "effective_weight" else last
        value = getattr(owner, "_parameters", {}).get(name)
        if isinstance(value, Tensor) and _is_zero(owner, value):
            yield f"{way}.{name}".lstrip(".")


def _constants(node: fx.Node) -> Iterator[fx.Node]:
    """What the model holds of all that goes into a node, through other constants."""
    waiting, seen = list(node.all_input_nodes), set[fx.Node]()
    from_data = _from_data(node.graph)
    while waiting:
        source = waiting.pop()
        if source in seen or source in from_data:
            continue
        seen.add(source)
        if source.op == "get_attr":
            yield source
        waiting += source.all_input_nodes


def _from_data(graph: fx.Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _is_zero(owner: nn.Module, value: Tensor) -> bool:
    if isinstance(owner, MaskedLayer) and value is owner.parameter:
        active = value.detach()[owner.mask]
        return bool(active.numel()) and not bool(active.any())
    return bool(value.numel()) and not bool(torch.count_nonzero(value.detach()))
