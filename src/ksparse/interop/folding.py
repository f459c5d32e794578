"""Write an SAE whose normalisation a format lacks as the nearest SAE that it holds, and measure it.

A code and a reconstruction of unit_norm, layer_norm and constant_norm depend on the mean m and the
scale s of each activation. The nearest SAE uses those of the nearest normalisation that the format
has, whose scale is t (layer_norm: the deviation, constant_norm: norm / sqrt(d), dataset: 1):

    x = (r - m) / s   becomes   P (r / t) / c,   P = I - 1 1^T / d (I for constant_norm)
    r' = s x' + m     becomes   t (c x' + u 1)

with c the mean of s / t and u the mean of m / t on the text that the SAE was trained on. P, c and u
go into weights and biases. P is exact; what is lost is how s / t and m / t vary. TopK loses little,
since s scales all latents of an activation alike and only biases see its variation; thresholds lose
more. unit_norm as layer_norm differs by the 1e-5 of layer_norm alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.interop import compatibility
from ksparse.interop.text_activations import read_activations
from ksparse.sae.model import SAE
from ksparse.sae.normalization import normalize

if TYPE_CHECKING:
    from ksparse.interop import Format
    from ksparse.lm.model import LM

TOKENS = 16_384
"""Activations on which c and u are measured, and as many held-out ones for the comparison."""
_NEAREST = {
    "unit_norm": ("unit_norm", "layer_norm", "constant_norm", "dataset"),
    "layer_norm": ("layer_norm", "constant_norm", "dataset"),
    "constant_norm": ("constant_norm", "dataset"),
    "dataset": ("dataset",),
    "none": ("none",),
}
"""What each normalisation is folded into, the nearest first."""
_NEARLY_EQUAL = ("unit_norm", "layer_norm")
_DENSE_VALUES = 2**24
"""Dense latents that are compared at a time."""


def fold_into(sae: SAE, format_name: str, format_: Format, lm: LM, *, tokens: int = TOKENS) -> SAE:
    """Rewrite an SAE as the nearest one that a format holds.

    Args:
        sae: the autoencoder.
        format_name: name of the format, for messages.
        format_: the format.
        lm: the LM that the SAE was trained on, at its site, with its text.
        tokens: activations to measure on, of the train split and of the held-out one.

    Returns:
        An SAE that the format holds. `metadata["fold"]` has how far it is from `sae`: see
        `measure`.

    Raises:
        InputError: the format lacks the SAE's activation, or the LM is of another width.
    """
    if lm.d_model != sae.shape.d_model:
        raise InputError(
            f"the autoencoder takes {sae.shape.d_model} numbers, the activations of "
            f"{lm.options.lm} at {lm.options.site} have {lm.d_model}; choose another --lm or --site"
        )
    folded, target = sae, _nearest_kind(sae, format_.SUPPORTED)
    if target != sae.shape.normalize and (sae.shape.normalize, target) != _NEARLY_EQUAL:
        folded = nearest(sae, target, read_activations(lm, "train", tokens))
    folded = compatibility.adapt(
        folded,
        format_name,
        format_.SUPPORTED,
        "layer_norm",
        unit_norm_decoder=getattr(format_, "UNIT_NORM_DECODER", False),
    )
    fold = {"from": sae.shape.normalize, "to": target, "lm": lm.options.lm, "site": lm.options.site}
    fold |= measure(sae, folded, read_activations(lm, "held-out", tokens))
    folded = compatibility.copy_with(folded)
    folded.metadata = sae.metadata | {"fold": fold}
    return folded


def _nearest_kind(sae: SAE, supported: Mapping[str, Collection[str]]) -> str:
    """Return the normalisation, among those that a format holds with the SAE's activation, that is
    nearest to the SAE's; its own where the format holds it, or holds none that is near."""
    kind, activation = sae.shape.normalize, sae.shape.activation
    if activation not in supported and activation in ("batch_topk", "relu"):
        activation = "jump_relu"
    held = {*supported.get(activation, ())}
    held |= {"dataset"} if "none" in held else set()  # `adapt` folds its factor
    return next((other for other in _NEAREST[kind] if other in held), kind)


@torch.no_grad()
def nearest(sae: SAE, target: str, raw: Tensor) -> SAE:
    """Return the SAE under another normalisation that is nearest to an SAE on a sample.

    Args:
        sae: an SAE with normalisation unit_norm, layer_norm or constant_norm.
        target: constant_norm or dataset.
        raw: raw activations [rows, d], on which the mean scale and mean are measured.
    """
    own, other = sae.normalize(raw), normalize(raw, target)
    scale = float((own.scale.double() / other.scale.double()).mean())
    mean = float((own.mean.double() / other.scale.double()).mean())
    moved = compatibility.copy_with(sae, normalize="dataset", factor=1 / scale)
    if sae.shape.normalize != "constant_norm":
        lost = moved.W_enc.double().mean(1, keepdim=True)  # W_enc (I - P), the same in each column
        shift = (lost[:, 0] * moved.b_pre.double().sum()).float()
        moved.W_enc.sub_(lost.float())
        moved.b_enc.sub_(shift)
        if sae.shape.activation == "gated":
            moved.b_mag.sub_(moved.r_mag.exp() * shift)
    moved.b_pre.add_(mean / scale)
    if target == "dataset":
        return moved
    return compatibility.rescale_input(moved, 1 / scale, target)


@torch.no_grad()
def measure(sae: SAE, other: SAE, raw: Tensor) -> dict[str, Any]:
    """Compare two SAEs on raw activations [rows, d].

    Returns:
        nmse: {"before", "after"}, the squared error of the raw reconstructions of `sae` and of
        `other`, divided by that of predicting the mean. equal_supports: the share of activations
        on which both have the same active latents. shared_latents: the size of the intersection of
        the active latents divided by that of the union, summed over activations. tokens: rows.
    """
    total = float((raw.double() - raw.double().mean(0)).square().sum())
    errors, equal, both, either = [0.0, 0.0], 0, 0, 0
    for rows in raw.split(max(1, _DENSE_VALUES // sae.shape.n_latents)):
        active = []
        for number, each in enumerate((sae, other)):
            code = each.encode(rows)
            errors[number] += float((each.decode(code) - rows).double().square().sum())
            active.append(code.dense(each.shape.n_latents) > 0)
        equal += int((active[0] == active[1]).all(1).sum())
        both += int((active[0] & active[1]).sum())
        either += int((active[0] | active[1]).sum())
    return {
        "nmse": {"before": errors[0] / total, "after": errors[1] / total},
        "equal_supports": equal / len(raw),
        "shared_latents": both / max(1, either),
        "tokens": len(raw),
    }
