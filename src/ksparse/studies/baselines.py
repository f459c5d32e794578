"""Which activation is best? Gao et al. 2024, sections 2.4, 5.2 and 5.3.

Every activation is trained at several sparsities on one stream, and compared by its error and the
LM's additional loss at equal L0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

from ksparse.config import (
    ActivationConfig,
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ProLUConfig,
    Recipe,
    ReLUConfig,
    TopKConfig,
)
from ksparse.studies.study import (
    Figure,
    Fitted,
    Study,
    StudyCurve,
    at_k,
    curve_against_l0,
    format_estimate,
    interpolate,
)

TOKENS, LATENTS, K = 400_000, 2048, 32
SPARSITIES = (1 / 4, 1 / 2, 1, 2, 4)
"""Multiples of k, for the activations that have one."""
PENALTIES = (1 / 4, 1, 4, 8, 16)
"""Multiples of each middle penalty weight; the largest are for short runs, in which L0 is still
falling."""
MULTI = 1 / 8
"""Weight of the loss at 4k (section 5.3)."""
PREFIX_SHARES = (16, 8, 4, 2)
"""Matryoshka's prefixes: n over each of these, besides all latents."""
L1 = {"ReLU": 0.02, "Gated": 0.02, "ProLU-STE": 0.01, "ProLU-ReLU": 0.02}
"""Middle penalty weights, which bring L0 near 32 on the built-in LM (docs/lab-book.md)."""


def run(study: Study) -> dict[str, Any]:
    """Train and evaluate the members; return the fields of study.json.

    The findings compare each activation with TopK at equal L0.
    """
    members = recipes(study)
    study.train(members)
    results = study.evaluate(list(members))
    methods: dict[str, list[str]] = {}
    for member in members:
        methods.setdefault(member.split(" ")[0], []).append(member)
    at_4k = _evaluate_at_4k(study, members)
    error, loss = (
        {
            method: curve_against_l0(results, key, evaluation, names)
            for method, names in methods.items()
        }
        for key, evaluation in (("nmse", "stats"), ("ce_delta", "downstream"))
    )
    return {
        "question": "Which activation reconstructs best, and loses the LM least, at equal L0?",
        "members": {member: numbers(results[member]) for member in members}
        | {member: numbers(result) for member, result in at_4k.items()},
        "figures": [
            _frontier("l0-nmse", "L0 against error", "normalised MSE", error),
            _frontier(
                "l0-ce", "L0 against the LM's additional loss", "delta CE, nats per token", loss
            ),
            Figure(
                "nmse-ce",
                "Error against the LM's additional loss",
                "At equal error, activations still differ in what they cost the LM.",
                "normalised MSE",
                "delta CE, nats per token",
                [
                    StudyCurve(method, error[method].y, loss[method].y, loss[method].se)
                    for method in methods
                ],
                "xy",
            ),
        ],
        "findings": [*_compare_with_topk(loss, error), *_compare_multi_topk(results, at_4k)],
    }


