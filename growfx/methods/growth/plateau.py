"""When has accuracy stopped paying for density? A fitted curve, its predicted gain, and the rule that stops growth.

Yao & Dovrolis 2025 (arXiv 2509.25665) fit a logistic to accuracy over density; its details are not published. Own
choices:

1. The curve is an average over families (logistic, power law, two-step: `growfx.methods.growth.curves`), each weighted
   by its evidence. A logistic alone is fooled by power laws, whose tail it takes for a plateau.
2. Each family has weak Gaussian priors: early rounds do not determine all parameters.
3. Where residuals are larger than the noise says, even under the best family, the noise is taken to be larger, so that
   a curve of no known family is believed less.
4. Where rounds were held (`hold_every`), what they gain by being trained on is fitted beside density
   (`growfx.methods.growth.curves`) and does not count as a gain of density.
5. The gain from a density to full density (1.0) has a standard error: by the delta method within a family, and by the
   disagreement of the families.

The rule (`PlateauRule`) stops when gain + 1.64 errors is below the tolerance in two rounds running; while the best
guess is a plateau but the errors are too large, it says that it is not sure, and growth goes on for a round. The
operating density is then the earliest round whose gain under the last fit is more likely than not below the tolerance,
and with a chance of 70 % below 5/3 of it: with the default tolerance of 0.3 points, 0.5 points. The numbers were chosen
on the curves of `benchmarks/plateau.py`. A fit that fails or is unbounded never stops growth.

Not handled: a curve that is flat for many rounds and rises again (whatever is flat long enough is a plateau).
At a noise of 1 point the density chosen is 1.24 times the ideal one in the median, where rounds 1.3 apart allow 1.14,
and power laws are left with 0.34 points to gain.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np

from growfx.errors import ConfigError
from growfx.methods.base import check_accuracy
from growfx.methods.growth.curves import FAMILIES, LOGISTIC, CurveFit, Family, fit_family

__all__ = ["AccuracyFit", "Decision", "PlateauRule", "Point", "fit_accuracy"]

_NOISE_FLOOR: Final = 3e-4  # accuracy is never known better than 0.03 points
_TYPICAL_NOISE: Final = 5e-3  # where no noise is reported, worth `_TYPICAL_WEIGHT` residuals
_TYPICAL_WEIGHT: Final = 2.0
_UNBOUNDED_ERROR: Final = 1.0  # an error of the gain of 100 points says nothing
_SMALLEST_ERROR: Final = 1e-9  # of a gain that is zero by definition
_SMALLEST_WEIGHT: Final = 1e-12  # of a family, as a logarithm has to be written


@dataclass(frozen=True)
class Point:
    """One growth round: density in (0, 1], accuracy as a fraction, its standard deviation (None: unknown).

    `epochs`: of training until its end, the seed's included; None leaves time out of the fit.
    """

    density: float
    accuracy: float
    noise: float | None = None
    epochs: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"`density` is {self.density!r}; allowed is a number in (0, 1]")
        if self.epochs is not None and not 0.0 < self.epochs < math.inf:
            raise ConfigError(f"`epochs` is {self.epochs!r}; allowed is a number above 0")
        check_accuracy(self.accuracy, self.noise)


@dataclass(frozen=True, eq=False)
class AccuracyFit:
    """Accuracy over density, averaged over curves of several families.

    Attributes:
        curves: one fit a family, that of largest weight first.
        weights: of the curves, by their evidence; they add up to 1.
        noise: standard deviation of a typical round (fraction). points: rounds fitted.
        time: accuracy (fraction) that e times as many epochs gain at any density; 0 where that was not fitted.
    """

    curves: tuple[CurveFit, ...]
    weights: tuple[float, ...]
    noise: float
    points: int
    time: float = 0.0

    @property
    def curve(self) -> str:
        """Name of the family that the data favour."""
        return self.curves[0].family.name

    def curve_of(self, family: Family) -> CurveFit | None:
        """Return the curve of `family`; None where it was not fitted."""
        return next((curve for curve in self.curves if curve.family is family), None)

    def accuracy(self, density: float | np.ndarray) -> np.ndarray:
        """Return the averaged curve's accuracy (fraction) at each density."""
        x = np.log(np.atleast_1d(density))
        return self._average([curve.accuracy(x) for curve in self.curves])

    def accuracy_error(self, density: float | np.ndarray) -> np.ndarray:
        """Return the standard error of `accuracy` (the half width of a one-sigma band)."""
        x = np.log(np.atleast_1d(density))
        return self._spread(
            [curve.accuracy(x) for curve in self.curves], [curve.error(curve.slopes(x)) for curve in self.curves]
        )

    def gain(self, density: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what full density (1.0) would gain over each density (fraction), and its standard error."""
        x = np.log(np.atleast_1d(density))
        full = np.zeros(1)
        gains = [curve.accuracy(full) - curve.accuracy(x) for curve in self.curves]
        errors = [curve.error(curve.slopes(full) - curve.slopes(x)) for curve in self.curves]
        return self._average(gains), self._spread(gains, errors)

    def chance(self, density: float | np.ndarray, gain: float) -> np.ndarray:
        """Return the probability that full density gains less than `gain` (fraction) over each density."""
        x = np.log(np.atleast_1d(density))
        full = np.zeros(1)
        chances: list[np.ndarray] = []
        for curve in self.curves:
            left = gain - (curve.accuracy(full) - curve.accuracy(x))
            error = np.maximum(curve.error(curve.slopes(full) - curve.slopes(x)), _SMALLEST_ERROR)
            chances.append(np.array([0.5 * (1.0 + math.erf(z / math.sqrt(2.0))) for z in left / error]))
        return self._average(chances)

    def _average(self, values: Sequence[np.ndarray]) -> np.ndarray:
        return np.array(self.weights) @ np.stack(values)

    def _spread(self, values: Sequence[np.ndarray], errors: Sequence[np.ndarray]) -> np.ndarray:
        """Return the standard deviation of a mixture of normal distributions."""
        mean = self._average(values)
        variance = np.stack(errors) ** 2 + (np.stack(values) - mean) ** 2
        return np.sqrt(np.array(self.weights) @ variance)

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers: the family favoured, each curve's weight, parameters and standard errors.

        A0, Ainf, k, x0 and `errors` are those of the logistic.
        """
        curves = {
            curve.family.name: {
                "weight": weight,
                "parameters": dict(zip(curve.family.parameters, map(float, curve.parameters), strict=True)),
                "errors": dict(
                    zip(curve.family.parameters, map(float, np.sqrt(np.diag(curve.covariance))), strict=True)
                ),
                "covariance": curve.covariance.tolist(),
            }
            for curve, weight in zip(self.curves, self.weights, strict=True)
        }
        facts = {"curve": self.curve, "curves": curves, "noise": self.noise, "points": self.points, "time": self.time}
        return facts | _logistic_facts(self.curve_of(LOGISTIC))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "AccuracyFit":
        """Return the fit that `to_json` (or a decision's) wrote, version 0.1's logistic included."""
        if "curves" not in data:
            values = [data["A0"], data["Ainf"] - data["A0"], math.log(data["k"]), data["x0"]]
            logistic = CurveFit(LOGISTIC, np.array(values), np.array(data["covariance"]), 0.0)
            return cls((logistic,), (1.0,), data["noise"], data["points"])
        curves = tuple(
            CurveFit(
                FAMILIES[name],
                np.array([kept["parameters"][key] for key in FAMILIES[name].parameters]),
                np.array(kept["covariance"]),
                math.log(max(kept["weight"], _SMALLEST_WEIGHT)),
            )
            for name, kept in data["curves"].items()
        )
        weights = tuple(kept["weight"] for kept in data["curves"].values())
        return cls(curves, weights, data["noise"], data["points"], data.get("time", 0.0))  # older fits have none


def _logistic_facts(curve: CurveFit | None) -> dict[str, Any]:
    """Return the logistic in the notation of its formula."""
    if curve is None:
        return {}
    a0, rise, log_k, x0 = (float(value) for value in curve.parameters)
    a0_error, _, log_k_error, x0_error = (float(value) for value in np.sqrt(np.diag(curve.covariance)))
    k = math.exp(log_k)
    rise_error = float(curve.error(np.array([[1.0, 1.0, 0.0, 0.0]]))[0])
    errors = {"A0": a0_error, "Ainf": rise_error, "k": k * log_k_error, "x0": x0_error}
    return {"A0": a0, "Ainf": a0 + rise, "k": k, "x0": x0, "errors": errors}


def fit_accuracy(points: Sequence[Point], families: Sequence[Family] = tuple(FAMILIES.values())) -> AccuracyFit | None:
    """Fit each family to at least two points and average them; None where no fit succeeds or the gain is unbounded.

    A point without noise counts as one of 0.5 points noise, corrected by the residuals. Time is fitted where all points
    have `epochs` and two that follow each other have the same density.
    """
    x = np.log([point.density for point in points])
    y = np.array([point.accuracy for point in points])
    given = [point.noise for point in points]
    known = all(noise is not None for noise in given)
    sigma = np.array([max(_TYPICAL_NOISE if noise is None else noise, _NOISE_FLOOR) for noise in given])
    age = _ages(points)
    curves: list[CurveFit] = []
    for _ in range(2 if known else 3):  # fit, read the noise off the residuals, fit again
        curves = _fits(families, x, y, sigma, age)
        if not curves:
            return None
        spread = _spread(curves[0], x, y, sigma, age, 1.0 if known else _TYPICAL_NOISE / sigma[0])
        if known and spread <= 1.0:
            break
        sigma = np.maximum(sigma * spread, _NOISE_FLOOR)
    fit = _averaged(curves, sigma)
    gain, error = fit.gain(points[-1].density)
    return fit if np.isfinite(gain[0]) and error[0] < _UNBOUNDED_ERROR else None


def _ages(points: Sequence[Point]) -> np.ndarray | None:
    """Return ln of the epochs of each point over the last's; None where they cannot be told from density."""
    epochs = [point.epochs for point in points if point.epochs is not None]
    densities = [point.density for point in points]
    if len(epochs) < len(points) or all(a != b for a, b in pairwise(densities)):
        return None
    return np.log(np.array(epochs) / epochs[-1])


def _fits(
    families: Sequence[Family], x: np.ndarray, y: np.ndarray, sigma: np.ndarray, age: np.ndarray | None
) -> list[CurveFit]:
    """Return the fit of each family, that of most evidence first."""
    found = [fit for family in families if (fit := fit_family(family, x, y, sigma, age)) is not None]
    return sorted(found, key=lambda fit: -fit.log_evidence)


def _averaged(curves: Sequence[CurveFit], sigma: np.ndarray) -> AccuracyFit:
    evidence = np.array([curve.log_evidence for curve in curves])
    weights = np.exp(evidence - evidence.max())
    weights = weights / weights.sum()
    noise = float(np.sqrt(np.mean(sigma**2)))
    return AccuracyFit(
        curves=tuple(curves),
        weights=tuple(float(weight) for weight in weights),
        noise=noise,
        points=len(sigma),
        time=float(weights @ [curve.time for curve in curves]),
    )


def _spread(
    curve: CurveFit, x: np.ndarray, y: np.ndarray, sigma: np.ndarray, age: np.ndarray | None, typical: float
) -> float:
    """Return the standard deviation of residuals over sigma, shrunk towards `typical` (a few points say little)."""
    later = 0.0 if age is None else curve.time * age
    residuals = (curve.accuracy(x) + later - y) / sigma
    freedom = max(len(residuals) - len(curve.parameters) - (age is not None), 0)
    total = float(residuals @ residuals) + _TYPICAL_WEIGHT * typical**2
    return math.sqrt(total / (freedom + _TYPICAL_WEIGHT))


@dataclass(frozen=True)
class Decision:
    """What the rule says after a round.

    `gain`, `gain_error`: predicted from this round's density to full density (fractions), None without a fit.
    `streak`: rounds running in which gain + 1.64 errors was below the tolerance. `stop`: end growth here.
    `operating_round`: index of the round to go back to under this fit (the last one where no earlier round
    qualifies). `unsure`: the plateau is likely, but not certain enough to stop.
    """

    fit: AccuracyFit | None
    gain: float | None
    gain_error: float | None
    streak: int
    stop: bool
    operating_round: int
    unsure: bool = False

    def to_json(self) -> dict[str, Any] | None:
        """Return the fit, the predicted gain and the decision as plain numbers; None without a fit."""
        if self.fit is None:
            return None
        decision = {
            "gain": self.gain,
            "gain_error": self.gain_error,
            "streak": self.streak,
            "stop": self.stop,
            "operating_round": self.operating_round,
            "unsure": self.unsure,
        }
        return self.fit.to_json() | decision


@dataclass(frozen=True)
class PlateauRule:
    """The stop rule; a pure function of the rounds so far.

    tolerance: accuracy (fraction) that full density may still have to offer; 0.003 is 0.3 points.
    rounds_running: rounds in a row that must agree. min_points: rounds needed before the first fit.
    errors: standard errors added to the gain before growth may stop (1.64: one-sided 95 %).
    margin, margin_chance: the operating round's gain is below the tolerance with a chance of one half, and below
    `margin` tolerances with `margin_chance`.
    """

    tolerance: float = 0.003
    rounds_running: int = 2
    min_points: int = 5
    errors: float = 1.64
    margin: float = 5.0 / 3.0
    margin_chance: float = 0.7

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance < 1.0:
            raise ConfigError(f"`tolerance` is {self.tolerance!r}; allowed is a fraction in (0, 1), 0.003 = 0.3 points")
        # the curve has four parameters: with fewer points its covariance says nothing
        if self.min_points < 5 or self.rounds_running < 1:
            raise ConfigError(
                f"`min_points` is {self.min_points} and `rounds_running` {self.rounds_running}; "
                "allowed are 5 or more and 1 or more"
            )

    def decide(self, points: Sequence[Point], streak: int = 0) -> Decision:
        """Decide after the last of `points` (rounds in order); `streak` is that of the decision before.

        At full density the predicted gain is zero whatever the curve, so that round never stops growth.
        """
        last = len(points) - 1
        fit = fit_accuracy(points) if len(points) >= self.min_points else None
        if fit is None:
            return Decision(None, None, None, 0, False, last)
        densities = np.array([point.density for point in points])
        gains, errors = fit.gain(densities)
        gain, error = float(gains[-1]), float(errors[-1])
        grows = points[-1].density < 1.0
        streak = streak + 1 if grows and gain + self.errors * error < self.tolerance else 0
        likely = fit.chance(densities, self.tolerance) > 0.5
        settled = likely & (fit.chance(densities, self.margin * self.tolerance) > self.margin_chance)
        operating = int(np.argmax(settled)) if settled.any() else last
        while operating < last and densities[operating + 1] == densities[operating]:
            operating += 1  # the same edges, trained for longer
        stop = streak >= self.rounds_running
        unsure = grows and bool(likely[-1]) and not stop
        return Decision(fit, gain, error, streak, stop, operating, unsure)

    def follow(self, points: Sequence[Point]) -> list[Decision]:
        """Return the decisions after each round, up to the one that stops growth."""
        decisions: list[Decision] = []
        for count in range(1, len(points) + 1):
            before = decisions[-1].streak if decisions else 0
            decisions.append(self.decide(points[:count], before))
            if decisions[-1].stop:
                break
        return decisions

    def verdict(self, decision: Decision, points: Sequence[Point]) -> str:
        """Return the reason why growth ends after `points`, at a plateau or at the largest density
        allowed."""
        if decision.stop:
            return "plateau"
        if decision.fit is None or decision.operating_round < len(points) - 1:
            return "max_density"  # too few rounds, or a plateau seen before the rule could be sure
        return "no plateau below max_density"
