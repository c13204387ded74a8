"""The logistic fit and the rule that stops growth."""

import importlib.util
import json
import math

import numpy as np
import pytest
from error_facts import facts
from places import ROOT
from scipy.optimize import minimize

from growfx.errors import ConfigError
from growfx.methods.growth.plateau import LogisticFit, PlateauRule, Point, fit_logistic


def load_benchmark():
    import sys

    path = ROOT / "benchmarks" / "plateau.py"
    spec = importlib.util.spec_from_file_location("benchmark_plateau", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


benchmark = load_benchmark()


def grown(curve, noise: float | None = 0.0, seed: int = 0, told: bool = True) -> list[Point]:
    """Rounds of a growth from 3 % by 1.3 a round over `curve` (ln density -> accuracy)."""
    grid = benchmark.densities()
    draws = np.random.default_rng(seed).normal(0, 1, len(grid)) * (noise or 0.0)
    values = curve(np.log(grid)) + draws
    return [Point(float(d), float(a), noise if told else None) for d, a in zip(grid, values, strict=True)]


def logistic(a0: float, rise: float, k: float, midpoint: float):
    return lambda x: a0 + rise / (1 + np.exp(-k * (x - math.log(midpoint))))


def test_a_curve_without_noise_is_found_again():
    curve = logistic(0.3, 0.5, 2.5, 0.06)
    fit = fit_logistic(grown(curve))
    assert fit is not None
    assert (fit.a0, fit.rise, math.exp(fit.log_k)) == pytest.approx((0.3, 0.5, 2.5), rel=0.02)
    assert math.exp(fit.x0) == pytest.approx(0.06, rel=0.02)
    grid = benchmark.densities()
    assert fit.accuracy(grid) == pytest.approx(curve(np.log(grid)), abs=1e-4)


def test_the_error_of_the_gain_is_the_spread_over_repeated_measurements():
    """Delta method against simulation, where the curve is well determined."""
    curve = logistic(0.2, 0.6, 2.0, 0.08)
    gains, errors = [], []
    for seed in range(80):
        fit = fit_logistic(grown(curve, 0.003, seed)[:12])
        assert fit is not None
        gain, error = fit.gain(0.3)
        gains.append(gain[0])
        errors.append(error[0])
    true = curve(np.zeros(1))[0] - curve(np.log([0.3]))[0]
    assert np.mean(gains) == pytest.approx(true, abs=0.002)
    assert np.std(gains) == pytest.approx(np.mean(errors), rel=0.35)


def test_noise_that_nobody_reports_is_read_off_the_residuals():
    fits = [fit_logistic(grown(logistic(0.2, 0.6, 2.0, 0.08), 0.01, seed, told=False)) for seed in range(20)]
    assert np.mean([fit.noise for fit in fits if fit]) == pytest.approx(0.01, rel=0.25)
    quiet = fit_logistic(grown(logistic(0.2, 0.6, 2.0, 0.08), 0.0, told=False))
    assert quiet is not None
    assert quiet.noise < 0.004


def test_a_curve_that_is_no_logistic_is_believed_less():
    def dented(x):
        return logistic(0.2, 0.6, 2.0, 0.08)(x) + 0.02 * np.cos(9 * x)

    smooth = fit_logistic(grown(logistic(0.2, 0.6, 2.0, 0.08), 0.0)[:10])
    wavy = fit_logistic([Point(p.density, p.accuracy, 0.001) for p in grown(dented)[:10]])
    assert smooth is not None
    assert wavy is not None
    assert wavy.noise > 0.005
    assert wavy.gain(0.2)[1][0] > 5 * smooth.gain(0.2)[1][0]


def test_a_fit_survives_json_with_its_band():
    fit = fit_logistic(grown(logistic(0.3, 0.5, 2.5, 0.06), 0.005)[:9])
    assert fit is not None
    again = LogisticFit.from_json(json.loads(json.dumps(fit.to_json())))
    grid = benchmark.densities()
    assert again.accuracy(grid) == pytest.approx(fit.accuracy(grid), rel=1e-12)
    assert again.accuracy_error(grid) == pytest.approx(fit.accuracy_error(grid), rel=1e-9)


def test_growth_goes_on_before_five_rounds_and_needs_two_rounds_that_agree():
    flat = [Point(float(d), 0.9, 0.0005) for d in benchmark.densities()]
    decisions = PlateauRule().follow(flat)
    assert [decision.fit is None for decision in decisions[:4]] == [True] * 4
    assert [decision.streak for decision in decisions[4:]] == [1, 2]
    assert [decision.stop for decision in decisions] == [False] * 5 + [True]


def test_a_steep_early_curve_stops_early_and_goes_back_to_the_first_round_that_is_good_enough():
    curve = logistic(0.3, 0.5, 3.0, 0.03)
    points = grown(curve, 0.001)
    decisions = PlateauRule().follow(points)
    assert decisions[-1].stop
    assert len(decisions) < len(points)
    back = decisions[-1].operating_round
    left = curve(np.zeros(1))[0] - curve(np.log([p.density for p in points]))
    assert back < len(decisions) - 1
    assert left[back] < 0.004
    assert left[back - 1] > 0.003


def test_no_growth_ends_on_full_density_alone():
    """At density 1 the gain is zero by definition, which is no evidence of a plateau."""
    rising = grown(lambda x: 0.5 + 0.1 * (x + 3.5))
    decisions = PlateauRule().follow(rising)
    assert len(decisions) == len(rising)
    assert not decisions[-1].stop
    assert PlateauRule().verdict(decisions[-1], rising) == "no plateau below max_density"


def test_a_plateau_seen_only_after_growth_had_to_end_is_called_by_its_name():
    curve = logistic(0.3, 0.5, 3.0, 0.03)
    points = grown(curve, 0.001)
    rule = PlateauRule(rounds_running=len(points))
    decisions = rule.follow(points)
    assert len(decisions) == len(points)
    assert rule.verdict(decisions[-1], points) == "max_density"


def test_the_goals_hold_on_a_small_set_of_synthetic_curves():
    """`benchmarks/plateau.py` with fewer curves; the shares have room for the smaller sample."""
    for level, share in ((0.2, 0.92), (0.5, 0.88), (1.0, 0.84)):
        outcomes = [benchmark.run_curve("logistic", level, number) for number in range(60)]
        assert np.mean([outcome.gain_left <= 0.5 for outcome in outcomes]) >= share
        if level <= 0.5:
            assert np.median([outcome.ratio for outcome in outcomes]) <= 1.25


def test_curves_that_still_rise_at_full_density_have_no_plateau():
    outcomes = [benchmark.run_curve("still rising", 0.2, number) for number in range(30)]
    assert {outcome.verdict for outcome in outcomes} == {"no plateau below max_density"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0.0, 0.5, None), facts("`density`", 0.0)),
        ((0.5, 87.5, None), facts("`accuracy`", 87.5, "[0, 1]")),
        ((0.5, math.nan, None), facts("`accuracy`", "nan")),
        ((0.5, 0.5, -0.1), facts("`noise`", -0.1)),
    ],
)
def test_impossible_measurements_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Point(*values)


