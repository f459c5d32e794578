"""What is each part of the recipe good for? Gao et al. 2024, appendix C: the same SAE without AuxK,
without tied initialisation, and so on, on one stream."""

from __future__ import annotations

from typing import Any

from ksparse.config import Recipe
from ksparse.studies.study import Figure, Study, StudyCurve, said

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


def study(study: Study) -> dict[str, Any]:
    """Train them, and draw dead latents and error along training."""
    members = recipes(study)
    study.train(members)
    results = study.judge(list(members))
    rows = {member: study.run(member).metrics() for member in members}
    return {
        "question": "What does each part of the recipe change: latents that die, and the error?",
        "members": {
            member: {
                "l0": result["stats"]["l0"],
                "nmse": result["stats"]["nmse"],
                "ce_delta": result["downstream"]["ce_delta"],
                "dead_fraction": result["stats"]["dead_fraction"],
                "dead_at_the_end": {"value": rows[member][-1]["dead"], "se": None},
                "dead_at_most": {"value": max(row["dead"] for row in rows[member]), "se": None},
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
                [
                    StudyCurve(
                        member,
                        [row["tokens"] for row in rows[member]],
                        [row["dead"] for row in rows[member]],
                    )
                    for member in members
                ],
            ),
            Figure(
                "nmse",
                "Error along training",
                "Of each logged step's batch, with the raw weights.",
                "tokens",
                "normalised MSE",
                [
                    StudyCurve(
                        member,
                        [row["tokens"] for row in rows[member]],
                        [row["nmse"] for row in rows[member]],
                    )
                    for member in members
                ],
                "xy",
            ),
        ],
        "findings": [
            f"{member}: {rows[member][-1]['dead']:.1%} dead at the end (at most "
            f"{max(row['dead'] for row in rows[member]):.1%}), error "
            f"{said(results[member]['stats']['nmse'])}, "
            f"delta CE {said(results[member]['downstream']['ce_delta'])}."
            for member in members
        ],
    }


def recipes(study: Study) -> dict[str, Recipe]:
    options = study.options
    return {
        member + (f" seed{seed}" if options.seeds > 1 else ""): study.recipe(
            tokens=TOKENS, n=options.n_latents or LATENTS, k=options.k or K, seed=seed, **changes
        )
        for member, changes in MEMBERS.items()
        for seed in range(options.seeds)
    }
