"""Report a comparison: facts of every run, means over seeds, a table, JSON and plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from growfx.artifact.writer import inspect
from growfx.errors import ArtifactError
from growfx.machine import machine_facts
from growfx.reporting.plots import draw_methods
from growfx.reporting.run import percent, table
from growfx.runs.folder import RunFolder

__all__ = ["FORMAT", "comparison_rows", "comparison_text", "run_facts", "summarise", "write_comparison"]

FORMAT = "growfx comparison 1"
_MEANS = ("density", "epochs", "dense_equivalent_epochs", "train_seconds", "eval_seconds", "seconds", "artifact_bytes")
_LONGEST = 60  # characters of an error in the table


def run_facts(
    folder: Path, *, label: str, method: str, asked: float | None, seed: int, control: bool, error: str | None
) -> dict[str, Any]:
    """Return what `compare.json` says of one run: its result's fields, or the `error` it ended by.

    `seconds`: of training and validation, summed over the epochs in the run's log; start-up, the drawing of masks and
    the writing of results are not in it, and other runs at the same time make it longer. `artifact_bytes`: size of the
    stored weights.
    """
    facts: dict[str, Any] = {
        "name": folder.name,
        "label": label,
        "method": method,
        "asked_density": asked,
        "seed": seed,
        "control": control,
        "error": error,
    }
    run = RunFolder(folder, {})
    result = run.read_json("result.json")
    if result is None:
        return {**facts, "error": error or "no result"}
    records = [record for record in run.read_log() if record["event"] == "epoch"]
    try:
        size = inspect(folder / "artifact").bytes
    except ArtifactError:
        size = None  # removed to save space
    kept = {key: value for key, value in result.items() if key not in facts}
    seconds = round(sum(record["seconds"] for record in records), 3)
    return {**facts, "error": None, **kept, "seconds": seconds, "artifact_bytes": size}


def summarise(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for every label and density asked for: means over seeds, and the spread of the accuracy.

    `accuracy` is that of the test images where every run has one, else that of the validation images (`split` says
    which); `spread` its sample standard deviation, None for one seed. `failed` counts runs without a result, `error` is
    the first of theirs.
    """
    good = [run for run in runs if run["error"] is None]
    split = "test" if all(run["test_accuracy"] is not None for run in good) else "val"
    groups: dict[tuple[str, float | None], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["label"], run["asked_density"]), []).append(run)
    return [_row(label, asked, members, split) for (label, asked), members in groups.items()]


def _row(label: str, asked: float | None, runs: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    good = [run for run in runs if run["error"] is None]
    accuracies = [run[f"{split}_accuracy"] for run in good]
    row: dict[str, Any] = {
        "label": label,
        "method": runs[0]["method"],
        "asked_density": asked,
        "control": runs[0]["control"],
        "seeds": len(good),
        "failed": len(runs) - len(good),
        "error": next((run["error"] for run in runs if run["error"]), None),
        "split": split,
        "accuracy": statistics.fmean(accuracies) if good else None,
        "spread": statistics.stdev(accuracies) if len(good) > 1 else None,
    }
    for key in _MEANS:
        values = [run[key] for run in good if run.get(key) is not None]  # runs of older versions lack some
        row[key] = statistics.fmean(values) if values else None
    return row


def comparison_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the rows of `summarise` as texts for `growfx.reporting.table`."""
    split = rows[0]["split"] if rows else "test"
    return [
        {
            "method": row["label"],
            "asked": "-" if row["asked_density"] is None else f"{100 * row['asked_density']:g} %",
            "seeds": f"{row['seeds']}" + (f" ({row['failed']} failed)" if row["failed"] else ""),
            f"{split} accuracy": percent(row["accuracy"]) if row["seeds"] else _short(row["error"]),
            "+-": "-" if row["spread"] is None else f"{100 * row['spread']:.2f}",
            "density": percent(row["density"]),
            "epochs": _number(row["epochs"], ".1f"),
            "dense-equivalent": _number(row["dense_equivalent_epochs"], ".2f"),
            "training": "-" if row["train_seconds"] is None else _duration(row["train_seconds"]),
            "wall time": "-" if row["seconds"] is None else _duration(row["seconds"]),
            "bytes": _number(row["artifact_bytes"], ",.0f"),
        }
        for row in rows
    ]


def comparison_text(facts: Mapping[str, Any]) -> str:
    """Return `table.txt`: the table, what its columns are, and the errors."""
    failures = [f"{name}: {error}" for name, error in facts["failures"].items()]
    notes = [
        "accuracy: mean over seeds; +-: sample standard deviation",
        "epochs: all that were run; dense-equivalent: epochs of dense training with as many FLOPs",
        "training: wall time without validation; wall time: with it; bytes: of the artifact",
        f"wall times are those of one run, {facts['jobs']} at the same time",
        f"{facts['model']} on {facts['data']}; {facts['machine']['accelerator'] or facts['machine']['cpu']}",
    ]
    parts = [table(comparison_rows(facts["rows"])), "\n".join(notes)]
    return "\n\n".join([*parts, *(["failed:\n" + "\n".join(failures)] if failures else [])]) + "\n"


def write_comparison(folder: RunFolder, about: Mapping[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write `compare.json`, `table.txt` and the plots, and return what `compare.json` holds.

    `plots` is False where matplotlib is not installed, or nothing was measured.
    """
    rows = summarise(runs)
    facts: dict[str, Any] = {**about, "machine": machine_facts(), "rows": rows, "runs": list(runs)}
    facts["failures"] = {run["name"]: run["error"] for run in runs if run["error"]}
    title = f"{facts['model']}"
    measured = [row for row in rows if row["accuracy"] is not None]
    label = f"{measured[0]['split'] if measured else 'test'} accuracy, %"
    facts["plots"] = bool(measured) and all(
        draw_methods(folder.path / f"accuracy_{name}.png", title, measured, key, label)
        for name, key in (("density", "density"), ("cost", "dense_equivalent_epochs"), ("seconds", "train_seconds"))
        if key != "train_seconds" or all(row[key] for row in measured)
    )
    folder.write_text("table.txt", comparison_text(facts))
    folder.write_json("compare.json", facts)
    return facts


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(text: str | None) -> str:
    text = text or "-"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
