"""Normalisation of raw activations into the SAE's inputs, and of reconstructions back.

| kind | input x of a raw activation r | kept for `restore` |
|---|---|---|
| unit_norm | (r - mean) / norm of r - mean | mean and norm of each r |
| layer_norm | (r - mean) / (deviation + 1e-5) | mean and deviation of each r |
| constant_norm | r / scale, scale = norm of r / sqrt(d_model) | scale of each r |
| dataset | factor * r, so that the mean squared norm is d_model | factor, saved with the SAE |
| none | r | - |

The mean is over the d_model components. unit_norm is that of Gao et al. 2024, section 2.1.
layer_norm is that of their code, with the unbiased standard deviation, so that x has a norm of
sqrt(d_model - 1); constant_norm is that of SAELens.

With the first three, the mean and scale of each activation bypass the SAE and are put back by
`restore`. Errors before and after `restore` are therefore different numbers, and results say which
they are. layer_norm puts back the deviation without the 1e-5, as other libraries do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("unit_norm", "layer_norm", "dataset", "none", "constant_norm")
PER_ACTIVATION = ("unit_norm", "layer_norm", "constant_norm")
"""Kinds with a mean or scale per activation, without which a code cannot be restored."""
LAYER_NORM_EPS = 1e-5


class Normalized(NamedTuple):
    """Normalised activations x[..., d] = (raw - mean) / scale, with mean[..., 1] and scale[..., 1].
    layer_norm divides by scale + 1e-5."""

    x: Tensor
    mean: Tensor
    scale: Tensor

    def restore(self, recon: Tensor) -> Tensor:
        """Return a reconstruction of x [..., d] on the scale of the raw activations."""
        return recon * self.scale + self.mean


def normalize(raw: Tensor, kind: str, factor: float = 1.0) -> Normalized:
    """Normalise raw activations.

    Args:
        raw: activations [..., d].
        kind: one of KINDS.
        factor: the constant of kind 'dataset'.
    """
    if kind in ("dataset", "none"):
        inverse = 1 / factor if kind == "dataset" else 1.0
        scale = raw.new_full((*raw.shape[:-1], 1), inverse)
        return Normalized(
            raw / inverse if kind == "dataset" else raw, torch.zeros_like(scale), scale
        )
    tiny = torch.finfo(raw.dtype).tiny
    if kind == "constant_norm":
        scale = (raw.norm(dim=-1, keepdim=True) / raw.shape[-1] ** 0.5).clamp_min(tiny)
        return Normalized(raw / scale, torch.zeros_like(scale), scale)
    mean = raw.mean(-1, keepdim=True)
    centred = raw - mean
    if kind == "unit_norm":
        scale = centred.norm(dim=-1, keepdim=True).clamp_min(tiny)
        return Normalized(centred / scale, mean, scale)
    deviation = centred.square().sum(-1, keepdim=True).div(raw.shape[-1] - 1).sqrt()
    return Normalized(centred / (deviation + LAYER_NORM_EPS), mean, deviation)


def dataset_factor(sample: Tensor) -> float:
    """Return the constant that makes the mean squared norm of raw activations d_model."""
    mean_square = sample.cpu().double().square().mean().item()
    return mean_square**-0.5 if mean_square > 0 else 1.0


def input_rms(kind: str, d_model: int) -> float:
    """Return the root mean square of one component of normalised inputs. Biases live on this scale,
    and so does their learning rate (section A.6)."""
    return d_model**-0.5 if kind == "unit_norm" else 1.0
