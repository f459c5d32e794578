"""The claims: what the paper saw, what is seen here, a figure, and a margin.

A margin is above zero where the claim holds; the page calls it decided at two standard errors. A
margin without a standard error decides nothing. Figures of the paper are those of GPT-2 small or
GPT-4 at convergence, as named; those here are of one LM after the tokens that the page states, so
signs and ratios compare, not values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ksparse.studies.paper import latents, quality
from ksparse.studies.paper.margins import PaperClaim
from ksparse.studies.paper.measure import Evidence

CLAIMS: tuple[Callable[[Evidence], PaperClaim | None], ...] = (
    quality.relu_error,
    quality.relu_loss,
    quality.dead_latents,
    quality.law_of_n_and_k,
    quality.downstream_by_size,
    latents.probes_against_relu,
    latents.probes_by_size,
    latents.explanations,
    latents.ablations,
    latents.shrinkage,
    latents.dense_latents,
    latents.subspaces,
    quality.gaussian,
    latents.progressive,
)
"""The claims in the order of the page."""


def summarize(evidence: Evidence) -> dict[str, Any]:
    """Return the fields of study.json, with the claims whose numbers are there."""
    judged = [claim for judge in CLAIMS if (claim := judge(evidence)) is not None]
    sizes, base = evidence.sizes, evidence.study.base
    tokens = evidence.study.options.tokens or base.tokens
    return {
        "question": "Which claims of Scaling and evaluating sparse autoencoders (Gao et al. 2024) "
        f"hold for SAEs of up to {sizes.n:,} latents, trained on {tokens:,} tokens?",
        "setup": {
            "tokens": tokens,
            "steps": tokens // base.batch,
            "batch": base.batch,
            "latents": sizes.latents,
            "k": sizes.sparsities,
            "compared": sizes.compared,
            "seeds": sizes.seeds,
            "eval_tokens": evidence.study.options.eval_tokens,
        },
        "claims": [
            {
                **{key: getattr(claim, key) for key in ("name", "claim", "paper", "here")},
                "margin": claim.margin,
                "figures": [figure.name for figure in claim.figures],
            }
            for claim in judged
        ],
        "members": {member: _row(evidence, member) for member in evidence.trained()},
        "figures": [figure for claim in judged for figure in claim.figures],
        "findings": [f"{claim.claim} {claim.here}" for claim in judged],
    }


def _row(evidence: Evidence, member: str) -> dict[str, Any]:
    """Return a member's numbers for the table."""
    columns = {
        "stats": ("l0", "nmse", "dead_fraction_training"),
        "downstream": ("ce_delta", "kl", "recovered"),
        "probes": ("probe_loss",),
        "n2g": ("recall", "precision"),
        "ablation": ("ablation_sparsity",),
    }
    results = evidence.results[member]
    return {
        key: results[name][key] for name, keys in columns.items() if name in results for key in keys
    }
