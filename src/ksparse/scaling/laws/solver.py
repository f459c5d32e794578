"""Least squares on logs for sums of at most two powers: one fit by scipy, many at once by numpy,
intervals.

    log L = log[exp(A a) + exp(F f)]        A[m, p_a] and F[m, p_f] are columns of a form; theta =
                                            (a, f); p_f may be 0

    fit(terms, logs, weights)      from many starts, the best of them taken to the end by scipy's
                                   Huber least squares -> Fit
    refit(terms, logs, ...)        b fits at once from given starts, each with its own weights, some
                                   coefficients held -> theta[b, p]
    intervals(fit)                 of each coefficient, by the profile of the loss
    interval_at(fit, rows)         of log L at other points, from the slopes

The second term is an exponential, so it cannot be negative; where the data have none, its exponent
falls until the term is `NOTHING` of the smallest loss, and its coefficients have no lower bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

NOTHING = 1e-5
"""A share of the smallest loss that counts as no irreducible loss."""
# times the scatter: 99.9 % of the efficiency of plain squares where the scatter is normal, and
# measured the better calibrated
_HUBER = 2.5
_LEAST_SCATTER = 1e-7  # of logs: below it, points lie on the form up to rounding
_SAME_COST = 1e-6  # relative: starts that end this near to the best have reached it
_STEPS, _OUTWARDS, _HALVINGS = 200, 24, 60
# from the best value: a loss that no longer rises there never will, since e^-40 of a loss is none
_FAR = 40.0
_SHARES = (
    0.0,
    0.2,
    0.4,
    0.55,
    0.7,
    0.8,
    0.9,
    0.96,
)  # irreducible part of each series' smallest loss
_TILTED = (
    (0.02, 0.5),
    (0.5, 0.02),
    (0.1, 0.8),
    (0.8, 0.1),
    (0.3, 0.9),
    (0.9, 0.3),
    (0.6, 0.96),
    (0.96, 0.6),
)  # of the first series and the last


class Terms(NamedTuple):
    """The columns of the two exponents at m points."""

    amplitude: np.ndarray
    floor: np.ndarray

    @property
    def size(self) -> int:
        return self.amplitude.shape[1] + self.floor.shape[1]

    def value(self, theta: np.ndarray) -> np.ndarray:
        """Return log L[..., m] of coefficients theta[..., p]."""
        first, second = self._exponents(theta)
        return first if second is None else np.logaddexp(first, second)

    def slopes(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return log L[..., m] and its derivatives [..., m, p]."""
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
        return theta[..., :split] @ self.amplitude.T, theta[
            ..., split:
        ] @ self.floor.T if self.floor.shape[1] else None

    def rows(self, chosen: np.ndarray) -> Terms:
        return Terms(self.amplitude[chosen], self.floor[chosen])


@dataclass(frozen=True)
class LawFit:
    """Coefficients theta[p] that fit logs[m], the largest residual that counts in full, and how the
    search went."""

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
        """Return log L of the points less that of the law."""
        return self.logs - self.terms.value(self.theta)

    @property
    def freedom(self) -> float:
        """Return how many independent measurements there are beyond the coefficients: weights sum
        to the former."""
        return float(self.weights.sum()) - self.terms.size


def fit(terms: Terms, logs: np.ndarray, *, weights: np.ndarray | None = None) -> LawFit:
    """Fit a form to the logarithms of m losses by Huber's loss, its width set by the scatter, from
    many starts."""
    weights = np.ones(len(logs)) if weights is None else weights
    starts = np.array(_starts(terms, logs))
    ends, costs = _all(terms, logs, starts, weights, math.inf)  # plain squares, for the scatter
    best, delta = ends[costs.argmin()], math.inf
    for _ in range(20):
        before, delta = delta, _HUBER * _scatter(logs - terms.value(best), weights, terms.size)
        best = _all(terms, logs, best[None], weights, delta)[0][0]
        if abs(delta - before) < 1e-3 * delta:
            break
    ends, costs = _all(terms, logs, np.concatenate([best[None], starts]), weights, delta)
    end = _scipy(terms, logs, weights, ends[costs.argmin()], delta)
    reached = int((costs[1:] <= costs.min() * (1 + _SAME_COST) + 1e-15).sum())
    return LawFit(terms, logs, weights, end.x, delta, float(end.cost), len(starts), reached)


