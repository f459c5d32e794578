"""Dead latents start anew on badly reconstructed activations: what the paper's baselines have in
the place of AuxK (section B.2; Bricken et al. 2023).

Which activations is drawn, from a generator that is a function of (seed, step): there is no random
state to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.config import Recipe
from ksparse.sae.model import SAE, Code

SIZE = 0.2
"""Norm of a new encoder row, as a share of the mean norm of the others (Bricken et al. 2023)."""


def resampling(step: int, recipe: Recipe) -> bool:
    """Return whether dead latents start anew after step `step` (from 1): so often, evenly over the
    first half of the run."""
    times = getattr(recipe.sae.activation, "resample", 0)
    return any(step == max(1, round(i * recipe.steps / (2 * times))) for i in range(1, times + 1))


@torch.no_grad()
def resample_dead(
    sae: SAE, x: Tensor, code: Code, dead: Tensor, seed: int
) -> dict[str, Tensor] | None:
    """Return new values of the tensors of the dead latents, from activations of x[b, d] drawn by
    their squared error; None if there is none.

    The decoder row is the activation's direction from b_pre, the encoder row the same at a fifth of
    the others' norm, all else 0.
    """
    error = (x - sae.decode_normalized(code)).square().sum(1).double().cpu()
    if not len(dead) or not error.sum() > 0:
        return None
    drawn = torch.multinomial(
        error,
        len(dead),
        replacement=len(dead) > int((error > 0).sum()),
        generator=torch.Generator().manual_seed(seed),
    )
    rows = torch.nn.functional.normalize(x[drawn.to(x.device)] - sae.b_pre, dim=1)
    alive = torch.ones(len(sae.W_enc), dtype=torch.bool, device=x.device)
    alive[dead] = False
    size = sae.W_enc[alive if alive.any() else ~alive].norm(dim=1).mean()
    own = {key: torch.zeros_like(getattr(sae, key)[dead]) for key in ("b_enc", *sae.activation.own)}
    return own | {"W_dec": rows, "W_enc": SIZE * size * rows}
