"""The recipe of a fine-tune: its parent's, with `sae.start`, `sae.lm_loss`, fewer tokens, and a
learning rate that falls from a quarter of the parent's to 0. Needs no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, cast

from ksparse.config import MeshConfig, Recipe
from ksparse.errors import InputError
from ksparse.storage.run_folder import RunFolder

LOSSES = ("kl", "ce", "none")
"""The values of `sae.lm_loss`; "none" is the same training without the LM, to compare with."""
TOKENS = 0.05
"""Tokens of a fine-tune without a number, as a share of the parent's: 25 of 500 million in Karvonen
2025."""

RATE = 0.25
"""Learning rate of the first step, as a share of the parent's. Adam begins anew, so the full rate
first undoes what the parent has learned (docs/lab-book.md)."""


def default_folder(parent: RunFolder, recipe: Recipe) -> Path:
    """Return where a fine-tune is written unless another folder is named: beside its parent."""
    loss = recipe.sae.lm_loss
    return parent.path.with_name(f"{parent.path.name}-{'plain' if loss == 'none' else loss}")


def finetune_recipe(parent: RunFolder, loss: str = "kl", tokens: int = 0) -> Recipe:
    """Return the recipe of a fine-tune.

    Args:
        parent: the run to begin from.
        loss: the `sae.lm_loss`.
        tokens: activations to train on; 0: a twentieth of the parent's.

    Raises:
        InputError: the parent is no run, or was trained without an LM.
    """
    if loss not in LOSSES:
        raise InputError(f"loss is {loss!r:.40}; it must be one of {', '.join(LOSSES)}")
    recipe = parent.recipe()
    acts = recipe.acts
    if not (acts.lm and acts.site and acts.text):
        raise InputError(
            f"{parent.path} was trained on activations alone; a fine-tune runs an LM on its text. "
            "With them: ksparse train --sae.start "
            f"{parent.path} --sae.lm-loss {loss} --acts.lm NAME --acts.site SITE --acts.text FILE"
        )
    return dataclasses.replace(
        recipe,
        acts=dataclasses.replace(acts, shards=""),
        sae=dataclasses.replace(
            recipe.sae,
            start=str(parent.path),
            lm_loss=cast(Literal["kl", "ce", "none"], loss),
            k_start=0,
            dead_after=recipe.dead_after,
        ),
        optim=dataclasses.replace(recipe.optim, lr=RATE * recipe.lr, warmup=0, decay=1.0),
        curve=dataclasses.replace(recipe.curve, converged=0.0),
        run=dataclasses.replace(recipe.run, ahead="auto"),
        mesh=MeshConfig(timeout=recipe.mesh.timeout),
        tokens=tokens or max(recipe.batch, round(TOKENS * recipe.tokens)),
    )


def fit_buffer(recipe: Recipe) -> Recipe:
    """Return a recipe whose shuffle buffer holds no more than the run uses."""
    mix = min(recipe.acts.mix, recipe.steps * recipe.batch)
    return dataclasses.replace(recipe, acts=dataclasses.replace(recipe.acts, mix=mix))


def check_parent(parent: RunFolder, recipe: Recipe) -> None:
    """Raise InputError for a run without weights to begin from, and for several sites."""
    if recipe.acts.names_several_sites:
        raise InputError(
            f"acts.site is {recipe.acts.site!r}, which may name several sites, and a fine-tune "
            f"goes on with the SAE of one, {parent.recipe().acts.site}: leave acts.site out"
        )
    if not parent.has_weights():
        raise InputError(
            f"{parent.path} has no checkpoint to begin from; `ksparse resume {parent.path}` trains "
            "it"
        )
