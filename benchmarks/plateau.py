"""The stop rule on synthetic accuracy curves: how much accuracy it leaves, how much density it spends.

Protocol. Growth starts at density 0.03 and grows by 1.3 a round up to 1.0 (15 rounds). A round measures the
true curve plus Gaussian noise of the level's standard deviation; the rule is told that standard deviation. It
stops when it wants to; the chosen density is the operating round it goes back to.

* gain left: true accuracy at full density minus true accuracy at the chosen density, in points.
* stopped early: more than half of the second rise of a two-step curve is left, the first step was taken for the top.
* density ratio: chosen density over the ideal one, the smallest (continuous) density whose gain left is the
  tolerance of 0.3 points. Rounds are 1.3 apart, so even an oracle has a median ratio of about 1.14.

Goals: logistic curves at most 0.5 points left in 95 % of curves up to a noise of 0.5 and in 90 % at 1, median density
ratio at most 1.2; power laws at most 0.3 points left in the median up to a noise of 0.5; two-step curves not stopped
early in 90 %.

Logistic curves: A_inf uniform in 0.6-0.95, rise 0.05-0.5, k 1-4, midpoint log-uniform in density 0.005-0.1;
curves whose ideal density is not within 0.04-0.7 are drawn again. Others: power laws, two steps, and curves
that still rise at full density, where the only right answer is "no plateau below max_density".

    python benchmarks/plateau.py [--curves 1000] [--json FILE]
"""

import argparse
import json
import math
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from growfx.methods.growth.plateau import PlateauRule, Point

SEED_DENSITY, GROWTH_RATIO, TOLERANCE = 0.03, 1.3, 0.003
LEVELS = (0.0, 0.2, 0.5, 1.0, 2.0)  # standard deviation of a round's accuracy, points
GOALS = {0.0: 0.95, 0.2: 0.95, 0.5: 0.95, 1.0: 0.90}  # share of curves with at most 0.5 points left
RATIO_GOAL = 1.2
POWER_LEFT_GOAL = 0.3  # points left in the median, power laws up to a noise of 0.5
NOT_EARLY_GOAL = 0.9  # share of two-step curves not stopped at the first step

Curve = Callable[[np.ndarray], np.ndarray]  # ln density -> accuracy


@dataclass(frozen=True)
class Outcome:
    """One curve: points left, chosen over ideal density, density at which growth ended, the verdict, stopped early."""

    gain_left: float
    ratio: float
    ended_at: float
    verdict: str
    early: bool


def ideal_density(curve: Curve) -> float:
    x = np.linspace(math.log(SEED_DENSITY), 0.0, 4001)
    left = curve(np.zeros(1)) - curve(x)
    return float(np.exp(x[np.argmax(left <= TOLERANCE)]))


def logistic(rng: np.random.Generator) -> Curve:
    while True:
        top, rise, k = rng.uniform(0.6, 0.95), rng.uniform(0.05, 0.5), rng.uniform(1.0, 4.0)
        x0 = rng.uniform(math.log(0.005), math.log(0.1))
        curve = _step(top - rise, rise, k, x0)
        if 0.04 <= ideal_density(curve) <= 0.7:
            return curve


def power_law(rng: np.random.Generator) -> Curve:
    while True:
        top, loss, power = rng.uniform(0.6, 0.95), rng.uniform(0.001, 0.02), rng.uniform(0.5, 2.0)
        curve = _power(top, loss, power)
        if 0.04 <= ideal_density(curve) <= 0.7 and curve(np.log([SEED_DENSITY]))[0] > 0.1:
            return curve


def two_step(rng: np.random.Generator) -> Curve:
    first, second = _two_steps(rng)
    return lambda x: first(x) + second(x)


def _two_steps(rng: np.random.Generator) -> tuple[Curve, Curve]:
    first = _step(0.3, rng.uniform(0.1, 0.3), rng.uniform(3.0, 5.0), math.log(rng.uniform(0.03, 0.06)))
    second = _step(0.0, rng.uniform(0.02, 0.15), rng.uniform(5.0, 8.0), math.log(rng.uniform(0.2, 0.35)))
    return first, second


def still_rising(rng: np.random.Generator) -> Curve:
    base, slope = rng.uniform(0.2, 0.5), rng.uniform(0.05, 0.13)
    return lambda x: base + slope * (x - math.log(SEED_DENSITY))


def _step(base: float, rise: float, k: float, x0: float) -> Curve:
    return lambda x: base + rise / (1.0 + np.exp(-k * (x - x0)))


def _power(top: float, loss: float, power: float) -> Curve:
    return lambda x: top - loss * np.exp(-power * x)