def test_impossible_rules_are_refused():
    with pytest.raises(ConfigError, match=facts("`tolerance`", 0.0)):
        PlateauRule(tolerance=0.0)
    with pytest.raises(ConfigError, match=facts("`min_points`", 4)):
        PlateauRule(min_points=4)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fit_is_the_minimum_of_its_squares_and_weak_terms_found_from_many_starts(seed):
    draw = np.random.default_rng(seed)
    densities = 0.02 * 1.35 ** np.arange(8)
    truth = 0.3 + 0.4 / (1 + np.exp(-1.7 * (np.log(densities) - math.log(0.04))))
    noise = draw.uniform(0.004, 0.01, 8)
    measured = truth + noise * draw.standard_normal(8)

    def cost(p):  # (A0, Ainf - A0, ln k, ln x0), each with its weak term
        a0, rise, log_k, log_x0 = p
        curve = a0 + rise / (1 + (densities / math.exp(log_x0)) ** -math.exp(log_k))
        weak = [a0 - 0.5, rise - 0.3, (log_k - math.log(2)) / 0.5, log_x0 - math.log(0.03)]
        return float(np.sum(((curve - measured) / noise) ** 2) + np.sum(np.square(weak)))

    options = {"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20000, "maxfev": 20000}
    starts = [(0.3, 0.4, math.log(k), math.log(x)) for k in (1, 2, 4) for x in (0.02, 0.05, 0.1)]
    found = [minimize(cost, start, method="Nelder-Mead", options=options) for start in starts]
    best = min(found, key=lambda result: result.fun)
    points = [Point(float(d), float(a), float(n)) for d, a, n in zip(densities, measured, noise, strict=True)]
    fit = fit_logistic(points)
    assert cost(fit.parameters) == pytest.approx(best.fun, rel=1e-6)
    assert fit.parameters == pytest.approx(best.x, abs=1e-3)