def _all(
    terms: Terms, logs: np.ndarray, starts: np.ndarray, weights: np.ndarray, delta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return where the starts end, and at which loss."""
    theta = refit(terms, logs, starts, weights=weights, delta=delta)
    return theta, loss(terms.value(theta) - logs, weights, delta)


def _scipy(
    terms: Terms, logs: np.ndarray, weights: np.ndarray, start: np.ndarray, delta: float
) -> optimize.OptimizeResult:
    def rho(squares: np.ndarray) -> np.ndarray:
        """Return twice `loss` of each residual, and its first two derivatives by the residual's
        square: scipy's own has no weights."""
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
    """Return a start for each irreducible share: with the second term given, the first is linear in
    its coefficients."""
    if not terms.floor.shape[1]:
        return [np.linalg.lstsq(terms.amplitude, logs, rcond=None)[0]]
    _, series = np.unique(terms.floor, axis=0, return_inverse=True)
    series = series.reshape(-1)
    last = int(series.max())
    least = np.array([logs[series == each].min() for each in range(last + 1)])[series]
    found = []
    for first, end in [*((share, share) for share in _SHARES), *(_TILTED if last else ())]:
        share = np.linspace(first, end, last + 1)[series] if last else first
        floor = np.linalg.lstsq(
            terms.floor, least + np.log(np.maximum(share, NOTHING)), rcond=None
        )[0]
        rest = np.maximum(np.exp(logs) - np.exp(terms.floor @ floor), 0.02 * np.exp(logs))
        found.append(
            np.concatenate([np.linalg.lstsq(terms.amplitude, np.log(rest), rcond=None)[0], floor])
        )
    return found


def _scatter(residuals: np.ndarray, weights: np.ndarray, spent: int) -> float:
    """Return a robust standard deviation of residuals after `spent` coefficients: from their
    weighted median size."""
    order = np.argsort(np.abs(residuals))
    total = np.cumsum(weights[order])
    middle = float(np.abs(residuals)[order][np.searchsorted(total, total[-1] / 2)])
    return max(_LEAST_SCATTER, 1.4826 * middle * math.sqrt(total[-1] / max(1.0, total[-1] - spent)))


# ---- many at once --------------------------------------------------------------------------------


def refit(
    terms: Terms,
    logs: np.ndarray,
    start: np.ndarray,
    *,
    weights: np.ndarray,
    delta: np.ndarray | float,
    held: np.ndarray | None = None,
) -> np.ndarray:
    """Return theta[b, p] of b fits by Levenberg and Marquardt's steps, from start[b, p].

    logs, weights and delta, Huber's width, are [m] or [b, m]; held[b, p]: coefficients left as they
    are.
    """
    theta = np.array(start, float)
    b, p = theta.shape
    logs, weights, delta = (
        np.broadcast_to(each, (b, len(terms.amplitude))) for each in (logs, weights, delta)
    )
    held = np.zeros((b, p), bool) if held is None else held
    damping, going = np.full(b, 1e-3), np.arange(b)
    value, slopes = terms.slopes(theta)
    cost = loss(value - logs, weights, delta)
    for _ in range(_STEPS):
        residual, free = value - logs[going], ~held[going]
        weighted = weights[going] * np.minimum(
            1, delta[going] / np.maximum(np.abs(residual), 1e-300)
        )
        slopes = slopes * free[:, None, :]
        gradient = np.einsum("bmp,bm->bp", slopes, weighted * residual)
        hessian = np.einsum("bmp,bm,bmq->bpq", slopes, weighted, slopes, optimize=True)
        scale = np.einsum("bpp->bp", hessian)
        diagonal = (
            np.where(free, damping[going, None] * scale + 1e-14 * scale.max(1, keepdims=True), 1.0)
            + 1e-300
        )
        step = -np.linalg.solve(hessian + diagonal[:, :, None] * np.eye(p), gradient[:, :, None])[
            :, :, 0
        ]
        step *= np.minimum(1, 8 / np.maximum(np.abs(step).max(1), 1e-300))[:, None]
        tried = theta[going] + step
        new_value, new_slopes = terms.slopes(tried)
        new_cost = loss(new_value - logs[going], weights[going], delta[going])
        better = new_cost <= cost[going]
        done = better & (cost[going] - new_cost <= 1e-13 * cost[going]) | ~better & (
            damping[going] > 1e10
        )
        theta[going[better]], cost[going[better]] = tried[better], new_cost[better]
        damping[going] = np.where(better, np.maximum(damping[going] / 5, 1e-12), damping[going] * 4)
        value, slopes = (
            np.where(better[:, None], new_value, value),
            np.where(better[:, None, None], new_slopes, slopes),
        )
        if done.all():
            break
        going, value, slopes = going[~done], value[~done], slopes[~done]
    return theta


def loss(residuals: np.ndarray, weights: np.ndarray, delta: np.ndarray | float) -> np.ndarray:
    """Return the sum of Huber's loss over the last dimension: half the square near 0, linear beyond
    delta."""
    size = np.abs(residuals)
    near = np.minimum(size, delta)
    return (weights * near * (size - near / 2)).sum(-1)


# ---- intervals -----------------------------------------------------------------------------------


def intervals(found: LawFit, level: float = 0.95) -> list[tuple[float, float]]:
    """Return the interval of each coefficient: the values at which the best fit of the others is
    not too much worse.

    Too much: the robust likelihood ratio, 2 (rho_v - rho) mean(psi') / var(psi), exceeds Student's
    t^2. A side without end is infinite.
    """
    p = found.terms.size
    spread = np.sqrt(np.diag(covariance(found)))

    def at(
        which: np.ndarray, values: np.ndarray, start: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        held = np.arange(p) == which[:, None]
        start = np.where(held, values[:, None], start)
        theta = refit(
            found.terms, found.logs, start, weights=found.weights, delta=found.delta, held=held
        )
        return theta, loss(found.terms.value(theta) - found.logs, found.weights, found.delta)

    return _sides(found, at, found.theta, spread, level)


def interval_at(found: LawFit, rows: Terms, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the interval of log L at other points, linear in the coefficients near
    them."""
    value, slopes = rows.slopes(found.theta)
    away = quantile(found, level) * np.sqrt(
        np.einsum("ip,pq,iq->i", slopes, covariance(found), slopes)
    )
    return value - away, value + away


def covariance(found: LawFit) -> np.ndarray:
    """Return the covariance of the coefficients as if the form were linear near them."""
    residuals, slopes = found.residuals, found.terms.slopes(found.theta)[1]
    inside, variance = _psi(residuals, found)
    hessian = np.einsum("mp,m,mq->pq", slopes, found.weights, slopes)
    return np.linalg.pinv(hessian, rcond=1e-13, hermitian=True) * variance / inside**2


def _psi(residuals: np.ndarray, found: LawFit) -> tuple[float, float]:
    """Return the share of points within Huber's width, and the variance of the clipped
    residuals."""
    clipped = np.clip(residuals, -found.delta, found.delta)
    inside = float(found.weights[np.abs(residuals) <= found.delta].sum() / found.weights.sum())
    return max(inside, 1e-3), max(
        float((found.weights * clipped**2).sum()) / max(1.0, found.freedom), _LEAST_SCATTER**2
    )


def _sides(
    found: LawFit, at, centre: np.ndarray, spread: np.ndarray, level: float
) -> list[tuple[float, float]]:
    """Search outwards from each centre, on both sides at once, for where the loss has risen to the
    bar."""
    if found.freedom <= 0:
        return [(-math.inf, math.inf)] * len(centre)
    inside, variance = _psi(found.residuals, found)
    away = quantile(found, level)
    bar = found.cost + away**2 * variance / (2 * inside)
    count = len(centre)
    which, sign = np.tile(np.arange(count), 2), np.repeat([-1.0, 1.0], count)
    known = np.isfinite(spread) & (
        spread > 1e-9 * np.maximum(1, np.abs(centre))
    )  # not so where a coefficient hardly matters
    near, far = np.zeros(2 * count), away * np.where(known, spread, 1.0)[which]
    theta = np.tile(found.theta, (2 * count, 1))
    reached, last = np.zeros(2 * count, bool), np.full(2 * count, found.cost)
    open_ = np.arange(2 * count)
    for _ in range(_OUTWARDS):  # in steps that grow
        new, cost = at(which[open_], centre[which[open_]] + sign[open_] * far[open_], theta[open_])
        over = cost > bar
        flat = ~over & (far[open_] > _FAR) & (cost - last[open_] < 1e-6 * (bar - found.cost))
        reached[open_[over]] = True
        on = open_[~over]
        theta[on], near[on], last[on] = new[~over], far[on], cost[~over]
        open_ = open_[~over & ~flat]
        far[open_] *= 3
        if not len(open_):
            break
    for _ in range(_HALVINGS):
        ids = np.flatnonzero(reached & (far - near > 1e-3 * far))
        if not len(ids):
            break
        middle = (near[ids] + far[ids]) / 2
        new, cost = at(which[ids], centre[which[ids]] + sign[ids] * middle, theta[ids])
        over = cost > bar
        far[ids[over]] = middle[over]
        near[ids[~over]], theta[ids[~over]] = middle[~over], new[~over]
    ends = np.where(reached, centre[which] + sign * far, sign * math.inf)
    return list(zip(ends[:count].tolist(), ends[count:].tolist()))


# ---- the bootstrap -------------------------------------------------------------------------------


def resampled(
    found: LawFit,
    draws: int,
    seed: int = 0,
    *,
    clusters: np.ndarray | None = None,
    kind: str = "pairs",
) -> np.ndarray:
    """Return theta[draws, p] of fits to resampled points.

    kind: `pairs` draws whole points (whole clusters[m] of them); `residuals` deals those of the fit
    anew; `wild` gives them random signs.
    """
    random = np.random.default_rng(seed)
    m, p = len(found.logs), found.terms.size
    start = np.tile(found.theta, (draws, 1))
    if kind == "pairs":
        clusters = np.arange(m) if clusters is None else clusters
        count = int(clusters.max()) + 1
        drawn = random.multinomial(count, np.full(count, 1 / count), size=draws)
        return refit(
            found.terms,
            found.logs,
            start,
            weights=found.weights * drawn[:, clusters],
            delta=found.delta,
        )
    residuals = found.residuals * math.sqrt(m / max(1, m - p))
    dealt = (
        residuals[random.integers(m, size=(draws, m))]
        if kind == "residuals"
        else residuals * random.choice([-1.0, 1.0], (draws, m))
    )
    return refit(
        found.terms,
        found.terms.value(found.theta) + dealt,
        start,
        weights=found.weights,
        delta=found.delta,
    )


# ---- scatter -------------------------------------------------------------------------------------


def scatter(found: LawFit) -> float:
    """Return the standard deviation of one run's log loss about the law."""
    return math.sqrt(float((found.weights * found.residuals**2).sum()) / max(1.0, found.freedom))


def quantile(found: LawFit, level: float) -> float:
    """Return Student's t for the fit's degrees of freedom; infinite where there are none."""
    return float(stats.t.ppf((1 + level) / 2, found.freedom)) if found.freedom > 0 else math.inf