FAMILIES = {"logistic": logistic, "power law": power_law, "two steps": two_step, "still rising": still_rising}


def densities() -> np.ndarray:
    rounds = math.ceil(math.log(1.0 / SEED_DENSITY) / math.log(GROWTH_RATIO)) + 1
    return np.minimum(SEED_DENSITY * GROWTH_RATIO ** np.arange(rounds), 1.0)


def run_curve(family: str, level: float, number: int) -> Outcome:
    rule = PlateauRule(tolerance=TOLERANCE)
    curve = FAMILIES[family](_curve_draws(family, number))
    noise = level / 100.0
    grid = densities()
    measured = curve(np.log(grid)) + np.random.default_rng([2, number]).normal(0.0, 1.0, len(grid)) * noise
    points = [Point(float(d), float(np.clip(a, 0, 1)), noise) for d, a in zip(grid, measured, strict=True)]
    decisions = rule.follow(points)
    chosen = float(grid[decisions[-1].operating_round])
    left = curve(np.zeros(1))[0] - curve(np.log([chosen]))[0]
    verdict = rule.verdict(decisions[-1], points[: len(decisions)])
    ended = float(grid[len(decisions) - 1])
    early = family == "two steps" and float(left) > 0.5 * second_rise(number)
    return Outcome(100.0 * float(left), chosen / ideal_density(curve), ended, verdict, early)


def second_rise(number: int) -> float:
    """Accuracy that the second step of a two-step curve brings."""
    _, second = _two_steps(_curve_draws("two steps", number))
    return float(second(np.zeros(1))[0])


def _curve_draws(family: str, number: int) -> np.random.Generator:
    return np.random.default_rng([1, list(FAMILIES).index(family), number])


def summary(family: str, level: float, outcomes: list[Outcome]) -> dict[str, Any]:
    left = np.array([outcome.gain_left for outcome in outcomes])
    ratio = np.array([outcome.ratio for outcome in outcomes])
    verdicts = [outcome.verdict for outcome in outcomes]
    return {
        "family": family,
        "noise": level,
        "curves": len(outcomes),
        "left median": float(np.median(left)),
        "left 95 %": float(np.percentile(left, 95)),
        "share <= 0.5": float(np.mean(left <= 0.5)),
        "ratio median": float(np.median(ratio)),
        "ratio 90 %": float(np.percentile(ratio, 90)),
        "stopped early": float(np.mean([outcome.early for outcome in outcomes])),
        "ended at": float(np.mean([outcome.ended_at for outcome in outcomes])),
        "plateau": verdicts.count("plateau") / len(verdicts),
        "no plateau": verdicts.count("no plateau below max_density") / len(verdicts),
    }


def _work(job: tuple[str, float, int]) -> dict[str, Any]:
    family, level, curves = job
    return summary(family, level, [run_curve(family, level, number) for number in range(curves)])


def _against_goals(row: dict[str, Any]) -> str | None:
    """One line for a row that has goals."""
    family, noise = row["family"], row["noise"]
    if family == "logistic" and noise in GOALS:
        facts = [
            ("at most 0.5 points left in a share of", row["share <= 0.5"], row["share <= 0.5"] >= GOALS[noise]),
            ("median density ratio", row["ratio median"], row["ratio median"] <= RATIO_GOAL),
        ]
    elif family == "power law" and noise <= 0.5:
        facts = [("median points left", row["left median"], row["left median"] <= POWER_LEFT_GOAL)]
    elif family == "two steps":
        facts = [("stopped early in a share of", row["stopped early"], row["stopped early"] <= 1 - NOT_EARLY_GOAL)]
    else:
        return None
    told = ", ".join(f"{what} {value:.3f} ({'met' if met else 'MISSED'})" for what, value, met in facts)
    return f"{family}, noise {noise}: {told}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy left and density spent by the stop rule.")
    parser.add_argument("--curves", type=int, default=1000, help="curves a family and noise level")
    parser.add_argument("--json", type=Path, help="write the table, machine and versions here")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs = [(family, level, options.curves) for family in FAMILIES for level in LEVELS]
    with ProcessPoolExecutor(options.processes) as pool:
        rows = list(pool.map(_work, jobs))
    from tabulate import tabulate

    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    for told in filter(None, map(_against_goals, rows)):
        print(told)
    if options.json:
        import scipy

        facts = {
            "machine": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "protocol": {"seed_density": SEED_DENSITY, "growth_ratio": GROWTH_RATIO, "tolerance": TOLERANCE},
            "rows": rows,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
