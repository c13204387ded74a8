"""Pictures of a run: accuracy over density while growing, accuracy over epochs otherwise.

matplotlib is optional; without it nothing is drawn, and the caller is told once.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from growfx.errors import CheckpointError

__all__ = ["draw_epochs", "draw_growth"]

_POINT, _CURVE, _STOP, _BACK = "#1b5e8c", "#c4651a", "#8a1c1c", "#2c7a3f"


def draw_growth(path: Path, title: str, rounds: Sequence[Mapping[str, Any]], stop_reason: str) -> bool:
    """Draw the growth curve: rounds with noise, the last fit with its 95 % band, the stop, the way back.

    Args:
        rounds: one record a round with `round`, `density`, `val_accuracy` (fraction), `noise` (fraction or
            None), and `fit`: None or what `growfx.plateau.Decision.to_json` gives.

    Returns:
        False when matplotlib is not installed; then nothing is written.
    """
    axes = _axes()
    if axes is None:
        return False
    density = [100 * r["density"] for r in rounds]
    accuracy = np.array([100 * r["val_accuracy"] for r in rounds])
    noise = np.array([100 * (r.get("noise") or 0.0) for r in rounds])
    axes.errorbar(density, accuracy, yerr=noise, fmt="o", color=_POINT, capsize=3, label="rounds (one sigma)")
    fit = next((r["fit"] for r in reversed(rounds) if r["fit"]), None)
    if fit is not None:
        _draw_fit(axes, fit, min(density))
        back = fit.get("operating_round")
        if back is not None and back < len(rounds):
            axes.axvline(density[back], color=_BACK, linestyle="--", label=_share("gone back to", density[back]))
    axes.axvline(density[-1], color=_STOP, linestyle=":", label=_share(f"stop: {stop_reason}", density[-1]))
    axes.set_xscale("log")
    _density_ticks(axes, min(density))
    _set_accuracy_limits(axes, accuracy, noise)
    axes.set_xlabel("density, % of the masked weights")
    return _save(axes, path, title)


def draw_epochs(path: Path, title: str, epochs: Sequence[int], accuracies: Sequence[float]) -> bool:
    """Draw validation accuracy (fractions) over epochs; False when matplotlib is not installed."""
    axes = _axes()
    if axes is None:
        return False
    axes.plot(epochs, 100 * np.array(accuracies), "o-", color=_POINT, markersize=3, label="validation")
    axes.set_xlabel("epoch")
    return _save(axes, path, title)


def _draw_fit(axes: Any, fit: Mapping[str, Any], lowest: float) -> None:
    from growfx.plateau import LogisticFit

    curve = LogisticFit.from_json(fit)
    density = np.geomspace(lowest / 100, 1.0, 200)
    level, error = 100 * curve.accuracy(density), 196 * curve.accuracy_error(density)
    axes.plot(100 * density, level, color=_CURVE, label="logistic fit")
    axes.fill_between(
        100 * density, level - error, level + error, color=_CURVE, alpha=0.15, linewidth=0, label="95 % band"
    )


def _share(text: str, density: float) -> str:
    return f"{text} ({density:.3g} %)"


def _density_ticks(axes: Any, lowest: float) -> None:
    """Plain percentages at 1, 2 and 5 times the powers of ten, instead of 10^n."""
    ticks = [m * 10.0**e for e in range(-4, 3) for m in (1, 2, 5)]
    shown = [t for t in ticks if 0.7 * lowest <= t <= 100]
    axes.set_xticks(shown, [f"{t:g}" for t in shown])
    axes.minorticks_off()
    axes.set_xlim(0.8 * lowest, 110)


def _set_accuracy_limits(axes: Any, accuracy: np.ndarray, noise: np.ndarray) -> None:
    """Frame the measurements: the band of an early fit may be many times as wide."""
    low, high = float((accuracy - noise).min()), float((accuracy + noise).max())
    margin = max(0.25 * (high - low), 0.5)
    axes.set_ylim(max(0.0, low - margin), min(101.0, high + margin))


def _axes() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _save(axes: Any, path: Path, title: str) -> bool:
    axes.set_title(title, fontsize=11)
    axes.set_ylabel("validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    new = path.with_name(path.name + ".new")
    try:
        axes.figure.savefig(new, format="png", dpi=150)
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise CheckpointError(f"`{path}` cannot be written ({error.strerror})") from error
    return True
