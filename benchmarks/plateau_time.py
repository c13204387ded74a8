"""The stop rule on curves that rise by training as well as by density, with and without held rounds.

Growth starts at 1 %, its seed trained for 15 epochs, then rounds of 2 epochs, 1.3 times as many edges each, up to full
density. A round measures a logistic curve over density (rise uniform in 0.15-0.3, k 1.2-2.5, midpoint log-uniform in
1-6 %) plus what training gains, so many points for e times as many epochs, plus Gaussian noise of 0.7 points, which the
rule is told. The tolerance is one point. With `hold_every` of n, one round after every n adds no edges.

* density ratio: chosen density over the ideal one, the smallest whose gain left by density is the tolerance.
* gain left: accuracy that density alone would still bring, in points. epochs: until growth ended.

    python benchmarks/plateau_time.py [--curves 40] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import describe
from tabulate import tabulate

from growfx.methods.growth.curves import LOGISTIC
from growfx.methods.growth.plateau import PlateauRule, Point

SEED_DENSITY, RATIO, SEED_EPOCHS, ROUND_EPOCHS, NOISE, TOLERANCE = 0.01, 1.3, 15, 2, 0.007, 0.01
GAINS, HELD = (0.0, 0.08, 0.16), (0, 1, 2, 3)


@dataclass(frozen=True)
class Outcome:
    """One growth: density gone back to over the ideal one, points left, density and epochs at its end."""

    ratio: float
    left: float
    ended_at: float
    epochs: int


def grow(number: int, by_time: float, hold_every: int) -> Outcome:
    rng = np.random.default_rng([3, number])
    rise, k, x0 = rng.uniform(0.15, 0.3), rng.uniform(1.2, 2.5), rng.uniform(math.log(0.01), math.log(0.06))
    parameters = np.array([[0.45, rise, math.log(k), x0]])

    def curve(density: float) -> float:
        return float(LOGISTIC.values(parameters, np.log([density]))[0, 0])

    rule, draws = PlateauRule(tolerance=TOLERANCE), np.random.default_rng([4, number])
    density, epochs, points, streak = SEED_DENSITY, SEED_EPOCHS, [], 0
    while True:
        accuracy = curve(density) + by_time * math.log(epochs / SEED_EPOCHS) + draws.normal() * NOISE
        told = float(epochs) if hold_every else None
        points.append(Point(density, float(np.clip(accuracy, 0, 1)), NOISE, told))
        decision = rule.decide(points, streak)
        streak = decision.streak
        if decision.stop or density == 1:
            break
        if not hold_every or len(points) % (hold_every + 1):
            density = min(RATIO * density, 1.0)
        epochs += ROUND_EPOCHS
    chosen = points[decision.operating_round].density
    grid = np.exp(np.linspace(math.log(SEED_DENSITY), 0, 2001))
    ideal = next(d for d in grid if curve(1.0) - curve(d) <= TOLERANCE)
    return Outcome(chosen / ideal, 100 * (curve(1.0) - curve(chosen)), density, epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for by_time in GAINS:
        for hold_every in HELD:
            found = [grow(number, by_time, hold_every) for number in range(options.curves)]
            rows.append(
                {
                    "points by e times the epochs": 100 * by_time,
                    "hold_every": hold_every,
                    "density ratio, median": round(float(np.median([one.ratio for one in found])), 2),
                    "left, median": round(float(np.median([one.left for one in found])), 2),
                    "left, 90 %": round(float(np.percentile([one.left for one in found], 90)), 2),
                    "ended at, median": round(float(np.median([one.ended_at for one in found])), 2),
                    "epochs, median": float(np.median([one.epochs for one in found])),
                }
            )
            print(rows[-1], flush=True)
    print(tabulate(rows, headers="keys", tablefmt="github"))
    if options.json:
        facts = {"machine": describe(), "curves": options.curves, "rows": rows}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
