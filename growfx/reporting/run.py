"""What a finished run leaves behind: artifact, curve, summary, result; and the tables the commands print."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from growfx.masked.graph import MaskedGraph
from growfx.reporting.fitted import short_count
from growfx.reporting.plots import draw_epochs, draw_growth
from growfx.runs.folder import RunFolder

__all__ = ["curve_text", "gain_text", "layer_rows", "newborn_rows", "percent", "result_rows", "table", "write_report"]


def write_report(folder: RunFolder, net: MaskedGraph, result: Mapping[str, Any]) -> str | None:
    """Write `artifact/`, `curve.png`, `summary.txt` and, last, `result.json` of a finished run.

    Returns:
        a notice when something optional is missing (matplotlib), else None.
    """
    from growfx.artifact.writer import save

    info = save(net, folder.path / "artifact", provenance=provenance(folder, result))
    log = folder.read_log()
    rounds = [r for r in log if r["event"] == "round"]
    title = f"{result['model']}, {result['method']}"
    path = folder.path / "curve.png"
    if rounds:
        drawn = draw_growth(path, title, rounds, result["stop_reason"])
    else:
        epochs = [r for r in log if r["event"] == "epoch" and r["val_accuracy"] is not None]
        drawn = draw_epochs(path, title, [r["epoch"] for r in epochs], [r["val_accuracy"] for r in epochs])
    folder.write_text("summary.txt", summary(result, rounds, info.bytes))
    folder.write_json("result.json", result)
    return None if drawn else "matplotlib is not installed, so `curve.png` was not drawn"


def provenance(folder: RunFolder, result: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the artifact says of its origin: data, input format, method, options, and the result's figures."""
    told = ("versions", "data", "input", "method", "seed", "weights_from")
    kept = {k: folder.config[k] for k in told if k in folder.config}
    if result is not None:
        names = ("val_accuracy", "test_accuracy", "dense_equivalent_epochs", "epochs", "stop_reason")
        kept["result"] = {name: result[name] for name in names}
    return kept


def summary(result: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], size: int) -> str:
    """The result and the growth rounds as text."""
    text = table(result_rows(result, size))
    if rounds:
        rows = [
            {
                "round": r["round"],
                "density": percent(r["density"]),
                **({"cost": percent(r["cost"])} if "cost" in r else {}),
                "accuracy": percent(r["val_accuracy"]),
                "noise": percent(r["noise"]),
                "predicted gain": gain_text(r["fit"]),
                "curve": curve_text(r["fit"]),
            }
            for r in rounds
        ]
        text += f"\n\n{table(rows)}\n\ngrowth stopped: {result['stop_reason']}"
        newborn = newborn_rows(rounds)
        text += f"\n\n{table(newborn)}" if newborn else ""
    return text + "\n"


def newborn_rows(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How edges fare at the end of their first round beside older ones, as rows for `table`; of a trace or its log."""
    from growfx.methods.growth.newborn import newest_cohorts

    def times(ratio: float | None) -> str:
        return "-" if ratio is None else f"{ratio:.2f} x"

    return [
        {
            "round": row["round"],
            "newborn edges": f"{row['edges']:,}",
            "gradient of older ones": times(row["gradient_ratio"]),
            "magnitude of older ones": times(row["magnitude_ratio"]),
            "still there at the end": percent(row["survival"]),
        }
        for row in newest_cohorts(rounds)
    ]


def result_rows(result: Mapping[str, Any], size: int | None = None) -> list[dict[str, Any]]:
    """A result as rows of name and value for `table`; `size` is the artifact's in bytes."""
    facts = {
        "model": result["model"],
        **weights_row(result.get("weights_from")),
        "method": result["method"],
        "density": f"{percent(result['density'])} ({result['nnz']:,} of {result['numel']:,} weights)",
        "validation accuracy": percent(result["val_accuracy"]),
        "test accuracy": percent(result["test_accuracy"]),
        "cost": f"{result['dense_equivalent_epochs']:.2f} dense-equivalent epochs",
        "time": seconds_text(result),
        "epochs run": f"{result['epochs']} ({result['steps']:,} steps)",
        "stopped by": result["stop_reason"],
        "masks": result["mask_digest"][:16],
    }
    if size is not None:
        facts["artifact"] = f"{size:,} bytes"
    return [{"": name, "value": value} for name, value in facts.items()]


def weights_row(source: Mapping[str, Any] | None) -> dict[str, str]:
    """Which weights a run started from, as a row of a table; none for initial ones."""
    return {"started from": f"{source['name']}, sha256 {source['sha256'][:16]}"} if source else {}


def seconds_text(result: Mapping[str, Any]) -> str:
    """The seconds of a result; "-" for a result of an older version, which has none."""
    if result.get("train_seconds") is None:
        return "-"
    return (
        f"{result['train_seconds']:.1f} s of training ({result['train_cpu_seconds']:.1f} s of processor time), "
        f"{result['eval_seconds']:.1f} s of evaluation"
    )


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Facts of masked layers as rows for `table`.

    Args:
        layers: dictionaries with `name`, `shape`, `nnz`, `numel` and, where known, `bytes`, `sparse_macs` and
            `dense_macs` (multiply-accumulates), `alive_in` and `alive_out` ([units on some path, units]).
    """
    rows = []
    stored = any("bytes" in layer for layer in layers)
    for layer in layers:
        row = {
            "layer": layer["name"],
            "shape": "x".join(map(str, layer["shape"])),
            "active": f"{layer['nnz']:,}",
            "density": percent(layer["nnz"] / layer["numel"]),
        }
        if stored:
            row["bytes"] = f"{layer['bytes']:,}"
        for key, title in (("sparse_macs", "multiply-adds"), ("dense_macs", "when dense")):
            row[title] = "-" if layer.get(key) is None else short_count(layer[key])
        for key in ("alive_in", "alive_out"):
            row[key.replace("_", " ")] = "/".join(map(str, layer[key])) if key in layer else "-"
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], widths: Sequence[int | None] = ()) -> str:
    """Rows of the same keys as a text table; `widths` breaks longer cells of a column into lines."""
    from tabulate import tabulate

    cells = [[_broken(value, width) for value, width in zip_longest(r.values(), widths)] for r in rows]
    return tabulate(cells, headers=list(rows[0]) if rows else (), disable_numparse=True)


def _broken(value: Any, width: int | None) -> Any:
    return value if width is None else "\n".join(textwrap.wrap(str(value), width, break_on_hyphens=False))


def percent(fraction: float | None) -> str:
    """A fraction as a percentage with two digits; "-" for None."""
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def curve_text(fit: Mapping[str, Any] | None) -> str:
    """Return the family that the data favour, and whether a plateau is likely but not sure."""
    if not fit:
        return "-"
    return fit.get("curve", "logistic") + (", not sure" if fit.get("unsure") else "")


def gain_text(fit: Mapping[str, Any] | None) -> str:
    """Return the accuracy that growth to full density would add by a fit, and its standard error, in points."""
    if not fit or fit.get("gain") is None:
        return "-"
    return f"{100 * fit['gain']:.2f} +- {100 * fit['gain_error']:.2f}"
