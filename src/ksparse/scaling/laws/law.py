"""Fit a scaling law to points: coefficients with intervals, and how far to trust it.

    law = fit({"n": ..., "k": ..., "loss": ...}, "nk")
    law = fit(read_points("points.csv", "nk"), "nk")
    law.predict(n=65_536, k=32)      # Prediction(value, low, high, run_low, run_high)
    law.summary()                       # sentences on the quality of the fit
    law.to_dict()                    # the content of law.json

The fit minimises Huber's loss of log residuals (`solver`). Every form that the law may have
(`forms`) is fitted to the same points and compared (`candidates`). Unless another form is requested
the law has the paper's form, so that which coefficients are reported does not depend on chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ksparse import display
from ksparse.errors import InputError
from ksparse.scaling.laws import solver
from ksparse.scaling.laws.candidates import (
    LEVEL,
    Candidate,
    Coefficient,
    Extrapolation,
    choose,
    coefficients,
    fit_candidate,
    leave_one_out,
    plain,
    rms,
)
from ksparse.scaling.laws.forms import LAWS, Columns, Form, LawKind, forms, law_of
from ksparse.scaling.laws.points import WORDS, Cells, read, to_cells
from ksparse.scaling.laws.solver import LawFit

FORMAT = 1
DRAWS = 1_000
"""Bootstrap samples."""
_CORRELATED = 0.5  # correlation of neighbouring residuals above which the form errs in a pattern
_CLOSE = 2.0  # a smaller difference of AICc means nothing


@dataclass(frozen=True, repr=False)
class Prediction:
    """A law's value with its 95 % interval, and the interval that holds a single further run.

    Example:
        >>> Prediction(value=0.25, low=0.2, high=0.3, run_low=0.1, run_high=0.4)
        Prediction(0.25, 95 % interval [0.2, 0.3], of a single run [0.1, 0.4])
    """

    value: float
    low: float
    high: float
    run_low: float
    run_high: float

    def __repr__(self) -> str:
        return (
            f"Prediction({self.value:.4g}, 95 % interval [{self.low:.4g}, {self.high:.4g}], "
            f"of a single run [{self.run_low:.4g}, {self.run_high:.4g}])"
        )

    def summary(self, target: str, at: dict[str, Any]) -> str:
        """Describe the prediction in one line."""
        where = ", ".join(
            f"{name} = {value if isinstance(value, str) else _short(value)}"
            for name, value in at.items()
        )
        return (
            f"{target} at {where}: {self.value:.4g}, 95 % interval [{self.low:.4g}, "
            f"{self.high:.4g}]; a single run would lie in [{self.run_low:.4g}, "
            f"{self.run_high:.4g}]"
        )


@dataclass(frozen=True, repr=False)
class Law:
    """A fitted law.

    Attributes:
        kind: What it predicts from what.
        form: The form of the law.
        cells: The points, seeds merged.
        fit: The fit of `form` to them.
        candidates: Every form that was tried, including `form`.
        coefficients: The coefficients of `form` by name.
        leave_one_out: The log-RMS of each point predicted from the others.
    """

    kind: LawKind
    form: Form
    cells: Cells
    fit: LawFit
    candidates: list[Candidate]
    coefficients: dict[str, Coefficient]
    leave_one_out: float | None

    @property
    def log_rms(self) -> float:
        """The root mean square of the log residuals."""
        return rms(self.fit.residuals, self.fit.weights)

    @property
    def extrapolation(self) -> Extrapolation:
        """How well the law's own form extrapolates."""
        extrapolation = self.candidate.extrapolation
        assert extrapolation is not None
        return extrapolation

    @property
    def candidate(self) -> Candidate:
        """The law's own form among those that were fitted."""
        return next(other for other in self.candidates if other.form.name == self.form.name)

    @property
    def best(self) -> Candidate:
        """The candidate of the smallest AICc; the law's own where none has one."""
        known = [(other.aicc, other) for other in self.candidates if other.aicc is not None]
        return min(known, key=lambda pair: pair[0])[1] if known else self.candidate

    @property
    def by_group(self) -> str | None:
        """The column whose values must be among the points', None if the law interpolates."""
        group = self.kind.group or "k"
        has_group_terms = self.kind.group is not None or any(
            coefficient.name.startswith(("alpha_", "beta_"))
            for coefficient in self.form.coefficients
        )
        return group if has_group_terms and group in self.cells.columns else None

    @cached_property
    def correlation(self) -> float | None:
        """Correlation of residuals of neighbours along the first variable, all others equal.

        None with fewer than 8 pairs of neighbours.
        """
        x, *others = self.cells.columns
        order = np.lexsort([self.cells.columns[x], *(self.cells.columns[name] for name in others)])
        residuals = (self.fit.residuals - self.fit.residuals.mean())[order]
        same = np.ones(len(order) - 1, bool)
        for name in others:
            same &= self.cells.columns[name][order][1:] == self.cells.columns[name][order][:-1]
        if same.sum() < 8 or not (square := float((residuals**2).mean())):
            return None
        return float((residuals[1:] * residuals[:-1])[same].mean()) / square

    def predict(self, **at: Any) -> Prediction:
        """Predict the target at one value of each of the law's variables.

        Args:
            at: A number above 0 for each variable (a name for `lm`), all of them.

        Returns:
            The value with a 95 % interval for the law and one for a single run.

        Raises:
            InputError: A variable is missing, unknown, not above 0 or too large for a float, or a
                group (a k, an LM) is not among the points.

        Example:
            >>> from ksparse.scaling.laws.law import fit
            >>> points = {"n": [1e3, 2e3, 4e3, 8e3, 16e3], "tokens": [1e6, 2e6, 4e6, 8e6, 16e6]}
            >>> law = fit(points, "tokens", draws=0)
            >>> round(law.predict(n=32e3).value / 1e6)
            32
        """
        self._check(at)
        rows = self.form.terms({name: np.array([at[name]]) for name in self.cells.columns})
        value = float(rows.value(self.fit.theta)[0])
        low, high = (float(end[0]) for end in solver.interval_at(self.fit, rows, LEVEL))
        run = solver.quantile(self.fit, LEVEL) * solver.scatter(self.fit)
        run_low = value - math.hypot(value - low, run)
        run_high = value + math.hypot(high - value, run)
        return Prediction(*map(math.exp, (value, low, high, run_low, run_high)))

    def _check(self, at: dict[str, Any]) -> None:
        """Raise InputError unless `at` has a usable value for each of the law's variables."""
        variables = list(self.cells.columns)
        extra = [name for name in at if name not in variables]
        missing = [name for name in variables if name not in at]
        if extra or missing:
            raise InputError(
                f"the law {self.kind.name} is predicted at "
                f"{', '.join(f'{name}=' for name in variables)}; "
                + (f"it does not depend on {extra[0]!r}" if extra else f"{missing[0]!r} is missing")
            )
        for name, value in at.items():
            if name not in WORDS:
                _check_number(name, value)
        group = self.by_group
        if group is None:
            return
        known = np.unique(self.cells.columns[group]).tolist()
        if at[group] not in known:
            raise InputError(
                f"the law {self.kind.name} ({self.form.name}) knows nothing of "
                f"{group}={_format(at[group])}; its points have {', '.join(map(_format, known))}"
            )

    def curve(self, at: Columns) -> np.ndarray:
        """Return the law's values at many points, columns of equal length."""
        return np.exp(self.form.terms(at).value(self.fit.theta))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of law.json (docs/formats.md)."""
        values = self.fit.terms.value(self.fit.theta)
        return {
            "law": self.kind.name,
            "title": self.kind.title,
            "form": self.form.name,
            "equation": self.form.equation,
            "target": self.kind.target,
            "coefficients": {
                name: vars(coefficient) for name, coefficient in self.coefficients.items()
            },
            "level": LEVEL,
            "log_rms": self.log_rms,
            "log_max": float(np.abs(self.fit.residuals).max()),
            "leave_one_out": self.leave_one_out,
            "extrapolation_error": self.extrapolation.error,
            "extrapolation": vars(self.extrapolation),
            "starts": self.fit.starts,
            "starts_at_best": self.fit.reached,
            "forms": self._candidate_rows(),
            "best_form": self.best.form.name,
            "residual_correlation": self.correlation,
            "seed_scatter": self.cells.seed_scatter,
            "points": [
                {
                    **{name: plain(column[i]) for name, column in self.cells.columns.items()},
                    self.kind.target: float(self.cells.value[i]),
                    "runs": int(self.cells.count[i]),
                    "fitted": math.exp(values[i]),
                    "residual": float(self.fit.residuals[i]),
                }
                for i in range(len(self.cells))
            ],
            "says": self.summary(),
        }

    def _candidate_rows(self) -> list[dict[str, Any]]:
        """Return the field `forms` of law.json."""
        lowest = min(
            (other.aicc for other in self.candidates if other.aicc is not None), default=math.inf
        )
        return [
            {
                "form": other.form.name,
                "equation": other.form.equation,
                "coefficients": len(other.form.coefficients),
                "log_rms": other.log_rms,
                "aicc": other.aicc,
                "extrapolation_error": other.extrapolation.error if other.extrapolation else None,
                "above_best": None if other.aicc is None else other.aicc - lowest,
                "why": other.why,
            }
            for other in self.candidates
        ]

    # ---- in words

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()

    def table(self) -> display.Table:
        """Return the coefficients with their 95 % intervals, and `summary` below them."""
        rows = [
            (name, f"{found.value:.4g}", f"{_end(found.low)} to {_end(found.high)}")
            for name, found in self.coefficients.items()
        ]
        header = ("coefficient", "value", "95 % interval")
        return display.Table(self.kind.title, header, rows, self.summary())

    def summary(self) -> list[str]:
        """Describe in sentences how well the law fits, what fits better, and what to distrust."""
        worst = float(np.abs(self.fit.residuals).max())
        return [
            f"{self.form.equation}: {len(self.cells)} points, {_percent(self.log_rms)} off "
            f"(log-RMS {self.log_rms:.4f}), the worst {_percent(worst)}.",
            *self._describe_best(),
            *self._describe_floor(),
            *self._describe_extrapolation(),
            *self._warnings(),
        ]

    def _describe_best(self) -> list[str]:
        """Compare the law's form with the one of the smallest AICc."""
        current, best = self.candidate, self.best
        if current.aicc is None or best.aicc is None:
            return []
        if best.form.name == self.form.name:
            tried = [other for other in self.candidates if other.aicc is not None]
            return ["No other form that was tried has a lower AICc."] if len(tried) > 1 else []
        gap = current.aicc - best.aicc
        extrapolation = best.extrapolation
        error = (
            f"; it predicts the largest {extrapolation.variable} with a mean error of "
            f"{_percent(extrapolation.error)}"
            if extrapolation is not None and extrapolation.error is not None
            else ""
        )
        return [
            f"Of the forms tried, {best.form.name} ({best.form.equation}) "
            f"{'fits best' if gap > _CLOSE else 'does about as well'}: "
            f"log-RMS {best.log_rms:.4f}, AICc lower by {gap:.1f}{error}."
        ]

    def _describe_floor(self) -> list[str]:
        """Say whether the irreducible term is needed, by the same form without it."""
        if not self.form.floor:
            return []
        names = [coefficient.name for coefficient in self.form.amplitude]
        without = next(
            (
                other
                for other in self.candidates
                if other.aicc is not None
                and not other.form.floor
                and [coefficient.name for coefficient in other.form.amplitude] == names
            ),
            None,
        )
        current = self.candidate
        if without is None or without.aicc is None or current.aicc is None:
            return []
        gap = without.aicc - current.aicc
        verdict = (
            "the points ask for it"
            if gap > _CLOSE
            else "the points do not ask for it"
            if gap < -_CLOSE
            else "the points do not decide"
        )
        return [
            f"Irreducible term: {verdict} (without it log-RMS {without.log_rms:.4f}, AICc "
            f"{'higher' if gap > 0 else 'lower'} by {abs(gap):.1f})."
        ]

    def _describe_extrapolation(self) -> list[str]:
        extrapolation = self.extrapolation
        if extrapolation.error is not None and extrapolation.largest is not None:
            return [
                f"Fitted without {extrapolation.variable} "
                f"{'≥' if extrapolation.variable == 'c' else '='} {_short(extrapolation.value)}, "
                f"it predicts those points with a mean error of {_percent(extrapolation.error)}, "
                f"at most {_percent(extrapolation.largest)}."
            ]
        return [f"No test of extrapolation: {extrapolation.why}."] if extrapolation.why else []

    def _warnings(self) -> list[str]:
        """Return what speaks against the fit."""
        warnings = []
        if self.correlation is not None and self.correlation > _CORRELATED:
            warnings.append(
                "Residuals are not random: neighbours err alike (correlation "
                f"{self.correlation:.2f}), so the form is not exact, and intervals, "
                "which suppose independent scatter, are too narrow."
            )
        if self.fit.starts > 1 and self.fit.reached < self.fit.starts / 4:
            warnings.append(
                f"Only {self.fit.reached} of {self.fit.starts} starts reached the best fit."
            )
        return warnings


