"""Fit every law that a sweep's folder has points for, and say what the others are missing.

    fit_sweep(folder) -> Survey   laws by name, notes on runs left out, the compute frontier

Which points each law is fitted to:

    nk, n     each (n, k) at its best learning rate; converged runs alone where there are enough
              of them, otherwise the end of every run
    s         the same at one k, for each LM
    tokens    tokens to convergence of the converged runs among them
    lr        for each (n, k) whose best rate has worse ones on both sides: the vertex of the
              parabola through the three, in logs
    c         the frontier: points of all curves of one k that none beats with less compute
    optimal   where along the frontier the best n changes: (C, geometric mean of both n)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ksparse import display
from ksparse.errors import InputError
from ksparse.scaling.laws import law as laws
from ksparse.scaling.laws.forms import Columns, law_of
from ksparse.scaling.laws.law import Law
from ksparse.scaling.laws.points import best_lr, read, take
from ksparse.storage import atomic

LAWS = ("nk", "n", "c", "tokens", "lr", "s", "optimal")


@dataclass(frozen=True, repr=False)
class Survey:
    """The laws of a sweep.

    Attributes:
        folder: The sweep's folder.
        laws: The fitted laws by name.
        absent: Why each other law could not be fitted, and which runs would add it.
        notes: Sentences on runs that were left out.
        subject: The LM and activation whose runs were fitted.
        frontier: Columns k, c, loss, n, tokens, run of the points that no other of their k beats
            with less compute.
        costs: Columns n, k, cost: training FLOPs per token.
        runs: The number of rows of points.csv.
    """

    folder: Path
    laws: dict[str, Law]
    absent: dict[str, str]
    notes: list[str]
    subject: dict[str, str]
    frontier: dict[str, np.ndarray]
    costs: dict[str, np.ndarray]
    runs: int

    def __getitem__(self, name: str) -> Law:
        """Return a law by its name; raise InputError that says why it could not be fitted."""
        if name not in self.laws:
            law_of(name)
            raise InputError(f"{self.absent[name]} There are {', '.join(self.laws)}")
        return self.laws[name]

    def __repr__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())

    def tables(self) -> list[display.Table]:
        """Return the table of each law, and one of notes."""
        found = [law.table() for law in self.laws.values()]
        notes = [*self.notes, *self.absent.values()]
        return found + ([display.Table("Notes", (), (), notes)] if notes else [])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a sweep's law.json (docs/formats.md)."""
        return {
            "format": laws.FORMAT,
            "runs": self.runs,
            "subject": self.subject,
            "laws": {name: law.to_dict() for name, law in self.laws.items()},
            "absent": self.absent,
            "notes": self.notes,
            "frontier": [
                {name: laws.plain(column[i]) for name, column in self.frontier.items()}
                for i in range(len(self.frontier.get("c", ())))
            ],
        }

    def predictions(self, at: dict[str, Any]) -> list[str]:
        """Return a line for each law whose variables are all in `at`, predicted there.

        Raises:
            InputError: No law can be predicted there.
        """
        if not at:
            return []
        lines = []
        for name, law in self.laws.items():
            columns = law.cells.columns
            if not set(columns) <= set(at):
                continue
            group = law.by_group
            # Where L(n, k) was fitted, it covers what L(n) of each k would say.
            if group is not None and (
                (name == "n" and "nk" in self.laws) or at[group] not in columns[group]
            ):
                continue
            values = {column: at[column] for column in columns}
            lines.append(law.predict(**values).summary(law.kind.target, values))
        if not lines:
            raise InputError(
                f"no law of this sweep is predicted at {', '.join(at)} alone; "
                + "; ".join(
                    f"{name} needs {', '.join(law.cells.columns)}"
                    for name, law in self.laws.items()
                )
            )
        return lines

    def budgeted(self, flops: float, at: dict[str, Any]) -> list[str]:
        """Return lines on the best n and tokens for a budget.

        Args:
            flops: Training FLOPs; 0 returns no lines.
            at: May hold the k to consider; by default every k.

        Raises:
            InputError: The budget is not a positive number, or the sweep has no law for it.
        """
        if not flops:
            return []
        if not (math.isfinite(flops) and flops > 0):
            raise InputError(f"--budget is {flops}; it must be a number of FLOPs above 0")
        if "optimal" not in self.laws:
            raise InputError(f"no compute-optimal size can be said: {self.absent['optimal']}")
        known = np.unique(self.frontier["k"]).tolist()
        requested = [at["k"]] if "k" in at else known
        if not set(requested) <= set(known):
            raise InputError(
                f"the sweep has no curves at k={requested[0]:g}; it has them at "
                f"{', '.join(f'{k:g}' for k in known)}"
            )
        return [self._describe_budget(flops, k) for k in requested]

    def _describe_budget(self, flops: float, k: float) -> str:
        law = self.laws["optimal"]
        variables = {"c": flops} | ({"k": k} if "k" in law.cells.columns else {})
        if "k" in variables and k not in law.cells.columns["k"]:
            return (
                f"k = {k:g}: no compute-optimal size, since one n is the best all along its curves"
            )
        size = law.predict(**variables)
        tokens = [flops / self.cost(n, k) for n in (size.value, size.high, size.low)]
        loss = ""
        if "c" in self.laws:
            frontier = self.laws["c"]
            expected = frontier.predict(
                **{name: {"c": flops, "k": k}[name] for name in frontier.cells.columns}
            )
            loss = f", loss {expected.value:.4g} [{expected.low:.4g}, {expected.high:.4g}]"
        return (
            f"{flops:.3g} FLOPs at k = {k:g}: n = {size.value:,.0f} [{size.low:,.0f}, "
            f"{size.high:,.0f}], "
            f"tokens = {tokens[0]:.3g} [{tokens[1]:.3g}, {tokens[2]:.3g}]{loss}"
        )

    def cost(self, n: float, k: float) -> float:
        """Return the training FLOPs per token of n latents, (log-)linear between the runs."""
        same_k = self.costs["k"] == k
        x, y = np.log(self.costs["n"][same_k]), np.log(self.costs["cost"][same_k])
        i = int(np.clip(np.searchsorted(x, math.log(n)), 1, max(1, len(x) - 1)))
        slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1]) if len(x) > 1 else 1.0
        return math.exp(y[min(i, len(x) - 1)] + slope * (math.log(n) - x[min(i, len(x) - 1)]))


