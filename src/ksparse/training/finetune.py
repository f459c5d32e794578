"""Go on with a run's SAE for a short while, with a loss of the LM behind the site (Karvonen 2025).

A fine-tune is an ordinary run, of the recipe that `ksparse.planning.tuning` makes. Nothing else in
the program knows of fine-tunes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ksparse.config import recipe_of
from ksparse.planning.tuning import check_parent, default_folder, finetune_recipe, fit_buffer
from ksparse.storage.run_folder import RunFolder
from ksparse.training.train import MetricsCallback, train


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
    check_parent(parent, recipe)
    return train(
        recipe,
        default_folder(parent, recipe) if out is None else out,
        observe=observe,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
