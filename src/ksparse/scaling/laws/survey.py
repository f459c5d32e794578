"""A sweep's folder -> all the laws that its points allow, and why not the others.

survey(folder) -> Survey     laws by name, sentences on what was left out, the frontier of compute

nk, n     each (n, k) at its best learning rate; of converged runs alone where they have enough n,
          else as all runs ended
s         the same at one k, of each LM
tokens    what those of them that converged took to
lr        of each (n, k) whose best rate has worse ones on both sides: the vertex of the parabola
          through the three, in logs
c         the points of all curves of one k that no other point beats with less compute
optimal   where along them the best n goes over to the next: (C, geometric mean of the two)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import InputError
from ksparse.scaling.laws import law as laws
from ksparse.scaling.laws.forms import Columns, law_of
from ksparse.scaling.laws.law import Law
from ksparse.scaling.laws.points import best_lr, read, take
from ksparse.storage import atomic

LAWS = ("nk", "n", "c", "tokens", "lr", "s", "optimal")


@dataclass(frozen=True)
class Survey:
    """The laws of a sweep."""

    folder: Path
    laws: dict[str, Law]
    absent: dict[str, str]
    """Why the other laws are not there, and which runs would add them."""
    notes: list[str]
    subject: dict[str, str]
    """The LM and activation whose runs the laws are of."""
    frontier: dict[str, np.ndarray]
    """Points (k, c, loss, n, tokens, run) that no other of their k beats with less compute."""
    costs: dict[str, np.ndarray]
    """Training FLOPs per token (n, k, cost)."""
    runs: int
    """Rows of points.csv."""

    def to_dict(self) -> dict[str, Any]:
        """Return what a sweep's law.json holds (docs/formats.md)."""
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
        """Say what each law that depends on no more than `at` says there."""
        if not at:
            return []
        said = [
            law.predict(**{name: at[name] for name in law.cells.columns}).says(
                law.kind.target, {name: at[name] for name in law.cells.columns}
            )
            for name, law in self.laws.items()
            if set(law.cells.columns) <= set(at)
            and (law.by_group is None or name != "n" or "nk" not in self.laws)
            and (law.by_group is None or at[law.by_group] in law.cells.columns[law.by_group])
        ]
        if not said:
            raise InputError(
                f"no law of this sweep is predicted at {', '.join(at)} alone; "
                + "; ".join(
                    f"{name} needs {', '.join(law.cells.columns)}"
                    for name, law in self.laws.items()
                )
            )
        return said

    def budgeted(self, flops: float, at: dict[str, Any]) -> list[str]:
        """Say the n and the tokens that so many training FLOPs are best spent on, for the k in `at`
        or every k."""
        if not flops:
            return []
        if not (math.isfinite(flops) and flops > 0):
            raise InputError(f"--budget is {flops}; it is a number of FLOPs above 0")
        if "optimal" not in self.laws:
            raise InputError(f"no compute-optimal size can be said: {self.absent['optimal']}")
        known = np.unique(self.frontier["k"]).tolist()
        wanted = [at["k"]] if "k" in at else known
        if not set(wanted) <= set(known):
            raise InputError(
                f"the sweep has no curves at k={wanted[0]:g}; it has them at "
                f"{', '.join(f'{k:g}' for k in known)}"
            )
        return [line for k in wanted for line in self._spend(flops, k)]

    def _spend(self, flops: float, k: float) -> list[str]:
        law = self.laws["optimal"]
        of = {"c": flops} | ({"k": k} if "k" in law.cells.columns else {})
        if "k" in of and k not in law.cells.columns["k"]:
            return [
                f"k = {k:g}: no compute-optimal size, since one n is the best all along its curves"
            ]
        size = law.predict(**of)
        tokens = [flops / self.cost(n, k) for n in (size.value, size.high, size.low)]
        loss = ""
        if "c" in self.laws:
            frontier = self.laws["c"]
            expected = frontier.predict(
                **{name: {"c": flops, "k": k}[name] for name in frontier.cells.columns}
            )
            loss = f", loss {expected.value:.4g} [{expected.low:.4g}, {expected.high:.4g}]"
        return [
            f"{flops:.3g} FLOPs at k = {k:g}: n = {size.value:,.0f} [{size.low:,.0f}, "
            f"{size.high:,.0f}], "
            f"tokens = {tokens[0]:.3g} [{tokens[1]:.3g}, {tokens[2]:.3g}]{loss}"
        ]

    def cost(self, n: float, k: float) -> float:
        """Return the training FLOPs per token at a size, between and beyond those of the runs along
        straight lines in logs."""
        of = self.costs["k"] == k
        x, y = np.log(self.costs["n"][of]), np.log(self.costs["cost"][of])
        i = int(np.clip(np.searchsorted(x, math.log(n)), 1, max(1, len(x) - 1)))
        slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1]) if len(x) > 1 else 1.0
        return math.exp(y[min(i, len(x) - 1)] + slope * (math.log(n) - x[min(i, len(x) - 1)]))


