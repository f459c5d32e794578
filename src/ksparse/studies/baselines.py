"""Which activation is best? Gao et al. 2024, sections 2.4, 5.2 and 5.3: L0 against error and the
LM's additional loss, all on one stream."""

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
from ksparse.studies.study import Figure, Fitted, Study, StudyCurve, at_k, between, points, said

TOKENS, LATENTS, K = 400_000, 2048, 32
SPARSITIES = (1 / 4, 1 / 2, 1, 2, 4)
"""Of k, for the kinds that have one."""
PENALTIES = (1 / 4, 1, 4, 8, 16)
"""Of each kind's middle weight; the largest are for short runs, in which L0 has not fallen to where
it would end."""
MULTI = 1 / 8
"""Weight of the loss at 4k (section 5.3)."""
L1 = {"ReLU": 0.02, "Gated": 0.02, "ProLU-STE": 0.01, "ProLU-ReLU": 0.02}
"""Middle weights of the penalties, which bring L0 near 32 on the built-in LM (docs/lab-book.md)."""


def study(study: Study) -> dict[str, Any]:
    """Train every kind at several sparsities, judge them, and say where TopK is better."""
    members = recipes(study)
    study.train(members)
    results = study.judge(list(members))
    kinds: dict[str, list[str]] = {}
    for member in members:
        kinds.setdefault(member.split(" ")[0], []).append(member)
    wide = _at_4k(study, members)
    error, loss = (
        {kind: points(results, key, of, some) for kind, some in kinds.items()}
        for key, of in (("nmse", "stats"), ("ce_delta", "downstream"))
    )
    return {
        "question": "Which activation reconstructs best, and loses the LM least, at equal L0?",
        "members": {member: numbers(results[member]) for member in members}
        | {member: numbers(result) for member, result in wide.items()},
        "figures": [
            _frontier("l0-nmse", "L0 against error", "normalised MSE", error),
            _frontier(
                "l0-ce", "L0 against the LM's additional loss", "delta CE, nats per token", loss
            ),
            Figure(
                "nmse-ce",
                "Error against the LM's additional loss",
                "At equal error, the kinds still differ in what they cost the LM.",
                "normalised MSE",
                "delta CE, nats per token",
                [StudyCurve(kind, error[kind].y, loss[kind].y, loss[kind].se) for kind in kinds],
                "xy",
            ),
        ],
        "findings": [*_rivals(loss, error), *_multi(results, wide)],
    }


def recipes(study: Study) -> dict[str, Recipe]:
    """Return the members: the kind, then its sparsity, then the seed where there are several."""
    options = study.options
    n, middle = options.n_latents or LATENTS, options.k or K
    found: dict[str, Recipe] = {}

    def add(
        kind: str, activation: ActivationConfig, word: str, k: int = middle, **changes: Any
    ) -> None:
        for seed in range(options.seeds):
            name = f"{kind} {word}" + (f" seed{seed}" if options.seeds > 1 else "")
            found[name] = study.recipe(
                tokens=TOKENS, n=n, k=k, activation=activation, seed=seed, **changes
            )

    for share in SPARSITIES:
        k = max(1, min(n, round(share * middle)))
        add("TopK", TopKConfig(), f"k{k}", k)
        if 4 * k <= n:
            add("Multi-TopK", TopKConfig(), f"k{k}", k, multi_topk=MULTI)
        if share in (SPARSITIES[0], 1, SPARSITIES[-1]):
            add("BatchTopK", BatchTopKConfig(), f"k{k}", k)
            add("JumpReLU", JumpReLUConfig(bandwidth=BANDWIDTH), f"k{k}", k)
    penalised: dict[str, Callable[..., ActivationConfig]] = {
        "ReLU": ReLUConfig,
        "Gated": GatedConfig,
        "ProLU-STE": ProLUConfig,
        "ProLU-ReLU": functools.partial(ProLUConfig, gradient="relu"),
    }
    for share in PENALTIES:
        for kind, make in penalised.items():
            weight = float(f"{share * L1[kind]:.4g}")
            add(kind, make(l1=weight), f"l{weight:g}")
    return found


BANDWIDTH = 0.03
"""Of JumpReLU's window. The original's 0.001 sees too few values for thresholds to move in a run of
this length (docs/lab-book.md)."""


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """Return what a table shows of a member."""
    return {
        "l0": result["stats"]["l0"],
        "nmse": result["stats"]["nmse"],
        "dead_fraction": result["stats"]["dead_fraction"],
        "ce_delta": result["downstream"]["ce_delta"],
        "kl": result["downstream"]["kl"],
    }


