"""How an autoencoder starts (Gao et al. 2024, appendix A.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.config import SAEConfig
from ksparse.sae.model import SAE

_PRE_ACTS = 2**24  # pre-activations computed to scale the encoder, at most
_SCALE_TOKENS = 1024  # activations on which the encoder is scaled, at most


@torch.no_grad()
def initialize_(
    sae: SAE,
    sample: Tensor,
    options: SAEConfig,
    generator: torch.Generator,
    *,
    b_pre: Tensor | None = None,
) -> None:
    """Set all weights to their start values, in place.

    Decoder directions are uniformly random. Tied encoder rows are a copy of them, not a view, and
    free from then on. With init_scale 'recon' the encoder is scaled so that, on the sample,
    reconstructions have the norm of their inputs, b_pre subtracted from both. (The official code
    measures this on random unit vectors; the data are closer to what counts.) The activation sets
    its own tensors last.

    Args:
        sae: the SAE.
        sample: normalised activations [s, d].
        options: the section `sae` of the recipe.
        generator: source of the random directions, on the CPU.
        b_pre: center(sample, options.b_pre_init), if it has been computed before.
    """
    activation = sae.activation.configured(options.activation)
    sae.b_pre.copy_(center(sample, options.b_pre_init) if b_pre is None else b_pre)
    for tensor in (sae.b_enc, *activation.parameters(), *activation.buffers()):
        tensor.zero_()
    sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
    sae.normalize_decoder_()
    if options.init == "tied":
        sae.W_enc.copy_(sae.W_dec)
    else:
        rows = torch.randn(sae.W_enc.shape, generator=generator)
        sae.W_enc.copy_(rows / rows.norm(dim=1, keepdim=True))
    if options.init_scale == "recon":
        rows = sample[: max(1, min(_SCALE_TOKENS, _PRE_ACTS // sae.shape.n_latents))]
        input_norm = (rows - sae.b_pre).norm(dim=1).mean()
        recon_norm = sae.decoder(activation.start_code(sae, rows)).norm(dim=1).mean()
        if recon_norm > 0:
            sae.W_enc.mul_(input_norm / recon_norm)
    activation.start_(sae, sample)


def center(sample: Tensor, kind: str) -> Tensor:
    """Return the start value of b_pre, [d]: the geometric median or the mean of sample[s, d], or
    zero."""
    if kind == "geometric_median":
        return geometric_median(sample)
    return sample.mean(0) if kind == "mean" else torch.zeros_like(sample[0])


def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """Return the point [d] with the least sum of distances to points[s, d], by Weiszfeld's
    iteration in float64.

    Where the iterate falls on a point, that point's weight would be infinite and hold it there.
    With the correction of Vardi & Zhang (2000) it stays only if the other points pull less.

    Args:
        points: the points [s, d].
        iterations: the most iterations.
        tolerance: the iteration ends once it moves by less than this share of the mean distance.
    """
    points64 = points.cpu().double()  # not every device has float64
    median = points64.mean(0)
    tiny = torch.finfo(torch.float64).tiny
    spread = (points64 - median).norm(dim=1).mean().clamp_min(tiny)
    for _ in range(iterations):
        away = (points64 - median).norm(dim=1)
        here = away <= 1e-12 * spread
        weights = torch.where(here, 0.0, 1 / away)
        pull = (weights @ (points64 - median)).norm()
        stay = (here.sum() / pull.clamp_min(tiny)).clamp_max(1.0)
        new = stay * median + (1 - stay) * (weights @ points64) / weights.sum().clamp_min(tiny)
        moved, median = (new - median).norm(), new
        if moved <= tolerance * spread:
            break
    return median.to(points)
