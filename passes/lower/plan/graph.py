"""A network as kernels of the native runtime, before memory is planned: nodes that name their operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from growfx.runtime.native.plan import Constant, Shape

__all__ = ["INPUT", "RESHAPE", "Chained", "Graph", "Node", "Operand"]

# Nodes that are no step: what the caller gives, and another shape of the same memory.
INPUT, RESHAPE = "input", "reshape"


@dataclass(eq=False)
class Chained:
    """An operation on each number of a node's result; see `growfx.runtime.native.plan.Post`."""

    operation: str
    operand: Operand | None = None
    a: float = 0.0
    b: float = 0.0


@dataclass(eq=False)
class Node:
    """A result, and the kernel that computes it; attributes as of `growfx.runtime.native.plan.Step`."""

    kernel: str
    inputs: list[Operand]
    shape: Shape
    ints: list[int] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)
    post: list[Chained] = field(default_factory=list)

    @property
    def operands(self) -> Iterator[Operand]:
        """All that it reads."""
        yield from self.inputs
        for chained in self.post:
            if chained.operand is not None:
                yield chained.operand


Operand = Node | Constant


@dataclass
class Graph:
    """Nodes in an order in which they can be computed.

    Attributes:
        nodes: all of them.
        inputs, outputs: of the network.
    """

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Node]

    def uses(self) -> Counter[int]:
        """How often each node is read, by its `id`; outputs are read once more."""
        counts = Counter(id(operand) for node in self.nodes for operand in node.operands)
        counts.update(id(node) for node in self.outputs)
        return counts

    def replace(self, replaced: dict[int, Node]) -> None:
        """Read other nodes in the place of some, given by `id`, and drop those."""

        def final(operand: Operand) -> Operand:
            while isinstance(operand, Node) and id(operand) in replaced:
                operand = replaced[id(operand)]
            return operand

        for node in self.nodes:
            node.inputs = [final(operand) for operand in node.inputs]
            for chained in node.post:
                chained.operand = None if chained.operand is None else final(chained.operand)
        self.outputs = [node for out in self.outputs if isinstance(node := final(out), Node)]
        self.nodes = [node for node in self.nodes if id(node) not in replaced]

    def drop_unused(self) -> None:
        """Drop nodes that no output needs."""
        needed: set[int] = {id(node) for node in (*self.inputs, *self.outputs)}
        for node in reversed(self.nodes):
            if id(node) in needed:
                needed.update(id(operand) for operand in node.operands)
        self.nodes = [node for node in self.nodes if id(node) in needed]
