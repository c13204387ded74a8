"""Where integers and booleans among the inputs become numbers that layers read.

Images of bytes, counts and one-hot codes are data as floating-point inputs are; token ids and attention masks are not.
What tells them apart is who reads the floating-point numbers made of them: a layer multiplies data by its weights.
What is joined with a value that paths lead to is read with it. Paths begin at the operator that makes these numbers
or, where an operator without a path rule follows, behind it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from growfx.masked.layers import MaskedLayer
from growfx.passes.operators.constants import evaluating_copy, execute
from growfx.passes.operators.names import operator_name, short_name, writes_in_place
from growfx.passes.operators.nests import Leaf, leaves, map_leaves
from growfx.passes.path_products.rules.shape import JOINING
from growfx.passes.path_products.rules.table import module_rule, node_rule
from growfx.passes.path_products.weights import CONTRACTIONS

if TYPE_CHECKING:
    from growfx.masked.graph import MaskedGraph

__all__ = ["embeds", "where_data_begins"]

_EMBEDDINGS = (F.embedding, torch.embedding, F.embedding_bag, torch.embedding_bag)
_LOOK_UPS = frozenset({"getitem", "__getitem__", "index_select", operator.getitem, torch.index_select})
# What takes the shape of a tensor, and none of its values.
_ALIKE = frozenset(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn"))
_NEW = frozenset(f"new_{kind}" for kind in ("zeros", "ones", "full", "empty"))
_PLAIN = (int, float, str, torch.dtype, torch.device, torch.layout, type(None))


def embeds(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node turns token ids into features: there paths begin."""
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or node.target in _EMBEDDINGS


def where_data_begins(net: MaskedGraph, graph: fx.Graph, inputs: Iterable[Any]) -> frozenset[fx.Node]:
    """The nodes that make floating-point data of integers and booleans among the inputs.

    Args:
        net: a masked graph; nothing of it is changed.
        graph: its recorded graph for the inputs.
        inputs: one value for each placeholder.
    """
    inputs = list(inputs)
    if all(item.is_floating_point() or item.is_complex() for item in leaves(inputs) if isinstance(item, Tensor)):
        return frozenset()
    scan = _Scan(net, graph)
    with torch.no_grad():
        scan.run(inputs)
    return frozenset(scan.begins)


class _Path(Leaf):
    """A value that paths lead to, or that cannot be computed ahead of them."""


@dataclass(slots=True, eq=False)
class _Known(Leaf):
    """A value that no path leads to.

    Attributes:
        value: what the network computes.
        data: whether it was made of an input; its shape alone makes none.
        learned: whether a parameter is in it.
        origins: the nodes at which its data became floating-point numbers.
    """

    value: Any
    data: bool = False
    learned: bool = False
    origins: frozenset[fx.Node] = frozenset()


class _Scan:
    """A run of all nodes that are not behind a path; `begins` are the nodes looked for."""

    def __init__(self, net: MaskedGraph, graph: fx.Graph) -> None:
        self.net, self.graph = net, graph
        self.begins: set[fx.Node] = set()
        self._device = next(net.parameters()).device
        self._values: dict[fx.Node, _Path | _Known] = {}
        self._writes = any(writes_in_place(node) for node in graph.nodes)

    def run(self, inputs: Iterable[Any]) -> None:
        waiting = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "output":
                return
            if node.op == "placeholder":
                self._values[node] = self._input(next(waiting, node.args[0] if node.args else None))
                continue
            try:
                self._values[node] = self._attribute(str(node.target)) if node.op == "get_attr" else self._step(node)
            except torch.OutOfMemoryError:
                raise
            except Exception:  # what does not run here is told of, with its place, where paths are followed
                self._values[node] = _Path()

    def _input(self, value: Any) -> _Path | _Known:
        def start(item: Any) -> Any:
            if not isinstance(item, Tensor):
                return item
            integers = not item.is_floating_point() and not item.is_complex()
            return item.detach().to(self._device, copy=self._writes) if integers else _Path()

        started = map_leaves(start, value)
        return started if isinstance(started, _Path) else _Known(started, data=True)

    def _attribute(self, target: str) -> _Known:
        way, _, last = target.rpartition(".")
        owner: Any = self.net.get_submodule(way) if way else self.net.shell
        value = getattr(owner, last)
        if not isinstance(value, Tensor):
            return _Known(value)
        learned = isinstance(value, nn.Parameter) or isinstance(owner, MaskedLayer)
        return _Known(value.detach().clone() if self._writes else value.detach(), learned=learned)

    def _step(self, node: fx.Node) -> _Path | _Known:
        known = [self._values[used] for used in node.all_input_nodes]
        args: Any = map_arg(node.args, self._value)
        kwargs: Any = map_arg(node.kwargs, self._value)
        if node.target in JOINING and any(isinstance(item, _Path) for item in known):  # what reads one reads them all
            self.begins |= frozenset[fx.Node]().union(*(item.origins for item in known if isinstance(item, _Known)))
        if args and isinstance(args[0], (tuple, list, dict)) and any(isinstance(item, _Path) for item in leaves(args)):
            result = self._from_container(node, args, kwargs)
            return result if isinstance(result, _Path) else _Known(result, data=True)
        if any(isinstance(item, _Path) for item in leaves((args, kwargs))):
            return _Path()
        module = self.net.get_submodule(str(node.target)) if node.op == "call_module" else None
        inputs = [item for item in known if isinstance(item, _Known)]
        data = any(item.data for item in inputs)
        origins = frozenset[fx.Node]().union(*(item.origins for item in inputs))
        ruled = (node_rule(node) if module is None else module_rule(module)) is not None
        if data and self._begins_here(node, module, inputs, origins, ruled):
            return _Path()
        result = execute(node, args, kwargs) if module is None else evaluating_copy(module)(*args, **kwargs)
        if short_name(node) in _ALIKE | _NEW or all(isinstance(item, _PLAIN) for item in leaves(result)):
            data = False
        if not data or not any(isinstance(item, Tensor) and item.is_floating_point() for item in leaves(result)):
            origins = frozenset()
        elif not origins or not ruled:
            origins = frozenset({node})
        learned = any(item.learned for item in inputs) or _has_parameters(module)
        return _Known(result, data, learned, origins)

    def _value(self, node: fx.Node) -> Any:
        known = self._values[node]
        return known.value if isinstance(known, _Known) else known

    def _from_container(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """A part of an input that holds several tensors."""
        if node.target is not operator.getitem and node.op != "call_method":
            return _Path()
        return execute(node, args, kwargs)

    def _begins_here(
        self,
        node: fx.Node,
        module: nn.Module | None,
        inputs: list[_Known],
        origins: frozenset[fx.Node],
        ruled: bool,
    ) -> bool:
        """Whether paths lead on from a node that reads data; notes where they begin."""
        if embeds(node, module):
            return True
        target, first = operator_name(node.target), inputs[0]
        table = first.learned and not first.data and isinstance(first.value, Tensor) and first.value.ndim > 1
        if module is None and target in _LOOK_UPS and table:  # an embedding written out
            self.begins.add(node)
            return True
        contracted = target in CONTRACTIONS and any(item.learned and not item.data for item in inputs)
        if not origins or not ruled or not (contracted or _has_parameters(module)):
            return False
        self.begins |= origins
        return True


def _has_parameters(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(), None) is not None
