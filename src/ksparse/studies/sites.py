"""Where in the LM? Layers, locations and positions in the context: Gao et al. 2024, appendix F.

The text is read once, with all sites hooked.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ksparse.config import Recipe
from ksparse.data import shards
from ksparse.data.contexts import Corpus
from ksparse.device import resolve_device
from ksparse.evals import by_site
from ksparse.lm.model import LM
from ksparse.lm.sites import list_sites
from ksparse.progress import report
from ksparse.studies.study import Figure, Study, StudyCurve

TOKENS, LATENTS, K = 200_000, 2048, 32


def run(study: Study) -> dict[str, Any]:
    """Train and evaluate the same SAE at every site; return the fields of study.json.

    The figures show error and the LM's additional loss by layer and by position.
    """
    folders = write_activations(study)
    members = recipes(study, folders)
    results: dict[str, dict[str, Any]] = {}
    for number, (member, recipe) in enumerate(members.items(), 1):
        study.train({member: recipe}, what=f"training {member}, {number} of {len(members)}")
    for member in members:
        results |= study.evaluate([member], ("stats", "downstream", "positions"))
    locations = by_site.locations(results)
    return {
        "question": "At which layer and location are activations easy to reconstruct, and where "
        "does that matter to the LM?",
        "members": {
            member: {
                "l0": result["stats"]["l0"],
                "nmse": result["stats"]["nmse"],
                "dead_fraction": result["stats"]["dead_fraction"],
                "ce_delta": result["downstream"]["ce_delta"],
                "kl": result["downstream"]["kl"],
            }
            for member, result in results.items()
        },
        "figures": _figures(locations, results),
        "findings": _findings(locations, results),
    }


def _figures(locations: dict[str, list[str]], results: dict[str, Any]) -> list[Figure]:
    by_layer = (
        ("layer-nmse", "Error by layer", "normalised MSE", "stats", "nmse"),
        (
            "layer-ce",
            "The LM's additional loss by layer",
            "delta CE, nats per token",
            "downstream",
            "ce_delta",
        ),
    )
    by_position = (
        (
            "position-nmse",
            "Error by position",
            "squared error over that of predicting the mean of all",
            "error",
            "positions",
        ),
        (
            "position-norm",
            "Norm by position",
            "mean norm of the raw activation",
            "norm",
            "positions",
        ),
        (
            "position-ce",
            "The LM's additional loss by position",
            "delta CE, nats per token",
            "ce_delta",
            "predicted",
        ),
    )
    return [
        *(_by_layer(name, title, y, results, *keys) for name, title, y, *keys in by_layer),
        *(
            _by_position(name, title, y, locations, results, *keys)
            for name, title, y, *keys in by_position
        ),
    ]


def write_activations(study: Study) -> dict[str, Path]:
    """Write the activations of all sites in one pass over the text; return {site: folder}."""
    acts = dataclasses.replace(study.acts, shards="")
    lm = LM(acts=acts, device=resolve_device(study.options.device))
    sites = list_sites(lm.model)
    rows = study.options.tokens or TOKENS
    folders = shards.write_sites(
        lm,
        Corpus(acts, lm.tokenizer, "train"),
        study.path / "acts",
        sites,
        rows=rows,
        dtype="bfloat16",
        progress=lambda done: report(f"reading {len(sites)} sites", done, rows),
    )
    return dict(zip(sites, map(Path, folders)))


def recipes(study: Study, folders: dict[str, Path]) -> dict[str, Recipe]:
    """Return the members' recipes by site."""
    options, members = study.options, {}
    for site, folder in folders.items():
        recipe = study.recipe(tokens=TOKENS, n=options.n_latents or LATENTS, k=options.k or K)
        members[site] = dataclasses.replace(
            recipe, acts=dataclasses.replace(study.acts, site=site, shards=str(folder))
        )
    return members


def _by_layer(
    name: str,
    title: str,
    y: str,
    results: dict[str, Any],
    evaluation: str,
    key: str,
) -> Figure:
    curves = [StudyCurve(*curve) for curve in by_site.curves(results, evaluation, key)]
    return Figure(
        name,
        title,
        "The same SAE trained at each site on the same text; held-out text.",
        "layer",
        y,
        curves,
    )


def _by_position(
    name: str,
    title: str,
    y: str,
    locations: dict[str, list[str]],
    results: dict[str, Any],
    key: str,
    at: str,
) -> Figure:
    """Draw the residual stream after each layer, or the first location if there is none."""
    sites = locations.get("resid_post") or next(iter(locations.values()))
    curves = [
        StudyCurve(
            member,
            results[member]["positions"][at],
            [number["value"] for number in results[member]["positions"][key]],
            [number["se"] for number in results[member]["positions"][key]],
        )
        for member in sites
    ]
    return Figure(
        name,
        title,
        "By the token's place in its context; position 0, the first, is left out unless acts.keep "
        "is all.",
        "position",
        y,
        curves,
    )


def _findings(locations: dict[str, list[str]], results: dict[str, Any]) -> list[str]:
    findings = by_site.findings(results)
    for member in locations.get("resid_post", []):
        positions = results[member]["positions"]
        third = max(1, len(positions["positions"]) // 3)
        early, late = (
            [number["value"] for number in part]
            for part in (positions["error"][:third], positions["error"][-third:])
        )
        findings.append(
            f"{member}: relative error {sum(early) / third:.4f} in the first third of the context, "
            f"{sum(late) / third:.4f} in the last; "
            f"norm {positions['norm'][0]['value']:.3g} at position {positions['positions'][0]}, "
            f"{positions['norm'][-1]['value']:.3g} at {positions['positions'][-1]}."
        )
    return findings
