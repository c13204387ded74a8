"""Numbers that remember the graph node they came from, so that a recorded graph keeps its batch size free."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

from torch import fx

__all__ = ["NodeSource", "TracedFloat", "TracedInt", "traced"]


class NodeSource(Protocol):
    """A recording under way: gives the node of a computed number."""

    def emit_number(self, function: Callable[..., Any], args: tuple[Any, ...]) -> fx.Node:
        """Append the node that computes ``function(*args)``."""
        ...

    def decide(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Python is about to branch on ``function(*args)``, which depends on values of the input."""
        ...


class _Traced:
    """What a number remembers: the recording it belongs to and how to make its node, once and only when used."""

    _source: NodeSource
    _make: Callable[[], fx.Node]
    _node: fx.Node | None
    _from_data: bool

    def node_in(self, source: NodeSource) -> fx.Node | None:
        """The number's node in the recording `source`; None if it is a left-over of another recording."""
        if self._source is not source:
            return None
        if self._node is None:
            self._node = self._make()
        return self._node

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A model may keep a size it computed; a copy of the model keeps the number alone.
        value = plain(self)
        return type(value), (value,)


class TracedInt(_Traced, int):
    """An int of a recording; its arithmetic is recorded, comparisons give plain bools."""

    __hash__ = int.__hash__


class TracedFloat(_Traced, float):
    """A float of a recording, from dividing sizes."""

    __hash__ = float.__hash__


def traced(value: Any, source: NodeSource, make: Callable[[], fx.Node], from_data: bool = False) -> Any:
    """`value` as a number that remembers `make`; other values are returned unchanged.

    `from_data`: it depends on values of the input; comparing it would fix the recording to these values.
    """
    if type(value) is int:
        number: TracedInt | TracedFloat = TracedInt(value)
    elif type(value) is float:
        number = TracedFloat(value)
    else:
        return value
    number._source, number._make, number._node, number._from_data = source, make, None, from_data
    return number


def plain(value: Any) -> Any:
    """The number without its memory."""
    if isinstance(value, TracedInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, TracedFloat) else value


def _recorded(function: Callable[..., Any], *args: Any) -> Any:
    numbers = [a for a in args if isinstance(a, _Traced)]
    source = numbers[0]._source
    value = function(*map(plain, args))
    from_data = any(number._from_data for number in numbers)
    return traced(value, source, lambda: source.emit_number(function, args), from_data)


def _binary(function: Callable[..., Any], reflected: bool) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return _recorded(function, other, self) if reflected else _recorded(function, self, other)

    return method


def _unary(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return _recorded(function, self, *args)

    return method


def _deciding(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *others: Any) -> Any:
        for number in (self, *others):
            if isinstance(number, _Traced) and number._from_data:
                number._source.decide(function, (self, *others))
                break
        return function(plain(self), *map(plain, others))

    return method


def _give_arithmetic(kind: type) -> None:
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(kind, f"__{name}__", _deciding(getattr(operator, name)))
    kind.__bool__ = _deciding(bool)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
        function = getattr(operator, name)
        setattr(kind, f"__{name}__", _binary(function, reflected=False))
        setattr(kind, f"__r{name}__", _binary(function, reflected=True))
    for name, function in {
        "neg": operator.neg,
        "pos": operator.pos,
        "abs": abs,
        "ceil": math.ceil,
        "floor": math.floor,
        "trunc": math.trunc,
        "round": round,
    }.items():
        setattr(kind, f"__{name}__", _unary(function))


_give_arithmetic(TracedInt)
_give_arithmetic(TracedFloat)
