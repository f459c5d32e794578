"""Resampling: dead latents restart on badly reconstructed activations. It is what the paper's
baselines have in the place of AuxK (section B.2; Bricken et al. 2023).

Which activations are used is drawn from a generator seeded by a function of (seed, step), so that
there is no random state to save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.config import Recipe
from ksparse.sae.model import SAE, Code

SIZE = 0.2
"""Norm of a new encoder row, as a share of the mean norm of the others (Bricken et al. 2023)."""


def resampling(step: int, recipe: Recipe) -> bool:
    """Return whether dead latents are resampled after step `step` (from 1)."""
    return step in recipe.sae.activation.resample_steps(recipe.steps)


@torch.no_grad()
def resample_dead(
    sae: SAE, x: Tensor, code: Code, dead: Tensor, seed: int
) -> dict[str, Tensor] | None:
    """Return new rows of the tensors of the dead latents.

    The decoder row is the direction of an activation from b_pre, the encoder row the same at a
    fifth of the mean norm of the others, and all else 0. Activations are drawn with probability
    proportional to their squared error.

    Args:
        sae: the SAE.
        x: normalised activations [b, d].
        code: their code.
        dead: indices of the dead latents [m], of this shard.
        seed: seed of the draw.

    Returns:
        {tensor name: rows [m, ...]}; None if no latent is dead or there is no error.
    """
    errors = (x - sae.decode_normalized(code)).square().sum(1).double()
    error, (number, before) = sae.joint.of_batch(errors).cpu(), sae.joint.place(dead)
    if not number or not error.sum() > 0:
        return None
    drawn = torch.multinomial(
        error,
        number,
        replacement=number > int((error > 0).sum()),
        generator=torch.Generator().manual_seed(seed),
    )[before : before + len(dead)]
    rows = sae.joint.rows_of_batch(x, drawn.to(x.device))
    directions = torch.nn.functional.normalize(rows - sae.b_pre, dim=1)
    alive = torch.ones(len(sae.W_enc), dtype=torch.bool, device=x.device)
    alive[dead] = False
    norms = sae.W_enc.norm(dim=1).double()
    sums = [norms[alive].sum(), alive.sum().to(norms), norms.sum(), norms.new_tensor(len(norms))]
    living, count, whole, latents = sae.joint.sum("resampled", torch.stack(sums)).tolist()
    size = living / count if count else whole / latents
    zeros = {
        name: torch.zeros_like(weight[dead])
        for name, weight in (("b_enc", sae.b_enc), *sae.activation.named_parameters())
    }
    return zeros | {"W_dec": directions, "W_enc": SIZE * size * directions}
