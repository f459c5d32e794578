"""How an autoencoder starts (Gao et al. 2024, appendix A.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.config import SAEConfig as Options
from ksparse.sae.activations import threshold_for
from ksparse.sae.model import SAE

_NUMBERS = 2**24  # pre-activations that are looked at, at most


@torch.no_grad()
def initialize_(
    sae: SAE,
    sample: Tensor,
    options: Options,
    generator: torch.Generator,
    *,
    b_pre: Tensor | None = None,
) -> None:
    """Set all weights, in place, from normalised activations sample[s, d].

    b_pre: center(sample, options.b_pre_init), where that has been computed before.

    Decoder directions are uniformly random; tied encoder rows are a copy of them, not a view, and
    are free later. With init_scale 'recon' the encoder is scaled so that, on the sample,
    reconstructions have the norm of their inputs, b_pre taken off both. (The official code measures
    this on random unit vectors; the data are nearer to what counts.) Thresholds start where k
    latents are active on the sample, or where the recipe says.
    """
    sae.b_pre.copy_(center(sample, options.b_pre_init) if b_pre is None else b_pre)
    for name in ("b_enc", *sae.activation.own):
        getattr(sae, name).zero_()
    sae.W_dec.copy_(torch.randn(sae.W_dec.shape, generator=generator))
    sae.normalize_decoder_()
    if options.init == "tied":
        sae.W_enc.copy_(sae.W_dec)
    else:
        rows = torch.randn(sae.W_enc.shape, generator=generator)
        sae.W_enc.copy_(rows / rows.norm(dim=1, keepdim=True))
    if options.init_scale == "recon":
        rows = sample[: max(1, min(1024, _NUMBERS // sae.shape.n_latents))]
        centred = (rows - sae.b_pre).norm(dim=1).mean()
        code = (
            sae.activate(rows)
            if sae.shape.activation in ("relu", "gated", "prolu")
            else sae.code(rows, sae.pre_acts_normalized(rows))
        )
        recon = sae.decoder(code).norm(dim=1).mean()
        if recon > 0:
            sae.W_enc.mul_(centred / recon)
    if "threshold" in sae.keys:
        given = getattr(options.activation, "threshold", 0.0)
        rows = sample[: max(1, _NUMBERS // sae.shape.n_latents)]
        sae.threshold.fill_(given * sae.input_norm or threshold_for(sae, rows))


def center(sample: Tensor, kind: str) -> Tensor:
    """Return where b_pre starts, [d]: the geometric median or the mean of sample[s, d], or zero."""
    if kind == "geometric_median":
        return geometric_median(sample)
    return sample.mean(0) if kind == "mean" else torch.zeros_like(sample[0])


def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-7) -> Tensor:
    """Return the point [d] with the least sum of distances to points[s, d], by Weiszfeld's
    iteration in float64.

    A point that the iterate falls on holds it unless the others pull harder (Vardi & Zhang 2000):
    an infinite weight would hold it in any case.
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
