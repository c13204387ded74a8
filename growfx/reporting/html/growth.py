"""Show how a network grew: the growth curve with its fits, the rounds, layers by round, and edges by birth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from growfx.methods.growth.newborn import newest_cohorts
from growfx.methods.growth.plateau import AccuracyFit
from growfx.reporting.html.charts import Axis, Band, Place, Series, chart, small_chart, stacked_chart, thinned
from growfx.reporting.html.elements import Cell, Markup, sortable_table, tag
from growfx.reporting.html.record import RunRecord, mapping, number, text
from growfx.reporting.run import curve_text, gain_text, newborn_rows, percent

__all__ = ["growth_parts"]

_SHOWN_WEIGHT: Final = 0.05  # of a family of curves in the average
_SMALLEST: Final = 1e-12  # density that a logarithmic axis shows
_MOST_ROUNDS, _MOST_BIRTHS = 60, 10  # positions and areas of the chart of cohorts
_ROUND_COLOUR, _FIT_COLOUR, _BACK_COLOUR, _STOP_COLOUR = 0, 1, 2, 3


def growth_parts(run: RunRecord, notes: list[str]) -> list[Markup]:
    """Return the section about growth, nothing for a run without rounds; what cannot be shown is added to `notes`."""
    rounds = run.rounds
    if not rounds:
        return []
    parts = [tag("h2", "Growth"), tag("p", f"growth stopped: {_stop_reason(run)}")]
    charts = [_curve_chart(run, notes), _cohort_chart(rounds)]
    parts.append(tag("div", *filter(None, charts), class_="charts"))
    parts.append(_round_table(rounds, notes))
    parts.extend(_newborn(rounds))
    parts.extend(_layers_by_round(rounds))
    return parts


def _stop_reason(run: RunRecord) -> str:
    return text(run.result.get("stop_reason")) or text(run.rounds[-1].get("stop_reason")) or "not yet"


def _paid(record: Mapping[str, Any]) -> float:
    """Return what the fit is about: the cost that growth pays for, or the density of the layers that may grow."""
    for name in ("cost", "budget_density", "density"):
        value = number(record.get(name))
        if value is not None:
            return value
    return 0.0


def _curve_chart(run: RunRecord, notes: list[str]) -> Markup | None:
    measured = [r for r in run.rounds if r.get("val_accuracy") is not None and _paid(r) > _SMALLEST]
    if not measured:
        notes.append("no round has an accuracy, so there is no growth curve")
        return None
    x = [100 * _paid(r) for r in measured]
    y, noise = [100 * r["val_accuracy"] for r in measured], [100 * (r.get("noise") or 0.0) for r in measured]
    tips = [
        f"round {r['round']:g}\ndensity {percent(r['density'])}\naccuracy {percent(r['val_accuracy'])}\n"
        f"noise {percent(r.get('noise'))}"
        for r in measured
    ]
    series = [Series("rounds, with one sigma of noise", x, y, tips, noise, line=False, colour=_ROUND_COLOUR)]
    bands: list[Band] = []
    fitted = next((r for r in reversed(measured) if r.get("fit")), None)
    if fitted is not None:
        try:
            curves, bands = _fit(AccuracyFit.from_json(fitted["fit"]), min(x))
            series.extend(curves)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            notes.append(f"the fit of round {fitted['round']:g} cannot be read ({type(error).__name__}: {error})")
    label = "cost, % of the dense multiply-adds" if "cost" in measured[-1] else "density, % of the masked weights"
    across = Axis("", 0.8 * min(x), 100.0, log=True) if series[1:] else Axis.around("", x, log=True)
    across = Axis(label, across.low, across.high, across.log)
    low, high = min(a - e for a, e in zip(y, noise, strict=True)), max(a + e for a, e in zip(y, noise, strict=True))
    # Framed by what was measured: the band of an early fit may be many times as wide.
    margin = max(0.2 * (high - low), 0.5)
    down = Axis("validation accuracy, %", max(0.0, low - margin), min(101.0, high + margin))
    return chart("Accuracy over density while growing", across, down, series, bands, _places(run, measured, x))


def _places(run: RunRecord, measured: Sequence[Mapping[str, Any]], x: Sequence[float]) -> list[Place]:
    """Return where growth stopped, and the round whose masks the final training has."""
    stop = Place(f"stop: {_stop_reason(run)}, {x[-1]:.3g} %", x[-1], _STOP_COLOUR)
    fit = next((mapping(r["fit"]) for r in reversed(measured) if r.get("fit")), {})
    back = next((i for i, r in enumerate(measured) if r["round"] == fit.get("operating_round")), None)
    if back is None:
        return [stop]
    return [stop, Place(f"operating round {measured[back]['round']:g}, {x[back]:.3g} %", x[back], _BACK_COLOUR)]


def _fit(fit: AccuracyFit, lowest: float) -> tuple[list[Series], list[Band]]:
    """Return the average over families with its 95 % band, and each family that counts in it."""
    density = np.geomspace(0.8 * lowest / 100, 1.0, 120)
    x, level = (100 * density).tolist(), 100 * fit.accuracy(density)
    error = 196 * fit.accuracy_error(density)
    if not (np.isfinite(level).all() and np.isfinite(error).all()):
        raise ValueError("its curve is not finite")
    trained = ", trained as long as the last round" if fit.time else ""
    whole = Series(f"fit: {fit.curve}{trained}, 95 % band", x, level.tolist(), marks=False, colour=_FIT_COLOUR)
    parts = [
        Series(
            f"{curve.family.name}, weight {percent(weight)}",
            x,
            (100 * curve.accuracy(np.log(density))).tolist(),
            marks=False,
            colour=4 + number,
            faint=True,
        )
        for number, (curve, weight) in enumerate(zip(fit.curves, fit.weights, strict=True))
        if weight >= _SHOWN_WEIGHT and len(fit.curves) > 1
    ]
    return [whole, *parts], [Band(x, (level - error).tolist(), (level + error).tolist(), _FIT_COLOUR)]


def _round_table(rounds: Sequence[Mapping[str, Any]], notes: list[str]) -> Markup:
    head = ["round", "density", "active", "accuracy", "raw accuracy", "noise", "predicted gain", "curve", "dead units"]
    priced = any(number(r.get("cost")) is not None for r in rounds)
    rows = []
    for r in rounds:
        shares = [r["density"], r.get("val_accuracy"), r.get("raw_accuracy"), r.get("noise")]
        density, accuracy, raw, noise = (Cell(percent(share), number(share)) for share in shares)
        fit = mapping(r.get("fit"))
        try:
            gain, curve = gain_text(fit), curve_text(fit)
        except (KeyError, TypeError, ValueError, OverflowError):
            notes.append(f"the decision of round {r['round']:g} cannot be read")
            gain, curve = "?", "?"
        active, dead = (Cell(_count(r.get(name)), number(r.get(name))) for name in ("nnz", "dead_units"))
        cells = [Cell(f"{r['round']:g}", r["round"]), density, active, accuracy, raw, noise]
        cells += [Cell(gain, number(fit.get("gain"))), Cell(curve), dead]
        rows.append([*cells, Cell(percent(r.get("cost")), number(r.get("cost")))] if priced else cells)
    return sortable_table([*head, *(["cost"] if priced else [])], rows)


def _count(value: object) -> str:
    known = number(value)
    return "-" if known is None else f"{known:,.0f}"


def _newborn(rounds: Sequence[Mapping[str, Any]]) -> list[Markup]:
    rows = newborn_rows(rounds)
    if not rows:
        return []
    told = "Edges at the end of their first round beside older ones: mean gradient and magnitude, and how many stay."
    facts = [[number(value) for value in cohort.values()] for cohort in newest_cohorts(rounds)]
    body = [[*map(Cell, row.values(), values)] for row, values in zip(rows, facts, strict=True)]
    return [tag("h3", "Newborn edges"), tag("p", told, class_="soft"), sortable_table(list(rows[0]), body)]


def _cohort_chart(rounds: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Draw the edges of each round by the round they were born in; many births are put together."""
    told = [r for r in rounds if r.get("cohorts")]
    if len(told) < 2:
        return None
    told = [told[i] for i in thinned(len(told), _MOST_ROUNDS)]
    births = 1 + max(cohort["born"] for r in told for cohort in r["cohorts"])
    width = -(-births // _MOST_BIRTHS)
    layers: list[tuple[str, list[float]]] = []
    for first in range(0, births, width):
        last = min(first + width, births) - 1
        edges = [float(sum(c["edges"] for c in r["cohorts"] if first <= c["born"] <= last)) for r in told]
        layers.append((f"born in {'round' if first == last else 'rounds'} {_span(first, last)}", edges))
    x = [r["round"] for r in told]
    highest = max(sum(values) for values in zip(*(edges for _, edges in layers), strict=True))
    if min(x) == max(x) or highest <= 0:
        return None
    across, down = Axis("round", min(x), max(x), whole=True), Axis("active edges", 0.0, 1.05 * highest)
    return stacked_chart("Edges by the round they were born in", across, down, x, layers)


def _span(first: int, last: int) -> str:
    return f"{first}" if first == last else f"{first} to {last}"


def _layers_by_round(rounds: Sequence[Mapping[str, Any]]) -> list[Markup]:
    told = [r for r in rounds if r.get("layer_density")]
    if len(told) < 2:
        return []
    names = list(told[-1]["layer_density"])
    least = min((d for r in told for d in r["layer_density"].values() if d > 0), default=0.01)
    x = Axis("round", told[0]["round"], max(told[-1]["round"], told[0]["round"] + 1))
    y = Axis("density", min(least, 0.5), 1.0, log=True)
    pictures = []
    for name in names:
        known = [(r["round"], r["layer_density"][name]) for r in told if name in r["layer_density"]]
        across, density = [round_ for round_, _ in known], [share for _, share in known]
        kept = thinned(len(known), 12)
        tip = "\n".join([name, *(f"round {across[i]:g}: {percent(density[i])}" for i in kept)])
        title = f"{name}: {percent(density[0])} to {percent(density[-1])}"
        pictures.append(small_chart(title, x, y, Series("", across, density, [tip])))
    told_scale = f"Density by round, logarithmic from {percent(y.low)} to 100 %; point at a layer for its rounds."
    parts = [tag("h3", "Density of each layer by round"), tag("p", told_scale, class_="soft")]
    return [*parts, tag("div", *pictures, class_="multiples")]
