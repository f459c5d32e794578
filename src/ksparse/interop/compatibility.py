"""What a format can hold: the same autoencoder in other units, so that latents and reconstructions
stay what they are.

| from | to | |
|---|---|---|
| dataset | none | exact: the constant goes into the weights |
| | of a format with UNIT_ROWS | into biases and thresholds: latents are divided by it |
| batch_topk, relu | jump_relu | exact in use: a threshold for each latent |
| unit_norm | layer_norm | when asked: layer_norm divides by deviation + 1e-5, so values differ by about 1e-5 / deviation of the activation |
| unit_norm, layer_norm, constant_norm | none | when asked: whoever uses the SAE normalises |
"""  # noqa: E501 (a table)

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
"""exact: carried or folded, or refused. layer_norm: also unit_norm as layer_norm. outside: left to
whoever uses the SAE."""


def fitted(
    sae: SAE,
    form: str,
    holds: Mapping[str, Collection[str]],
    normalization: Normalization = "exact",
    *,
    unit_rows: bool = False,
) -> SAE:
    """Return the SAE as a format can hold it; raise InputError, naming it, for what the format
    cannot hold.

    holds: the activations that the format can hold, and with each the normalisations. unit_rows:
    whether decoder rows are to keep their norm.
    """
    made = _activation(sae, form, holds)
    if (
        unit_rows
        and made.shape.normalize == "dataset"
        and "dataset" not in holds[made.shape.activation]
    ):
        made = in_raw_units(made)
        _log.info(
            "latents are divided by the constant of the data set, %.6g, since %s wants decoder "
            "rows of norm 1",
            sae.shape.factor,
            form,
        )
    return _normalization(made, form, holds[made.shape.activation], normalization)


def in_units(sae: SAE, size: float, normalize: str) -> SAE:
    """Return the SAE for inputs x / size, of another normalisation: latents keep their values,
    reconstructions are divided by size too."""
    made = like(sae, normalize=normalize, factor=1.0)
    with torch.no_grad():
        made.W_enc.mul_(size)
        made.W_dec.div_(size)
        made.b_pre.div_(size)
    return made


def in_raw_units(sae: SAE) -> SAE:
    """Return the SAE without the constant of the data set, and with the rows that it has: biases
    and thresholds, and so latents, are divided by it.

    Exact, since every activation is positively homogeneous: values, biases and thresholds times a
    number give values times that number.
    """
    made = like(sae, normalize="none", factor=1.0)
    scale_free = {"W_enc", "W_dec", *made.activation.SCALE_FREE}
    for key, tensor in made.state_dict().items():
        if key not in scale_free:
            tensor.div_(sae.shape.factor)
    return made


class _Changes(TypedDict, total=False):
    normalize: str
    factor: float
    activation: str


def like(sae: SAE, **changes: Unpack[_Changes]) -> SAE:
    """Return a copy with another shape and the same weights."""
    made = SAE(dataclasses.replace(sae.shape, **changes), sae.metadata)
    weights = sae.state_dict()
    for key, tensor in made.state_dict().items():
        if key in weights:
            tensor.copy_(weights[key].expand_as(tensor))
    return made


def _normalization(sae: SAE, form: str, held: Collection[str], asked: Normalization) -> SAE:
    kind = sae.shape.normalize
    if kind in held:
        return sae
    if kind == "dataset" and "none" in held:
        return in_units(sae, sae.shape.factor, "none")
    if kind == "unit_norm" and asked == "layer_norm" and "layer_norm" in held:
        return in_units(sae, (sae.shape.d_model - 1) ** -0.5, "layer_norm")
    if asked == "outside" and "none" in held:
        return like(sae, normalize="none")
    choices = ["--normalization outside (whoever uses it must normalise)"] if "none" in held else []
    if kind == "unit_norm" and "layer_norm" in held:
        choices.insert(
            0,
            "--normalization layer_norm (it divides by deviation + 1e-5, so values differ by about "
            "1e-5 / deviation of the activation)",
        )
    raise InputError(
        f"{form} cannot hold this SAE's normalisation, {kind}; it holds {', '.join(held)}. "
        + (f"Ask for {' or '.join(choices)}" if choices else "There is no way around")
    )


def _activation(sae: SAE, form: str, held: Collection[str]) -> SAE:
    kind = sae.shape.activation
    if kind in held:
        return sae
    if kind in ("batch_topk", "relu") and "jump_relu" in held:
        return like(sae, activation="jump_relu")  # ReLU has no threshold: those of the copy are 0
    raise InputError(
        f"{form} cannot hold this SAE's activation, {kind}; it holds {', '.join(held)}"
    )
