"""Points -> one law: coefficients with intervals, how well it fits, how well it foretells, and what
else would fit.

    law = fit({"n": ..., "k": ..., "loss": ...}, "nk")     or fit(read_points("points.csv", "nk"),
                                                           "nk")
    law.predict(n=65_536, k=32)                            Prediction(value, low, high, ...)
    law.says()                                             sentences
    law.to_dict()                                          what law.json holds

The fit minimises Huber's loss of log residuals (`solve`). Each form that the law may have (`forms`)
is fitted to the same points and compared by

    AICc = m log(mean squared log residual) + 2 p + 2 p (p + 1) / (m - p - 1)        p counts the
        scatter as well

but unless another is asked for, the law is of the paper's form: which coefficients are reported
does not depend on chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import InputError
from ksparse.scaling.laws import solver
from ksparse.scaling.laws.forms import LAWS, Columns, Form, LawKind, forms, law_of
from ksparse.scaling.laws.points import WORDS, Cells, cells, read
from ksparse.scaling.laws.solver import LawFit

FORMAT = 1
LEVEL = 0.95
DRAWS = 1_000
_CORRELATED = 0.5  # of neighbours' residuals: above it the form errs in a pattern
_CLOSE = 2.0  # difference of AICc that means nothing


@dataclass(frozen=True)
class Coefficient:
    """A coefficient with its 95 % interval, and that of the bootstrap; None: without end."""

    value: float
    low: float | None
    high: float | None
    bootstrap_low: float | None
    bootstrap_high: float | None


@dataclass(frozen=True)
class Extrapolation:
    """How well the law fitted without the largest of a variable says them; error: mean relative;
    why: the reason where it cannot be said."""

    variable: str
    value: float | None = None
    error: float | None = None
    largest: float | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""


@dataclass(frozen=True)
class Candidate:
    """A form as it fits the same points; why: the reason where it cannot be fitted."""

    form: Form
    fit: LawFit | None = None
    aicc: float | None = None
    why: str = ""
    foretelling: Extrapolation | None = None

    @property
    def log_rms(self) -> float | None:
        return None if self.fit is None else _rms(self.fit.residuals, self.fit.weights)

    @property
    def foretold(self) -> str:
        """Say how well it extrapolates, as the end of a sentence; '' where that is not known."""
        said = self.foretelling
        return (
            ""
            if said is None or said.error is None
            else f"; it foretells the largest {said.variable} with a mean error of "
            f"{_percent(said.error)}"
        )


@dataclass(frozen=True)
class Prediction:
    """A law's value with its 95 % interval, and that within which one more run would lie."""

    value: float
    low: float
    high: float
    run_low: float
    run_high: float

    def says(self, target: str, at: dict[str, Any]) -> str:
        """Say it in a line."""
        where = ", ".join(
            f"{name} = {value if isinstance(value, str) else _short(value)}"
            for name, value in at.items()
        )
        return (
            f"{target} at {where}: {self.value:.4g}, 95 % interval [{self.low:.4g}, "
            f"{self.high:.4g}]; "
            f"a single run would lie in [{self.run_low:.4g}, {self.run_high:.4g}]"
        )


