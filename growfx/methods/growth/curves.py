"""Families of accuracy curves over density, and the fit of one family to measurements.

With x = ln density, the families are

    logistic    a0 + rise / (1 + exp(-k (x - x0)))
    power law   top - loss * exp(-p (x - x_ref))               loss at the reference density exp(x_ref) = 0.03
    two-step    the sum of two logistics, the second of which sits at a larger density

Where rounds say how long the network had been trained, a term

    time * ln(epochs / epochs of the last round),            time >= 0

is fitted with each of them: what rounds gain by being trained on, whatever their density. It can be told from density
only where some rounds add no edges. The curve is then that of the last round's training.

A fit is the least-squares estimate under the measurements' noise and weak Gaussian priors: a few rounds do not
determine all parameters, and without priors the covariance is singular there. Its evidence is Laplace's approximation
of the marginal likelihood (Bishop, Pattern Recognition and Machine Learning, 4.4.1): an information criterion that,
unlike BIC, counts a parameter by how far the data determine it, which matters with 5 to 15 points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

__all__ = ["FAMILIES", "LOGISTIC", "POWER_LAW", "TWO_STEP", "CurveFit", "Family", "fit_family"]

_X_REF: Final = math.log(0.03)
_TIME_SPREAD: Final = 0.1  # of the prior of `time`: accuracy for e times as many epochs
_STARTS: Final = 3  # grid points that are refined: the cost has several valleys
_ITERATIONS: Final = 40
_CONVERGED: Final = 1e-9  # relative decrease of the cost

Grid = np.ndarray


@dataclass(frozen=True, eq=False)
class Family:
    """Curves ``sum_j c_j * basis_j(x; q)``: linear in some parameters c, which come first, not in the others, q.

    Attributes:
        name: as reported in traces and plots.
        parameters: names, linear ones first.
        linear: how many are linear.
        lower, upper: bounds. mean, spread: of the Gaussian priors.
        grid: values (g, q) of the nonlinear parameters that a fit starts from.
        basis: (q (s, q), x (n)) -> (s, n, linear). bends: (parameters (s, p), x (n)) -> the derivatives of the curve by
            the nonlinear parameters (s, n, q).
    """

    name: str
    parameters: tuple[str, ...]
    linear: int
    lower: np.ndarray
    upper: np.ndarray
    mean: np.ndarray
    spread: np.ndarray
    grid: np.ndarray
    basis: Callable[[np.ndarray, np.ndarray], np.ndarray]
    bends: Callable[[np.ndarray, np.ndarray], np.ndarray]

    def values(self, p: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the accuracies (s, n) of curves with parameters `p` (s, parameters) at `x` (n)."""
        return (self.basis(p[:, self.linear :], x) @ p[:, : self.linear, None])[..., 0]

    def slopes(self, p: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Return the derivatives (s, n, parameters) of `values`."""
        return np.concatenate([self.basis(p[:, self.linear :], x), self.bends(p, x)], axis=2)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.clip(z, -60.0, 60.0)))


def _grid(*axes: tuple[float, ...]) -> Grid:
    return np.stack([axis.ravel() for axis in np.meshgrid(*axes)], axis=1)


def _logs(*values: float) -> tuple[float, ...]:
    return tuple(math.log(value) for value in values)


# -- logistic: a0, rise | log_k, x0 --------------------------------------------------------------------------------


def _step_share(log_k: np.ndarray, x0: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _sigmoid(np.exp(log_k)[:, None] * (x[None, :] - x0[:, None]))


def _step_bends(rise: np.ndarray, log_k: np.ndarray, x0: np.ndarray, x: np.ndarray) -> list[np.ndarray]:
    share = _step_share(log_k, x0, x)
    bend = rise[:, None] * share * (1.0 - share) * np.exp(log_k)[:, None]
    return [bend * (x[None, :] - x0[:, None]), -bend]


def _logistic_basis(q: np.ndarray, x: np.ndarray) -> np.ndarray:
    share = _step_share(q[:, 0], q[:, 1], x)
    return np.stack([np.ones_like(share), share], axis=2)


def _logistic_bends(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.stack(_step_bends(p[:, 1], p[:, 2], p[:, 3], x), axis=2)


LOGISTIC: Final = Family(
    name="logistic",
    parameters=("a0", "rise", "log_k", "x0"),  # rise = Ainf - A0
    linear=2,
    lower=np.array([0.0, 0.0, math.log(0.2), math.log(1e-4)]),
    upper=np.array([1.0, 1.0, math.log(20.0), math.log(3.0)]),
    mean=np.array([0.5, 0.3, math.log(2.0), math.log(0.03)]),
    spread=np.array([1.0, 1.0, 0.5, 1.0]),
    grid=_grid(_logs(0.5, 1.0, 2.0, 4.0, 8.0), _logs(0.001, 0.004, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)),
    basis=_logistic_basis,
    bends=_logistic_bends,
)


# -- power law: top, loss | log_p -----------------------------------------------------------------------------------


def _power_basis(q: np.ndarray, x: np.ndarray) -> np.ndarray:
    fall = np.exp(-np.exp(q[:, 0])[:, None] * (x[None, :] - _X_REF))
    return np.stack([np.ones_like(fall), -fall], axis=2)


def _power_bends(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    power = np.exp(p[:, 2])[:, None]
    away = x[None, :] - _X_REF
    return (p[:, 1, None] * power * away * np.exp(-power * away))[..., None]


POWER_LAW: Final = Family(
    name="power law",
    parameters=("top", "loss", "log_p"),
    linear=2,
    lower=np.array([0.0, 0.0, math.log(0.02)]),
    upper=np.array([2.0, 2.0, math.log(8.0)]),
    mean=np.array([0.8, 0.3, 0.0]),
    spread=np.array([1.0, 1.0, 0.6]),
    grid=_grid(_logs(0.05, 0.2, 0.4, 0.7, 1.0, 1.4, 2.0, 3.0)),
    basis=_power_basis,
    bends=_power_bends,
)


# -- two-step: a0, rise, rise2 | log_k, x0, log_k2, log_gap ----------------------------------------------------------


def _two_step_basis(q: np.ndarray, x: np.ndarray) -> np.ndarray:
    first = _step_share(q[:, 0], q[:, 1], x)
    second = _step_share(q[:, 2], q[:, 1] + np.exp(q[:, 3]), x)
    return np.stack([np.ones_like(first), first, second], axis=2)


def _two_step_bends(p: np.ndarray, x: np.ndarray) -> np.ndarray:
    _, rise, rise2, log_k, x0, log_k2, log_gap = p.T
    gap = np.exp(log_gap)
    by_k, by_x0 = _step_bends(rise, log_k, x0, x)
    by_k2, by_middle = _step_bends(rise2, log_k2, x0 + gap, x)
    return np.stack([by_k, by_x0 + by_middle, by_k2, by_middle * gap[:, None]], axis=2)


TWO_STEP: Final = Family(
    name="two-step",
    parameters=("a0", "rise", "rise2", "log_k", "x0", "log_k2", "log_gap"),
    linear=3,
    lower=np.array([0.0, 0.0, 0.0, math.log(0.5), math.log(1e-4), math.log(1.0), math.log(0.7)]),
    upper=np.array([1.0, 1.0, 1.0, math.log(20.0), 0.0, math.log(20.0), math.log(5.0)]),
    mean=np.array([0.5, 0.3, 0.1, math.log(3.0), math.log(0.03), math.log(5.0), math.log(1.8)]),
    spread=np.array([1.0, 1.0, 0.2, 0.5, 1.0, 0.5, 0.4]),
    grid=_grid(_logs(2.0, 5.0), _logs(0.005, 0.015, 0.03, 0.06, 0.12), _logs(4.0, 8.0), _logs(1.0, 1.5, 2.2, 3.2)),
    basis=_two_step_basis,
    bends=_two_step_bends,
)

FAMILIES: Final = {family.name: family for family in (LOGISTIC, POWER_LAW, TWO_STEP)}


# -- the fit of one family -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CurveFit:
    """A fitted curve of one family.

    `covariance`: (parameters, parameters). `log_evidence`: of the data, up to what all families have in common. `time`:
    accuracy (fraction) that e times as many epochs gain at any density; 0 where rounds do not say how long they were.
    """

    family: Family
    parameters: np.ndarray
    covariance: np.ndarray
    log_evidence: float
    time: float = 0.0

    def accuracy(self, x: np.ndarray) -> np.ndarray:
        """Return the curve's accuracy (fraction) at each ln density."""
        return self.family.values(self.parameters[None], x)[0]

    def slopes(self, x: np.ndarray) -> np.ndarray:
        """Return the derivatives of `accuracy` by the parameters, one row for each ln density."""
        return self.family.slopes(self.parameters[None], x)[0]

    def error(self, slopes: np.ndarray) -> np.ndarray:
        """Return the standard errors of quantities whose derivatives by the parameters are the rows of `slopes`."""
        return np.sqrt(np.maximum(np.einsum("pi,ij,pj->p", slopes, self.covariance, slopes), 0.0))


def fit_family(
    family: Family, x: np.ndarray, y: np.ndarray, sigma: np.ndarray, age: np.ndarray | None = None
) -> CurveFit | None:
    """Fit a curve of `family` to accuracies `y` at ln densities `x` with standard deviations `sigma`.

    `age`: ln of epochs over those of the last round, for a fit with time. Returns None where the fit is not finite.
    """
    if age is not None:
        fit = fit_family(_with_time(family, age), x, y, sigma)
        if fit is None:
            return None
        time = float(fit.parameters[0])
        return CurveFit(family, fit.parameters[1:], fit.covariance[1:, 1:], fit.log_evidence, time)
    with np.errstate(over="ignore", invalid="ignore"):
        best, cost = _refined(family, _starts(family, x, y, sigma), x, y, sigma)
        if not np.isfinite(cost):
            return None
        slopes = family.slopes(best[None], x)[0] / sigma[:, None]
        curvature = slopes.T @ slopes + np.diag(family.spread**-2.0)
    sign, log_det = np.linalg.slogdet(curvature)
    if sign <= 0 or not np.isfinite(log_det):
        return None
    log_evidence = -0.5 * cost - 0.5 * float(log_det) - float(np.sum(np.log(family.spread)))
    return CurveFit(family, best, np.linalg.inv(curvature), log_evidence)


def _with_time(family: Family, age: np.ndarray) -> Family:
    """Return `family` with the linear parameter `time`, which comes first, at points of these ages."""

    def basis(q: np.ndarray, x: np.ndarray) -> np.ndarray:
        own = family.basis(q, x)
        return np.concatenate([np.broadcast_to(age[:, None], (*own.shape[:2], 1)), own], axis=2)

    return Family(
        family.name,
        ("time", *family.parameters),
        family.linear + 1,
        lower=np.append(0.0, family.lower),
        upper=np.append(1.0, family.upper),
        mean=np.append(0.0, family.mean),
        spread=np.append(_TIME_SPREAD, family.spread),
        grid=family.grid,
        basis=basis,
        bends=lambda p, x: family.bends(p[:, 1:], x),
    )


def _starts(family: Family, x: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return the best points of the family's grid, with the linear parameters solved for."""
    count = family.linear
    basis = family.basis(family.grid, x)
    weighted = basis / sigma[:, None]
    prior = family.spread[:count] ** -2.0
    normal = weighted.transpose(0, 2, 1) @ weighted + np.diag(prior)
    right = weighted.transpose(0, 2, 1) @ (y / sigma) + prior * family.mean[:count]
    linear = np.linalg.solve(normal, right[..., None])[..., 0]
    p = np.concatenate([np.clip(linear, family.lower[:count], family.upper[:count]), family.grid], axis=1)
    return p[np.argsort(_costs(family, p, x, y, sigma), kind="stable")[:_STARTS]]


def _costs(family: Family, p: np.ndarray, x: np.ndarray, y: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    residuals = (family.values(p, x) - y) / sigma
    weak = (p - family.mean) / family.spread
    costs = np.sum(residuals**2, axis=1) + np.sum(weak**2, axis=1)
    return np.where(np.isfinite(costs), costs, np.inf)


def _refined(
    family: Family, p: np.ndarray, x: np.ndarray, y: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the parameters of least cost within bounds, and that cost: Levenberg-Marquardt from all starts at once.

    A parameter at a bound that the cost pushes against takes no part in a step.
    """
    inverse = family.spread**-2.0
    costs = _costs(family, p, x, y, sigma)
    damping = np.full(len(p), 1e-3)
    diagonal = np.arange(p.shape[1])
    for _ in range(_ITERATIONS):
        slopes = family.slopes(p, x) / sigma[None, :, None]
        residuals = (family.values(p, x) - y) / sigma
        gradient = (slopes.transpose(0, 2, 1) @ residuals[..., None])[..., 0] + (p - family.mean) * inverse
        held = ((p <= family.lower) & (gradient > 0)) | ((p >= family.upper) & (gradient < 0))
        curvature = slopes.transpose(0, 2, 1) @ slopes
        curvature[:, diagonal, diagonal] += inverse
        curvature[:, diagonal, diagonal] *= 1.0 + damping[:, None]
        curvature = np.where(held[:, :, None] | held[:, None, :], 0.0, curvature)
        curvature[:, diagonal, diagonal] += held
        move = np.linalg.solve(curvature, np.where(held, 0.0, gradient)[..., None])[..., 0]
        trial = np.clip(p - move, family.lower, family.upper)
        found = _costs(family, trial, x, y, sigma)
        better = found < costs
        gained = np.where(better, costs - found, 0.0)
        settled = gained <= _CONVERGED * (1.0 + found)
        p = np.where(better[:, None], trial, p)
        costs = np.where(better, found, costs)
        damping = np.where(better, damping / 8.0, damping * 10.0)
        if np.all(settled & (better | (damping > 1e4))):
            break
    best = int(np.argmin(costs))
    return p[best], float(costs[best])
