"""The values of a path graph: path values, layer weights, learned constants; and what a factor counts for.

A *path value* descends from the model's input through data. Everything else is a constant: a plain tensor or number,
a `Learned` tensor (a parameter or something computed from parameters), the `Weight` of a masked layer or several such
weights `Combined`. Constants act on path values by their magnitude; `power` applies to learned ones only.

Where data decides what is looked at next, paths end: a `ComparedValue` constant was found by looking at path values
(a comparison, an argmax), an `Ended` one was selected by data (top-k, non-maximum suppression, indexing by what was
judged).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from growfx.errors import UnsupportedOperatorError
from growfx.passes.operators.nests import Leaf, leaves, map_leaves

__all__ = [
    "Combined",
    "ComparedValue",
    "Ended",
    "Learned",
    "NoPathRuleError",
    "PathValue",
    "Token",
    "Weight",
    "broadcast",
    "is_tensor",
    "mean_of",
    "move",
    "paths_in",
    "raw",
]


class NoPathRuleError(UnsupportedOperatorError):
    """Raised inside a rule that cannot follow its arguments; the interpreter adds node, operator and source line."""


@dataclass(slots=True, eq=False)
class PathValue(Leaf):
    """Sums of path products, one per unit.

    Attributes:
        tensor: float64, no negative element. Two path values that hold the same tensor object are the same value.
        bounded: it came from a sigmoid, softmax, tanh, hardsigmoid or normalization through data movement and constant
            factors only.
        divisor: a reciprocal of data. Its tensor holds the constant factors alone and carries no path.
        peak: an upper bound of the elements, None before the interpreter has looked.
    """

    tensor: Tensor
    bounded: bool = False
    divisor: bool = False
    peak: float | None = None

    def same(self, *, bounded: bool | None = None) -> PathValue:
        """The same value after an identity rule."""
        return PathValue(self.tensor, self.bounded if bounded is None else bounded, self.divisor, self.peak)


@dataclass(slots=True, eq=False)
class Learned(Leaf):
    """A constant that is a parameter or was computed from parameters."""

    tensor: Tensor


@dataclass(slots=True, eq=False)
class Weight(Leaf):
    """The effective weight of a masked layer, used directly by the graph rather than through its module.

    Attributes:
        layer: the layer's name.
        tensor: the signed effective weight after `steps`.
        applied: the signed weight in the layer's own layout, when it was transformed elementwise; else None.
        steps: what was done to it since the layer's own layout (data movement, edges taken out), to be repeated on the
            magnitudes: functions of the run and the magnitudes.
        shifts: the data movement among them.
    """

    layer: str
    tensor: Tensor
    applied: Tensor | None = None
    steps: tuple[Callable[[Any, Tensor], Tensor], ...] = ()
    shifts: tuple[Callable[[Tensor], Tensor], ...] = ()


@dataclass(slots=True, eq=False)
class Combined(Leaf):
    """What was made of the weights of masked layers: joined, added, multiplied with each other, averaged.

    Attributes:
        tensor: the signed result.
        layers: names of the layers.
        size: the same of the magnitudes, as a function of the run.
    """

    tensor: Tensor
    layers: tuple[str, ...]
    size: Callable[[Any], Tensor]


@dataclass(slots=True, eq=False)
class ComparedValue(Leaf):
    """A constant found by looking at path values: a comparison, an argmax. It acts as what it is on the path graph.

    Attributes:
        tensor: its value on the path graph.
        sources: the path values looked at. Paths end there as soon as the comparison selects something.
        step: what it carries where it goes on as data (a spike, a sign), in its shape, if it was moved or averaged
            since it was found; None where that is the value looked at, or nothing.
    """

    tensor: Tensor
    sources: tuple[PathValue, ...]
    step: PathValue | None = None

    def carried(self) -> PathValue | None:
        """The paths of a step that goes on as data; None for other comparisons."""
        if not self.tensor.is_floating_point():
            return None
        source = self.sources[0]
        alone = len(self.sources) == 1 and source.tensor.shape == self.tensor.shape
        return source.same() if self.step is None and alone else self.step


@dataclass(slots=True, eq=False)
class Ended(Leaf):
    """What data selected, and all that is computed from it: no path runs through it, and its value is not known.

    Attributes:
        tensor: a tensor on the meta device in its place, of the shape it had when the network was recorded; None for
            a tuple of results.
    """

    tensor: Tensor | None


def paths_in(*nests: Any) -> list[PathValue]:
    """All path values in the nests."""
    return [item for item in leaves(nests) if isinstance(item, PathValue)]


def raw(nest: Any) -> Any:
    """The nest with plain tensors in place of path values and of constants of a kind."""
    return map_leaves(lambda item: item.tensor if isinstance(item, _VALUES) else item, nest)


def is_tensor(item: Any) -> bool:
    """Whether an operand is a tensor of any kind."""
    return isinstance(item, (Tensor, *_VALUES))


def mean_of(tensor: Tensor) -> float:
    """The mean of all elements, a number held fixed; one where there are no values, zero where nothing is."""
    if not tensor.numel():
        return 0.0
    return 1.0 if tensor.is_meta else float(tensor.detach().mean())


def move(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function that only moves, repeats or drops elements on the tensors of path values."""
    sources = paths_in(args, kwargs)
    bounded = all(source.bounded for source in sources)
    divisor = all(source.divisor for source in sources)
    peaks = [source.peak for source in sources if source.peak is not None]
    peak = max(peaks) if len(peaks) == len(sources) else None
    tensors = {id(source.tensor) for source in sources}

    def wrap(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        if id(item) in tensors:
            return next(source.same() for source in sources if source.tensor is item)
        return PathValue(item, bounded, divisor, peak)

    return map_leaves(wrap, function(*raw(args), **raw(kwargs)))


def broadcast(value: PathValue, other: Any) -> PathValue:
    """`value` in the shape that an elementwise operation with `other` gives."""
    if isinstance(other, _VALUES):
        other = other.tensor
    if not isinstance(other, Tensor):
        return value
    shape = torch.broadcast_shapes(value.tensor.shape, other.shape)
    if shape == value.tensor.shape:
        return value
    return PathValue(value.tensor.expand(shape), value.bounded, value.divisor, value.peak)


@dataclass(slots=True, eq=False)
class Token(Learned):
    """Integer data from an input (token ids): not a path itself, but the source of paths where it is embedded."""


_VALUES = (PathValue, Learned, Weight, Combined, ComparedValue, Ended)
