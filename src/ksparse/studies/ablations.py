"""What does each part of the recipe contribute? Gao et al. 2024, appendix C.

The same SAE is trained without AuxK, without tied initialisation and so on, on one stream.
"""

from __future__ import annotations

from typing import Any

from ksparse.config import Recipe
from ksparse.studies.study import Figure, Study, StudyCurve, format_estimate

TOKENS, LATENTS, K = 800_000, 8192, 16
MEMBERS: dict[str, dict[str, Any]] = {
    "whole": {},
    "no AuxK": {"auxk_coef": 0.0},
    "untied": {"init": "independent"},
    "no AuxK, untied": {"auxk_coef": 0.0, "init": "independent"},
    "no b_enc": {"b_enc": False},
    "free decoder norm": {"unit_norm": False},
    "unscaled": {"init_scale": "unit"},
    "untied, unscaled": {"init": "independent", "init_scale": "unit"},
}


def run(study: Study) -> dict[str, Any]:
    """Train and evaluate the members; return the fields of study.json.

    The figures show dead latents and error along training.
    """
    members = recipes(study)
    study.train(members)
    results = study.evaluate(list(members))
    rows = {member: study.run_folder(member).metrics() for member in members}
    dead = {member: [row["dead"] for row in rows[member]] for member in members}
    return {
        "question": "What does each part of the recipe change: latents that die, and the error?",
        "members": {
            member: {
                "l0": result["stats"]["l0"],
                "nmse": result["stats"]["nmse"],
                "ce_delta": result["downstream"]["ce_delta"],
                "dead_fraction": result["stats"]["dead_fraction"],
                "dead_at_the_end": {"value": dead[member][-1], "se": None},
                "dead_at_most": {"value": max(dead[member]), "se": None},
            }
            for member, result in results.items()
        },
        "figures": [
            Figure(
                "dead",
                "Dead latents along training",
                "Share of latents that have not fired for "
                f"{next(iter(members.values())).dead_after:,} tokens.",
                "tokens",
                "dead latents",
                _curves(rows, "dead"),
            ),
            Figure(
                "nmse",
                "Error along training",
                "On the batch of each logged step, with the raw weights.",
                "tokens",
                "normalised MSE",
                _curves(rows, "nmse"),
                "xy",
            ),
        ],
        "findings": [
            f"{member}: {dead[member][-1]:.1%} dead at the end (at most "
            f"{max(dead[member]):.1%}), error "
            f"{format_estimate(results[member]['stats']['nmse'])}, "
            f"delta CE {format_estimate(results[member]['downstream']['ce_delta'])}."
            for member in members
        ],
    }


def _curves(rows: dict[str, list[dict[str, Any]]], key: str) -> list[StudyCurve]:
    """Return a metric of each member against tokens."""
    return [
        StudyCurve(member, [row["tokens"] for row in logged], [row[key] for row in logged])
        for member, logged in rows.items()
    ]


def recipes(study: Study) -> dict[str, Recipe]:
    """Return the members' recipes by name, each member once for every seed."""
    options = study.options
    return {
        member + (f" seed{seed}" if options.seeds > 1 else ""): study.recipe(
            tokens=TOKENS, n=options.n_latents or LATENTS, k=options.k or K, seed=seed, **changes
        )
        for member, changes in MEMBERS.items()
        for seed in range(options.seeds)
    }