def fit(
    points: Columns, law: str = "nk", *, form: str = "paper", draws: int = DRAWS, seed: int = 0
) -> Law:
    """Fit a law to columns of numbers.

    Args:
        points: Arrays of equal length: the law's variables and its target. Rows that agree in the
            variables count as seeds of one point.
        law: The law's name: nk, n, c, tokens, lr, s or optimal.
        form: `paper`, `best` (the smallest AICc) or the name of a form.
        draws: Bootstrap samples; 0 skips the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        InputError: The law or form is unknown, or the points do not suffice.

    Example:
        >>> from ksparse.scaling.laws.law import fit
        >>> points = {"n": [1e3, 2e3, 4e3, 8e3, 16e3], "lr": [8e-3, 4e-3, 2e-3, 1e-3, 5e-4]}
        >>> round(fit(points, "lr", draws=0).coefficients["beta"].value, 3)
        -1.0
    """
    law_kind = law_of(law)
    cells = to_cells(law_kind, _check_columns(law_kind, points))
    candidates = [fit_candidate(law_kind, tried, cells) for tried in forms(law, cells.columns)]
    chosen = choose(law_kind, candidates, form, cells)
    assert chosen.fit is not None
    return Law(
        law_kind,
        chosen.form,
        cells,
        chosen.fit,
        candidates,
        coefficients(chosen.form, chosen.fit, cells, draws, seed),
        leave_one_out(chosen.fit, cells.cluster),
    )


