"""When has accuracy stopped paying for density? A logistic fit, its predicted gain, and the rule that stops
growth.

    A(x) = A0 + (Ainf - A0) / (1 + exp(-k (x - x0))),    x = ln density

is fitted to the rounds' (density, accuracy, noise) by bounded least squares (Yao & Dovrolis 2025, arXiv
2509.25665, fit such a curve; its details are not published). Own choices:

1. Besides the measurements the fit has weak Gaussian terms on ln k and x0 (and very weak ones on the levels).
Early
   rounds do not determine all four parameters; without these terms the covariance is singular there.
2. Where residuals are larger than the noise says, the covariance grows by their ratio, so that a curve that
   is not a logistic gets less weight.
3. The gain from a density to full density (1.0) has a standard error by the delta method.

The rule (`PlateauRule`) stops when gain + 1.64 errors is below the tolerance in two rounds running. The
operating density is then the earliest round whose gain under the last fit is below the tolerance, and with
1.5 errors added below 5/3 of it: with the default tolerance of 0.3 points, 0.5 points. (1.5 was chosen on the
curves of `benchmarks/plateau.py`: fewer errors leave more accuracy behind, more of them spend more density.)
A fit that fails or is unbounded never stops growth.

Not handled: a curve that is flat for many rounds and rises again (a long flat stretch counts as a plateau).
A curve that approaches its top more slowly than a logistic, such as a power law, is left with about 0.5
points to gain at a noise of 0.5 points, not 0.2. At a noise of 1 point the density chosen is 1.3 times the
ideal one in the median.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from growfx.errors import ConfigError
from growfx.methods.base import check_accuracy

__all__ = ["Decision", "LogisticFit", "PlateauRule", "Point", "fit_logistic"]

_PARAMETERS: Final = ("a0", "rise", "log_k", "x0")  # rise = Ainf - A0
_LOWER: Final = np.array([0.0, 0.0, math.log(0.2), math.log(1e-4)])
_UPPER: Final = np.array([1.0, 1.0, math.log(20.0), math.log(3.0)])
_WEAK_MEAN: Final = np.array([0.5, 0.3, math.log(2.0), math.log(0.03)])
_WEAK_SPREAD: Final = np.array([1.0, 1.0, 0.5, 1.0])
_START_LOG_K: Final = np.log([0.5, 1.0, 2.0, 4.0, 8.0])
_START_X0: Final = np.log([0.001, 0.004, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0])
_NOISE_FLOOR: Final = 3e-4  # accuracy is never known better than 0.03 points
_TYPICAL_NOISE: Final = 5e-3  # where no noise is reported, worth `_TYPICAL_WEIGHT` residuals
_TYPICAL_WEIGHT: Final = 2.0
_UNBOUNDED_ERROR: Final = 1.0  # an error of the gain of 100 points says nothing


@dataclass(frozen=True)
class Point:
    """One growth round: density in (0, 1], accuracy as a fraction, its standard deviation (None: unknown)."""

    density: float
    accuracy: float
    noise: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ConfigError(f"`density` is {self.density!r}; allowed is a number in (0, 1]")
        check_accuracy(self.accuracy, self.noise)


@dataclass(frozen=True)
class LogisticFit:
    """A fitted curve. `covariance` is that of (a0, rise, log_k, x0), `noise` the one of a typical round."""

    a0: float
    rise: float
    log_k: float
    x0: float
    covariance: tuple[tuple[float, ...], ...]
    noise: float
    points: int

    @property
    def parameters(self) -> np.ndarray:
        """The four parameters in the order of `covariance`."""
        return np.array([self.a0, self.rise, self.log_k, self.x0])

    def accuracy(self, density: float | np.ndarray) -> np.ndarray:
        """Return the curve's accuracy (fraction) at each density."""
        return _curve(self.parameters, np.log(np.atleast_1d(density)))

    def accuracy_error(self, density: float | np.ndarray) -> np.ndarray:
        """Return the standard error of `accuracy` (the half width of a one-sigma band)."""
        return self._error(_slopes(self.parameters, np.log(np.atleast_1d(density))))

    def gain(self, density: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what full density (1.0) would gain over each density (fraction), and its standard error."""
        x = np.log(np.atleast_1d(density))
        full = np.zeros(1)
        gain = _curve(self.parameters, full) - _curve(self.parameters, x)
        return gain, self._error(_slopes(self.parameters, full) - _slopes(self.parameters, x))

    def _error(self, slopes: np.ndarray) -> np.ndarray:
        variance = np.einsum("pi,ij,pj->p", slopes, np.array(self.covariance), slopes)
        return np.sqrt(np.maximum(variance, 0.0))

    def to_json(self) -> dict[str, Any]:
        """Return plain numbers: A0, Ainf, k, x0, their standard errors, and what `from_json` needs."""
        errors = np.sqrt(np.diag(np.array(self.covariance)))
        k = math.exp(self.log_k)
        rise_error = float(self._error(np.array([[1.0, 1.0, 0.0, 0.0]]))[0])
        return {
            "A0": self.a0,
            "Ainf": self.a0 + self.rise,
            "k": k,
            "x0": self.x0,
            "errors": {
                "A0": float(errors[0]),
                "Ainf": rise_error,
                "k": k * float(errors[2]),
                "x0": float(errors[3]),
            },
            "covariance": [list(row) for row in self.covariance],
            "noise": self.noise,
            "points": self.points,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "LogisticFit":
        """Return the fit that `to_json` (or a decision's) wrote."""
        return cls(
            a0=data["A0"],
            rise=data["Ainf"] - data["A0"],
            log_k=math.log(data["k"]),
            x0=data["x0"],
            covariance=tuple(tuple(row) for row in data["covariance"]),
            noise=data["noise"],
            points=data["points"],
        )


def _curve(parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    a0, rise, log_k, x0 = parameters
    return a0 + rise / (1.0 + np.exp(-math.exp(log_k) * (x - x0)))


def _slopes(parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the derivatives of the curve at each x by (a0, rise, log_k, x0), one row an x."""
    _, rise, log_k, x0 = parameters
    k = math.exp(log_k)
    share = 1.0 / (1.0 + np.exp(-k * (x - x0)))
    bend = rise * share * (1.0 - share) * k
    return np.stack([np.ones_like(x), share, bend * (x - x0), -bend], axis=1)


def fit_logistic(points: Sequence[Point]) -> LogisticFit | None:
    """Fit the curve to at least two points; None where the fit fails or its gain is unbounded."""
    x = np.log([point.density for point in points])
    y = np.array([point.accuracy for point in points])
    given = [point.noise for point in points]
    known = all(noise is not None for noise in given)
    sigma = np.array([max(_TYPICAL_NOISE if noise is None else noise, _NOISE_FLOOR) for noise in given])
    best, spread = None, 1.0
    for _ in range(1 if known else 3):  # without reported noise: fit, read it off the residuals, fit again
        best = _least_squares(x, y, sigma)
        if best is None:
            return None
        spread = _spread((_curve(best, x) - y) / sigma, 1.0 if known else _TYPICAL_NOISE / sigma[0])
        if not known:
            sigma = np.maximum(sigma * spread, _NOISE_FLOOR)
    assert best is not None
    slopes = _slopes(best, x) / sigma[:, None]
    scale = max(1.0, spread**2) if known else 1.0
    covariance = np.linalg.inv(slopes.T @ slopes + np.diag(_WEAK_SPREAD**-2)) * scale
    fit = LogisticFit(
        *(float(value) for value in best),
        covariance=tuple(tuple(float(v) for v in row) for row in covariance),
        noise=float(np.sqrt(np.mean(sigma**2) * scale)),
        points=len(points),
    )
    gain, error = fit.gain(math.exp(x[-1]))
    return fit if np.isfinite(gain[0]) and error[0] < _UNBOUNDED_ERROR else None


def _spread(residuals: np.ndarray, typical: float) -> float:
    """Return the standard deviation of residuals, shrunk towards `typical` (a few points say little)."""
    freedom = max(len(residuals) - len(_PARAMETERS), 0)
    total = float(residuals @ residuals) + _TYPICAL_WEIGHT * typical**2
    return math.sqrt(total / (freedom + _TYPICAL_WEIGHT))


def _least_squares(x: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> np.ndarray | None:
    """Return the parameters of least cost within bounds, or None where they are not finite."""
    from scipy.optimize import least_squares

    def residuals(p: np.ndarray) -> np.ndarray:
        return np.concatenate([(_curve(p, x) - y) / sigma, (p - _WEAK_MEAN) / _WEAK_SPREAD])

    def jacobian(p: np.ndarray) -> np.ndarray:
        return np.concatenate([_slopes(p, x) / sigma[:, None], np.diag(1.0 / _WEAK_SPREAD)])

    start = np.clip(_start(x, y, sigma), _LOWER + 1e-6, _UPPER - 1e-6)
    result = least_squares(residuals, start, jacobian, bounds=(_LOWER, _UPPER), max_nfev=100)
    return result.x if np.isfinite(result.cost) else None


def _start(x: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return the best of a grid of (k, x0), with the levels solved for: the cost has several valleys."""
    log_k, x0 = (grid.reshape(-1, 1) for grid in np.meshgrid(_START_LOG_K, _START_X0))
    share = 1.0 / (1.0 + np.exp(-np.exp(log_k) * (x - x0)))
    weight = sigma**-2 / np.sum(sigma**-2)
    mean_share, mean_y = (share @ weight)[:, None], float(y @ weight)
    centred = share - mean_share
    # the small term keeps a grid point whose curve is flat over these rounds from dividing by zero
    rise = (centred * (y - mean_y)) @ weight / (centred**2 @ weight + 1e-9)
    rise = np.clip(rise, 0.0, 1.0)[:, None]
    error = (centred * rise - (y - mean_y)) / sigma
    weak = (np.hstack([log_k, x0]) - _WEAK_MEAN[2:]) / _WEAK_SPREAD[2:]
    best = int(np.argmin(np.sum(error**2, axis=1) + np.sum(weak**2, axis=1)))
    a0 = mean_y - float(rise[best, 0] * mean_share[best, 0])
    return np.array([a0, rise[best, 0], log_k[best, 0], x0[best, 0]])


@dataclass(frozen=True)
class Decision:
    """What the rule says after a round.

    `gain`, `gain_error`: predicted from this round's density to full density (fractions), None without a fit.
    `streak`: rounds running in which gain + 1.64 errors was below the tolerance. `stop`: end growth here.
    `operating_round`: index of the round to go back to under this fit (the last one where no earlier round
    qualifies).
    """

    fit: LogisticFit | None
    gain: float | None
    gain_error: float | None
    streak: int
    stop: bool
    operating_round: int

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
        }
        return self.fit.to_json() | decision


@dataclass(frozen=True)
class PlateauRule:
    """The stop rule; a pure function of the rounds so far.

    tolerance: accuracy (fraction) that full density may still have to offer; 0.003 is 0.3 points.
    rounds_running: rounds in a row that must agree. min_points: rounds needed before the first fit.
    errors: standard errors added to the gain before growth may stop (1.64: one-sided 95 %).
    margin, margin_errors: the operating round's gain plus `margin_errors` errors is below `margin`
    tolerances.
    """

    tolerance: float = 0.003
    rounds_running: int = 2
    min_points: int = 5
    errors: float = 1.64
    margin: float = 5.0 / 3.0
    margin_errors: float = 1.5

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
        fit = fit_logistic(points) if len(points) >= self.min_points else None
        if fit is None:
            return Decision(None, None, None, 0, False, last)
        gains, errors = fit.gain(np.array([point.density for point in points]))
        gain, error = float(gains[-1]), float(errors[-1])
        below = points[-1].density < 1.0 and gain + self.errors * error < self.tolerance
        streak = streak + 1 if below else 0
        settled = (gains < self.tolerance) & (gains + self.margin_errors * errors < self.margin * self.tolerance)
        operating = int(np.argmax(settled)) if settled.any() else last
        return Decision(fit, gain, error, streak, streak >= self.rounds_running, operating)

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