def recipes(study: Study) -> dict[str, Recipe]:
    """Return the members' recipes by name: activation, sparsity, and seed if there are several."""
    options = study.options
    n, middle = options.n_latents or LATENTS, options.k or K
    members: dict[str, Recipe] = {}

    def add(
        method: str, activation: ActivationConfig, sparsity: str, k: int = middle, **changes: Any
    ) -> None:
        for seed in range(options.seeds):
            name = f"{method} {sparsity}" + (f" seed{seed}" if options.seeds > 1 else "")
            members[name] = study.recipe(
                tokens=TOKENS, n=n, k=k, activation=activation, seed=seed, **changes
            )

    for share in SPARSITIES:
        k = max(1, min(n, round(share * middle)))
        add("TopK", TopKConfig(), f"k{k}", k)
        if 4 * k <= n:
            add("Multi-TopK", TopKConfig(), f"k{k}", k, multi_topk=MULTI)
        if share in (SPARSITIES[0], 1, SPARSITIES[-1]):
            add("BatchTopK", BatchTopKConfig(), f"k{k}", k)
            if n >= 2 * PREFIX_SHARES[0]:
                prefixes = tuple(n // share for share in PREFIX_SHARES)
                add("Matryoshka", BatchTopKConfig(), f"k{k}", k, prefixes=prefixes)
            add("JumpReLU", JumpReLUConfig(), f"k{k}", k)
    penalised: dict[str, Callable[..., ActivationConfig]] = {
        "ReLU": ReLUConfig,
        "Gated": GatedConfig,
        "ProLU-STE": ProLUConfig,
        "ProLU-ReLU": functools.partial(ProLUConfig, gradient="relu"),
    }
    for share in PENALTIES:
        for method, make in penalised.items():
            weight = float(f"{share * L1[method]:.4g}")
            add(method, make(l1=weight), f"l{weight:g}")
    return members


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """Return a member's numbers for the table."""
    return {
        "l0": result["stats"]["l0"],
        "nmse": result["stats"]["nmse"],
        "dead_fraction": result["stats"]["dead_fraction"],
        **({"prefixes": result["stats"]["prefixes"]} if "prefixes" in result["stats"] else {}),
        "ce_delta": result["downstream"]["ce_delta"],
        "kl": result["downstream"]["kl"],
    }


def _evaluate_at_4k(study: Study, members: dict[str, Recipe]) -> dict[str, dict[str, Any]]:
    """Evaluate TopK and Multi-TopK with four times the k that they were trained with."""
    trained_as = {
        f"{member} at 4k": member
        for member in members
        if member.startswith(("TopK", "Multi-TopK"))
        and 4 * members[member].sae.k <= members[member].sae.n_latents
    }
    return study.evaluate(
        list(trained_as),
        source=trained_as.__getitem__,
        change=lambda member, sae: at_k(sae, 4 * sae.shape.k),
    )


def _frontier(name: str, title: str, y: str, curves: dict[str, StudyCurve]) -> Figure:
    return Figure(
        name,
        title,
        "Held-out text, averaged weights, all on one stream; lower is better. Bars are a standard "
        "error over documents.",
        "L0",
        y,
        [dataclasses.replace(curve, label=method) for method, curve in curves.items()],
        "xy",
    )


def _compare_with_topk(loss: dict[str, StudyCurve], error: dict[str, StudyCurve]) -> list[str]:
    """Compare each other activation with TopK at TopK's values of L0.

    An activation that is never as sparse is compared at its own lowest L0.
    """
    findings = []
    for method in loss:
        if method in ("TopK", "Multi-TopK"):
            continue
        comparisons = []
        for x, ours, se in _known(loss["TopK"]):
            theirs, worse, reference = (
                interpolate(curve, x) for curve in (loss[method], error[method], error["TopK"])
            )
            if theirs is None or worse is None or reference is None:
                continue
            difference = format_estimate(_difference(theirs, (ours, se)))
            comparisons.append(
                f"at L0 {x:.1f} by {difference} nats (error {worse[0]:.4f} against "
                f"{reference[0]:.4f})"
            )
        findings.append(
            f"{method} costs the LM more than TopK {'; '.join(comparisons)}."
            if comparisons
            else _compare_sparsest(method, loss)
        )
    return findings


def _difference(one: tuple[float, float | None], other: tuple[float, float | None]) -> Fitted:
    """Return the difference of two (value, standard error)."""
    return {"value": one[0] - other[0], "se": math.hypot(one[1] or 0.0, other[1] or 0.0)}


def _compare_sparsest(method: str, loss: dict[str, StudyCurve]) -> str:
    """Compare an activation that is never as sparse as TopK with the densest TopK.

    The activation counts at its lowest L0. Curves are ordered by rising L0.
    """
    theirs, ours = _known(loss[method]), _known(loss["TopK"])
    if not theirs or not ours or theirs[0][0] <= ours[-1][0]:
        return (
            f"{method} has no point on either side of one of TopK's values of L0: "
            "nothing to compare."
        )
    difference = _difference(theirs[0][1:], ours[-1][1:])
    return (
        f"{method} at L0 {theirs[0][0]:.1f}, its lowest, costs the LM more than TopK at "
        f"{ours[-1][0]:.1f} by {format_estimate(difference)} nats."
    )


def _known(curve: StudyCurve) -> list[tuple[float, float, float | None]]:
    """Return the points (x, y, standard error) of a curve that have a value."""
    errors = curve.se or [None] * len(curve.x)
    return [
        (x, y, se) for x, y, se in zip(curve.x, curve.y, errors) if x is not None and y is not None
    ]


def _compare_multi_topk(
    results: dict[str, dict[str, Any]], at_4k: dict[str, dict[str, Any]]
) -> list[str]:
    """Compare Multi-TopK with TopK at k and at 4k."""
    findings = []
    for member in results:
        multi = f"Multi-{member}"
        if not member.startswith("TopK") or multi not in results or f"{member} at 4k" not in at_4k:
            continue
        parts = []
        for where, ours, theirs in (
            ("k", results[member], results[multi]),
            ("4k", at_4k[f"{member} at 4k"], at_4k[f"{multi} at 4k"]),
        ):
            error, loss = (
                _difference(
                    (theirs[evaluation][key]["value"], theirs[evaluation][key]["se"]),
                    (ours[evaluation][key]["value"], ours[evaluation][key]["se"]),
                )
                for evaluation, key in (("stats", "nmse"), ("downstream", "ce_delta"))
            )
            parts.append(
                f"at {where} by {format_estimate(error)} in error and {format_estimate(loss)} nats"
            )
        findings.append(
            f"Multi-TopK less TopK, trained with {member.removeprefix('TopK ')}: "
            + ", ".join(parts)
            + "."
        )
    return findings
