"""Where in the LM? Gao et al. 2024, appendix F: layers and locations, and positions of the context.
The text is read once, with all sites hooked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ksparse.config import Recipe
from ksparse.data import shards
from ksparse.data.contexts import Corpus
from ksparse.device import resolve_device
from ksparse.lm.model import LM
from ksparse.lm.sites import sites_of
from ksparse.studies.study import Figure, Study, StudyCurve, said

TOKENS, LATENTS, K = 200_000, 2048, 32


def study(study: Study) -> dict[str, Any]:
    """Train the same SAE at every site, judge each, and draw them by layer and by position."""
    folders = activations(study)
    members = recipes(study, folders)
    results: dict[str, dict[str, Any]] = {}
    for number, (member, recipe) in enumerate(members.items(), 1):
        study.train({member: recipe}, what=f"training {member}, {number} of {len(members)}")
    for member in members:
        results |= study.judge([member], ("stats", "downstream", "positions"))
    kinds: dict[str, list[str]] = {}
    for member in members:
        kinds.setdefault(member.rpartition(".")[0], []).append(member)
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
        "figures": [
            _by_layer(
                "layer-nmse", "Error by layer", "normalised MSE", kinds, results, "stats", "nmse"
            ),
            _by_layer(
                "layer-ce",
                "The LM's additional loss by layer",
                "delta CE, nats per token",
                kinds,
                results,
                "downstream",
                "ce_delta",
            ),
            _by_position(
                "position-nmse",
                "Error by position",
                "squared error over that of predicting the mean of all",
                kinds,
                results,
                "error",
                "positions",
            ),
            _by_position(
                "position-norm",
                "Norm by position",
                "mean norm of the raw activation",
                kinds,
                results,
                "norm",
                "positions",
            ),
            _by_position(
                "position-ce",
                "The LM's additional loss by position",
                "delta CE, nats per token",
                kinds,
                results,
                "ce_delta",
                "predicted",
            ),
        ],
        "findings": _findings(kinds, results),
    }


def activations(study: Study) -> dict[str, Path]:
    """Write the activations of all sites in one pass over the text; return {site: its shards}."""
    acts = dataclasses.replace(study.acts, shards="")
    lm = LM(acts=acts, device=resolve_device(study.options.device))
    sites = sites_of(lm.model)
    rows = study.options.tokens or TOKENS
    written = shards.write_sites(
        lm,
        Corpus(acts, lm.tokenizer, "train"),
        study.path / "acts",
        sites,
        rows=rows,
        dtype="bfloat16",
        progress=lambda done: study.observe(f"reading {len(sites)} sites", done, rows),
    )
    return dict(zip(sites, written))


def recipes(study: Study, folders: dict[str, Path]) -> dict[str, Recipe]:
    options, found = study.options, {}
    for site, folder in folders.items():
        recipe = study.recipe(tokens=TOKENS, n=options.n_latents or LATENTS, k=options.k or K)
        found[site] = dataclasses.replace(
            recipe, acts=dataclasses.replace(study.acts, site=site, shards=str(folder))
        )
    return found


def _by_layer(
    name: str,
    title: str,
    y: str,
    kinds: dict[str, list[str]],
    results: dict[str, Any],
    of: str,
    key: str,
) -> Figure:
    curves = [
        StudyCurve(
            kind,
            [int(member.rpartition(".")[2]) for member in some],
            [results[member][of][key]["value"] for member in some],
            [results[member][of][key]["se"] for member in some],
        )
        for kind, some in kinds.items()
    ]
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
    kinds: dict[str, list[str]],
    results: dict[str, Any],
    key: str,
    at: str,
) -> Figure:
    """Draw the residual stream after each layer."""
    some = kinds.get("resid_post") or next(iter(kinds.values()))
    curves = [
        StudyCurve(
            member,
            results[member]["positions"][at],
            [each["value"] for each in results[member]["positions"][key]],
            [each["se"] for each in results[member]["positions"][key]],
        )
        for member in some
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


def _findings(kinds: dict[str, list[str]], results: dict[str, Any]) -> list[str]:
    found = []
    for kind, some in kinds.items():
        best, worst = (
            pick(some, key=lambda member: results[member]["stats"]["nmse"]["value"])
            for pick in (min, max)
        )
        found.append(
            f"{kind}: error from {said(results[best]['stats']['nmse'])} at {best} to "
            f"{said(results[worst]['stats']['nmse'])} at {worst}; "
            "delta CE "
            f"{', '.join(said(results[member]['downstream']['ce_delta']) for member in some)} by "
            "layer."
        )
    for member in kinds.get("resid_post", []):
        positions = results[member]["positions"]
        third = max(1, len(positions["positions"]) // 3)
        early, late = (
            [each["value"] for each in part]
            for part in (positions["error"][:third], positions["error"][-third:])
        )
        found.append(
            f"{member}: relative error {sum(early) / third:.4f} in the first third of the context, "
            f"{sum(late) / third:.4f} in the last; "
            f"norm {positions['norm'][0]['value']:.3g} at position {positions['positions'][0]}, "
            f"{positions['norm'][-1]['value']:.3g} at {positions['positions'][-1]}."
        )
    return found
