"""Go on with a run's SAE for a short while, with a loss of the LM behind the site (Karvonen 2025).

A fine-tune is an ordinary run: its recipe is the parent's with `sae.start`, `sae.lm_loss`, fewer
tokens, and a learning rate that falls from a quarter of the parent's to 0. Nothing else in the
program knows of fine-tunes.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, cast

from ksparse.config import MeshConfig, Recipe, recipe_of
from ksparse.errors import InputError
from ksparse.storage.run_folder import RunFolder
from ksparse.training.train import MetricsCallback, train

LOSSES = ("kl", "ce", "none")
"""The values of `sae.lm_loss`; "none" is the same training without the LM, to compare with."""
TOKENS = 0.05
"""Tokens of a fine-tune without a number, as a share of the parent's: 25 of 500 million in Karvonen
2025."""

RATE = 0.25
"""Learning rate of the first step, as a share of the parent's. Adam begins anew, so the full rate
first undoes what the parent has learned (docs/lab-book.md)."""


def finetune(
    run: RunFolder | Path | str,
    loss: str = "kl",
    *,
    tokens: int = 0,
    out: Path | str | None = None,
    observe: MetricsCallback = lambda row: None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **keywords: Any,
) -> RunFolder:
    """Train a run's SAE on, with a loss of the LM beside the reconstruction error.

    Args:
        run: the run to begin from, which stays as it is.
        loss: "kl", the divergence of the LM with reconstructions from the unchanged one; "ce", its
            cross-entropy; "none", neither: the control with the same tokens and learning rates.
        tokens: activations to train on; 0: a twentieth of the run's.
        out: the new run's folder; by default RUN-LOSS.
        observe: as in `ksparse.train`.
        trust_remote_code: as in `ksparse.train`.
        progress: as in `ksparse.train`.
        keywords: keys of the recipe, such as `lm_share=0.8` or `lr=1e-4`, as in `ksparse.train`.

    Returns:
        The new run's folder.

    Raises:
        InputError: if the run was trained without an LM, its site is read-only, or a key is wrong;
            otherwise as `ksparse.train`.

    Example:
        >>> import ksparse
        >>> tuned = ksparse.finetune("runs/demo", tokens=2048, mix=2048, out="runs/demo-kl")
        >>> tuned.recipe().sae.lm_loss, ksparse.load(tuned).metadata["start"]["from"]
        ('kl', 'runs/demo')
    """
    parent = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    recipe = fit_buffer(recipe_of(finetune_recipe(parent, loss, tokens), **keywords))
    return train(
        recipe,
        default_folder(parent, recipe) if out is None else out,
        observe=observe,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )


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
        InputError: the parent is no run, has no checkpoint, or was trained without an LM.
    """
    if loss not in LOSSES:
        raise InputError(f"loss is {loss!r:.40}; it must be one of {', '.join(LOSSES)}")
    recipe = parent.recipe()
    if not parent.has_weights():
        raise InputError(
            f"{parent.path} has no checkpoint to begin from; `ksparse resume {parent.path}` trains "
            "it"
        )
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