def evaluate(law: dict[str, Any], at: Columns) -> np.ndarray:
    """Return the values at many points of a law in the form of law.json."""
    law_kind, points = law_of(law["law"]), law["points"]
    columns = {
        name: np.array([point[name] for point in points])
        for name in (*law_kind.variables, law_kind.group)
        if name is not None and name in points[0]
    }
    form = next(form for form in forms(law["law"], columns) if form.name == law["form"])
    values = [law["coefficients"][coefficient.name]["value"] for coefficient in form.coefficients]
    theta = [
        math.log(max(value, 1e-300)) if coefficient.exponential else value
        for coefficient, value in zip(form.coefficients, values)
    ]
    return np.exp(form.terms(at).value(np.array(theta)))


def read_points(file: Path | str, law: str) -> dict[str, np.ndarray]:
    """Read the columns that a law needs from a CSV file.

    Raises:
        InputError: A column is missing, or a row cannot be a point.
    """
    law_kind = law_of(law)
    needed = (*law_kind.variables, *((law_kind.group,) if law == "s" else ()), law_kind.target)
    columns = read(file, needed, positive=[name for name in needed if name not in WORDS])
    used = [
        name
        for name in (*needed, law_kind.group, law_kind.cluster)
        if name is not None and name in columns
    ]
    if law_kind.group in columns and law_kind.group not in WORDS and law_kind.group not in needed:
        columns = read(file, needed, positive=[name for name in used if name not in WORDS])
    return {name: columns[name] for name in used}


