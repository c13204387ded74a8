"""Show one run: result, growth, learning curves, layers, cost, kernels, artifact and options."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from growfx.artifact.info import ArtifactInfo, LayerInfo
from growfx.reporting.html.charts import Axis, Series, chart
from growfx.reporting.html.elements import Cell, Markup, bar, facts_table, sortable_table, tag
from growfx.reporting.html.growth import growth_parts
from growfx.reporting.html.paths import LayerPaths, artifact_paths
from growfx.reporting.html.record import RunRecord, mapping, number
from growfx.reporting.run import percent

__all__ = ["notes_box", "run_parts", "size"]

_SHARES: Final = ("density", "val_accuracy", "test_accuracy")
_SECONDS: Final = ("train_seconds", "train_cpu_seconds", "eval_seconds")
# Shown in their own sections.
_ELSEWHERE: Final = ("trace", "kernels")
_TITLES: Final = {
    "nnz": "active weights",
    "numel": "masked weights",
    "mask_digest": "masks (sha256)",
    "val_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
    "dense_equivalent_epochs": "training cost, dense-equivalent epochs",
    "epochs": "epochs run",
    "steps": "optimizer steps",
    "stop_reason": "stopped by",
    "train_seconds": "training, wall time",
    "train_cpu_seconds": "training, processor time",
    "eval_seconds": "evaluation, wall time",
}


def run_parts(run: RunRecord, *, with_paths: bool) -> list[Markup]:
    """Return the sections about one run.

    Args:
        with_paths: build the artifact's network and follow its paths, which takes seconds for a large one.
    """
    notes = list(run.problems)
    growth = growth_parts(run, notes)
    curves = _learning_curves(run)
    layers = _layers(run, notes, with_paths=with_paths)
    sections = [tag("h2", "Result"), _result(run), *growth, *curves, *_trace(run), *layers, *_kernels(run)]
    sections += [*_artifact(run.artifact), *_options(run)]
    return [*notes_box("What could not be shown", notes), *sections]


def notes_box(title: str, notes: Sequence[str]) -> list[Markup]:
    """Return a box with a title and a list of sentences, nothing without any."""
    if not notes:
        return []
    items = [tag("li", note) for note in dict.fromkeys(notes)]
    return [tag("div", tag("strong", title), tag("ul", *items), class_="notes", role="note")]


def size(count: float | None) -> str:
    """A number of bytes as text; "-" for None."""
    if count is None:
        return "-"
    scaled, unit = next(
        (count / n, u) for n, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes")) if count >= n or n == 1
    )
    return f"{count:,.0f} bytes" if unit == "bytes" else f"{scaled:.3g} {unit} ({count:,.0f} bytes)"


def _result(run: RunRecord) -> Markup:
    facts: list[tuple[str, object]] = [("folder", str(run.path)), ("model", run.model), ("method", run.method)]
    facts.append(("data", run.data))
    known = {"model", "method", *_ELSEWHERE}
    # A run that has not ended has its last epoch to show.
    last = run.epochs[-1] if run.epochs else {}
    shown = run.result or {
        f"{key} (so far)": last[key] for key in ("epoch", "density", "nnz", "val_accuracy") if key in last
    }
    facts += [
        (_TITLES.get(key, key.replace("_", " ")), _fact(key, value)) for key, value in shown.items() if key not in known
    ]
    if run.artifact is not None:
        facts.append(("artifact", size(run.artifact.bytes)))
    return facts_table(facts)


def _fact(key: str, value: object) -> str:
    key, known = key.removesuffix(" (so far)"), number(value)
    if value is None:
        return "-"
    if known is None:
        return value if isinstance(value, str) else json.dumps(value)
    if key in _SHARES:
        return percent(known)
    if key in _SECONDS:
        return f"{known:,.1f} s"
    return f"{known:,.0f}" if known == int(known) else f"{known:,.4g}" if known < 1000 else f"{known:,.1f}"


# -- epochs --------------------------------------------------------------------------------------------------------


def _learning_curves(run: RunRecord) -> list[Markup]:
    """Return accuracy, loss, density, learning rate, cost and time over epochs, those that the log has."""
    told: list[tuple[str, str, str, float]] = [
        ("val_accuracy", "Validation accuracy", "accuracy, %", 100.0),
        ("train_loss", "Training loss", "loss", 1.0),
        ("density", "Density", "density, % of the masked weights", 100.0),
        ("lr", "Learning rate", "learning rate", 1.0),
        ("dense_equivalent_epochs", "Training cost so far, in FLOPs of dense epochs", "dense-equivalent epochs", 1.0),
        ("seconds", "Time of each epoch, validation included", "seconds", 1.0),
    ]
    charts = [picture for chosen in told if (picture := _over_epochs(run.epochs, *chosen)) is not None]
    return [tag("h2", "Learning curves and cost"), tag("div", *charts, class_="charts")] if charts else []


def _over_epochs(epochs: Sequence[Mapping[str, Any]], key: str, title: str, label: str, scale: float) -> Markup | None:
    known = [(r["epoch"], scale * r[key]) for r in epochs if number(r.get(key)) is not None]
    if not known:
        return None
    x, y = [float(epoch) for epoch, _ in known], [value for _, value in known]
    tips = [f"epoch {epoch:g}\n{title}: {value:.5g}" for epoch, value in known]
    return chart(
        title,
        Axis.around("epoch", x, whole=True),
        Axis.around(label, y, least=0.0 if min(y) >= 0 else None),
        [Series("", x, y, tips, colour=0, marks=len(x) <= 60)],
    )


def _trace(run: RunRecord) -> list[Markup]:
    """Return the trace of a method that is not growth: levels, phases, exploration."""
    trace = run.result.get("trace")
    if run.rounds or not isinstance(trace, list):
        return []
    rows = [mapping(entry) for entry in trace]
    plain = {k for row in rows for k, v in row.items() if v is None or isinstance(v, (str, int, float))}
    names = [k for k in dict.fromkeys(k for row in rows for k in row) if k in plain]
    if not names:
        return []
    body = [[Cell(_fact(k, row.get(k)), number(row.get(k))) for k in names] for row in rows]
    return [tag("h2", "Trace of the method"), sortable_table([k.replace("_", " ") for k in names], body)]


# -- layers --------------------------------------------------------------------------------------------------------


def _layers(run: RunRecord, notes: list[str], *, with_paths: bool) -> list[Markup]:
    info = run.artifact
    if info is None or not info.layers:
        return []
    paths: Mapping[str, LayerPaths] = {}
    told = "Density of the stored network, layer by layer."
    if with_paths:
        paths, why = artifact_paths(run.path / "artifact", info)
        notes.extend([f"path mass and alive units are not known: {why}"] if why else [])
        told += " Path mass: the share of the network's path products that go through the layer."
        told += " Alive: units on some path from input to output; the others are dead."
    else:
        told += " A report of this run alone also has path mass and alive units."
    kernels = mapping(mapping(run.result.get("kernels")).get("layers"))
    head = ["layer", "shape", "active", "of", "density", "bytes", "codec", "multiply-adds", "when dense", "kernel"]
    head += ["path mass", "alive in", "alive out", "dead out"] if paths else []
    rows = [_layer_row(layer, kernels, paths) for layer in info.layers]
    charts = [_density_chart(info.layers), *([_mass_chart(info.layers, paths)] if paths else [])]
    parts = [tag("h2", "Layers"), tag("p", told, class_="soft"), tag("div", *filter(None, charts), class_="charts")]
    return [*parts, sortable_table(head, rows)]


def _layer_row(layer: LayerInfo, kernels: Mapping[str, Any], paths: Mapping[str, LayerPaths]) -> list[Cell | str]:
    row: list[Cell | str] = [
        layer.name,
        "x".join(map(str, layer.shape)),
        Cell(f"{layer.nnz:,}", layer.nnz),
        Cell(f"{layer.numel:,}", layer.numel),
        Cell(bar(layer.density, percent(layer.density)), layer.density),
        Cell(f"{layer.bytes:,}", layer.bytes),
        layer.codec,
        *(Cell("-" if macs is None else f"{macs:,.0f}", macs) for macs in (layer.sparse_macs, layer.dense_macs)),
        str(kernels.get(layer.name, "-")),
    ]
    if not paths:
        return row
    found = paths.get(layer.name)
    if found is None:
        return [*row, "off path", "-", "-", "-"]
    mass = Cell("-") if found.mass is None else Cell(bar(found.mass, percent(found.mass)), found.mass)
    alive = [
        Cell(f"{some:,}/{every:,}", some / every if every else 1.0) for some, every in (found.alive_in, found.alive_out)
    ]
    dead = found.alive_out[1] - found.alive_out[0]
    return [*row, mass, *alive, Cell(f"{dead:,}", dead)]


def _density_chart(layers: Sequence[LayerInfo]) -> Markup | None:
    tips = [f"{x.name}\n{percent(x.density)}\n{x.nnz:,} of {x.numel:,}" for x in layers]
    y = [max(100 * x.density, 1e-4) for x in layers]
    axis = Axis("density, %", min(10.0, 0.8 * min(y)), 100.0, log=True)
    return _by_layer("Final density of each layer, in data-flow order", axis, y, tips)


def _mass_chart(layers: Sequence[LayerInfo], paths: Mapping[str, LayerPaths]) -> Markup | None:
    masses = [paths[x.name].mass if x.name in paths else None for x in layers]
    if all(mass is None for mass in masses):
        return None
    y = [100 * (mass or 0.0) for mass in masses]
    tips = [f"{x.name}\npath mass {percent(mass)}" for x, mass in zip(layers, masses, strict=True)]
    return _by_layer("Share of path mass through each layer", Axis("path mass, %", 0.0, 1.05 * max(*y, 100.0)), y, tips)


def _by_layer(title: str, axis: Axis, y: Sequence[float], tips: Sequence[str]) -> Markup:
    x = [float(place) for place in range(1, len(y) + 1)]
    return chart(title, Axis("layer", 0.0, len(y) + 1.0, whole=True), axis, [Series("", x, y, tips, colour=0)])


# -- kernels, artifact, options --------------------------------------------------------------------------------------


def _kernels(run: RunRecord) -> list[Markup]:
    kernels = mapping(run.result.get("kernels"))
    facts = [(key, str(value)) for key, value in kernels.items() if key != "layers"]
    if not facts:
        return []
    told = "What was asked for, and how many layers took which kernel in their last call of training."
    return [tag("h2", "Kernels"), tag("p", told, class_="soft"), facts_table(facts)]


def _artifact(info: ArtifactInfo | None) -> list[Markup]:
    if info is None:
        return []
    facts: list[tuple[str, object]] = [
        ("stored", size(info.bytes)),
        ("all tensors when dense", size(info.dense_bytes)),
        ("active weights", f"{info.nnz:,} of {info.numel:,} ({percent(info.density)})"),
        ("format", info.version),
        ("model", _recipe(info.model) if info.model else "not recorded; `growfx.load` needs an instance"),
        ("model checked against the outputs", "yes" if info.identity_checked else "no"),
        ("inputs", "-" if info.inputs is None else ", ".join(map(str, info.inputs))),
    ]
    if info.cost is not None:
        cost = info.cost.to_dict()
        facts += [
            (
                "multiply-adds of one sample, under the masks",
                f"{cost['sparse']:,.0f} (FLOPs: {2 * cost['sparse']:,.0f})",
            ),
            ("multiply-adds when dense", f"{cost['dense']:,.0f} (FLOPs: {2 * cost['dense']:,.0f})"),
            ("of them outside the masked layers", f"{cost['rest']:,.0f}"),
        ]
    return [tag("h2", "Artifact"), facts_table(facts), *notes_box("Notes of the artifact", info.notes)]


def _recipe(model: Mapping[str, Any]) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in model["kwargs"].items())
    return f"{model['name']}({arguments}), of {model['library']}"


def _options(run: RunRecord) -> list[Markup]:
    facts = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in _flat(run.config)]
    if not facts:
        return []
    return [tag("details", tag("summary", "Options and versions"), facts_table(facts))]


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