def _at_4k(study: Study, members: dict[str, Recipe]) -> dict[str, dict[str, Any]]:
    """Judge TopK and Multi-TopK with four times the k that they were trained with."""
    there = {
        f"{member} at 4k": member
        for member in members
        if member.startswith(("TopK", "Multi-TopK"))
        and 4 * members[member].sae.k <= members[member].sae.n_latents
    }
    return study.judge(
        list(there), source=there.__getitem__, change=lambda member, sae: at_k(sae, 4 * sae.shape.k)
    )


def _frontier(name: str, title: str, y: str, curves: dict[str, StudyCurve]) -> Figure:
    return Figure(
        name,
        title,
        "Held-out text, averaged weights, all on one stream; lower is better. Bars are a standard "
        "error over documents.",
        "L0",
        y,
        [dataclasses.replace(curve, label=kind) for kind, curve in curves.items()],
        "xy",
    )


def _rivals(loss: dict[str, StudyCurve], error: dict[str, StudyCurve]) -> list[str]:
    """Say, for each other kind, how it compares with TopK at TopK's own values of L0, or, where it
    is never so sparse, at its own lowest."""
    found = []
    for kind in loss:
        if kind in ("TopK", "Multi-TopK"):
            continue
        said_of = []
        for x, ours, se in _known(loss["TopK"]):
            theirs, worse, reference = (
                between(curve, x) for curve in (loss[kind], error[kind], error["TopK"])
            )
            if theirs is None or worse is None or reference is None:
                continue
            said_of.append(
                f"at L0 {x:.1f} by {said(_less(theirs, (ours, se)))} nats (error {worse[0]:.4f} "
                f"against {reference[0]:.4f})"
            )
        found.append(
            f"{kind} costs the LM more than TopK {'; '.join(said_of)}."
            if said_of
            else _beyond(kind, loss)
        )
    return found


def _less(one: tuple[float, float | None], other: tuple[float, float | None]) -> Fitted:
    """Return the difference of two (value, standard error)."""
    return {"value": one[0] - other[0], "se": math.hypot(one[1] or 0.0, other[1] or 0.0)}


def _beyond(kind: str, loss: dict[str, StudyCurve]) -> str:
    """Say how the sparsest of a kind that is never as sparse as TopK compares with the densest
    TopK; curves go by rising L0."""
    theirs, ours = _known(loss[kind]), _known(loss["TopK"])
    if not theirs or not ours or theirs[0][0] <= ours[-1][0]:
        return (
            f"{kind} has no point on either side of one of TopK's values of L0: nothing to compare."
        )
    difference = _less(theirs[0][1:], ours[-1][1:])
    return (
        f"{kind} at L0 {theirs[0][0]:.1f}, its lowest, costs the LM more than TopK at "
        f"{ours[-1][0]:.1f} by {said(difference)} nats."
    )


def _known(curve: StudyCurve) -> list[tuple[float, float, float | None]]:
    """Return the points (x, y, standard error) of a curve that have a value."""
    errors = curve.se or [None] * len(curve.x)
    return [
        (x, y, se) for x, y, se in zip(curve.x, curve.y, errors) if x is not None and y is not None
    ]


def _multi(results: dict[str, dict[str, Any]], wide: dict[str, dict[str, Any]]) -> list[str]:
    """Say how Multi-TopK compares with TopK at k and at 4k."""
    found = []
    for member in results:
        rival = f"Multi-{member}"
        if not member.startswith("TopK") or rival not in results or f"{member} at 4k" not in wide:
            continue
        parts = []
        for where, ours, theirs in (
            ("k", results[member], results[rival]),
            ("4k", wide[f"{member} at 4k"], wide[f"{rival} at 4k"]),
        ):
            error, loss = (
                {
                    "value": theirs[of][key]["value"] - ours[of][key]["value"],
                    "se": math.hypot(theirs[of][key]["se"] or 0, ours[of][key]["se"] or 0),
                }
                for of, key in (("stats", "nmse"), ("downstream", "ce_delta"))
            )
            parts.append(f"at {where} by {said(error)} in error and {said(loss)} nats")
        found.append(
            f"Multi-TopK less TopK, trained with {member.removeprefix('TopK ')}: "
            + ", ".join(parts)
            + "."
        )
    return found
