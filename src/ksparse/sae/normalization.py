"""How raw activations become the autoencoder's inputs, and reconstructions raw activations again.

| kind | input | scale that is kept |
|---|---|---|
| unit_norm | subtract the mean over d_model, divide by the norm (Gao et al. 2024, section 2.1) | mean and norm, per activation |
| layer_norm | the same, divided by the unbiased standard deviation + 1e-5 (their code; norm sqrt(d_model - 1)) | mean and deviation |
| constant_norm | times sqrt(d_model) over the norm (SAELens) | norm / sqrt(d_model), per activation |
| dataset | times one constant, so that the mean squared norm is d_model | the constant, saved with the autoencoder |
| none | as it is | - |

With the first three, mean and scale of each activation pass around the autoencoder and are given
back, so errors before and after `restore` are different numbers, and results say which they are.
layer_norm gives back the deviation without the 1e-5, as all who use it do.
"""  # noqa: E501 (a table)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("unit_norm", "layer_norm", "dataset", "none", "constant_norm")
PER_ACTIVATION = ("unit_norm", "layer_norm", "constant_norm")
"""Those whose mean or scale is of each activation, so that a code alone cannot be restored."""
LAYER_NORM_EPS = 1e-5


class Normalized(NamedTuple):
    """x[..., d] = (raw - mean) / scale, with mean[..., 1] and scale[..., 1]; layer_norm: / (scale +
    1e-5)."""

    x: Tensor
    mean: Tensor
    scale: Tensor

    def restore(self, recon: Tensor) -> Tensor:
        """Return a reconstruction of x in the scale of the raw activations."""
        return recon * self.scale + self.mean


def normalize(raw: Tensor, kind: str, factor: float = 1.0) -> Normalized:
    """Normalise raw activations [..., d]; `factor` is the constant of kind 'dataset'."""
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
    """Return the size of one normalised component: biases live on this scale, so their learning
    rate does too (A.6)."""
    return d_model**-0.5 if kind == "unit_norm" else 1.0
