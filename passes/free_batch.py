"""Free the batch size in a recording: numbers that Python computed from it follow it again.

A size keeps its origin while Python computes with it, but not everywhere: `len(x)`, `int(n / 2)` and numpy's functions
give plain numbers. Two recordings of the same forward, with two and with three rows, tell which of the numbers in them
depend on the batch, and how.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from growfx.recorded import graph_ops

__all__ = ["free_batch"]


def free_batch(graph: fx.Graph, other: fx.Graph) -> bool:
    """Make numbers of `graph`, recorded with two rows, follow the batch size where those of `other`, with three, do.

    Only numbers that grow in proportion to the batch size plus a constant are known. Returns whether any was found;
    False as well where the graphs differ in more than numbers, and then nothing is changed.
    """
    ours, theirs = list(graph.nodes), list(other.nodes)
    if len(ours) != len(theirs):
        return False
    matching = dict(zip(theirs, ours, strict=True))
    changes: list[tuple[fx.Node, Any, Any]] = []
    try:
        for a, b in zip(ours, theirs, strict=True):
            if a.op != b.op or not _same_target(a, b):
                return False
            args, kwargs = _merged(a.args, b.args, matching), _merged(dict(a.kwargs), dict(b.kwargs), matching)
            if _grows(args) or _grows(kwargs):
                changes.append((a, args, kwargs))
    except _DifferentError:
        return False
    if not changes:
        return False
    batch = _batch_node(graph)
    if batch is None:
        return False
    for node, args, kwargs in changes:
        with graph.inserting_before(node):
            node.args, node.kwargs = _written(graph, batch, args), _written(graph, batch, kwargs)
    return True


class _DifferentError(Exception):
    """Two recordings differ in more than numbers."""


class _Growing:
    """A number that is `slope` times the batch size plus `offset`."""

    def __init__(self, two: float, three: float) -> None:
        self.slope = three - two
        self.offset = two - 2 * self.slope


def _same_target(a: fx.Node, b: fx.Node) -> bool:
    # Constants that one recording met are other tensors in the other one, of the same value where they are constant.
    return a.target == b.target or (a.op == "get_attr" and b.op == "get_attr")


def _merged(a: Any, b: Any, matching: dict[fx.Node, fx.Node]) -> Any:
    """The arguments `a`, with the numbers that are others in `b` as `_Growing`."""
    if isinstance(a, fx.Node):
        if not isinstance(b, fx.Node) or matching.get(b) is not a:
            raise _DifferentError
        return a
    if isinstance(a, (tuple, list)):
        if not isinstance(b, (tuple, list)) or len(a) != len(b):
            raise _DifferentError
        return (
            type(a)(_merged(x, y, matching) for x, y in zip(a, b, strict=True))
            if type(a) in (tuple, list)
            else (tuple(_merged(x, y, matching) for x, y in zip(a, b, strict=True)))
        )
    if isinstance(a, dict):
        if not isinstance(b, dict) or list(a) != list(b):
            raise _DifferentError
        return {key: _merged(value, b[key], matching) for key, value in a.items()}
    if isinstance(a, slice):
        if not isinstance(b, slice):
            raise _DifferentError
        return slice(*(_merged(getattr(a, k), getattr(b, k), matching) for k in ("start", "stop", "step")))
    if isinstance(a, (int, float)) and not isinstance(a, bool) and type(a) is type(b):
        return a if a == b else _Growing(a, b)
    if isinstance(a, Tensor) or isinstance(b, Tensor) or type(a) is not type(b) or a != b:
        raise _DifferentError
    return a


def _grows(nest: Any) -> bool:
    if isinstance(nest, (tuple, list)):
        return any(map(_grows, nest))
    if isinstance(nest, dict):
        return any(map(_grows, nest.values()))
    if isinstance(nest, slice):
        return any(map(_grows, (nest.start, nest.stop, nest.step)))
    return isinstance(nest, _Growing)


def _written(graph: fx.Graph, batch: fx.Node, nest: Any) -> Any:
    if isinstance(nest, _Growing):
        node = graph.call_function(graph_ops.affine, (batch, nest.slope, nest.offset))
        node.meta.update(shape=None, source="", module="", number=True)
        return node
    if isinstance(nest, (tuple, list)):
        return type(nest)(_written(graph, batch, value) for value in nest)
    if isinstance(nest, dict):
        return {key: _written(graph, batch, value) for key, value in nest.items()}
    if isinstance(nest, slice):
        return slice(*(_written(graph, batch, value) for value in (nest.start, nest.stop, nest.step)))
    return nest


def _batch_node(graph: fx.Graph) -> fx.Node | None:
    """A node with the size of the first input that is a tensor, made at the start of the graph."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        if node.meta.get("shape"):
            with graph.inserting_after(inputs[-1]):
                size = graph.call_method("size", (node, 0))
            size.meta.update(shape=None, source="", module="", number=True)
            return size
    return None