@dataclass
class _Runs:
    """The rows of points.csv, with notes on what was left out of them."""

    rows: dict[str, np.ndarray]
    total: int
    notes: list[str] = field(default_factory=list)
    subject: dict[str, str] = field(default_factory=dict)


def fit_sweep(
    folder: Path | str,
    *,
    form: str = "paper",
    draws: int = laws.DRAWS,
    observe: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Survey:
    """Fit every law that a sweep's points and curves allow.

    Args:
        folder: The sweep's folder.
        form: The form to use for the laws that have it: `paper`, `best` or a name.
        draws: Bootstrap samples.
        observe: Called with the number of laws done, their total and the current law's title.

    Raises:
        InputError: The folder's points cannot be read, or allow no law at all.
    """
    folder = Path(folder)
    runs = _read(folder)
    curves = _curves(folder, runs)
    frontier = frontier_of(curves)
    tables = {
        "nk": _best_runs(runs),
        "n": _best_runs(runs),
        "tokens": _tokens(runs),
        "lr": best_rates(runs.rows, runs.notes),
        "s": _by_lm(runs),
        "c": _without_smallest(frontier),
        "optimal": crossings(frontier),
    }
    fitted, absent = {}, {}
    for done, name in enumerate(LAWS):
        observe(done, len(LAWS), law_of(name).title)
        try:
            fitted[name] = _fit(name, tables[name], form, draws)
        except InputError as error:
            absent[name] = (
                f"No law {law_of(name).title}: "
                f"{str(error).removeprefix(f'too few points for {law_of(name).title}: ')}."
            )
    observe(len(LAWS), len(LAWS), "")
    if not fitted:
        raise InputError(f"{folder} allows no law: " + " ".join(absent.values()))
    return Survey(
        folder, fitted, absent, runs.notes, runs.subject, frontier, _costs(curves), runs.total
    )


def _fit(name: str, table: dict[str, np.ndarray], form: str, draws: int) -> Law:
    if not table or not len(next(iter(table.values()))):
        raise InputError(NO_POINTS[name])
    if name == "nk" and len(np.unique(table["k"])) < 2:
        raise InputError("all runs have one k; runs at another k would add it")
    if form not in ("paper", "best"):
        try:
            return laws.fit(table, name, form=form, draws=draws)
        except InputError as error:
            if "has no form" not in str(error):
                raise
            form = "paper"
    return laws.fit(table, name, form=form, draws=draws)


NO_POINTS = {
    "nk": "there are no finished runs",
    "n": "there are no finished runs",
    "tokens": "no run has converged; runs that train to convergence would add it",
    "lr": "no (n, k) has its best learning rate between two worse ones; runs of at least three "
    "rates at each n would add it",
    "s": "all runs are of one LM; the same n and k on another LM would add it",
    "c": "there are no curves; runs with curves.csv would add it",
    "optimal": "the best n does not change along the curves; longer runs, or runs of other n, "
    "would add it",
}
"""Why a law has no points at all, and what would add some."""
MIN_SIZES = 4
"""Values of n at each k: three to tell an irreducible term from a power, one to extrapolate to."""


# ---- the runs ------------------------------------------------------------------------------------


def _read(folder: Path) -> _Runs:
    """Read the runs of the commonest activation, and note what is left out."""
    file = atomic.inside(folder, "points.csv")
    if not file.is_file():
        raise InputError(f"{folder} holds no points.csv; `ksparse sweep` writes it as runs finish")
    rows = read(file, ("n", "k", "loss"), positive=("n", "k"))
    runs = _Runs(rows, len(rows["loss"]))
    finite = np.isfinite(rows["loss"])
    if (not_positive := rows["loss"] <= 0).any():
        raise InputError(
            f"{file}: the loss of {_run_name(rows, np.flatnonzero(not_positive)[0])} is "
            f"{rows['loss'][not_positive][0]:g}; a loss is above 0"
        )
    if not finite.all():
        runs.notes.append(
            f"{(~finite).sum()} of {len(finite)} runs have no finite loss and are left out: "
            + ", ".join(_run_name(rows, i) for i in np.flatnonzero(~finite)[:5])
            + (" …" if (~finite).sum() > 5 else "")
            + "."
        )
    runs.rows = take(rows, finite)
    for name, words in (("lm", ""), ("activation", "with activation"), ("site", "at")):
        if name in rows and finite.any():
            _choose_commonest(runs, name, words)
    return runs


def _choose_commonest(runs: _Runs, name: str, words: str) -> None:
    """Note in the subject the value of a column that most runs have; leave out the runs of others,
    but not those of other LMs."""
    values, counts = np.unique(runs.rows[name], return_counts=True)
    if name == "site" and len(values) > 1 and _sites_go_with_lms(runs.rows):
        return
    chosen = runs.subject[name] = str(values[counts.argmax()])
    if len(values) == 1:
        return
    if name == "lm":
        runs.notes.append(f"All laws but L_s(N) are of {chosen}, the LM with the most runs.")
        return
    runs.notes.append(
        f"Laws are of the runs {words} {chosen}; those {words.partition(' ')[0]} "
        f"{', '.join(sorted(set(values) - {chosen}))} are left out."
    )
    runs.rows = take(runs.rows, runs.rows[name] == chosen)


def _sites_go_with_lms(rows: Columns) -> bool:
    """Return whether each LM was read at one site of its own, as in a law over LMs."""
    pairs = set(zip(rows["lm"].tolist(), rows["site"].tolist())) if "lm" in rows else set()
    return len(pairs) > 1 and len(pairs) == len({lm for lm, _ in pairs})


def _run_name(rows: Columns, i: int) -> str:
    return str(rows["run"][i]) if "run" in rows else f"row {i + 1}"


def _best_runs(runs: _Runs) -> dict[str, np.ndarray]:
    """Return the runs at the best learning rate; converged ones only, where there are enough."""
    return best_lr(_converged(_subject_runs(runs), runs.notes), ("n", "k"))


def _subject_runs(runs: _Runs) -> dict[str, np.ndarray]:
    return (
        take(runs.rows, runs.rows["lm"] == runs.subject["lm"])
        if "lm" in runs.subject
        else runs.rows
    )


def _converged(rows: dict[str, np.ndarray], notes: list[str]) -> dict[str, np.ndarray]:
    if "converged" not in rows or not len(rows["loss"]):
        return rows
    converged = np.char.lower(rows["converged"].astype(str)) == "true"
    if not converged.any():
        _note(
            notes,
            "No run has converged: L(N) and L(N, k) are of losses at the end of each run's budget, "
            "which larger n, slower to converge, suffer from more.",
        )
        return rows
    if converged.all():
        return rows
    sizes = [len(np.unique(rows["n"][converged & (rows["k"] == k)])) for k in np.unique(rows["k"])]
    if min(sizes) < MIN_SIZES:
        _note(
            notes,
            f"{converged.sum()} of {len(converged)} runs converged, too few to fit alone "
            f"(not {MIN_SIZES} n at each k): L(N) and L(N, k) are of all runs as they ended, "
            "at convergence or at the end of the budget, which larger n, slower to converge, "
            "suffer from more.",
        )
        return rows
    _note(
        notes,
        f"{(~converged).sum()} of {len(converged)} runs did not converge and count only for "
        "L(C) and the learning rate.",
    )
    return take(rows, converged)


def _note(notes: list[str], sentence: str) -> None:
    if sentence not in notes:
        notes.append(sentence)


def _tokens(runs: _Runs) -> dict[str, np.ndarray]:
    rows = _best_runs(runs)
    if "tokens_to_convergence" not in rows:
        return {}
    tokens = rows["tokens_to_convergence"]
    return take(
        {"n": rows["n"], "k": rows["k"], "tokens": tokens}, np.isfinite(tokens) & (tokens > 0)
    )


def _by_lm(runs: _Runs) -> dict[str, np.ndarray]:
    """Return the runs of all LMs at the k that most (LM, n) share; none with a single LM."""
    if "lm" not in runs.rows or len(np.unique(runs.rows["lm"])) < 2:
        return {}
    rows = best_lr(_converged(runs.rows, []), ("lm", "n", "k"))
    pairs: dict[float, set[tuple[str, float]]] = {}
    for lm, n, k in zip(rows["lm"].tolist(), rows["n"].tolist(), rows["k"].tolist()):
        pairs.setdefault(k, set()).add((lm, n))
    k = max(pairs, key=lambda k: (len({lm for lm, _ in pairs[k]}), len(pairs[k]), -k))
    runs.subject["k of L_s(N)"] = f"{k:g}"
    chosen = take(rows, rows["k"] == k)
    return chosen if len(np.unique(chosen["lm"])) > 1 else {}


def best_rates(rows: Columns, notes: list[str]) -> dict[str, np.ndarray]:
    """Return n, k and the best learning rate where it lies between two worse ones.

    Only runs of the commonest LM count. The rate is the vertex of the parabola through the best
    rate and its neighbours, in logs. (n, k) whose best rate is at the edge are added to `notes`.
    """
    if "lr" not in rows or not len(rows["loss"]):
        return {}
    if "lm" in rows:
        lms, counts = np.unique(rows["lm"], return_counts=True)
        rows = take(rows, rows["lm"] == lms[counts.argmax()])
    vertices, edges = [], []
    for n, k in sorted(set(zip(rows["n"].tolist(), rows["k"].tolist()))):
        group = take(rows, (rows["n"] == n) & (rows["k"] == k))
        rates = np.unique(group["lr"][np.isfinite(group["lr"]) & (group["lr"] > 0)])
        losses = np.array([np.log(group["loss"][group["lr"] == rate]).mean() for rate in rates])
        if len(rates) < 3:
            continue
        best = int(losses.argmin())
        if best in (0, len(rates) - 1):
            edges.append(f"n = {n:g}, k = {k:g}")
            continue
        a, b, _ = np.polyfit(
            np.log(rates[best - 1 : best + 2]) - math.log(rates[best]),
            losses[best - 1 : best + 2] - losses[best],
            2,
        )
        vertices.append((n, k, rates[best] * math.exp(-b / (2 * a))))
    if edges:
        _note(
            notes,
            "The best learning rate is at the edge of those tried for "
            f"{'; '.join(edges[:4])}{' …' if len(edges) > 4 else ''}: rates beyond it would place "
            "it.",
        )
    return dict(zip(("n", "k", "lr"), np.array(vertices, float).T)) if vertices else {}


# ---- the curves ----------------------------------------------------------------------------------


def _curves(folder: Path, runs: _Runs) -> dict[str, np.ndarray]:
    """Return the curves of the subject's runs, without points that have no finite loss."""
    file = atomic.inside(folder, "curves.csv")
    if not file.is_file():
        return {}
    rows = read(file, ("run", "n", "k", "flops", "loss"))
    usable = np.isfinite(rows["loss"]) & (rows["loss"] > 0) & (rows["flops"] > 0)
    if "run" in runs.rows:
        usable &= np.isin(rows["run"], _subject_runs(runs)["run"])
    rows = take(rows, usable)
    rows["c"] = rows.pop("flops")
    return rows


def frontier_of(curves: Columns) -> dict[str, np.ndarray]:
    """Return the points that no other of their k beats with as much compute or less."""
    if not len(curves.get("c", ())):
        return {}
    chosen = []
    for k in np.unique(curves["k"]):
        rows = np.flatnonzero(curves["k"] == k)
        order = rows[np.lexsort([curves["loss"][rows], curves["c"][rows]])]
        lowest = np.minimum.accumulate(np.append(np.inf, curves["loss"][order]))
        chosen.append(order[curves["loss"][order] < lowest[:-1]])
    names = [name for name in ("k", "c", "loss", "n", "tokens", "run") if name in curves]
    return {name: curves[name][np.concatenate(chosen)] for name in names}


def _without_smallest(frontier: Columns) -> dict[str, np.ndarray]:
    """Return the frontier without each k's smallest n.

    No smaller n was tried, so the loss there is not known to be the lowest for its compute.
    """
    if not frontier:
        return {}
    keep = np.ones(len(frontier["c"]), bool)
    for k in np.unique(frontier["k"]):
        same_k = frontier["k"] == k
        if len(np.unique(frontier["n"][same_k])) > 2:
            keep &= ~same_k | (frontier["n"] > frontier["n"][same_k].min())
    return take({name: frontier[name] for name in ("k", "c", "loss", "run")}, keep)


def crossings(frontier: Columns) -> dict[str, np.ndarray]:
    """Return c, k and n where the frontier of a k passes from one n to the next.

    c is the geometric mean of the last point of the smaller n (or less) and the first point of the
    larger (or more), n that of both sizes.
    """
    rows = []
    for k in np.unique(frontier["k"]) if frontier else ():
        same_k = frontier["k"] == k
        n, c = frontier["n"][same_k], frontier["c"][same_k]
        sizes = np.unique(n)
        rows += [
            (math.sqrt(c[n <= small].max() * c[n >= large].min()), k, math.sqrt(small * large))
            for small, large in itertools.pairwise(sizes)
        ]
    return dict(zip(("c", "k", "n"), np.array(rows, float).T)) if rows else {}


def _costs(curves: Columns) -> dict[str, np.ndarray]:
    """Return the training FLOPs per token of each (n, k), from the ends of its curves."""
    costs = {}
    if "tokens" in curves:
        for n, k, tokens, c in sorted(
            zip(
                curves["n"].tolist(),
                curves["k"].tolist(),
                curves["tokens"].tolist(),
                curves["c"].tolist(),
            )
        ):
            if tokens > 0:
                costs[k, n] = c / tokens
    return {
        "k": np.array([k for k, _ in costs]),
        "n": np.array([n for _, n in costs]),
        "cost": np.array(list(costs.values())),
    }
