"""Begin from the weights of another SAE (`sae.start`): fine-tuning, growth, a change of k.

Weights, biases and the activation's own tensors are taken over; moments, averages and dead counters
begin anew. Where the new SAE has more latents, the further ones start at random directions with
encoder rows too small to be chosen, so that at the first step the SAE computes what its parent
does. Where AuxK revives dead latents they count as dead at once, and learn from the parent's error;
other kinds resample them.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ksparse import interop
from ksparse.config import SAEConfig
from ksparse.errors import InputError
from ksparse.interop import compatibility
from ksparse.sae.model import SAE

log = logging.getLogger("ksparse")

QUIET = 0.1
"""What the encoder rows of further latents are multiplied by."""
_UNIT = 1e-3  # how far the norm of a decoder row may be from 1
_HOMOGENEOUS = ("relu", "jump_relu")  # a row's norm can go into the latent without other effects


def begin_from_(sae: SAE, options: SAEConfig, sample: Tensor) -> dict[str, Any]:
    """Give an initialized SAE the weights of `options.start`, in place.

    Args:
        sae: the SAE as `initialize_` leaves it, or one shard of it.
        options: the section `sae` of the recipe.
        sample: normalised activations [s, d].

    Returns:
        What the parent is, for the SAE's metadata.

    Raises:
        InputError: the parent has another width, more latents, a normalization that cannot be
            converted exactly, decoder rows that cannot have norm 1, or biases where `sae.b_enc` is
            off.
    """
    parent = interop.load(options.start, device="cpu")
    shape = parent.shape
    facts = {
        "from": options.start,
        "format": interop.format_of(options.start),
        "n_latents": shape.n_latents,
        "k": shape.k,
        "activation": shape.activation,
        "normalize": shape.normalize,
    }
    _check_sizes(sae, parent, options)
    parent = _unit_rows(_in_units_of(sae, parent, options), options)
    _copy_(sae, parent)
    _quieten_(sae, options, shape.n_latents, sample)
    if shape.activation != sae.shape.activation:
        log.warning(
            "%s is %s, the new SAE %s: its weights are taken over, the tensors of the activation "
            "begin anew, and the first losses are not the parent's",
            options.start,
            shape.activation,
            sae.shape.activation,
        )
    return facts


def _check_sizes(sae: SAE, parent: SAE, options: SAEConfig) -> None:
    have, want = parent.shape, sae.shape
    if have.d_model != want.d_model:
        raise InputError(
            f"sae.start = {options.start} takes activations of width {have.d_model}, those of this "
            f"recipe have {want.d_model}; give an SAE of the same LM and site"
        )
    if have.n_latents > options.n_latents:
        raise InputError(
            f"sae.start = {options.start} has {have.n_latents:,} latents, sae.n_latents is "
            f"{options.n_latents:,}; give at least as many"
        )
    if not options.b_enc and parent.b_enc.any():
        raise InputError(
            f"sae.start = {options.start} has an encoder bias, which sae.b_enc = false leaves out; "
            "give sae.b_enc = true"
        )


def _in_units_of(sae: SAE, parent: SAE, options: SAEConfig) -> SAE:
    """Return the parent for the inputs of `sae`, exactly."""
    have, want = parent.shape, sae.shape
    if {have.normalize, want.normalize} <= {"none", "dataset"}:  # the factor of 'none' is 1
        return _scale_inputs(parent, want.factor / have.factor)
    if have.normalize == want.normalize:
        return parent
    root = (have.d_model - 1) ** 0.5  # layer_norm is unit_norm times this, but for its 1e-5
    if (have.normalize, want.normalize) == ("layer_norm", "unit_norm"):
        return _scale_inputs(parent, 1 / root)
    if (have.normalize, want.normalize) == ("unit_norm", "layer_norm"):
        return _scale_inputs(parent, root)
    raise InputError(
        f"sae.start = {options.start} was trained with acts.normalize = '{have.normalize}', this "
        f"recipe has '{want.normalize}', into which it cannot be converted exactly; give "
        f"acts.normalize = '{have.normalize}'"
    )


def _scale_inputs(parent: SAE, ratio: float) -> SAE:
    """Return the same SAE for inputs that are `ratio` times as large; latents grow with them."""
    scaled = compatibility.copy_with(parent)
    directions = {"W_enc", "W_dec", *scaled.activation.SCALE_FREE}
    with torch.no_grad():
        for key, tensor in scaled.state_dict().items():
            if key not in directions:
                tensor.mul_(ratio)
    return scaled


def _unit_rows(parent: SAE, options: SAEConfig) -> SAE:
    """Return the parent with decoder rows of norm 1 where the recipe keeps them so."""
    norms = parent.W_dec.norm(dim=1)
    if not options.unit_norm or not ((norms - 1).abs() > _UNIT).any():
        return parent
    kind = parent.shape.activation
    if kind not in _HOMOGENEOUS or not (norms > 0).all():
        raise InputError(
            f"sae.start = {options.start} has decoder rows of norm {norms.min():.3g} to "
            f"{norms.max():.3g}, and {kind} chooses otherwise once they have norm 1; give "
            "sae.unit_norm = false"
        )
    folded = compatibility.copy_with(parent)
    with torch.no_grad():
        folded.W_dec.div_(norms[:, None])
        folded.W_enc.mul_(norms[:, None])
        folded.b_enc.mul_(norms)
        if kind == "jump_relu":
            folded.threshold.mul_(norms)
    return folded


@torch.no_grad()
def _copy_(sae: SAE, parent: SAE) -> None:
    """Write the parent's tensors into the first rows; those of another activation are left out."""
    theirs, first = parent.state_dict(), sae.joint.first_latent
    rows = slice(first, first + sae.shape.n_latents)
    if parent.shape.activation != sae.shape.activation:
        theirs = {key: theirs[key] for key in ("W_enc", "W_dec", "b_enc", "b_pre")}
    for key, tensor in sae.state_dict().items():
        if key in theirs:
            mine = theirs[key] if _shared(key, tensor) else theirs[key][rows]
            tensor[: len(mine)].copy_(mine)


def _shared(key: str, tensor: Tensor) -> bool:
    """Return whether a tensor is one for all latents."""
    return key == "b_pre" or tensor.shape == (1,)


@torch.no_grad()
def _quieten_(sae: SAE, options: SAEConfig, first: int, sample: Tensor) -> None:
    """Keep the latents from number `first` on from firing until they are revived."""
    first = max(0, first - sae.joint.first_latent)
    sae.W_enc[first:].mul_(QUIET)
    if options.activation.REVIVAL == "auxk":
        return
    if not options.b_enc:
        sae.W_enc[first:].zero_()
    largest = (sample - sae.b_pre).norm(dim=1).max()
    sae.b_enc[first:].copy_(-2 * largest * sae.W_enc[first:].norm(dim=1))
