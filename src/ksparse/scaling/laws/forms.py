"""The forms of each law: what the loss, the tokens or the learning rate may be as a function of n,
k, compute, the subject's size.

Every form is a power, or a power and an irreducible term, whose exponents are linear in
coefficients (`solve.Terms`):

    nk        L = exp(alpha + b_k log k + b_n log n + g log k log n) + exp(zeta + eta log k)     Gao
              et al. 2024, eq. 3; natural logarithms
    n, c      L = alpha n^beta + e           of each k, or of each LM, where the points have
              several: the paper's L(N), L_s(N) and L(C)
    tokens, lr, optimal    alpha n^beta, of compute alpha C^beta; beta shared by all k

    forms(law, points)   the forms that a law may have, the paper's first
    law_of(name)         columns that a law needs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ksparse.errors import unknown
from ksparse.scaling.laws.solver import Terms

Columns = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class LawKind:
    """What a law says: the column it predicts from which others.

    group: a column by which it may be split. cluster: a column whose equal rows are one
    measurement, such as the points of one run's curve.
    """

    name: str
    title: str
    target: str
    variables: tuple[str, ...]
    group: str | None = None
    cluster: str | None = None


LAWS = {
    kind.name: kind
    for kind in (
        LawKind("nk", "L(N, k)", "loss", ("n", "k")),
        LawKind("n", "L(N)", "loss", ("n",), "k"),
        LawKind("c", "L(C)", "loss", ("c",), "k", "run"),
        LawKind("tokens", "Tokens to convergence", "tokens", ("n",), "k"),
        LawKind("lr", "Best learning rate", "lr", ("n",), "k"),
        LawKind("s", "L_s(N)", "loss", ("n",), "lm"),
        LawKind("optimal", "Compute-optimal n", "n", ("c",), "k"),
    )
}


@dataclass(frozen=True)
class CoefficientSpec:
    """One coefficient: its name, its column of the exponent, and whether it is the exponential of
    what is fitted."""

    name: str
    column: Callable[[Columns], np.ndarray]
    exponential: bool = False


@dataclass(frozen=True)
class Form:
    """A form: coefficients of the first exponent and of the irreducible term's."""

    name: str
    equation: str
    amplitude: tuple[CoefficientSpec, ...]
    floor: tuple[CoefficientSpec, ...] = ()

    @property
    def coefficients(self) -> tuple[CoefficientSpec, ...]:
        return self.amplitude + self.floor

    def terms(self, points: Columns) -> Terms:
        """Return the columns of both exponents at points."""
        count = len(next(iter(points.values())))
        first, second = (
            np.stack([each.column(points) for each in some], 1).astype(float)
            if some
            else np.zeros((count, 0))
            for some in (self.amplitude, self.floor)
        )
        return Terms(first, second)


def law_of(name: str) -> LawKind:
    """Return a law by its name; say which there are."""
    if name not in LAWS:
        raise unknown("there is no law", name, LAWS)
    return LAWS[name]


def forms(law: str, points: Columns) -> list[Form]:
    """Return the forms of a law for these points, the paper's first."""
    kind = law_of(law)
    if law == "nk":
        return _joint(points)
    groups = _groups(points, kind.group)
    if law in ("tokens", "lr", "optimal"):
        shared = _power(kind, groups, exponents="one")
        return [shared, _power(kind, groups)] if len(groups) > 1 else [shared]
    return [_power(kind, groups, floor=True), _power(kind, groups)]


# ---- single powers -------------------------------------------------------------------------------


def _power(kind: LawKind, groups: list, *, exponents: str = "own", floor: bool = False) -> Form:
    """Return alpha x^beta [+ e] of each group, with exponents of their own or one for all."""
    x = kind.variables[0]
    own = [
        (_in(kind.group, group), f"_{_label(group)}" if group is not None else "")
        for group in groups
    ]
    alphas = tuple(CoefficientSpec(f"alpha{end}", inside, exponential=True) for inside, end in own)
    betas = tuple(CoefficientSpec(f"beta{end}", _times(inside, x)) for inside, end in own)
    if exponents == "one":
        betas = (CoefficientSpec("beta", lambda points: np.log(points[x])),)
    floors = (
        tuple(CoefficientSpec(f"e{end}", inside, exponential=True) for inside, end in own)
        if floor
        else ()
    )
    left = "L" if kind.target == "loss" else kind.target
    of = (
        ""
        if groups == [None]
        else f", alpha of each {kind.group}"
        if exponents == "one"
        else f", of each {kind.group}"
    )
    return Form(
        ("power_floor" if floor else "power")
        + ("_each" if groups != [None] and exponents == "own" else ""),
        f"{left} = alpha {'C' if x == 'c' else x}^beta" + (" + e" if floor else "") + of,
        alphas + betas,
        floors,
    )


def _groups(points: Columns, group: str | None) -> list:
    """Return the values of the column that splits a law, or [None] where there is none."""
    if group is None or group not in points or len(found := np.unique(points[group])) < 2:
        return [None]
    return found.tolist()


def _one(points: Columns) -> np.ndarray:
    return np.ones(len(next(iter(points.values()))))


def _in(group: str | None, value: object) -> Callable[[Columns], np.ndarray]:
    if group is None or value is None:
        return _one
    return lambda points: (points[group] == value).astype(float)


def _times(inside: Callable[[Columns], np.ndarray], x: str) -> Callable[[Columns], np.ndarray]:
    return lambda points: inside(points) * np.log(points[x])


def _label(group: object) -> str:
    return f"{group:g}" if isinstance(group, (int, float)) else str(group)


# ---- in n and k ----------------------------------------------------------------------------------


def _log(name: str, power: int = 1) -> Callable[[Columns], np.ndarray]:
    return lambda points: np.log(points[name]) ** power


def _joint(points: Columns) -> list[Form]:
    first = (
        CoefficientSpec("alpha", _one),
        CoefficientSpec("b_k", _log("k")),
        CoefficientSpec("b_n", _log("n")),
        CoefficientSpec("g", lambda points: np.log(points["k"]) * np.log(points["n"])),
    )
    floor = (CoefficientSpec("zeta", _one), CoefficientSpec("eta", _log("k")))
    bend = CoefficientSpec("q", _log("k", 2))
    power, rest = "exp(alpha + b_k log k + b_n log n + g log k log n)", "exp(zeta + eta log k)"
    bent = power[:-1] + " + q log^2 k)"
    own = tuple(
        CoefficientSpec(f"alpha_{_label(k)}", _in("k", k)) for k in np.unique(points["k"]).tolist()
    )
    kind = LAWS["n"]
    groups = _groups(points, "k")
    return [
        Form("eq3", f"L = {power} + {rest}", first, floor),
        Form("eq3_no_floor", f"L = {power}", first),
        Form("eq3_bent", f"L = {bent} + {rest}", (*first, bend), floor),
        Form("eq3_bent_no_floor", f"L = {bent}", (*first, bend)),
        Form(
            "eq3_free",
            f"L = exp(alpha_k + b_n log n + g log k log n) + {rest}, alpha_k of each k",
            (*own, *first[2:]),
            floor,
        ),
        _power(kind, groups, floor=True),
        _power(kind, groups),
    ]
