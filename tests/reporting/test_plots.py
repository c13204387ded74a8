import sys

import numpy as np
import pytest

from growfx.errors import CheckpointError
from growfx.methods.growth.plateau import PlateauRule, Point
from growfx.reporting import plots


def grown(count: int = 14) -> list[dict]:
    """Rounds along a logistic curve, with the rule's decisions."""
    density = np.minimum(0.02 * 1.3 ** np.arange(count), 1.0)
    accuracy = 0.6 + 0.3 / (1 + np.exp(-2.0 * (np.log(density) - np.log(0.03))))
    points = [Point(d, a, 0.002) for d, a in zip(density.tolist(), accuracy.tolist(), strict=True)]
    decisions = PlateauRule().follow(points)
    return [
        {"round": i, "density": p.density, "val_accuracy": p.accuracy, "noise": p.noise, "fit": d.to_json()}
        for i, (p, d) in enumerate(zip(points, decisions, strict=False))
    ]


@pytest.fixture
def drawn(monkeypatch):
    """The axes that were drawn on."""
    kept = []
    original = plots._axes

    def axes():
        kept.append(original())
        return kept[-1]

    monkeypatch.setattr(plots, "_axes", axes)
    return kept


def labels(axes) -> list[str]:
    return axes.get_legend_handles_labels()[1]


def test_a_growth_curve_shows_rounds_fit_band_stop_and_way_back(tmp_path, drawn):
    rounds = grown()
    assert plots.draw_growth(tmp_path / "curve.png", "a title", rounds, "plateau")
    assert (tmp_path / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    shown = labels(drawn[0])
    last, back = rounds[-1], rounds[rounds[-1]["fit"]["operating_round"]]
    assert {"rounds (one sigma, 0.20 points)", "95 % band"} <= set(shown)
    assert sum(label.startswith(last["fit"]["curve"] + " fit") for label in shown) == 1
    assert f"stop: plateau ({100 * last['density']:.3g} %)" in shown
    assert f"gone back to ({100 * back['density']:.3g} %)" in shown
    assert back["density"] < last["density"]
    low, high = drawn[0].get_ylim()
    assert all(low < 100 * r["val_accuracy"] < high for r in rounds)


def test_where_growth_pays_for_time_the_curve_is_over_cost(tmp_path, drawn):
    rounds = [{**r, "cost": 0.5 * r["density"]} for r in grown()]
    assert plots.draw_growth(tmp_path / "curve.png", "", rounds, "plateau")
    assert "multiply-accumulates" in drawn[0].get_xlabel()
    assert f"stop: plateau ({50 * rounds[-1]['density']:.3g} %)" in labels(drawn[0])


def test_rounds_without_a_fit_are_drawn_alone(tmp_path, drawn):
    assert plots.draw_growth(tmp_path / "curve.png", "", grown()[:3], "max_density")
    assert not any(" fit" in label for label in labels(drawn[0]))


def test_epochs_are_drawn_where_there_are_no_rounds(tmp_path, drawn):
    assert plots.draw_epochs(tmp_path / "curve.png", "", [1, 2, 3], [0.1, 0.5, 0.6])
    assert drawn[0].lines[0].get_ydata().tolist() == [10, 50, 60]


def test_without_matplotlib_nothing_is_drawn_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not plots.draw_growth(tmp_path / "curve.png", "", grown(), "plateau")
    assert not plots.draw_epochs(tmp_path / "curve.png", "", [1], [0.5])
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"curve\.png` cannot be written"):
        plots.draw_epochs(tmp_path / "missing" / "curve.png", "", [1], [0.5])
