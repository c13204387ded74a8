"""Draw charts as inline SVG: lines and points with errors, bands, marked places, stacked areas, small multiples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from growfx.reporting.html.elements import Markup, join, tag

__all__ = ["Axis", "Band", "Place", "Series", "chart", "small_chart", "stacked_chart", "thinned"]

_WIDTH, _HEIGHT = 640.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 68.0, 20.0, 12.0, 44.0
_COLOURS: Final = 10
_MOST_MARKS, _MOST_POINTS = 200, 500  # of one series; more cannot be told apart on a screen


@dataclass(frozen=True)
class Axis:
    """The range of an axis; `log` scales need a positive `low`; `whole`: of numbers that are counted."""

    label: str
    low: float
    high: float
    log: bool = False
    whole: bool = False

    @classmethod
    def around(
        cls,
        label: str,
        values: Sequence[float],
        *,
        log: bool = False,
        whole: bool = False,
        least: float | None = None,
        margin: float = 0.06,
    ) -> Axis:
        """Return an axis that holds all values and a margin; `least` is the lowest end it may have."""
        log = log and min(values) > 1e-100  # below, a margin would end at zero
        low, high = min(values), max(values)
        if log:
            pad = max((math.log(high) - math.log(low)) * margin, 0.1)
            return cls(label, low / math.exp(pad), high * math.exp(pad), True)
        pad = (high - low) * margin or abs(high) * margin or 0.5
        return cls(label, low - pad if least is None else max(low - pad, least), high + pad, whole=whole)

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high one, at most one length outside of them."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        least = max(self.low**2 / self.high, 1e-300) if self.log else 0.0  # zero has no logarithm
        at = (math.log(max(value, least)) if self.log else value) - low
        return min(max(at / (high - low), -1.0), 2.0)

    def ticks(self) -> list[float]:
        """Return about five round numbers within the range."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [m * 10.0**e for e in range(first, last + 1) for m in steps]
                found = [tick for tick in found if self.low <= tick <= self.high]
                if len(found) <= 9:
                    break
            if len(found) > 1:
                return found[:: -(-len(found) // 9)]
        raw = (self.high - self.low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        step = max(step, 1.0) if self.whole else step
        first = math.ceil(self.low / step)
        return [round(n * step, 12) for n in range(first, math.floor(self.high / step) + 1)]


@dataclass(frozen=True)
class Series:
    """Points of a chart: their values, and what is told of each when it is pointed at.

    Attributes:
        errors: one standard deviation of each `y`, or None.
        colour: number of the colour; the same number, the same colour.
        faint: a thin broken line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    tips: Sequence[str] = ()
    errors: Sequence[float] | None = None
    line: bool = True
    marks: bool = True
    colour: int = 0
    faint: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two curves over the same `x`."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int = 0


@dataclass(frozen=True)
class Place:
    """A value of the horizontal axis that is marked by a line and named in the legend."""

    label: str
    x: float
    colour: int = 0


def thinned(count: int, most: int) -> list[int]:
    """Return at most `most` (at least two) of the numbers below `count`, evenly spread, the first and last among
    them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def chart(
    title: str,
    x: Axis,
    y: Axis,
    series: Sequence[Series],
    bands: Sequence[Band] = (),
    places: Sequence[Place] = (),
) -> Markup:
    """Return a chart with axes and a legend, as a figure with its title."""
    frame = _Frame(x, y)
    areas = [tag("path", d=frame.outline(b.x, b.low, b.high), class_=f"band {_colour(b.colour)}") for b in bands]
    lines = [frame.curve(one) for one in series if one.line and len(one.x) > 1]
    drawn = [
        frame.axes(),
        frame.clipped([*areas, *(frame.place(place) for place in places), *lines]),
        *(frame.marks(one) for one in series if one.marks),
    ]
    named = [(s.label, s.colour) for s in series if s.label] + [(p.label, p.colour) for p in places]
    return _figure(title, drawn, named)


def stacked_chart(
    title: str, x: Axis, y: Axis, positions: Sequence[float], layers: Sequence[tuple[str, Sequence[float]]]
) -> Markup:
    """Return areas on top of each other: for each layer its label and a value at each position."""
    frame = _Frame(x, y)
    below, drawn = [0.0] * len(positions), [frame.axes()]
    for number, (label, values) in enumerate(layers):
        above = [a + b for a, b in zip(below, values, strict=True)]
        drawn.append(
            tag("path", d=frame.outline(positions, below, above), class_=f"area {_colour(number)}", data_tip=label)
        )
        below = above
    return _figure(title, drawn, [(label, number) for number, (label, _) in enumerate(layers)])


def small_chart(title: str, x: Axis, y: Axis, one: Series) -> Markup:
    """Return a small chart without numbers on its axes, to stand among others of the same axes."""
    frame = _Frame(x, y, width=150.0, height=56.0, left=2.0, right=2.0, top=2.0, bottom=2.0)
    drawn = [
        tag("rect", x="0", y="0", width="150", height="56", class_="plane", data_tip="\n".join(one.tips)),
        tag("path", d=frame.line(one.x, one.y), class_=f"line {_colour(one.colour)}"),
    ]
    picture = tag("svg", *drawn, viewBox="0 0 150 56", role="img", aria_label=title)
    return tag("figure", picture, tag("figcaption", title), class_="small")


def _colour(number: int) -> str:
    return f"c{number % _COLOURS}"


def _figure(title: str, drawn: Sequence[Markup], named: Sequence[tuple[str, int]]) -> Markup:
    box = f"0 0 {_WIDTH:.0f} {_HEIGHT:.0f}"
    picture = tag("svg", *drawn, viewBox=box, role="img", aria_label=title)
    entries = [tag("span", tag("i", class_=_colour(colour)), label) for label, colour in named]
    legend = [tag("div", *entries, class_="legend")] if len(named) > 1 else []
    return tag("figure", tag("figcaption", title), picture, *legend)


def _tick(value: float) -> str:
    """Return a number on an axis, of few characters."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * unit or (unit > 1e3 and abs(value) >= unit):
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class _Frame:
    """The plane between two axes, in units of the picture."""

    x: Axis
    y: Axis
    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM

    def across(self, value: float) -> float:
        return self.left + self.x.share(value) * (self.width - self.left - self.right)

    def down(self, value: float) -> float:
        return self.height - self.bottom - self.y.share(value) * (self.height - self.top - self.bottom)

    def _points(self, xs: Sequence[float], ys: Sequence[float]) -> list[str]:
        kept = thinned(len(xs), _MOST_POINTS)
        return [f"{_number(self.across(xs[i]))},{_number(self.down(ys[i]))}" for i in kept]

    def line(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return "M" + "L".join(self._points(xs, ys))

    def outline(self, xs: Sequence[float], low: Sequence[float], high: Sequence[float]) -> str:
        return "M" + "L".join([*self._points(xs, high), *reversed(self._points(xs, low))]) + "Z"

    def axes(self) -> Markup:
        left, right = _number(self.left), _number(self.width - self.right)
        top, floor = _number(self.top), _number(self.height - self.bottom)
        parts: list[Markup] = []
        for tick in self.y.ticks():
            at = _number(self.down(tick))
            parts.append(tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
            parts.append(tag("text", _tick(tick), x=_number(self.left - 6), y=at, class_="y"))
        for tick in self.x.ticks():
            at = _number(self.across(tick))
            parts.append(tag("line", x1=at, x2=at, y1=top, y2=floor, class_="grid"))
            parts.append(tag("text", _tick(tick), x=at, y=_number(self.height - self.bottom + 16), class_="x"))
        middle = _number((self.left + self.width - self.right) / 2)
        parts.append(tag("text", self.x.label, x=middle, y=_number(self.height - 8), class_="x name"))
        turned = f"translate(13 {_number((self.top + self.height - self.bottom) / 2)}) rotate(-90)"
        parts.append(tag("text", self.y.label, transform=turned, class_="x name"))
        return join(parts)

    def place(self, place: Place) -> Markup:
        at, top, floor = _number(self.across(place.x)), _number(self.top), _number(self.height - self.bottom)
        return tag(
            "line", x1=at, x2=at, y1=top, y2=floor, class_=f"place {_colour(place.colour)}", data_tip=place.label
        )

    def clipped(self, drawn: Sequence[Markup]) -> Markup:
        """Return what is drawn without what lies outside the plane; an inner picture shows nothing else."""
        box = [self.left, self.top, self.width - self.left - self.right, self.height - self.top - self.bottom]
        x, y, width, height = map(_number, box)
        return tag("svg", *drawn, x=x, y=y, width=width, height=height, viewBox=f"{x} {y} {width} {height}")

    def curve(self, one: Series) -> Markup:
        faint = " faint" if one.faint else ""
        return tag("path", d=self.line(one.x, one.y), class_=f"line {_colour(one.colour)}{faint}")

    def marks(self, one: Series) -> Markup:
        parts: list[Markup] = []
        colour = _colour(one.colour)
        for i in thinned(len(one.x), _MOST_MARKS):
            at, height = _number(self.across(one.x[i])), _number(self.down(one.y[i]))
            if one.errors is not None and one.errors[i] > 0:
                low, high = (_number(self.down(one.y[i] + sign * one.errors[i])) for sign in (-1, 1))
                parts.append(tag("line", x1=at, x2=at, y1=low, y2=high, class_=f"error {colour}"))
            tip = one.tips[i] if one.tips else None
            parts.append(tag("circle", cx=at, cy=height, r="4", class_=f"mark {colour}", data_tip=tip))
        return join(parts)
