"""Rewrite an SAE in the terms that a format can hold, without changing what it computes.

* Normalisation dataset -> none: exact. The scale is folded into the weights; in a format with
  UNIT_NORM_DECODER into biases and thresholds instead, which divides latents by the scale.
* Activation batch_topk or relu -> jump_relu: exact at inference, with one threshold per latent.
* Normalisation unit_norm -> layer_norm, on request: layer_norm divides by deviation + 1e-5, so
  values differ by about 1e-5 / deviation of the activation.
* Normalisation unit_norm, layer_norm or constant_norm -> none, on request: the user of the SAE must
  normalise.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping
from typing import Literal, TypedDict, Unpack

import torch

from ksparse.errors import InputError
from ksparse.sae.model import SAE

_log = logging.getLogger("ksparse")
Normalization = Literal["exact", "layer_norm", "outside"]
"""exact: keep or fold the normalisation, or refuse. layer_norm: also write unit_norm as layer_norm.
outside: leave the normalisation to the user of the SAE."""


def adapt(
    sae: SAE,
    format_name: str,
    supported: Mapping[str, Collection[str]],
    normalization: Normalization = "exact",
    *,
    unit_norm_decoder: bool = False,
) -> SAE:
    """Rewrite an SAE so that a format can hold it.

    Args:
        sae: the autoencoder.
        format_name: name of the format, for messages.
        supported: activations the format can hold, each with the normalisations it can hold.
        normalization: what may be done to a normalisation that the format lacks.
        unit_norm_decoder: whether decoder rows must keep norm 1.

    Returns:
        `sae` itself, or a rewritten copy.

    Raises:
        InputError: the format cannot hold the SAE; names the activation or normalisation.
    """
    adapted = _adapt_activation(sae, format_name, supported)
    normalizations = supported[adapted.shape.activation]
    if (
        unit_norm_decoder
        and adapted.shape.normalize == "dataset"
        and "dataset" not in normalizations
    ):
        adapted = fold_factor_into_latents(adapted)
        _log.info(
            "latents are divided by the data set's scale, %.6g, because %s needs decoder rows of "
            "norm 1",
            sae.shape.factor,
            format_name,
        )
    return _adapt_normalization(adapted, format_name, normalizations, normalization)


def rescale_input(sae: SAE, scale: float, normalize: str) -> SAE:
    """Return the same SAE for inputs x / scale, under another normalisation.

    Latents keep their values; reconstructions are divided by `scale` too.
    """
    rescaled = copy_with(sae, normalize=normalize, factor=1.0)
    with torch.no_grad():
        rescaled.W_enc.mul_(scale)
        rescaled.W_dec.div_(scale)
        rescaled.b_pre.div_(scale)
    return rescaled


def fold_factor_into_latents(sae: SAE) -> SAE:
    """Return the same SAE without the data set's scale, with unchanged decoder rows.

    Biases and thresholds, and with them the latents, are divided by the scale. This is exact since
    every activation is positively homogeneous: scaling pre-activations, biases and thresholds by a
    positive number scales the values by it.
    """
    folded = copy_with(sae, normalize="none", factor=1.0)
    scale_free = {"W_enc", "W_dec", *folded.activation.SCALE_FREE}
    for key, tensor in folded.state_dict().items():
        if key not in scale_free:
            tensor.div_(sae.shape.factor)
    return folded


class _ShapeChanges(TypedDict, total=False):
    normalize: str
    factor: float
    activation: str


def copy_with(sae: SAE, **changes: Unpack[_ShapeChanges]) -> SAE:
    """Return a copy with the same weights and a changed shape."""
    copied = SAE(dataclasses.replace(sae.shape, **changes), sae.metadata)
    weights = sae.state_dict()
    for key, tensor in copied.state_dict().items():
        if key in weights:
            tensor.copy_(weights[key].expand_as(tensor))
    return copied


def _adapt_normalization(
    sae: SAE, format_name: str, supported: Collection[str], requested: Normalization
) -> SAE:
    current = sae.shape.normalize
    if current in supported:
        return sae
    if current == "dataset" and "none" in supported:
        return rescale_input(sae, sae.shape.factor, "none")
    if current == "unit_norm" and requested == "layer_norm" and "layer_norm" in supported:
        return rescale_input(sae, (sae.shape.d_model - 1) ** -0.5, "layer_norm")
    if requested == "outside" and "none" in supported:
        return copy_with(sae, normalize="none")
    choices = []
    if current == "unit_norm" and "layer_norm" in supported:
        choices.append(
            "--normalization layer_norm (it divides by deviation + 1e-5, so values differ by about "
            "1e-5 / deviation of the activation)"
        )
    if "none" in supported:
        choices.append("--fold (the nearest SAE, with the measured difference)")
        choices.append("--normalization outside (the user of the SAE must normalise)")
    raise InputError(
        f"{format_name} cannot hold this SAE's normalisation, {current}; it holds "
        f"{', '.join(supported)}. "
        + (f"Use {' or '.join(choices)}" if choices else "No conversion is available")
    )


def _adapt_activation(sae: SAE, format_name: str, supported: Collection[str]) -> SAE:
    current = sae.shape.activation
    if current in supported:
        return sae
    if current in ("batch_topk", "relu") and "jump_relu" in supported:
        # ReLU has no threshold; a new SAE's thresholds are 0.
        return copy_with(sae, activation="jump_relu")
    raise InputError(
        f"{format_name} cannot hold this SAE's activation, {current}; it holds "
        f"{', '.join(supported)}"
    )