def _check_columns(law_kind: LawKind, points: Columns) -> dict[str, np.ndarray]:
    """Return the points as arrays of one length, all numbers finite and above 0."""
    needed = [*law_kind.variables, law_kind.target]
    missing = [name for name in needed if name not in points]
    if missing:
        raise InputError(
            f"the law {law_kind.name} needs {', '.join(needed)}; {missing[0]!r} is missing"
        )
    columns = {
        name: np.asarray(points[name])
        for name in (*needed, law_kind.group, law_kind.cluster)
        if name is not None and name in points
    }
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the columns of a law have one length; got {sizes}")
    for name, column in columns.items():
        if name in WORDS:
            continue
        numbers = column.astype(float)
        if not (np.isfinite(numbers) & (numbers > 0)).all():
            raise InputError(
                f"{name} of the law {law_kind.name} has values that are not above 0; laws are "
                "fitted to logarithms"
            )
    return columns


def _check_number(name: str, value: Any) -> None:
    try:
        usable = isinstance(value, (int, float)) and 0 < float(value) < math.inf
    except OverflowError:
        raise InputError(
            f"{name} is larger than any float (about 1.8e308); give a smaller number"
        ) from None
    if not usable:
        raise InputError(f"{name}={value} is not a number above 0; a law is of logarithms")


def _format(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _end(value: float | None) -> str:
    """Return the end of an interval; None is one that the points do not bound."""
    return "unbounded" if value is None else f"{value:.4g}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if 1 <= abs(value) < 1e7 else f"{value:.3g}"


__all__ = ["LAWS", "Candidate", "Coefficient", "Law", "Prediction", "fit", "plain", "read_points"]
