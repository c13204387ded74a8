"""Pictures of a run: accuracy over density while growing, accuracy over epochs otherwise. And of runs side by side.

matplotlib is optional; without it nothing is drawn, and the caller is told once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growfx.errors import CheckpointError

__all__ = ["draw_epochs", "draw_growth", "draw_methods"]

_POINT, _CURVE, _STOP, _BACK = "#1b5e8c", "#c4651a", "#8a1c1c", "#2c7a3f"
_MARKERS = "osD^v<>Pp*hX"
_NEARLY_ALL, _WORTH_TELLING = 0.95, 0.05  # weights of a family of curves
_NAMES = 24  # names below each other beside a plot
_X_LABELS = {
    "cost": "cost, % of the dense multiply-accumulates",
    "density": "density, % of the masked weights",
    "dense_equivalent_epochs": "training cost, dense-equivalent epochs",
    "train_seconds": "training, seconds of wall time",
}


def draw_growth(path: Path, title: str, rounds: Sequence[Mapping[str, Any]], stop_reason: str) -> bool:
    """Draw the growth curve: rounds with noise, the last fit with its 95 % band, the stop, the way back.

    Args:
        rounds: one record a round with `round`, `density`, `val_accuracy` (fraction), `noise` (fraction or
            None), and `fit`: None or what `growfx.methods.growth.plateau.Decision.to_json` gives.

    Returns:
        False when matplotlib is not installed; then nothing is written.
    """
    axes = _axes()
    if axes is None:
        return False
    # the fit is about what growth pays for; with frozen layers about the others
    density = [100 * r.get("cost", r.get("budget_density", r["density"])) for r in rounds]
    accuracy = np.array([100 * r["val_accuracy"] for r in rounds])
    noise = np.array([100 * (r.get("noise") or 0.0) for r in rounds])
    axes.errorbar(density, accuracy, yerr=noise, fmt="o", color=_POINT, capsize=3, label=_noise_label(noise))
    fit = next((r["fit"] for r in reversed(rounds) if r["fit"]), None)
    if fit is not None:
        _draw_fit(axes, fit, min(density))
        back = fit.get("operating_round")
        if back is not None and back < len(rounds):
            axes.axvline(density[back], color=_BACK, linestyle="--", label=_share("gone back to", density[back]))
    axes.axvline(density[-1], color=_STOP, linestyle=":", label=_share(f"stop: {stop_reason}", density[-1]))
    axes.set_xscale("log")
    _plain_ticks(axes, min(density))
    _set_accuracy_limits(axes, accuracy, noise)
    axes.set_xlabel(_X_LABELS["cost" if "cost" in rounds[-1] else "density"])
    return _save(axes, path, title)


def draw_epochs(path: Path, title: str, epochs: Sequence[int], accuracies: Sequence[float]) -> bool:
    """Draw validation accuracy (fractions) over epochs; False when matplotlib is not installed."""
    axes = _axes()
    if axes is None:
        return False
    axes.plot(epochs, 100 * np.array(accuracies), "o-", color=_POINT, markersize=3, label="validation")
    axes.set_xlabel("epoch")
    return _save(axes, path, title)


def draw_methods(path: Path, title: str, rows: Sequence[Mapping[str, Any]], key: str, y_label: str) -> bool:
    """Draw accuracy over density or cost, one line for every label; False when matplotlib is not installed.

    Args:
        rows: with `label`, `accuracy` and its `spread` (fractions, None for one seed), and `key`.
        key: "density" (a fraction), "dense_equivalent_epochs" or "train_seconds".
    """
    series: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        series.setdefault(row["label"], []).append(row)
    columns = -(-len(series) // _NAMES)
    axes = _axes(width=6 + 3 * columns)
    if axes is None:
        return False
    scale = 100 if key == "density" else 1
    for number, (label, members) in enumerate(series.items()):
        members.sort(key=lambda row: row[key])
        style = {"marker": _MARKERS[number % len(_MARKERS)], "color": f"C{number % 10}", "markersize": 5}
        axes.errorbar(
            [scale * row[key] for row in members],
            [100 * row["accuracy"] for row in members],
            yerr=[100 * (row["spread"] or 0.0) for row in members],
            label=label,
            linewidth=1,
            capsize=2,
            **style,
        )
    axes.set_xscale("log")
    lowest, highest = (scale * pick(row[key] for row in rows) for pick in (min, max))
    _plain_ticks(axes, lowest, 1.2 * highest)
    axes.set_xlabel(_X_LABELS[key])
    return _save(axes, path, title, y_label, beside=columns)


def _draw_fit(axes: Any, fit: Mapping[str, Any], lowest: float) -> None:
    from growfx.methods.growth.plateau import AccuracyFit

    curve = AccuracyFit.from_json(fit)
    density = np.geomspace(lowest / 100, 1.0, 200)
    level, error = 100 * curve.accuracy(density), 196 * curve.accuracy_error(density)
    axes.plot(100 * density, level, color=_CURVE, label=f"{curve.curve} fit{_shares(curve)}{_time(curve)}")
    axes.fill_between(
        100 * density, level - error, level + error, color=_CURVE, alpha=0.15, linewidth=0, label="95 % band"
    )


def _noise_label(noise: np.ndarray) -> str:
    typical = float(np.median(noise))
    return f"rounds (one sigma, {typical:.2f} points)" if typical else "rounds"


def _shares(fit: Any) -> str:
    """The weights of an average over families; nothing where one has nearly all."""
    if fit.weights[0] >= _NEARLY_ALL:
        return ""
    pairs = zip(fit.curves, fit.weights, strict=True)
    return " (" + ", ".join(f"{curve.family.name} {100 * w:.0f} %" for curve, w in pairs if w >= _WORTH_TELLING) + ")"


def _time(fit: Any) -> str:
    """How long the curve's networks are trained, where the fit tells time from density."""
    return ", trained as long as the last round" if fit.time else ""


def _share(text: str, density: float) -> str:
    return f"{text} ({density:.3g} %)"


def _plain_ticks(axes: Any, lowest: float, highest: float = 100) -> None:
    """Plain numbers at 1, 2 and 5 times the powers of ten, instead of 10^n."""
    ticks = [m * 10.0**e for e in range(-4, 6) for m in (1, 2, 5)]
    shown = [t for t in ticks if 0.7 * lowest <= t <= highest]
    axes.set_xticks(shown, [f"{t:g}" for t in shown])
    axes.minorticks_off()
    axes.set_xlim(0.8 * lowest, 1.1 * highest)


def _set_accuracy_limits(axes: Any, accuracy: np.ndarray, noise: np.ndarray) -> None:
    """Frame the measurements: the band of an early fit may be many times as wide."""
    low, high = float((accuracy - noise).min()), float((accuracy + noise).max())
    margin = max(0.25 * (high - low), 0.5)
    axes.set_ylim(max(0.0, low - margin), min(101.0, high + margin))


def _axes(width: float = 7) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _save(axes: Any, path: Path, title: str, y_label: str = "validation accuracy, %", *, beside: int = 0) -> bool:
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if beside:  # many lines: their names would hide them
        axes.figure.legend(fontsize=7, loc="outside right upper", ncols=beside)
    else:
        axes.legend(fontsize=8, loc="lower right")
    new = path.with_name(path.name + ".new")
    try:
        axes.figure.savefig(new, format="png", dpi=150)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"`{path}` cannot be written ({error.strerror})") from error
    return True
