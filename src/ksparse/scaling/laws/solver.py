"""Least squares on logs for sums of at most two powers: single fits, batches of fits, intervals.

    log L = log[exp(A a) + exp(F f)]

A[m, p_a] and F[m, p_f] are the columns of a form at m points, theta = (a, f), and p_f may be 0.

    fit(terms, logs, weights)   from many starts by `refit`, the best polished by scipy -> LawFit
    refit(terms, logs, ...)     b fits at once from given starts, each with its own weights,
                                some coefficients held fixed -> theta[b, p]
    intervals(fit)              of each coefficient, by the profile of the loss
    interval_at(fit, rows)      of log L at other points, linearised
    resampled(fit, draws)       the bootstrap

The second term is an exponential, so it cannot be negative. Where the data have no irreducible
loss, its exponent falls until the term is `NOTHING` of the smallest loss, and its coefficients have
no lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

NOTHING = 1e-5
"""Share of the smallest loss below which an irreducible loss counts as zero."""
# Huber's width over the scatter: 99.9 % of the efficiency of plain squares under normal scatter,
# and measured to give better calibrated intervals.
_HUBER = 2.5
_MIN_SCATTER = 1e-7  # of logs: below it, points lie on the form up to rounding
_SAME_COST = 1e-6  # relative: starts that end this close to the best have reached it
_STEPS, _OUTWARD_STEPS, _HALVINGS = 200, 24, 60
# Distance from the best value beyond which a flat loss will never rise: e^-40 of a loss is nothing.
_FAR = 40.0
# Starts: the irreducible share of the smallest loss of each series, equal for all series ...
_SHARES = (0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.9, 0.96)
# ... or different for the first series and the last.
_TILTED_SHARES = (
    *((0.02, 0.5), (0.5, 0.02), (0.1, 0.8), (0.8, 0.1)),
    *((0.3, 0.9), (0.9, 0.3), (0.6, 0.96), (0.96, 0.6)),
)


class Terms(NamedTuple):
    """The columns of both exponents at m points: amplitude[m, p_a] and floor[m, p_f]."""

    amplitude: np.ndarray
    floor: np.ndarray

    @property
    def size(self) -> int:
        """The number p of coefficients."""
        return self.amplitude.shape[1] + self.floor.shape[1]

    def value(self, theta: np.ndarray) -> np.ndarray:
        """Return log L [..., m] for coefficients theta[..., p]."""
        first, second = self._exponents(theta)
        return first if second is None else np.logaddexp(first, second)

    def slopes(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log L [..., m] and its derivatives by theta [..., m, p]."""
        first, second = self._exponents(theta)
        if second is None:
            return first, np.broadcast_to(self.amplitude, (*first.shape, self.size))
        value = np.logaddexp(first, second)
        return value, np.concatenate(
            [
                np.exp(first - value)[..., None] * self.amplitude,
                np.exp(second - value)[..., None] * self.floor,
            ],
            -1,
        )

    def _exponents(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        split = self.amplitude.shape[1]
        first = theta[..., :split] @ self.amplitude.T
        return first, theta[..., split:] @ self.floor.T if self.floor.shape[1] else None

    def rows(self, chosen: np.ndarray) -> Terms:
        """Return the columns at some of the points (a mask or indices)."""
        return Terms(self.amplitude[chosen], self.floor[chosen])


@dataclass(frozen=True)
class LawFit:
    """A form fitted to logs[m].

    Attributes:
        terms: The columns of the form at the points.
        logs: The logarithms of the target, [m].
        weights: How much each point counts, [m]; the sum is the number of measurements.
        theta: The coefficients [p].
        delta: Huber's width: the largest residual that counts with its full square.
        cost: The loss at `theta`.
        starts: From how many starts the search began.
        reached: How many of them ended at the best loss.
    """

    terms: Terms
    logs: np.ndarray
    weights: np.ndarray
    theta: np.ndarray
    delta: float
    cost: float
    starts: int
    reached: int

    @property
    def residuals(self) -> np.ndarray:
        """Log L of the points minus that of the law, [m]."""
        return self.logs - self.terms.value(self.theta)

    @property
    def freedom(self) -> float:
        """Degrees of freedom: independent measurements minus coefficients."""
        return float(self.weights.sum()) - self.terms.size


def fit(terms: Terms, logs: np.ndarray, *, weights: np.ndarray | None = None) -> LawFit:
    """Fit a form to the logarithms of m values by Huber's loss, from many starts.

    Args:
        terms: The columns of the form at the points.
        logs: The logarithms of the values, [m].
        weights: How much each point counts, [m]; 1 by default.
    """
    weights = np.ones(len(logs)) if weights is None else weights
    starts = np.array(_starts(terms, logs))
    # Plain squares first, to estimate the scatter that sets Huber's width.
    ends, costs = _fit_starts(terms, logs, starts, weights, math.inf)
    best, delta = ends[costs.argmin()], math.inf
    for _ in range(20):
        previous, delta = (
            delta,
            _HUBER * _robust_scatter(logs - terms.value(best), weights, terms.size),
        )
        best = _fit_starts(terms, logs, best[None], weights, delta)[0][0]
        if abs(delta - previous) < 1e-3 * delta:
            break
    ends, costs = _fit_starts(terms, logs, np.concatenate([best[None], starts]), weights, delta)
    end = _polish(terms, logs, weights, ends[costs.argmin()], delta)
    reached = int((costs[1:] <= costs.min() * (1 + _SAME_COST) + 1e-15).sum())
    return LawFit(terms, logs, weights, end.x, delta, float(end.cost), len(starts), reached)


def _fit_starts(
    terms: Terms, logs: np.ndarray, starts: np.ndarray, weights: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return where each start ends [b, p], and the loss there [b]."""
    theta = refit(terms, logs, starts, weights=weights, delta=delta)
    return theta, loss(terms.value(theta) - logs, weights, delta)


def _polish(
    terms: Terms, logs: np.ndarray, weights: np.ndarray, start: np.ndarray, delta: float
) -> optimize.OptimizeResult:
    """Run scipy's least squares from a start, to full precision."""

    def rho(squares: np.ndarray) -> np.ndarray:
        """Return twice `loss` of each residual and its derivatives by the squared residual.

        scipy's own Huber loss has no weights.
        """
        size = np.maximum(np.sqrt(squares), 1e-100)
        near = np.minimum(size, delta)
        return weights * np.stack(
            [
                2 * near * (size - near / 2),
                near / size,
                np.where(size > delta, -0.5 * near / size**3, 0.0),
            ]
        )

    return optimize.least_squares(
        lambda theta: terms.value(theta) - logs,
        start,
        lambda theta: terms.slopes(theta)[1],
        loss=rho,
        x_scale="jac",
        ftol=1e-13,
        xtol=1e-13,
        gtol=1e-13,
        max_nfev=500,
    )


def _starts(terms: Terms, logs: np.ndarray) -> list[np.ndarray]:
    """Return a start for each irreducible share.

    Given the second term, the first one is linear in its coefficients.
    """
    if not terms.floor.shape[1]:
        return [np.linalg.lstsq(terms.amplitude, logs, rcond=None)[0]]
    _, series = np.unique(terms.floor, axis=0, return_inverse=True)
    series = series.reshape(-1)
    last = int(series.max())
    lowest = np.array([logs[series == number].min() for number in range(last + 1)])[series]
    starts = []
    for first, end in [*((share, share) for share in _SHARES), *(_TILTED_SHARES if last else ())]:
        share = np.linspace(first, end, last + 1)[series] if last else first
        floor = np.linalg.lstsq(
            terms.floor, lowest + np.log(np.maximum(share, NOTHING)), rcond=None
        )[0]
        remainder = np.maximum(np.exp(logs) - np.exp(terms.floor @ floor), 0.02 * np.exp(logs))
        amplitude = np.linalg.lstsq(terms.amplitude, np.log(remainder), rcond=None)[0]
        starts.append(np.concatenate([amplitude, floor]))
    return starts


def _robust_scatter(residuals: np.ndarray, weights: np.ndarray, p: int) -> float:
    """Return a standard deviation from the weighted median size of residuals of p coefficients."""
    order = np.argsort(np.abs(residuals))
    total = np.cumsum(weights[order])
    median = float(np.abs(residuals)[order][np.searchsorted(total, total[-1] / 2)])
    return max(_MIN_SCATTER, 1.4826 * median * math.sqrt(total[-1] / max(1.0, total[-1] - p)))


# ---- batches of fits -----------------------------------------------------------------------------


def refit(
    terms: Terms,
    logs: np.ndarray,
    start: np.ndarray,
    *,
    weights: np.ndarray,
    delta: np.ndarray | float,
    held: np.ndarray | None = None,
) -> np.ndarray:
    """Run b fits at once by Levenberg-Marquardt steps.

    Args:
        terms: The columns of the form at the points.
        logs: The logarithms to fit, [m] or [b, m].
        start: Where each fit begins, [b, p].
        weights: How much each point counts, [m] or [b, m].
        delta: Huber's width, a number or [b, m].
        held: Coefficients to leave as they are, bool [b, p].

    Returns:
        theta[b, p].
    """
    theta = np.array(start, float)
    b, p = theta.shape
    logs, weights, delta = (
        np.broadcast_to(array, (b, len(terms.amplitude))) for array in (logs, weights, delta)
    )
    held = np.zeros((b, p), bool) if held is None else held
    damping, active = np.full(b, 1e-3), np.arange(b)
    value, slopes = terms.slopes(theta)
    cost = loss(value - logs, weights, delta)
    for _ in range(_STEPS):
        residual, free = value - logs[active], ~held[active]
        huber = np.minimum(1, delta[active] / np.maximum(np.abs(residual), 1e-300))
        step = _damped_step(
            slopes * free[:, None, :], weights[active] * huber, residual, free, damping[active]
        )
        tried = theta[active] + step
        new_value, new_slopes = terms.slopes(tried)
        new_cost = loss(new_value - logs[active], weights[active], delta[active])
        better = new_cost <= cost[active]
        done = better & (cost[active] - new_cost <= 1e-13 * cost[active]) | ~better & (
            damping[active] > 1e10
        )
        theta[active[better]], cost[active[better]] = tried[better], new_cost[better]
        damping[active] = np.where(
            better, np.maximum(damping[active] / 5, 1e-12), damping[active] * 4
        )
        value, slopes = (
            np.where(better[:, None], new_value, value),
            np.where(better[:, None, None], new_slopes, slopes),
        )
        if done.all():
            break
        active, value, slopes = active[~done], value[~done], slopes[~done]
    return theta


def _damped_step(
    slopes: np.ndarray,
    weights: np.ndarray,
    residual: np.ndarray,
    free: np.ndarray,
    damping: np.ndarray,
) -> np.ndarray:
    """Return a Levenberg-Marquardt step [b, p], at most 8 in any coefficient."""
    gradient = np.einsum("bmp,bm->bp", slopes, weights * residual)
    hessian = np.einsum("bmp,bm,bmq->bpq", slopes, weights, slopes, optimize=True)
    scale = np.einsum("bpp->bp", hessian)
    relative = damping[:, None] * scale + 1e-14 * scale.max(1, keepdims=True)
    diagonal = np.where(free, relative, 1.0) + 1e-300
    damped = hessian + diagonal[:, :, None] * np.eye(slopes.shape[2])
    step = -np.linalg.solve(damped, gradient[:, :, None])[:, :, 0]
    return step * np.minimum(1, 8 / np.maximum(np.abs(step).max(1), 1e-300))[:, None]


def loss(residuals: np.ndarray, weights: np.ndarray, delta: np.ndarray | float) -> np.ndarray:
    """Return Huber's loss summed over the last axis: half the square near 0, linear past delta."""
    size = np.abs(residuals)
    near = np.minimum(size, delta)
    return (weights * near * (size - near / 2)).sum(-1)


# ---- intervals -----------------------------------------------------------------------------------


def intervals(fitted: LawFit, level: float = 0.95) -> list[tuple[float, float]]:
    """Return the interval of each coefficient by the profile of the loss.

    A value lies inside if, with the other coefficients refitted, the robust likelihood ratio
    2 (rho_v - rho) mean(psi') / var(psi) does not exceed Student's t^2. An unbounded side is
    infinite.
    """
    p = fitted.terms.size
    spread = np.sqrt(np.diag(covariance(fitted)))

    def profile(
        which: np.ndarray, values: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Refit with coefficient which[b] held at values[b]; return theta[b, p] and loss [b]."""
        held = np.arange(p) == which[:, None]
        start = np.where(held, values[:, None], start)
        theta = refit(
            fitted.terms, fitted.logs, start, weights=fitted.weights, delta=fitted.delta, held=held
        )
        return theta, loss(fitted.terms.value(theta) - fitted.logs, fitted.weights, fitted.delta)

    return _search_ends(fitted, profile, spread, level)


def interval_at(fitted: LawFit, rows: Terms, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return both ends of the interval of log L at other points, linearised in theta."""
    value, slopes = rows.slopes(fitted.theta)
    away = quantile(fitted, level) * np.sqrt(
        np.einsum("ip,pq,iq->i", slopes, covariance(fitted), slopes)
    )
    return value - away, value + away


def covariance(fitted: LawFit) -> np.ndarray:
    """Return the covariance [p, p] of the coefficients, with the form linearised at them."""
    residuals, slopes = fitted.residuals, fitted.terms.slopes(fitted.theta)[1]
    inside, variance = _psi(residuals, fitted)
    hessian = np.einsum("mp,m,mq->pq", slopes, fitted.weights, slopes)
    return np.linalg.pinv(hessian, rcond=1e-13, hermitian=True) * variance / inside**2


def _psi(residuals: np.ndarray, fitted: LawFit) -> tuple[float, float]:
    """Return the share of points within Huber's width, and the clipped residuals' variance."""
    clipped = np.clip(residuals, -fitted.delta, fitted.delta)
    inside = float(fitted.weights[np.abs(residuals) <= fitted.delta].sum() / fitted.weights.sum())
    return max(inside, 1e-3), max(
        float((fitted.weights * clipped**2).sum()) / max(1.0, fitted.freedom), _MIN_SCATTER**2
    )


def _search_ends(
    fitted: LawFit,
    profile: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    spread: np.ndarray,
    level: float,
) -> list[tuple[float, float]]:
    """Find on both sides of each coefficient where the profile of the loss reaches the bar.

    First outwards in growing steps, then by bisection; all 2 p sides at once.
    """
    centre = fitted.theta
    if fitted.freedom <= 0:
        return [(-math.inf, math.inf)] * len(centre)
    inside, variance = _psi(fitted.residuals, fitted)
    away = quantile(fitted, level)
    bar = fitted.cost + away**2 * variance / (2 * inside)
    count = len(centre)
    which, sign = np.tile(np.arange(count), 2), np.repeat([-1.0, 1.0], count)
    # The linear spread is no guide where a coefficient hardly matters.
    known = np.isfinite(spread) & (spread > 1e-9 * np.maximum(1, np.abs(centre)))
    near, far = np.zeros(2 * count), away * np.where(known, spread, 1.0)[which]
    theta = np.tile(fitted.theta, (2 * count, 1))
    reached, last = np.zeros(2 * count, bool), np.full(2 * count, fitted.cost)
    open_ = np.arange(2 * count)
    for _ in range(_OUTWARD_STEPS):
        values = centre[which[open_]] + sign[open_] * far[open_]
        new, cost = profile(which[open_], values, theta[open_])
        over = cost > bar
        flat = ~over & (far[open_] > _FAR) & (cost - last[open_] < 1e-6 * (bar - fitted.cost))
        reached[open_[over]] = True
        below = open_[~over]
        theta[below], near[below], last[below] = new[~over], far[below], cost[~over]
        open_ = open_[~over & ~flat]
        far[open_] *= 3
        if not len(open_):
            break
    for _ in range(_HALVINGS):
        ids = np.flatnonzero(reached & (far - near > 1e-3 * far))
        if not len(ids):
            break
        middle = (near[ids] + far[ids]) / 2
        new, cost = profile(which[ids], centre[which[ids]] + sign[ids] * middle, theta[ids])
        over = cost > bar
        far[ids[over]] = middle[over]
        near[ids[~over]], theta[ids[~over]] = middle[~over], new[~over]
    ends = np.where(reached, centre[which] + sign * far, sign * math.inf)
    return list(zip(ends[:count].tolist(), ends[count:].tolist()))


# ---- the bootstrap -------------------------------------------------------------------------------


def resampled(
    fitted: LawFit,
    draws: int,
    seed: int = 0,
    *,
    clusters: np.ndarray | None = None,
    kind: str = "pairs",
) -> np.ndarray:
    """Fit resampled points.

    Args:
        fitted: The fit to resample.
        draws: The number of samples.
        seed: Seed of the generator.
        clusters: The cluster of each point, [m]; by default each point is its own.
        kind: `pairs` draws whole clusters of points; `residuals` reassigns the fit's residuals to
            points; `wild` flips their signs at random.

    Returns:
        theta[draws, p].
    """
    random = np.random.default_rng(seed)
    m, p = len(fitted.logs), fitted.terms.size
    start = np.tile(fitted.theta, (draws, 1))
    if kind == "pairs":
        clusters = np.arange(m) if clusters is None else clusters
        count = int(clusters.max()) + 1
        drawn = random.multinomial(count, np.full(count, 1 / count), size=draws)
        return refit(
            fitted.terms,
            fitted.logs,
            start,
            weights=fitted.weights * drawn[:, clusters],
            delta=fitted.delta,
        )
    residuals = fitted.residuals * math.sqrt(m / max(1, m - p))
    noise = (
        residuals[random.integers(m, size=(draws, m))]
        if kind == "residuals"
        else residuals * random.choice([-1.0, 1.0], (draws, m))
    )
    return refit(
        fitted.terms,
        fitted.terms.value(fitted.theta) + noise,
        start,
        weights=fitted.weights,
        delta=fitted.delta,
    )


# ---- scatter -------------------------------------------------------------------------------------


def scatter(fitted: LawFit) -> float:
    """Return the standard deviation of one run's log loss about the law."""
    return math.sqrt(float((fitted.weights * fitted.residuals**2).sum()) / max(1.0, fitted.freedom))


def quantile(fitted: LawFit, level: float) -> float:
    """Return Student's t for the fit's degrees of freedom; infinite if there are none."""
    return float(stats.t.ppf((1 + level) / 2, fitted.freedom)) if fitted.freedom > 0 else math.inf
