"""Constants that repeat themselves, as biases of relative positions do: a table, and places in it."""

from __future__ import annotations

import torch
from torch import Tensor

from growfx.passes.lower.plan.graph import INPUT, RESHAPE, Graph, Node, Operand
from growfx.runtime.native.plan import Constant, Size

__all__ = ["look_up_repeats"]

_LEAST = 1 << 14  # numbers; of fewer, nothing is to be saved
# A table is taken where it saves so much of the bytes: about these for a number, and for a place, which is an argument.
_WORTH, _VALUE_BYTES, _PLACE_BYTES = 0.6, 3.2, 2.0
# Their constants are weights, which are stored as such.
_LAYERS = ("convolution", "deconvolution", "gated_convolution", "linear")


def look_up_repeats(graph: Graph) -> None:
    """Replace constants that repeat themselves by nodes that take them from a table when the network is opened."""
    made: dict[int, Node | None] = {}
    nodes: list[Node] = []

    def looked_up(operand: Operand) -> Operand:
        if isinstance(operand, Node) or operand.mask is not None:
            return operand
        if id(operand) not in made:
            new = _from_table(operand.tensor)
            nodes.extend(new)
            made[id(operand)] = new[-1] if new else None
        return made[id(operand)] or operand

    for node in graph.nodes:
        if node.kernel not in _LAYERS:
            node.inputs = [looked_up(operand) for operand in node.inputs]
        for chained in node.post:
            chained.operand = None if chained.operand is None else looked_up(chained.operand)
    inputs = sum(node.kernel == INPUT for node in graph.nodes)
    graph.nodes[inputs:inputs] = nodes


def _from_table(value: Tensor) -> list[Node]:
    found = _repeated_columns(value)
    if found is None:
        return []
    table, places = found
    shape = (Size(0, len(table)), Size(0, len(places)))
    taken = Node("gather", [Constant(table)], shape, [1, *places])
    return [taken, Node(RESHAPE, [taken], tuple(Size(0, size) for size in value.shape))]


def _repeated_columns(value: Tensor) -> tuple[Tensor, list[int]] | None:
    """The table (rows, columns) and the places in it that make up a float32 tensor, its first axes taken as rows.

    Returns:
        The table of the fewest bytes; None where none is worth it.
    """
    best, bytes_of_best = None, _WORTH * _VALUE_BYTES * value.numel()
    if value.numel() < _LEAST:
        return None
    bits = value.contiguous().view(torch.int32)  # so that a NaN repeats itself, and a negative zero is no other
    for axes in range(value.dim()):
        columns = bits.reshape(1, -1) if axes == 0 else bits.flatten(0, axes - 1).flatten(1)
        rows, count = columns.shape
        # A column repeats itself where its first number does.
        if _bytes(count, rows * len(columns[0].unique())) >= bytes_of_best:
            continue
        table, places = columns.unique(dim=1, return_inverse=True)
        size = _bytes(count, table.numel())
        if size < bytes_of_best:
            best, bytes_of_best = (table.contiguous().view(torch.float32), places), size
    return None if best is None else (best[0], best[1].tolist())


def _bytes(places: int, values: int) -> float:
    return _PLACE_BYTES * places + _VALUE_BYTES * values
