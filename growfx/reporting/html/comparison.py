"""Show several runs side by side: accuracy over density, FLOPs and seconds, and a table that can be sorted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from growfx.reporting.html.charts import Axis, Series, chart
from growfx.reporting.html.elements import Cell, Markup, sortable_table, tag
from growfx.reporting.html.record import RunRecord
from growfx.reporting.html.single import notes_box
from growfx.reporting.run import percent

__all__ = ["comparison_parts", "data_note"]

_OVER: Final = {
    "density": ("Accuracy over density", "density, % of the masked weights", 100.0),
    "dense_equivalent_epochs": ("Accuracy over FLOPs of training", "dense-equivalent epochs", 1.0),
    "train_seconds": ("Accuracy over seconds of training", "wall time of training, s", 1.0),
}
_COLUMNS: Final = {
    "dense_equivalent_epochs": ("dense-equivalent epochs", ".2f"),
    "train_seconds": ("training, s", ",.1f"),
    "train_cpu_seconds": ("processor, s", ",.1f"),
    "eval_seconds": ("evaluation, s", ",.1f"),
    "epochs": ("epochs", ",.0f"),
    "steps": ("steps", ",.0f"),
    "nnz": ("active weights", ",.0f"),
    "numel": ("masked weights", ",.0f"),
}


@dataclass(frozen=True)
class _Point:
    """A run in a chart, and the density that tells which other runs are of the same setting."""

    density: float
    x: float
    y: float
    tip: str


def comparison_parts(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Markup]:
    """Return the sections about several runs, called by `names`."""
    named = list(zip(names, runs, strict=True))
    unended = [name for name, run in named if not run.result]
    notes = [note for note in [data_note(runs, names)] if note]
    notes += [f"`{name}` has no result: it is in the table only" for name in unended]
    split = "test" if all(run.accuracy[1] is not None for run in runs if run.result) else "validation"
    charts = [picture for key in _OVER if (picture := _over(named, key, split)) is not None]
    return [
        *notes_box("To know", notes),
        tag("div", *charts, class_="charts"),
        tag("h2", "Table"),
        tag("p", "A click on the head of a column sorts by it.", class_="soft"),
        _table(named),
    ]


def data_note(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return a sentence about runs of different data, "" where all have the same."""
    groups: dict[str, list[int]] = {}
    for place, run in enumerate(runs):
        groups.setdefault(run.same_data, []).append(place)
    if len(groups) < 2:
        return ""
    told = [f"{runs[g[0]].data} ({', '.join(f'`{names[i]}`' for i in g)})" for g in groups.values()]
    return f"these runs are of different data, so their accuracies cannot be compared: {'; '.join(told)}"


def _accuracy(run: RunRecord, split: str) -> float | None:
    return run.accuracy[split == "test"]


def _over(named: Sequence[tuple[str, RunRecord]], key: str, split: str) -> Markup | None:
    title, label, scale = _OVER[key]
    points: dict[str, list[_Point]] = {}
    for name, run in named:
        at, accuracy = run.figure(key), _accuracy(run, split)
        if at is not None and at > 0 and accuracy is not None:
            tip = f"{name}\n{run.method}\n{label}: {scale * at:.5g}\n{split} accuracy {percent(accuracy)}"
            point = _Point(run.figure("density") or 0.0, scale * at, 100 * accuracy, tip)
            points.setdefault(_label(run, named), []).append(point)
    if not points:
        return None
    series: list[Series] = []
    for number, (group, members) in enumerate(points.items()):
        x, y, tips = [p.x for p in members], [p.y for p in members], [p.tip for p in members]
        series.append(Series(group, x, y, tips, line=False, colour=number))
        series.append(Series("", *_means(members), marks=False, colour=number))
    every = [point for members in points.values() for point in members]
    across = Axis.around(label, [point.x for point in every], log=True)
    return chart(title, across, Axis.around(f"{split} accuracy, %", [p.y for p in every], least=0.0), series)


def _means(points: Sequence[_Point]) -> tuple[list[float], list[float]]:
    """Return the means of points of the same density, within 5 % of the next: the seeds of one setting."""
    groups: list[list[_Point]] = []
    for point in sorted(points, key=lambda p: p.density):
        if groups and point.density <= 1.05 * groups[-1][-1].density:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [fmean(p.x for p in group) for group in groups], [fmean(p.y for p in group) for group in groups]


def _label(run: RunRecord, named: Sequence[tuple[str, RunRecord]]) -> str:
    """Return what a run is called in the legend: its method, and its model and data where these differ."""
    parts = [run.method]
    parts += [run.model] if len({other.model for _, other in named}) > 1 else []
    parts += [run.data] if len({other.same_data for _, other in named}) > 1 else []
    return ", ".join(parts)


def _table(named: Sequence[tuple[str, RunRecord]]) -> Markup:
    head = ["run", "model", "method", "data", "density", "validation accuracy", "test accuracy"]
    head += [title for title, _ in _COLUMNS.values()] + ["artifact, bytes", "stopped by"]
    return sortable_table(head, [_row(f"#run-{i}", name, run) for i, (name, run) in enumerate(named)])


def _row(anchor: str, name: str, run: RunRecord) -> list[Cell | str]:
    shares = [run.figure("density"), *run.accuracy]
    stored = None if run.artifact is None else run.artifact.bytes
    figures: Mapping[str, float | None] = {key: run.figure(key) for key in _COLUMNS}
    return [
        tag("a", name, href=anchor),
        run.model,
        run.method,
        run.data,
        *(Cell(percent(share), share) for share in shares),
        *(Cell("-" if v is None else format(v, _COLUMNS[key][1]), v) for key, v in figures.items()),
        Cell("-" if stored is None else f"{stored:,}", stored),
        str(run.result.get("stop_reason") or "not ended"),
    ]
