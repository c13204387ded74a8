"""What the rules of operators make nodes with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from growfx.passes.lower.plan.calls import Calls, Reference
from growfx.passes.lower.plan.graph import INPUT, RESHAPE, Chained, Graph, Node, Operand
from growfx.passes.operators.nests import leaves
from growfx.runtime.native.plan import Constant, Shape, Size

__all__ = ["Arguments", "Builder", "NoKernelError", "Rule", "as_number", "axis_of", "is_empty", "numbers", "view_ops"]

# Arguments of a call by name, and the shapes of its results.
Arguments = dict[str, Any]
Rule = Callable[["Builder", Arguments, Sequence[Shape]], "Operand | Sequence[Operand | None]"]

# A constant is computed again where that takes less than this share of its bytes.
_WORTH = 0.6
_LARGEST_EXACT = 1 << 24  # float32 holds all whole numbers up to it
_REPEATING = ("aten.expand", "aten.view", "aten.reshape", "aten._unsafe_view", "aten.clone", "aten.unsqueeze")


class NoKernelError(Exception):
    """A form of an operator that no kernel computes; the text says which."""


class Builder:
    """Makes nodes of calls.

    Attributes:
        nodes: so far, in order.
    """

    def __init__(self, calls: Calls, mask_of: Callable[[Tensor], Tensor | None], rules: Mapping[str, Rule]) -> None:
        self._calls, self._mask_of, self._rules = calls, mask_of, rules
        self._constants: dict[tuple[tuple[int, ...], bytes], Constant] = {}
        self._sizes: dict[int, float] = {}
        self._made: dict[int, Operand] = {}
        self.nodes: list[Node] = []
        self._inputs = [Node(INPUT, [], calls.shapes[number]) for number in calls.inputs]
        self._made.update(zip(calls.inputs, self._inputs, strict=True))
        self.nodes += self._inputs

    # -- operands -----------------------------------------------------------------------------------------------------

    def shape(self, reference: Reference) -> Shape:
        """The shape of a tensor."""
        return self._calls.shapes[reference.number]

    def rank(self, reference: Reference) -> int:
        """Its number of axes."""
        return len(self.shape(reference))

    def dtype(self, reference: Reference) -> torch.dtype:
        """The type that a tensor has in torch; in kernels, all numbers are floats."""
        return self._calls.dtypes[reference.number]

    def is_bool(self, value: Any) -> bool:
        """Whether an argument is true or false, or a tensor of such: numbers 1 and 0 in kernels."""
        return self.dtype(value) == torch.bool if isinstance(value, Reference) else isinstance(value, bool)

    def is_constant(self, value: Any) -> bool:
        """Whether an argument is a tensor that is the same in every run."""
        return isinstance(value, Reference) and value.number in self._calls.constants

    def value(self, reference: Reference) -> Tensor:
        """A constant's value.

        Raises:
            NoKernelError: it is computed.
        """
        if reference.number not in self._calls.constants:
            raise NoKernelError("with an argument that must be the same in every run, and is computed")
        return self._calls.constants[reference.number]

    def operand(self, reference: Reference) -> Operand:
        """The node or constant of a tensor.

        A constant that is much larger than what it is computed from, such as a table of relative positions, is computed
        again when the network is opened.
        """
        number = reference.number
        if number not in self._made and self.is_constant(reference):
            self._made[number] = self._recomputed(number) or self._stored(self.value(reference))
        return self._made[number]

    def _stored(self, value: Tensor) -> Constant:
        mask = self._mask_of(value)
        if mask is not None:
            return self.constant(value, mask)
        made = self.constant(value)
        key = (tuple(value.shape), made.tensor.numpy().tobytes())
        return self._constants.setdefault((key[0], hashlib.sha256(key[1]).digest()), made)

    def _recomputed(self, number: int) -> Operand | None:
        call = self._calls.makers.get(number)
        if call is None or call.results[0] != number or self._made_bytes(number) >= self._stored_bytes(number) * _WORTH:
            return None
        nodes, known = len(self.nodes), set(self._made)
        try:
            made = self._rules[call.operator](self, call.arguments, [self._calls.shapes[number]])
        except NoKernelError:
            del self.nodes[nodes:]
            for other in self._made.keys() - known:  # made of the nodes that are gone
                del self._made[other]
            return None
        return made if isinstance(made, (Node, Constant)) else made[0]

    def _stored_bytes(self, number: int) -> float:
        """About how many bytes a constant takes in the file; of indices, as arguments of a step."""
        value = self._calls.constants[number]
        mask = self._mask_of(value)
        each = 3.2 if value.is_floating_point() else 2.0
        return each * (value.numel() if mask is None else int(mask.sum()))

    def _made_bytes(self, number: int) -> float:
        """The same of what it is computed from."""
        call = self._calls.makers.get(number)
        value = self._calls.constants[number]
        if call is None or call.operator not in self._rules or self._mask_of(value) is not None:
            return math.inf
        read = {x.number for x in leaves(call.arguments) if isinstance(x, Reference)}
        if not all(_is_exact(self._calls.constants[x]) for x in (number, *read)):
            return math.inf
        return sum(map(self._least_bytes, read))

    def _least_bytes(self, number: int) -> float:
        if number not in self._sizes:
            self._sizes[number] = min(self._stored_bytes(number), self._made_bytes(number))
        return self._sizes[number]

    def repeated_matrix(self, reference: Reference) -> Constant | None:
        """The matrix that a tensor (batch, rows, columns) repeats; None where it is not one matrix again and again.

        Torch expands the weight of a linear layer so where the layer's input is not contiguous.
        """
        number = reference.number
        value = self._calls.constants.get(number)
        if value is None:
            return _expanded_matrix(self.operand(reference))
        if value.dim() != 3 or not bool((value == value[:1]).all()):
            return None
        while (call := self._calls.makers.get(number)) is not None and call.operator in _REPEATING:
            number = next(iter(call.arguments.values())).number
            source = self._calls.constants[number]
            if source.shape == value.shape[1:] and torch.equal(source, value[0]):
                operand = self.operand(Reference(number))
                return operand if isinstance(operand, Constant) else None
        return self._stored(value[0])

    def node(self, reference: Reference) -> Node:
        """The same, as a node also where it is a constant."""
        operand = self.operand(reference)
        return operand if isinstance(operand, Node) else self.view(operand, (), self.shape(reference))

    def constant(self, tensor: Tensor, mask: Tensor | None = None) -> Constant:
        """A tensor as a constant of the file."""
        if tensor.is_complex():
            raise NoKernelError("of complex numbers")
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        return Constant(values, None if mask is None or bool(mask.all()) else mask.contiguous())

    def keep(self, number: int, operand: Operand) -> None:
        """Note what a call resulted in."""
        self._made[number] = operand

    def finished(self) -> Graph:
        """All nodes, with the outputs."""
        outputs = [self.node(Reference(number)) for number in self._calls.outputs]
        once: set[int] = set()
        for node in self.nodes:
            if node.kernel != INPUT and all(isinstance(x, Constant) or id(x) in once for x in node.operands):
                once.add(id(node))
        # The runtime computes what depends on constants alone when it opens the network.
        first = [node for node in self.nodes if id(node) in once]
        rest = [node for node in self.nodes if id(node) not in once and node.kernel != INPUT]
        return Graph([*self._inputs, *first, *rest], self._inputs, outputs)

    # -- nodes --------------------------------------------------------------------------------------------------------

    def add(
        self,
        kernel: str,
        inputs: Sequence[Operand | None],
        shape: Shape,
        ints: Sequence[int] = (),
        floats: Sequence[float] = (),
    ) -> Node:
        """A new node; operands that are None are left out."""
        node = Node(kernel, [x for x in inputs if x is not None], tuple(shape), list(ints), list(floats))
        self.nodes.append(node)
        return node

    def pointwise(self, x: Operand, shape: Shape, *operations: Chained) -> Node:
        """Operations on each number."""
        node = self.add("pointwise", [x], shape)
        node.post = list(operations)
        return node

    def reshape(self, x: Operand, shape: Shape) -> Operand:
        """The same numbers in another shape."""
        if isinstance(x, Node):
            return x if x.shape == shape else self.add(RESHAPE, [x], shape)
        if any(size.per_batch for size in shape):
            raise NoKernelError("of a constant with a size that grows with the batch")
        sizes = [size.fixed for size in shape]
        return Constant(x.tensor.reshape(sizes), None if x.mask is None else x.mask.reshape(sizes))

    def converted(self, reference: Reference, dtype: torch.dtype) -> Operand:
        """A tensor's numbers as those of a tensor of another type that they are written into.

        Raises:
            NoKernelError: they would be rounded to whole numbers.
        """
        if dtype == torch.bool:
            return self.truth(reference)
        if self.dtype(reference).is_floating_point and not dtype.is_floating_point:
            raise NoKernelError(f"to {dtype}")
        return self.operand(reference)

    def truth(self, reference: Reference) -> Operand:
        """Whether each number of a tensor is another than 0, which a NaN is."""
        x = self.operand(reference)
        if self.is_bool(reference):
            return x
        return self.pointwise(x, self.shape(reference), Chained("equal", a=0.0), Chained("scale", a=-1.0, b=1.0))

    def view(self, x: Operand, ops: Sequence[int], shape: Shape) -> Node:
        """Other numbers of a tensor in another order; `ops` of `view_ops`."""
        return self.add("view", [x], shape, ops)

    def permute(self, x: Operand, shape: Shape, order: Sequence[int]) -> Node:
        """A tensor of `shape` with its axes in another order."""
        return self.view(x, view_ops.permute(order), tuple(shape[i] for i in order))


class view_ops:  # noqa: N801 (a namespace)
    """The integers of the operations of `view`, as `steps_views.cpp` reads them."""

    @staticmethod
    def permute(order: Sequence[int]) -> list[int]:
        """Axes in another order."""
        return [0, *order]

    @staticmethod
    def slice(axis: int, start: int, step: int, length: Size) -> list[int]:
        """Some places of an axis."""
        return [1, axis, start, step, length.per_batch, length.fixed]

    @staticmethod
    def expand(axis: int, length: Size) -> list[int]:
        """Repeat an axis of size 1."""
        return [2, axis, length.per_batch, length.fixed]

    @staticmethod
    def flip(axis: int) -> list[int]:
        """The other way round."""
        return [3, axis]

    @staticmethod
    def insert(axis: int) -> list[int]:
        """A new axis of size 1."""
        return [4, axis]

    @staticmethod
    def drop(axis: int) -> list[int]:
        """Leave out an axis of size 1."""
        return [5, axis]

    @staticmethod
    def unfold(axis: int, size: int, step: int) -> list[int]:
        """Windows along an axis, as a new last axis."""
        return [6, axis, size, step]

    @staticmethod
    def broadcast(shape: Shape, target: Shape) -> list[int]:
        """Axes of size 1, and new first ones, repeated to a shape."""
        ops: list[int] = []
        for _ in range(len(target) - len(shape)):
            ops += view_ops.insert(0)
        padded = (*[Size(0, 1)] * (len(target) - len(shape)), *shape)
        for axis, (have, want) in enumerate(zip(padded, target, strict=True)):
            if have != want:
                ops += view_ops.expand(axis, want)
        return ops


def _is_exact(value: Tensor) -> bool:
    """Whether kernels, which compute with floats, give the numbers that torch does: small whole ones, or floats."""
    if value.is_floating_point() or value.dtype == torch.bool:
        return True
    if value.dtype not in (torch.int32, torch.int64) or value.numel() == 0:  # narrow ones wrap around
        return False
    low, high = value.aminmax()
    return max(-int(low), int(high)) <= _LARGEST_EXACT


def _expanded_matrix(operand: Operand) -> Constant | None:
    """The matrix that a view repeats along a new first axis, as often as there are rows in the batch."""
    while isinstance(operand, Node) and operand.kernel == RESHAPE and operand.shape == _shape_of(operand.inputs[0]):
        operand = operand.inputs[0]
    if not isinstance(operand, Node) or operand.kernel != "view" or len(operand.shape) != 3:
        return None
    source = operand.inputs[0]
    if not isinstance(source, Constant) or operand.ints != view_ops.broadcast(_shape_of(source), operand.shape):
        return None
    if source.tensor.dim() == 3 and source.tensor.shape[0] == 1:
        source = Constant(source.tensor[0], None if source.mask is None else source.mask[0])
    return source if _shape_of(source) == operand.shape[1:] else None


def _shape_of(operand: Operand) -> Shape:
    return operand.shape if isinstance(operand, Node) else tuple(Size(0, n) for n in operand.tensor.shape)


def as_number(value: Any, dtype: torch.dtype | None) -> float:
    """A plain number as a tensor of some type holds it: truth values are 0 and 1, whole numbers have no fraction.

    Raises:
        NoKernelError: it grows with the batch.
    """
    if isinstance(value, Size):
        raise NoKernelError("with a number that grows with the batch")
    if dtype is None or dtype.is_floating_point or dtype.is_complex:
        return float(value)
    return float(torch.tensor(value).to(dtype))


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front."""
    return axis + rank if axis < 0 else axis


def is_empty(shape: Shape) -> bool:
    """Whether a tensor of a shape has no elements, whatever the batch."""
    return Size(0, 0) in shape


def numbers(values: Any, count: int) -> list[int]:
    """A list of so many integers, of which one may stand for all.

    Raises:
        NoKernelError: one grows with the batch.
    """
    listed = list(values) if isinstance(values, (list, tuple)) else [values]
    if any(isinstance(value, Size) for value in listed):
        raise NoKernelError("with an argument that grows with the batch")
    return listed * count if len(listed) == 1 else listed