@dataclass(frozen=True)
class Law:
    """A fitted law."""

    kind: LawKind
    form: Form
    cells: Cells
    fit: LawFit
    candidates: list[Candidate]
    coefficients: dict[str, Coefficient]
    leave_one_out: float | None

    @property
    def log_rms(self) -> float:
        return _rms(self.fit.residuals, self.fit.weights)

    @property
    def foretelling(self) -> Extrapolation:
        """Return how well the law's own form extrapolates."""
        found = self.candidate.foretelling
        assert found is not None
        return found

    @property
    def best(self) -> Candidate:
        """Return the form of the smallest AICc; the law's own where none has one."""
        known = [(each.aicc, each) for each in self.candidates if each.aicc is not None]
        return min(known, key=lambda pair: pair[0])[1] if known else self.candidate

    @cached_property
    def correlation(self) -> float | None:
        """Return the correlation of the residuals of neighbours along the first variable, the
        others being equal; None below 8 pairs."""
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
        """Return the law's value where its variables are as given."""
        needed = list(self.cells.columns)
        wrong = next((name for name in at if name not in needed), None) or next(
            (name for name in needed if name not in at), None
        )
        if wrong is not None:
            raise InputError(
                f"the law {self.kind.name} is predicted at "
                f"{', '.join(f'{name}=' for name in needed)}; "
                + (f"it does not depend on {wrong!r}" if wrong in at else f"{wrong!r} is missing")
            )
        for name, value in at.items():
            if name not in WORDS and not (
                isinstance(value, (int, float)) and math.isfinite(value) and value > 0
            ):
                raise InputError(f"{name}={value} is not a number above 0; a law is of logarithms")
        if (group := self.by_group) is not None and at[group] not in (
            known := np.unique(self.cells.columns[group]).tolist()
        ):
            raise InputError(
                f"the law {self.kind.name} ({self.form.name}) knows nothing of "
                f"{group}={written(at[group])}; its points have " + ", ".join(map(written, known))
            )
        rows = self.form.terms({name: np.array([at[name]]) for name in needed})
        value = float(rows.value(self.fit.theta)[0])
        low, high = (float(end[0]) for end in solver.interval_at(self.fit, rows, LEVEL))
        run = solver.quantile(self.fit, LEVEL) * solver.scatter(self.fit)
        return Prediction(
            *(
                math.exp(each)
                for each in (
                    value,
                    low,
                    high,
                    value - math.hypot(value - low, run),
                    value + math.hypot(high - value, run),
                )
            )
        )

    def curve(self, at: Columns) -> np.ndarray:
        """Return the law's values at many points."""
        return np.exp(self.form.terms(at).value(self.fit.theta))

    @property
    def by_group(self) -> str | None:
        """Return the column of which the law only knows the values that its points have; None if it
        may lie in between."""
        group = self.kind.group or "k"
        own = self.kind.group is not None or any(
            each.name.startswith(("alpha_", "beta_")) for each in self.form.coefficients
        )
        return group if own and group in self.cells.columns else None

    @property
    def candidate(self) -> Candidate:
        """Return the law's own form among those that were fitted."""
        return next(each for each in self.candidates if each.form.name == self.form.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of law.json (docs/formats.md)."""
        least = min(
            (each.aicc for each in self.candidates if each.aicc is not None), default=math.inf
        )
        values = self.fit.terms.value(self.fit.theta)
        return {
            "law": self.kind.name,
            "title": self.kind.title,
            "form": self.form.name,
            "equation": self.form.equation,
            "target": self.kind.target,
            "coefficients": {name: vars(each) for name, each in self.coefficients.items()},
            "level": LEVEL,
            "log_rms": self.log_rms,
            "log_max": float(np.abs(self.fit.residuals).max()),
            "leave_one_out": self.leave_one_out,
            "extrapolation_error": self.foretelling.error,
            "extrapolation": vars(self.foretelling),
            "starts": self.fit.starts,
            "starts_at_best": self.fit.reached,
            "forms": [
                {
                    "form": each.form.name,
                    "equation": each.form.equation,
                    "coefficients": len(each.form.coefficients),
                    "log_rms": each.log_rms,
                    "aicc": each.aicc,
                    "extrapolation_error": each.foretelling.error if each.foretelling else None,
                    "above_best": None if each.aicc is None else each.aicc - least,
                    "why": each.why,
                }
                for each in self.candidates
            ],
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
            "says": self.says(),
        }

    def says(self) -> list[str]:
        """Say in words how well the law fits, what else would, and what speaks against it."""
        said = [
            f"{self.form.equation}: {len(self.cells)} points, {_percent(self.log_rms)} off "
            f"(log-RMS {self.log_rms:.4f}), "
            f"the worst {_percent(float(np.abs(self.fit.residuals).max()))}."
        ]
        mine, best = self.candidate, self.best
        if mine.aicc is not None and best.aicc is not None and best.form.name != self.form.name:
            gap = mine.aicc - best.aicc
            said.append(
                f"Of the forms tried, {best.form.name} ({best.form.equation}) "
                f"{'fits best' if gap > _CLOSE else 'does about as well'}: "
                f"log-RMS {best.log_rms:.4f}, AICc lower by {gap:.1f}" + best.foretold + "."
            )
        elif (
            mine.aicc is not None
            and len([each for each in self.candidates if each.aicc is not None]) > 1
        ):
            said.append("No other form that was tried has a lower AICc.")
        said += self._irreducible()
        foretelling = self.foretelling
        if foretelling.error is not None and foretelling.largest is not None:
            said.append(
                f"Fitted without {foretelling.variable} "
                f"{'≥' if foretelling.variable == 'c' else '='} {_short(foretelling.value)}, "
                f"it foretells those points with a mean error of {_percent(foretelling.error)}, "
                f"at most {_percent(foretelling.largest)}."
            )
        elif foretelling.why:
            said.append(f"No test of extrapolation: {foretelling.why}.")
        if self.correlation is not None and self.correlation > _CORRELATED:
            said.append(
                "Residuals are not random: neighbours err alike (correlation "
                f"{self.correlation:.2f}), so the form is not exact, and intervals, "
                "which suppose independent scatter, are too narrow."
            )
        if self.fit.starts > 1 and self.fit.reached < self.fit.starts / 4:
            said.append(
                f"Only {self.fit.reached} of {self.fit.starts} starts reached the best fit."
            )
        return said

    def _irreducible(self) -> list[str]:
        """Say what the irreducible term is worth, by the same form without it."""
        if not self.form.floor:
            return []
        plain = next(
            (
                each
                for each in self.candidates
                if each.aicc is not None
                and not each.form.floor
                and [c.name for c in each.form.amplitude] == [c.name for c in self.form.amplitude]
            ),
            None,
        )
        mine = self.candidate
        if plain is None or plain.aicc is None or mine.aicc is None:
            return []
        gap = plain.aicc - mine.aicc
        verdict = (
            "the points ask for it"
            if gap > _CLOSE
            else "the points do not ask for it"
            if gap < -_CLOSE
            else "the points do not decide"
        )
        return [
            f"Irreducible term: {verdict} (without it log-RMS {plain.log_rms:.4f}, AICc "
            f"{'higher' if gap > 0 else 'lower'} by {abs(gap):.1f})."
        ]


def fit(
    points: Columns, law: str = "nk", *, form: str = "paper", draws: int = DRAWS, seed: int = 0
) -> Law:
    """Fit a law to columns of numbers: its variables and its target; rows that agree in the
    variables count as seeds of one point.

    form: `paper`, `best` (the smallest AICc) or a form's name. draws: of the bootstrap. Raises
    InputError where the points do not suffice.
    """
    kind = law_of(law)
    found = cells(kind, _checked(kind, points))
    candidates = [_candidate(kind, each, found) for each in forms(law, found.columns)]
    chosen = _choose(kind, candidates, form, found)
    assert chosen.fit is not None
    return Law(
        kind,
        chosen.form,
        found,
        chosen.fit,
        candidates,
        _coefficients(chosen, found, draws, seed),
        _leave_one_out(chosen.fit, found.cluster),
    )


def evaluate(found: dict[str, Any], at: Columns) -> np.ndarray:
    """Return the values at many points of a law as law.json holds it."""
    columns = {
        name: np.array([point[name] for point in found["points"]]) for name in _variables(found)
    }
    form = next(form for form in forms(found["law"], columns) if form.name == found["form"])
    values = [found["coefficients"][each.name]["value"] for each in form.coefficients]
    theta = [
        math.log(max(value, 1e-300)) if each.exponential else value
        for each, value in zip(form.coefficients, values)
    ]
    return np.exp(form.terms(at).value(np.array(theta)))


def _variables(found: dict[str, Any]) -> list[str]:
    kind = law_of(found["law"])
    return [
        name
        for name in (*kind.variables, kind.group)
        if name is not None and name in found["points"][0]
    ]


def read_points(file: Path | str, law: str) -> dict[str, np.ndarray]:
    """Return the columns of a CSV that a law needs; raise InputError for what cannot be a point."""
    kind = law_of(law)
    needed = (*kind.variables, *((kind.group,) if law == "s" else ()), kind.target)
    columns = read(file, needed, positive=[name for name in needed if name not in WORDS])
    wanted = [
        name for name in (*needed, kind.group, kind.cluster) if name is not None and name in columns
    ]
    if kind.group in columns and kind.group not in WORDS and kind.group not in needed:
        columns = read(file, needed, positive=[name for name in wanted if name not in WORDS])
    return {name: columns[name] for name in wanted}


# ---- the parts of a fit --------------------------------------------------------------------------


def _checked(kind: LawKind, points: Columns) -> dict[str, np.ndarray]:
    """Return the points as arrays of one length, all numbers finite and above 0."""
    needed = [*kind.variables, kind.target]
    missing = [name for name in needed if name not in points]
    if missing:
        raise InputError(
            f"the law {kind.name} needs {', '.join(needed)}; {missing[0]!r} is missing"
        )
    columns = {
        name: np.asarray(points[name])
        for name in (*needed, kind.group, kind.cluster)
        if name is not None and name in points
    }
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"the columns of a law have one length; got {sizes}")
    for name, column in columns.items():
        if (
            name not in WORDS
            and not (np.isfinite(column.astype(float)) & (column.astype(float) > 0)).all()
        ):
            raise InputError(
                f"{name} of the law {kind.name} has values that are not above 0; laws are fitted "
                "to logarithms"
            )
    return columns


def _candidate(kind: LawKind, form: Form, found: Cells) -> Candidate:
    why = lacking(form, found.columns, found.weight)
    if why:
        return Candidate(form, why=why)
    fitted = solver.fit(form.terms(found.columns), np.log(found.value), weights=found.weight)
    m, p = float(found.weight.sum()), len(form.coefficients) + 1
    aicc = (
        m * math.log(max(_rms(fitted.residuals, fitted.weights), 1e-12) ** 2)
        + 2 * p
        + 2 * p * (p + 1) / (m - p - 1)
        if m > p + 1
        else None
    )
    return Candidate(form, fitted, aicc, foretelling=_foretell(kind, form, found))


def lacking(form: Form, columns: Columns, weight: np.ndarray) -> str:
    """Say what points lack for a form; '' if they suffice."""
    m, p = round(float(weight.sum())), len(form.coefficients)
    kinds = ", ".join(f"{len(np.unique(column))} {name}" for name, column in columns.items())
    if m < p + 1:
        return (
            f"{form.name} has {p} coefficients and needs at least {p + 1} different points; "
            f"there {'is' if m == 1 else 'are'} {m} ({kinds})"
        )
    terms = form.terms(columns)
    if np.linalg.matrix_rank(terms.amplitude) < terms.amplitude.shape[1] or (
        form.floor and np.linalg.matrix_rank(terms.floor) < terms.floor.shape[1]
    ):
        return (
            f"{form.name} needs more different values of {' and '.join(columns)}; there are {kinds}"
        )
    if form.floor:
        x, *others = columns
        series = (
            np.stack(
                [np.unique(columns[name], return_inverse=True)[1].reshape(-1) for name in others], 1
            )
            if others
            else np.zeros((len(columns[x]), 1))
        )
        fewest = min(
            len(np.unique(columns[x][(series == each).all(1)]))
            for each in np.unique(series, axis=0)
        )
        most = max(
            len(np.unique(columns[x][(series == each).all(1)]))
            for each in np.unique(series, axis=0)
        )
        if (fewest if "each" in form.name or not others else most) < 3:
            return f"{form.name} needs at least 3 {x} to tell an irreducible term from a power" + (
                f" at each {others[0]}" if others else ""
            )
    return ""


def _choose(kind: LawKind, candidates: list[Candidate], form: str, found: Cells) -> Candidate:
    fitted = [each for each in candidates if each.fit is not None]
    if form == "best" and fitted:
        return min(fitted, key=lambda each: math.inf if each.aicc is None else each.aicc)
    names = [each.form.name for each in candidates]
    if form not in ("paper", "best", *names):
        raise InputError(
            f"the law {kind.name} has no form {form!r} for these points; there are paper, best, "
            f"{', '.join(names)}"
        )
    chosen = candidates[names.index(form) if form in names else 0]
    if chosen.fit is None:
        able = [each.form.name for each in fitted]
        hint = f"add points, or ask for another form: {', '.join(able)}" if able else "add points"
        if kind.name == "nk" and len(np.unique(found.columns["k"])) == 1:
            hint = "with a single k the law is L(N): --law n"
        raise InputError(f"too few points for {kind.title}: {chosen.why}; {hint}")
    return chosen


def _coefficients(chosen: Candidate, found: Cells, draws: int, seed: int) -> dict[str, Coefficient]:
    fitted = chosen.fit
    assert fitted is not None
    ends = solver.intervals(fitted, LEVEL)
    drawn = (
        solver.resampled(fitted, draws, seed, clusters=found.cluster)
        if draws
        else np.full((1, fitted.terms.size), math.nan)
    )
    result = {}
    for i, coefficient in enumerate(chosen.form.coefficients):
        spread = np.quantile(drawn[:, i], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        values = [fitted.theta[i], *ends[i], *spread.tolist()]
        if coefficient.exponential:
            values = [
                math.exp(min(value, 700.0)) if value != math.inf else math.inf for value in values
            ]
            if coefficient in chosen.form.floor:
                values = [
                    0.0 if value < solver.NOTHING * float(found.value.min()) else value
                    for value in values
                ]
        value, *others = values
        result[coefficient.name] = Coefficient(
            float(value), *(float(each) if math.isfinite(each) else None for each in others)
        )
    return result


def _foretell(kind: LawKind, form: Form, found: Cells) -> Extrapolation:
    """Fit without the points of the largest first variable (of compute: the largest quarter) and
    compare what that says of them."""
    x = kind.variables[0]
    column = found.columns[x]
    bar = np.sort(column)[-max(1, len(column) // 4)] if x == "c" else column.max()
    out = column >= bar
    rest = {name: values[~out] for name, values in found.columns.items()}
    why = "all points have the same " + x if out.all() else lacking(form, rest, found.weight[~out])
    if why:
        return Extrapolation(x, float(bar), why=why)
    terms, logs = form.terms(found.columns), np.log(found.value)
    fitted = solver.fit(terms.rows(~out), logs[~out], weights=found.weight[~out])
    said = np.exp(terms.rows(out).value(fitted.theta))
    errors = said / found.value[out] - 1
    points = [
        {
            **{name: plain(values[out][i]) for name, values in found.columns.items()},
            kind.target: float(found.value[out][i]),
            "foretold": float(said[i]),
            "error": float(errors[i]),
        }
        for i in range(int(out.sum()))
    ]
    return Extrapolation(
        x, float(bar), float(np.abs(errors).mean()), float(np.abs(errors).max()), points
    )


def _leave_one_out(fitted: LawFit, clusters: np.ndarray) -> float | None:
    """Return the log-RMS of each point as the fit without it (without its cluster) says it; None
    where a fit to the others has no freedom left."""
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
    return _rms(fitted.logs - np.diagonal(fitted.terms.value(theta)), fitted.weights)


def _rms(residuals: np.ndarray, weights: np.ndarray) -> float:
    return math.sqrt(float((weights * residuals**2).sum() / weights.sum()))


def plain(value: Any) -> Any:
    """Return a NumPy scalar as JSON has it."""
    value = value.item()  # of whatever kind NumPy has it
    return (
        int(value)
        if isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        else value
    )


def written(value: Any) -> str:
    """Return a number or a word as it is named."""
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if 1 <= abs(value) < 1e7 else f"{value:.3g}"


__all__ = ["LAWS", "Coefficient", "Law", "Prediction", "fit", "read_points"]
