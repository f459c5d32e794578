"""Fit each form that a law may have to the same points, and measure how well it does.

Forms are compared by

    AICc = m log(mean squared log residual) + 2 p + 2 p (p + 1) / (m - p - 1)

where m is the number of independent points and p counts the coefficients and the scatter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ksparse.errors import InputError
from ksparse.scaling.laws import solver
from ksparse.scaling.laws.forms import Columns, Form, LawKind
from ksparse.scaling.laws.points import Cells
from ksparse.scaling.laws.solver import LawFit

LEVEL = 0.95
"""Coverage of all intervals."""
_MIN_SIZES = 3  # values of the first variable that tell an irreducible term from a power


@dataclass(frozen=True)
class Coefficient:
    """A coefficient with its 95 % interval, by profile and by bootstrap; None is unbounded."""

    value: float
    low: float | None
    high: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None


@dataclass(frozen=True)
class Extrapolation:
    """How well a form fitted without the largest values of a variable predicts them.

    Attributes:
        variable: The first variable of the law.
        value: The smallest value of it that was held out.
        error: The mean relative error on the held-out points.
        largest: The largest relative error on them.
        points: The held-out points with their prediction and error.
        why: Why the test was not possible; "" where it was.
    """

    variable: str
    value: float | None = None
    error: float | None = None
    largest: float | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""


@dataclass(frozen=True)
class Candidate:
    """A form fitted to the points; `why` says what is missing where it cannot be fitted."""

    form: Form
    fit: LawFit | None = None
    aicc: float | None = None
    why: str = ""
    extrapolation: Extrapolation | None = None

    @property
    def log_rms(self) -> float | None:
        """The root mean square of the log residuals, None without a fit."""
        return None if self.fit is None else rms(self.fit.residuals, self.fit.weights)


def fit_candidate(law_kind: LawKind, form: Form, cells: Cells) -> Candidate:
    """Fit one form, with its AICc and its test of extrapolation."""
    why = missing_points(form, cells.columns, cells.weight)
    if why:
        return Candidate(form, why=why)
    fitted = solver.fit(form.terms(cells.columns), np.log(cells.value), weights=cells.weight)
    m, p = float(cells.weight.sum()), len(form.coefficients) + 1
    aicc = None
    if m > p + 1:
        log_rms = max(rms(fitted.residuals, fitted.weights), 1e-12)
        aicc = m * math.log(log_rms**2) + 2 * p + 2 * p * (p + 1) / (m - p - 1)
    return Candidate(form, fitted, aicc, extrapolation=_extrapolate(law_kind, form, cells))


def missing_points(form: Form, columns: Columns, weight: np.ndarray) -> str:
    """Say which points are missing to fit a form; "" if they suffice."""
    m, p = round(float(weight.sum())), len(form.coefficients)
    counts = ", ".join(f"{len(np.unique(column))} {name}" for name, column in columns.items())
    if m < p + 1:
        return (
            f"{form.name} has {p} coefficients and needs at least {p + 1} different points; "
            f"there {'is' if m == 1 else 'are'} {m} ({counts})"
        )
    if not all(_has_full_rank(exponent) for exponent in form.terms(columns)):
        return (
            f"{form.name} needs more different values of {' and '.join(columns)}; there are "
            f"{counts}"
        )
    x, *others = columns
    if form.floor:
        sizes = _sizes_per_series(columns, x, others)
        if (min(sizes) if "each" in form.name or not others else max(sizes)) < _MIN_SIZES:
            return (
                f"{form.name} needs at least {_MIN_SIZES} {x} to tell an irreducible term from a "
                "power" + (f" at each {others[0]}" if others else "")
            )
    return ""


def _has_full_rank(columns: np.ndarray) -> bool:
    return not columns.shape[1] or np.linalg.matrix_rank(columns) == columns.shape[1]


def _sizes_per_series(columns: Columns, x: str, others: list[str]) -> list[int]:
    """Count the different x among the points that agree in all other variables."""
    keys = [np.unique(columns[name], return_inverse=True)[1].reshape(-1) for name in others]
    series = np.stack(keys, 1) if keys else np.zeros((len(columns[x]), 1))
    return [len(np.unique(columns[x][(series == key).all(1)])) for key in np.unique(series, axis=0)]


def choose(law_kind: LawKind, candidates: list[Candidate], form: str, cells: Cells) -> Candidate:
    """Return the candidate of the requested form: `paper`, `best` (smallest AICc) or a name."""
    fitted = [candidate for candidate in candidates if candidate.fit is not None]
    if form == "best" and fitted:
        return min(fitted, key=lambda other: math.inf if other.aicc is None else other.aicc)
    names = [candidate.form.name for candidate in candidates]
    if form not in ("paper", "best", *names):
        raise InputError(
            f"the law {law_kind.name} has no form {form!r} for these points; there are paper, "
            f"best, {', '.join(names)}"
        )
    chosen = candidates[names.index(form) if form in names else 0]
    if chosen.fit is None:
        possible = ", ".join(candidate.form.name for candidate in fitted)
        hint = f"add points, or ask for another form: {possible}" if possible else "add points"
        if law_kind.name == "nk" and len(np.unique(cells.columns["k"])) == 1:
            hint = "with a single k the law is L(N): --law n"
        raise InputError(f"too few points for {law_kind.title}: {chosen.why}; {hint}")
    return chosen


def coefficients(
    form: Form, fitted: LawFit, cells: Cells, draws: int, seed: int
) -> dict[str, Coefficient]:
    """Return a fitted form's coefficients with their intervals.

    Args:
        form: The form.
        fitted: Its fit.
        cells: The points that were fitted.
        draws: Bootstrap samples; 0 gives no bootstrap interval.
        seed: Seed of the bootstrap.
    """
    profile = solver.intervals(fitted, LEVEL)
    bootstrap = (
        solver.resampled(fitted, draws, seed, clusters=cells.cluster)
        if draws
        else np.full((1, fitted.terms.size), math.nan)
    )
    negligible = solver.NOTHING * float(cells.value.min())
    result = {}
    for i, coefficient in enumerate(form.coefficients):
        quantiles = np.quantile(bootstrap[:, i], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        numbers = [fitted.theta[i], *profile[i], *quantiles.tolist()]
        if coefficient.exponential:
            numbers = [math.inf if x == math.inf else math.exp(min(x, 700.0)) for x in numbers]
            if coefficient in form.floor:
                numbers = [0.0 if x < negligible else x for x in numbers]
        value, *ends = numbers
        result[coefficient.name] = Coefficient(
            float(value), *(float(end) if math.isfinite(end) else None for end in ends)
        )
    return result


def _extrapolate(law_kind: LawKind, form: Form, cells: Cells) -> Extrapolation:
    """Fit without the largest first variable (compute: its largest quarter) and predict those."""
    x = law_kind.variables[0]
    column = cells.columns[x]
    bound = np.sort(column)[-max(1, len(column) // 4)] if x == "c" else column.max()
    held_out = column >= bound
    kept = {name: values[~held_out] for name, values in cells.columns.items()}
    why = (
        "all points have the same " + x
        if held_out.all()
        else missing_points(form, kept, cells.weight[~held_out])
    )
    if why:
        return Extrapolation(x, float(bound), why=why)
    terms, logs = form.terms(cells.columns), np.log(cells.value)
    fitted = solver.fit(terms.rows(~held_out), logs[~held_out], weights=cells.weight[~held_out])
    predicted = np.exp(terms.rows(held_out).value(fitted.theta))
    errors = predicted / cells.value[held_out] - 1
    points = [
        {
            **{name: plain(values[held_out][i]) for name, values in cells.columns.items()},
            law_kind.target: float(cells.value[held_out][i]),
            "foretold": float(predicted[i]),
            "error": float(errors[i]),
        }
        for i in range(int(held_out.sum()))
    ]
    size = np.abs(errors)
    return Extrapolation(x, float(bound), float(size.mean()), float(size.max()), points)


def leave_one_out(fitted: LawFit, clusters: np.ndarray) -> float | None:
    """Return the log-RMS of points predicted by a fit without them (without their cluster).

    None where a fit to the others has no degree of freedom left.
    """
    m = len(fitted.logs)
    if fitted.freedom < 2:
        return None
    weights = fitted.weights * (clusters != clusters[:, None])
    theta = solver.refit(
        fitted.terms,
        fitted.logs,
        np.tile(fitted.theta, (m, 1)),
        weights=weights,
        delta=fitted.delta,
    )
    return rms(fitted.logs - np.diagonal(fitted.terms.value(theta)), fitted.weights)


def rms(residuals: np.ndarray, weights: np.ndarray) -> float:
    """Return the weighted root mean square."""
    return math.sqrt(float((weights * residuals**2).sum() / weights.sum()))


def plain(value: Any) -> Any:
    """Return a NumPy scalar as a JSON value; whole floats as int."""
    value = value.item()
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return int(value) if is_whole else value
