"""The plan of a network for the native runtime: steps in order, constants, and which results share memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from torch import Tensor

__all__ = ["OPERATIONS", "WITH_OPERAND", "Constant", "Plan", "Post", "Shape", "Size", "Step", "Value"]

# By their number in the file: the order of `enum class Op` in `operations.h`.
OPERATIONS: Final = (
    *("add", "mul", "sub", "rsub", "div", "rdiv", "maximum", "minimum", "scale", "clamp", "relu", "hard_sigmoid"),
    *("hard_swish", "sigmoid", "silu", "tanh", "gelu", "gelu_tanh", "leaky", "elu", "exp", "log", "sqrt", "rsqrt"),
    *("reciprocal", "abs", "square", "softplus", "mish", "power", "sin", "cos", "erf", "greater", "less", "equal"),
    *("round", "floor", "greater_than", "less_than", "at_least", "at_most", "equal_to"),
)
WITH_OPERAND: Final = frozenset(
    {
        *("add", "mul", "sub", "rsub", "div", "rdiv", "maximum", "minimum"),
        *("greater_than", "less_than", "at_least", "at_most", "equal_to"),
    }
)


class Size(NamedTuple):
    """A size of an axis: `per_batch` times the batch size, plus `fixed`."""

    per_batch: int
    fixed: int

    def at(self, batch: int) -> int:
        """The size at a batch size."""
        return self.per_batch * batch + self.fixed

    def __str__(self) -> str:
        grows = "batch" if self.per_batch == 1 else f"{self.per_batch}*batch"
        if not self.per_batch:
            return str(self.fixed)
        return f"{grows} + {self.fixed}" if self.fixed else grows


Shape = tuple[Size, ...]


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that is in the file.

    Attributes:
        tensor: float32, contiguous, on the CPU.
        mask: bool, of its shape: the elements that are stored; None for all.
    """

    tensor: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Value:
    """A tensor that every run computes; values that share a `slot` share memory."""

    shape: Shape
    slot: int


@dataclass(frozen=True)
class Post:
    """An operation on each number of a result: a name of `OPERATIONS`, its operand's id (or None), its numbers."""

    operation: str
    operand: int | None = None
    a: float = 0.0
    b: float = 0.0


@dataclass(frozen=True)
class Step:
    """One call of a kernel.

    Attributes:
        kernel: its name in the library.
        inputs: ids of values; those of constants follow, beginning with the number of values.
        output: id of a value.
        ints, floats: as the kernel wants them.
        post: what is done to each number of the result.
    """

    kernel: str
    inputs: Sequence[int]
    output: int
    ints: Sequence[int] = ()
    floats: Sequence[float] = ()
    post: Sequence[Post] = ()


@dataclass(frozen=True)
class Plan:
    """A network as the native runtime runs it.

    Attributes:
        values: by id.
        constants: by id minus the number of values.
        steps: in the order in which they run.
        inputs, outputs: ids of values.
        folded: number of norms and factors that went into weights.
    """

    values: tuple[Value, ...]
    constants: tuple[Constant, ...]
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    folded: int = field(default=0, compare=False)

    @property
    def slots(self) -> int:
        """Number of buffers."""
        return max((value.slot for value in self.values), default=-1) + 1

    def memory(self, batch: int) -> int:
        """Bytes of all buffers at a batch size."""
        sizes = [0] * self.slots
        for value in self.values:
            elements = 1
            for size in value.shape:
                elements *= size.at(batch)
            sizes[value.slot] = max(sizes[value.slot], 4 * elements)
        return sum(sizes)

    def __str__(self) -> str:
        lines: list[str] = []
        for step in self.steps:
            shape = ", ".join(map(str, self.values[step.output].shape))
            operands = ", ".join(self._name(i) for i in step.inputs)
            post = "".join(f" {p.operation}" for p in step.post)
            lines.append(f"{self._name(step.output)}[{shape}] = {step.kernel}({operands}){post}")
        return "\n".join(lines)

    def _name(self, identity: int) -> str:
        known = len(self.values)
        return f"v{identity}" if identity < known else f"c{identity - known}"