@dataclass
class _Rows:
    """The runs as they are read, and what is said of them on the way."""

    rows: dict[str, np.ndarray]
    runs: int
    notes: list[str] = field(default_factory=list)
    subject: dict[str, str] = field(default_factory=dict)


def survey(
    folder: Path | str,
    *,
    form: str = "paper",
    draws: int = laws.DRAWS,
    observe: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Survey:
    """Fit every law that the points and curves of a sweep's folder allow; form: of those laws that
    have it."""
    folder = Path(folder)
    found = _read(folder)
    curves = _curves(folder, found)
    frontier = frontier_of(curves)
    tables = {
        "nk": _of_subject(found),
        "n": _of_subject(found),
        "tokens": _tokens(found),
        "lr": best_rates(found.rows, found.notes),
        "s": _by_lm(found),
        "c": _along(frontier),
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
        folder, fitted, absent, found.notes, found.subject, frontier, _costs(curves), found.runs
    )


def _fit(name: str, table: dict[str, np.ndarray], form: str, draws: int) -> Law:
    if not table or not len(next(iter(table.values()))):
        raise InputError(WANTED[name])
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


WANTED = {
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
"""What would add a law for which there is no point at all."""
ENOUGH = 4
"""Sizes n at each k that tell a power with an irreducible term from one without, and leave one to
foretell."""


# ---- the runs ------------------------------------------------------------------------------------


def _read(folder: Path) -> _Rows:
    """Read the points of the subject that most runs are of; say what is left out."""
    file = atomic.inside(folder, "points.csv")
    if not file.is_file():
        raise InputError(f"{folder} holds no points.csv; `ksparse sweep` writes it as runs finish")
    rows = read(file, ("n", "k", "loss"), positive=("n", "k"))
    found = _Rows(rows, len(rows["loss"]))
    finite = np.isfinite(rows["loss"])
    if (wrong := rows["loss"] <= 0).any():
        raise InputError(
            f"{file}: the loss of {_name(rows, np.flatnonzero(wrong)[0])} is "
            f"{rows['loss'][wrong][0]:g}; a loss is above 0"
        )
    if not finite.all():
        found.notes.append(
            f"{(~finite).sum()} of {len(finite)} runs have no finite loss and are left out: "
            + ", ".join(_name(rows, i) for i in np.flatnonzero(~finite)[:5])
            + (" …" if (~finite).sum() > 5 else "")
            + "."
        )
    found.rows = take(rows, finite)
    for name in ("lm", "activation"):
        if name in rows and finite.any():
            kinds, counts = np.unique(found.rows[name], return_counts=True)
            found.subject[name] = str(kinds[counts.argmax()])
            if len(kinds) > 1 and name == "activation":
                found.notes.append(
                    f"Laws are of the runs with activation {found.subject[name]}; those with "
                    f"{', '.join(sorted(set(kinds) - {found.subject[name]}))} "
                    "are left out."
                )
                found.rows = take(found.rows, found.rows[name] == found.subject[name])
            elif len(kinds) > 1:
                found.notes.append(
                    f"All laws but L_s(N) are of {found.subject[name]}, of which there are the "
                    "most runs."
                )
    return found


def _name(rows: Columns, i: int) -> str:
    return str(rows["run"][i]) if "run" in rows else f"row {i + 1}"


def _of_subject(found: _Rows) -> dict[str, np.ndarray]:
    """Return the runs at their best learning rate: converged ones, where there are enough."""
    return best_lr(_converged(_mine(found), found.notes), ("n", "k"))


def _mine(found: _Rows) -> dict[str, np.ndarray]:
    return (
        take(found.rows, found.rows["lm"] == found.subject["lm"])
        if "lm" in found.subject
        else found.rows
    )


def _converged(rows: dict[str, np.ndarray], notes: list[str]) -> dict[str, np.ndarray]:
    if "converged" not in rows or not len(rows["loss"]):
        return rows
    yes = np.char.lower(rows["converged"].astype(str)) == "true"
    if not yes.any():
        _say(
            notes,
            "No run has converged: L(N) and L(N, k) are of losses at the end of each run's budget, "
            "which larger n, slower to converge, suffer from more.",
        )
        return rows
    if yes.all():
        return rows
    if (
        min(len(np.unique(rows["n"][yes & (rows["k"] == k)])) for k in np.unique(rows["k"]))
        < ENOUGH
    ):
        _say(
            notes,
            f"{yes.sum()} of {len(yes)} runs converged, too few to fit alone (not {ENOUGH} n at "
            "each k): L(N) and L(N, k) are of all runs as they ended, "
            "at convergence or at the end of the budget, which larger n, slower to converge, "
            "suffer from more.",
        )
        return rows
    _say(
        notes,
        f"{(~yes).sum()} of {len(yes)} runs did not converge and count only for L(C) and the "
        "learning rate.",
    )
    return take(rows, yes)


def _say(notes: list[str], sentence: str) -> None:
    if sentence not in notes:
        notes.append(sentence)


def _tokens(found: _Rows) -> dict[str, np.ndarray]:
    rows = _of_subject(found)
    if "tokens_to_convergence" not in rows:
        return {}
    there = np.isfinite(rows["tokens_to_convergence"]) & (rows["tokens_to_convergence"] > 0)
    return take({"n": rows["n"], "k": rows["k"], "tokens": rows["tokens_to_convergence"]}, there)


def _by_lm(found: _Rows) -> dict[str, np.ndarray]:
    """Return the runs of all LMs at the k that most (LM, n) have, if there are several LMs."""
    if "lm" not in found.rows or len(np.unique(found.rows["lm"])) < 2:
        return {}
    rows = best_lr(_converged(found.rows, []), ("lm", "n", "k"))
    pairs: dict[float, set[tuple[str, float]]] = {}
    for lm, n, k in zip(rows["lm"].tolist(), rows["n"].tolist(), rows["k"].tolist()):
        pairs.setdefault(k, set()).add((lm, n))
    k = max(pairs, key=lambda k: (len({lm for lm, _ in pairs[k]}), len(pairs[k]), -k))
    found.subject["k of L_s(N)"] = f"{k:g}"
    chosen = take(rows, rows["k"] == k)
    return chosen if len(np.unique(chosen["lm"])) > 1 else {}


def best_rates(rows: Columns, notes: list[str]) -> dict[str, np.ndarray]:
    """Return (n, k, lr) of each (n, k) of the commonest LM whose lowest loss lies between two rates
    that are worse."""
    if "lr" not in rows or not len(rows["loss"]):
        return {}
    if "lm" in rows:
        kinds, counts = np.unique(rows["lm"], return_counts=True)
        rows = take(rows, rows["lm"] == kinds[counts.argmax()])
    found, edges = [], []
    for n, k in sorted(set(zip(rows["n"].tolist(), rows["k"].tolist()))):
        here = take(rows, (rows["n"] == n) & (rows["k"] == k))
        rates = np.unique(here["lr"][np.isfinite(here["lr"]) & (here["lr"] > 0)])
        losses = np.array([np.log(here["loss"][here["lr"] == rate]).mean() for rate in rates])
        if len(rates) < 3:
            continue
        at = int(losses.argmin())
        if at in (0, len(rates) - 1):
            edges.append(f"n = {n:g}, k = {k:g}")
            continue
        a, b, _ = np.polyfit(
            np.log(rates[at - 1 : at + 2]) - math.log(rates[at]),
            losses[at - 1 : at + 2] - losses[at],
            2,
        )
        found.append((n, k, rates[at] * math.exp(-b / (2 * a))))
    if edges:
        _say(
            notes,
            "The best learning rate is at the edge of those tried for "
            f"{'; '.join(edges[:4])}{' …' if len(edges) > 4 else ''}: rates beyond it would place "
            "it.",
        )
    return dict(zip(("n", "k", "lr"), np.array(found, float).T)) if found else {}


# ---- the curves ----------------------------------------------------------------------------------


def _curves(folder: Path, found: _Rows) -> dict[str, np.ndarray]:
    """Return the curves of the runs that count, without points of no finite loss."""
    file = atomic.inside(folder, "curves.csv")
    if not file.is_file():
        return {}
    rows = read(file, ("run", "n", "k", "flops", "loss"))
    good = np.isfinite(rows["loss"]) & (rows["loss"] > 0) & (rows["flops"] > 0)
    if "run" in found.rows:
        good &= np.isin(rows["run"], _mine(found)["run"])
    rows = take(rows, good)
    rows["c"] = rows.pop("flops")
    return rows


def frontier_of(curves: Columns) -> dict[str, np.ndarray]:
    """Return the points of curves that no other of their k beats with as much compute or less."""
    if not len(curves.get("c", ())):
        return {}
    chosen = []
    for k in np.unique(curves["k"]):
        of = np.flatnonzero(curves["k"] == k)
        order = of[np.lexsort([curves["loss"][of], curves["c"][of]])]
        least = np.minimum.accumulate(np.append(np.inf, curves["loss"][order]))
        chosen.append(order[curves["loss"][order] < least[:-1]])
    names = [name for name in ("k", "c", "loss", "n", "tokens", "run") if name in curves]
    return {name: curves[name][np.concatenate(chosen)] for name in names}


def _along(frontier: Columns) -> dict[str, np.ndarray]:
    """Return the frontier without the stretch of each k's smallest n, whose beginning says nothing
    of the best n there."""
    if not frontier:
        return {}
    keep = np.ones(len(frontier["c"]), bool)
    for k in np.unique(frontier["k"]):
        of = frontier["k"] == k
        if len(np.unique(frontier["n"][of])) > 2:
            keep &= ~of | (frontier["n"] > frontier["n"][of].min())
    return take({name: frontier[name] for name in ("k", "c", "loss", "run")}, keep)


def crossings(frontier: Columns) -> dict[str, np.ndarray]:
    """Return (c, k, n) where the frontier of a k goes from one n to the next: between the last
    point of n or less and the first of more."""
    found = []
    for k in np.unique(frontier["k"]) if frontier else ():
        of = frontier["k"] == k
        n, c = frontier["n"][of], frontier["c"][of]
        sizes = np.unique(n)
        found += [
            (math.sqrt(c[n <= small].max() * c[n >= large].min()), k, math.sqrt(small * large))
            for small, large in itertools.pairwise(sizes)
        ]
    return dict(zip(("c", "k", "n"), np.array(found, float).T)) if found else {}


def _costs(curves: Columns) -> dict[str, np.ndarray]:
    """Return the training FLOPs per token of each (n, k), from the ends of its curves."""
    found = {}
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
                found[k, n] = c / tokens
    return {
        "k": np.array([k for k, _ in found]),
        "n": np.array([n for _, n in found]),
        "cost": np.array(list(found.values())),
    }
