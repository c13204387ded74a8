"""Give results memory: those that are never needed at the same time share a buffer."""

from __future__ import annotations

from math import prod

from growfx.passes.lower.plan.graph import INPUT, RESHAPE, Graph, Node, Operand
from growfx.runtime.native.plan import Constant, Plan, Post, Step, Value

__all__ = ["planned"]


def planned(graph: Graph, folded: int) -> Plan:
    """The plan of a graph."""
    return _Planner(graph, folded).plan()


class _Planner:
    """Goes through the nodes once, with the last use of each known."""

    def __init__(self, graph: Graph, folded: int) -> None:
        self._graph, self._folded = graph, folded
        self._values: list[Value] = []
        self._ids: dict[int, int] = {}
        self._constants: dict[int, int] = {}
        self._kept: list[Constant] = []
        self._free: list[int] = []
        self._sizes: list[int] = []
        self._last = self._last_uses()

    def plan(self) -> Plan:
        steps: list[tuple[Node, int]] = []
        for place, node in enumerate(self._graph.nodes):
            output = self._place(node)
            if node.kernel not in (INPUT, RESHAPE):
                steps.append((node, output))
            for operand in [*node.operands, node]:
                self._release(operand, place)
        made = [self._step(node, output) for node, output in steps]
        ids = {
            key: [self._ids[id(node)] for node in nodes]
            for key, nodes in (("inputs", self._graph.inputs), ("outputs", self._graph.outputs))
        }
        return Plan(
            tuple(self._values),
            tuple(self._kept),
            tuple(made),
            tuple(ids["inputs"]),
            tuple(ids["outputs"]),
            self._folded,
        )

    def _last_uses(self) -> dict[int, int]:
        """The place after which nothing reads a node's memory, by the `id` of the node that owns it."""
        last: dict[int, int] = {}
        for place, node in enumerate(self._graph.nodes):
            last.setdefault(id(_memory_of(node)), place)
            for operand in node.operands:
                if isinstance(operand, Node):
                    last[id(_memory_of(operand))] = place
        for node in self._graph.outputs:
            last[id(_memory_of(node))] = len(self._graph.nodes)
        # What depends on constants alone is computed once, and stays.
        once: set[int] = set()
        for node in self._graph.nodes:
            if node.kernel != INPUT and all(isinstance(x, Constant) or id(x) in once for x in node.operands):
                once.add(id(node))
                last[id(_memory_of(node))] = len(self._graph.nodes)
        return last

    def _place(self, node: Node) -> int:
        if node.kernel == RESHAPE:
            source = node.inputs[0]
            assert isinstance(source, Node)
            slot = self._values[self._ids[id(source)]].slot
        else:
            slot = self._slot(prod(size.at(1) for size in node.shape))
        self._ids[id(node)] = len(self._values)
        self._values.append(Value(node.shape, slot))
        return self._ids[id(node)]

    def _slot(self, size: int) -> int:
        """The free buffer that fits best, or must grow least; a new one where none is free."""
        if self._free:
            best = min(self._free, key=lambda slot: (max(size - self._sizes[slot], 0), abs(self._sizes[slot] - size)))
            self._free.remove(best)
            self._sizes[best] = max(self._sizes[best], size)
            return best
        self._sizes.append(size)
        return len(self._sizes) - 1

    def _release(self, operand: Operand, place: int) -> None:
        if not isinstance(operand, Node):
            return
        owner = _memory_of(operand)
        if self._last.get(id(owner)) == place:
            del self._last[id(owner)]
            self._free.append(self._values[self._ids[id(owner)]].slot)

    def _step(self, node: Node, output: int) -> Step:
        inputs = [self._operand(x) for x in node.inputs]
        post = [Post(c.operation, None if c.operand is None else self._operand(c.operand), c.a, c.b) for c in node.post]
        return Step(node.kernel, inputs, output, tuple(node.ints), tuple(node.floats), tuple(post))

    def _operand(self, operand: Operand) -> int:
        if isinstance(operand, Node):
            return self._ids[id(operand)]
        if id(operand) not in self._constants:
            self._constants[id(operand)] = len(self._kept)
            self._kept.append(operand)
        return len(self._values) + self._constants[id(operand)]


def _memory_of(node: Node) -> Node:
    while node.kernel == RESHAPE:
        source = node.inputs[0]
        assert isinstance(source, Node)
        node = source
    return node
