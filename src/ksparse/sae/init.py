"""How an autoencoder starts (Gao et al. 2024, appendix A.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ksparse.config import SAEConfig
from ksparse.sae.model import SAE

_PRE_ACTS = 2**24  # pre-activations computed to scale the encoder, at most
_SCALE_TOKENS = 1024  # activations on which the encoder is scaled, at most
_PIECE = 2**20  # numbers drawn at a time
_UNIT = 16
"""torch draws normal numbers in units of 16: a long draw in pieces of whole units has the same
bits, and so has its last piece where it is not shorter than one."""


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

    A shard gets the rows that it has in the whole SAE, of which no process holds more. So that the
    scale, too, has the same bits on every mesh, it is rounded to 14 of them.

    Args:
        sae: the SAE, or one shard of it.
        sample: normalised activations [s, d].
        options: the section `sae` of the recipe.
        generator: source of the random directions, on the CPU.
        b_pre: center(sample, options.b_pre_init), if it has been computed before.
    """
    activation = sae.activation.configured(options.activation)
    sae.b_pre.copy_(center(sample, options.b_pre_init) if b_pre is None else b_pre)
    for tensor in (sae.b_enc, *activation.parameters(), *activation.buffers()):
        tensor.zero_()
    first, n = sae.joint.first_latent, sae.joint.latents(sae.shape.n_latents)
    draw_rows_(sae.W_dec, first, n, generator)
    sae.normalize_decoder_()
    if options.init == "tied":
        sae.W_enc.copy_(sae.W_dec)
    else:
        draw_rows_(sae.W_enc, first, n, generator)
        sae.W_enc.div_(sae.W_enc.norm(dim=1, keepdim=True))
    if options.init_scale == "recon":
        rows = sample[: max(1, min(_SCALE_TOKENS, _PRE_ACTS // n))]
        input_norm = (rows - sae.b_pre).norm(dim=1).mean()
        recon_norm = sae.decoder(activation.start_code(sae, rows)).norm(dim=1).mean()
        if recon_norm > 0:
            mantissa, exponent = math.frexp(float(input_norm / recon_norm))
            sae.W_enc.mul_(math.ldexp(round(mantissa * 2**14), exponent - 14))
    activation.start_(sae, sample)


@torch.no_grad()
def draw_rows_(out: Tensor, first: int, rows: int, generator: torch.Generator) -> None:
    """Fill out[m, d] with rows first to first + m of the numbers torch.randn(rows, d) in place. The
    generator moves past all of them, and none but those of `out` are held.

    Args:
        out: the rows wanted, on any device.
        first: the number of the first of them.
        rows: how many rows the whole has.
        generator: the source, on the CPU.

    Example:
        >>> import torch
        >>> whole = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
        >>> part = torch.empty(2, 5)
        >>> draw_rows_(part, 3, 6, torch.Generator().manual_seed(0))
        >>> torch.equal(part, whole[3:5])
        True
    """
    width = out.shape[1]
    total, flat = rows * width, out.view(-1)
    begin = first * width
    buffer, at = torch.empty(min(total, _PIECE + _UNIT)), 0
    while at < total:
        left = total - at
        size = left if left < _PIECE + _UNIT else _PIECE
        drawn = buffer[:size].normal_(generator=generator)
        low, high = max(at, begin), min(at + size, begin + flat.numel())
        if low < high:
            flat[low - begin : high - begin] = drawn[low - at : high - at].to(out)
        at += size


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
