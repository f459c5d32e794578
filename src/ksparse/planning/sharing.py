"""What SAEs must have in common to train on one stream of activations. Needs no torch."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ksparse.config import Recipe


def stream_key(recipe: Recipe) -> dict[str, Any]:
    """Return what recipes have in common that can train together.

    `train_many` takes recipes with equal keys and no others; a sweep groups its runs by them. The
    names are those of the recipe's keys, so that a difference can be named. Sites may differ where
    the LM runs, which one pass reads; shards are of one site.
    """
    acts = recipe.fingerprint()["acts"]
    if not recipe.acts.shards:
        del acts["site"]
    return {
        "acts": acts,
        "batch": recipe.batch,
        "order": recipe.data_seed,
        "threads": recipe.threads,
        "curve": {"held_out": recipe.curve.held_out},
        "mesh": asdict(recipe.mesh),
        "run": {"device": recipe.run.device},
        "sae": {"lm_loss": "kl or ce" if recipe.sae.uses_lm else "none"},  # whole contexts
    }
