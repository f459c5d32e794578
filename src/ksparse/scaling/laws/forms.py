"""The laws and the forms that each may have.

A law predicts a loss, a number of tokens, a learning rate or a size from n, k, compute or the LM.
Every form is a power, with or without an irreducible term. Their exponents are linear in the
coefficients (`solver.Terms`), logarithms are natural:

    nk                   L = exp(alpha + b_k log k + b_n log n + g log k log n)
                             + exp(zeta + eta log k)           Gao et al. 2024, eq. 3
    n, s, c              L = alpha n^beta + e                  the paper's L(N), L_s(N) and L(C);
                                                               one for each k or LM, if several
    tokens, lr, optimal  alpha n^beta, or alpha C^beta         beta shared by all k
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
    """Which column a law predicts from which others.

    Attributes:
        name: The law's name on the command line and in files.
        title: The law's name in reports.
        target: The column that it predicts.
        variables: The columns that it depends on.
        group: A column by which the law may be split.
        cluster: A column whose equal rows are one measurement, such as the curve of one run.
    """

    name: str
    title: str
    target: str
    variables: tuple[str, ...]
    group: str | None = None
    cluster: str | None = None


LAWS = {
    law_kind.name: law_kind
    for law_kind in (
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
    """One coefficient of a form.

    Attributes:
        name: Its name in law.json.
        column: What it multiplies in the exponent, computed from the points.
        exponential: Whether the reported coefficient is exp of the fitted one.
    """

    name: str
    column: Callable[[Columns], np.ndarray]
    exponential: bool = False


@dataclass(frozen=True)
class Form:
    """A form of a law.

    Attributes:
        name: Its name on the command line and in files.
        equation: The equation, for reports.
        amplitude: The coefficients of the power.
        floor: The coefficients of the irreducible term; empty without one.
    """

    name: str
    equation: str
    amplitude: tuple[CoefficientSpec, ...]
    floor: tuple[CoefficientSpec, ...] = ()

    @property
    def coefficients(self) -> tuple[CoefficientSpec, ...]:
        """All coefficients, in the order of the fit."""
        return self.amplitude + self.floor

    def terms(self, points: Columns) -> Terms:
        """Return the columns of both exponents at m points, [m, p] each."""
        m = len(next(iter(points.values())))
        amplitude, floor = (
            np.stack([spec.column(points) for spec in specs], 1).astype(float)
            if specs
            else np.zeros((m, 0))
            for specs in (self.amplitude, self.floor)
        )
        return Terms(amplitude, floor)


def law_of(name: str) -> LawKind:
    """Return a law by its name; raise InputError that lists the laws for an unknown one."""
    if name not in LAWS:
        raise unknown("there is no law", name, LAWS)
    return LAWS[name]


def forms(law: str, points: Columns) -> list[Form]:
    """Return the forms that a law may have for these points, the paper's first."""
    law_kind = law_of(law)
    if law == "nk":
        return _joint(points)
    groups = _groups(points, law_kind.group)
    if law in ("tokens", "lr", "optimal"):
        shared = _power(law_kind, groups, shared_beta=True)
        return [shared, _power(law_kind, groups)] if len(groups) > 1 else [shared]
    return [_power(law_kind, groups, floor=True), _power(law_kind, groups)]


# ---- single powers -------------------------------------------------------------------------------


def _power(
    law_kind: LawKind, groups: list, *, shared_beta: bool = False, floor: bool = False
) -> Form:
    """Return alpha x^beta [+ e] for each group, with a beta for each or one for all."""
    x = law_kind.variables[0]
    columns = [
        (_indicator(law_kind.group, group), f"_{_label(group)}" if group is not None else "")
        for group in groups
    ]
    alphas: tuple[CoefficientSpec, ...] = ()
    betas: tuple[CoefficientSpec, ...] = ()
    floors: tuple[CoefficientSpec, ...] = ()
    for column, suffix in columns:
        alphas += (CoefficientSpec(f"alpha{suffix}", column, exponential=True),)
        betas += (CoefficientSpec(f"beta{suffix}", _times_log(column, x)),)
        floors += (CoefficientSpec(f"e{suffix}", column, exponential=True),) if floor else ()
    if shared_beta:
        betas = (CoefficientSpec("beta", _log(x)),)
    name = "power_floor" if floor else "power"
    target = "L" if law_kind.target == "loss" else law_kind.target
    equation = f"{target} = alpha {'C' if x == 'c' else x}^beta" + (" + e" if floor else "")
    if groups != [None]:
        name += "" if shared_beta else "_each"
        equation += f", {'alpha ' if shared_beta else ''}of each {law_kind.group}"
    return Form(name, equation, alphas + betas, floors)


def _groups(points: Columns, group: str | None) -> list:
    """Return the values of the column that splits a law; [None] if it has fewer than two."""
    if group is None or group not in points:
        return [None]
    values = np.unique(points[group]).tolist()
    return values if len(values) > 1 else [None]


def _ones(points: Columns) -> np.ndarray:
    return np.ones(len(next(iter(points.values()))))


def _indicator(group: str | None, value: object) -> Callable[[Columns], np.ndarray]:
    if group is None or value is None:
        return _ones
    return lambda points: (points[group] == value).astype(float)


def _times_log(column: Callable[[Columns], np.ndarray], x: str) -> Callable[[Columns], np.ndarray]:
    return lambda points: column(points) * np.log(points[x])


def _label(group: object) -> str:
    return f"{group:g}" if isinstance(group, (int, float)) else str(group)


# ---- in n and k ----------------------------------------------------------------------------------


def _log(name: str, power: int = 1) -> Callable[[Columns], np.ndarray]:
    return lambda points: np.log(points[name]) ** power


def _joint(points: Columns) -> list[Form]:
    """Return the forms of L(n, k): equation 3, bent in k, with an alpha for each k, and L(n)."""
    amplitude = (
        CoefficientSpec("alpha", _ones),
        CoefficientSpec("b_k", _log("k")),
        CoefficientSpec("b_n", _log("n")),
        CoefficientSpec("g", lambda points: np.log(points["k"]) * np.log(points["n"])),
    )
    floor = (CoefficientSpec("zeta", _ones), CoefficientSpec("eta", _log("k")))
    bend = CoefficientSpec("q", _log("k", 2))
    power = "exp(alpha + b_k log k + b_n log n + g log k log n)"
    irreducible = "exp(zeta + eta log k)"
    bent = power[:-1] + " + q log^2 k)"
    alphas = tuple(
        CoefficientSpec(f"alpha_{_label(k)}", _indicator("k", k))
        for k in np.unique(points["k"]).tolist()
    )
    law_kind = LAWS["n"]
    groups = _groups(points, "k")
    return [
        Form("eq3", f"L = {power} + {irreducible}", amplitude, floor),
        Form("eq3_no_floor", f"L = {power}", amplitude),
        Form("eq3_bent", f"L = {bent} + {irreducible}", (*amplitude, bend), floor),
        Form("eq3_bent_no_floor", f"L = {bent}", (*amplitude, bend)),
        Form(
            "eq3_free",
            f"L = exp(alpha_k + b_n log n + g log k log n) + {irreducible}, alpha_k of each k",
            (*alphas, *amplitude[2:]),
            floor,
        ),
        _power(law_kind, groups, floor=True),
        _power(law_kind, groups),
    ]
