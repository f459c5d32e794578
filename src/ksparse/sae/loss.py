"""What is minimised: reconstruction, AuxK over dead latents, Multi-TopK. Gao et al. 2024, sections 2.3, 5.3, A.2."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ksparse.recipe import SAE as Options
from ksparse.sae.model import SAE, Code


class Losses(NamedTuple):
    """Scalars that carry gradient, and the code they came from."""

    total: Tensor
    nmse: Tensor
    auxk: Tensor
    code: Code


def losses(sae: SAE, x: Tensor, *, baseline: float, dead: Tensor, k_aux: int, options: Options,
           auxk_tokens: int | None = None, auxk_weight: float = 1.0) -> Losses:
    """Return the losses on normalised activations x[b, d].

    baseline: the mean squared error per component of predicting the mean, one constant for the whole run (A.6).
    dead: the indices of the latents that are dead now; none is fine.
    auxk_tokens: AuxK is the mean over the first so many of x (all if not given), times auxk_weight where x is a part of a batch.
    """
    pre_acts = sae.pre_acts(x)
    code = sae.code(x, pre_acts)
    recon = sae.decode(code)
    nmse = (recon - x).square().mean() / baseline
    total, aux = nmse, nmse.new_zeros(())
    if options.multi_topk:
        wide = sae.decode(sae.code(x, pre_acts, 4 * sae.shape.k))
        total = total + options.multi_topk * (wide - x).square().mean() / baseline
    if options.auxk_coef and len(dead) and auxk_tokens != 0:
        some = slice(auxk_tokens)
        error = (x[some] - recon[some]).detach()
        aux = auxk_weight * finite_or_zero(auxk(sae.decoder(sae.code(x[some], pre_acts[some], k_aux, among=dead)), error, options.auxk_norm))
        total = total + options.auxk_coef * aux
    return Losses(total, nmse, aux, code)


def auxk(predicted: Tensor, error: Tensor, norm: str) -> Tensor:
    """Return ||e - ê||² relative to the error's size: per token (A.2), or over the batch as in the official code.

    `error` must be detached; `predicted` is the bias-free decoding of the dead latents' code.
    """
    tiny = torch.finfo(error.dtype).tiny
    if norm == "token":
        return ((predicted - error).square().sum(-1) / error.square().sum(-1).clamp_min(tiny)).mean()
    spread = (error - error.mean(0)).square().mean()
    return (predicted - error).square().mean() / spread.clamp_min(tiny)


def finite_or_zero(loss: Tensor) -> Tensor:
    """Return the loss, or a constant 0 where it is not finite, so that no NaN reaches the weights (A.2)."""
    return loss if torch.isfinite(loss) else loss.new_zeros(())
