"""Llamascopium (Language-Model-SAEs): config.json, and sae_weights.safetensors or sae_weights.pt.
Llama Scope R1 Distill is in the names that it wrote until March 2025.

    acts  = f(x W_E + b_E)
    recon = acts W_D + b_D        x is scaled so that its norm is sqrt(d); recon is scaled back

| ksparse | file | |
|---|---|---|
| W_enc[n, d] | W_E[d, n] | transposed |
| b_enc[n] | b_E[n] | + W_enc b_D, since ksparse's encoder subtracts b_pre from x |
| W_dec[n, d] | W_D[n, d] | |
| b_pre[d] | b_D[d] | 0 without use_decoder_bias |
| threshold[n] | activation_function.log_jumprelu_threshold[n] | the exponential of it |
| factor | dataset_average_activation_norm.SITE | sqrt(d) / norm, for norm_activation dataset-wise |

* Until March 2025: encoder.weight[n, d], encoder.bias, decoder.weight[d, n], decoder.bias and
  log_jumprelu_threshold; apply_decoder_bias_to_pre_encoder says whether the encoder reads x - b_D.
* norm_activation inference is ksparse's none, token-wise its constant_norm. batch-wise, and the
  activation batchtopk, depend on the rest of the batch and are refused.
* sparsity_include_decoder_norm: f compares values times the norms of their decoder rows. Thresholds
  are divided by the norms. A TopK is read with decoder rows scaled to norm 1 and latents multiplied
  by the norms, so reconstructions stay the same and the latents' unit changes.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names, llama_scope
from ksparse.interop.foreign import CheckedTensors, Settings
from ksparse.interop.recognition import refusal
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic, jsonio

CONFIG, WEIGHTS = "config.json", "sae_weights"
ACTIVATIONS = {"relu": "relu", "topk": "topk", "jumprelu": "jump_relu"}
NORMALIZATIONS = {"inference": "none", "dataset-wise": "dataset", "token-wise": "constant_norm"}
SUPPORTED = {activation: tuple(NORMALIZATIONS.values()) for activation in ACTIVATIONS.values()}
_THRESHOLD, _DATASET_NORM = (
    "activation_function.log_jumprelu_threshold",
    "dataset_average_activation_norm.",
)
_EARLIER_THRESHOLD = "log_jumprelu_threshold"
_KINDS = {"transcoder": "transcoder", "crosscoder": "crosscoder", "clt": "cross-layer transcoder"}
_log = logging.getLogger("ksparse")


def find(path: Path) -> Path | None:
    """Return `path` if it is the folder of an SAE in this format, else None."""
    return path if (path / CONFIG).is_file() and any(path.glob(f"{WEIGHTS}.*")) else None


def read(folder: Path, *, factor: float | None = None) -> SAE:
    """Read an SAE from a folder.

    Args:
        folder: what `find` returned.
        factor: what x is multiplied by for norm_activation dataset-wise, where the files do not
            hold the norm.
    """
    settings, weights = foreign.read_settings(folder / CONFIG), _open_weights(folder)
    kind = settings.get("sae_type", "sae")
    if isinstance(kind, str) and kind in _KINDS:
        raise refusal(f"{settings.file}: sae_type is {kind!r}; it", _KINDS[kind])
    settings.require(sae_type="sae", use_glu_encoder=False)
    site = settings.get_typed("hook_point_in", str)
    settings.require(hook_point_out=site)
    activation = ACTIVATIONS[settings.get_choice("act_fn", ACTIVATIONS, "relu")]
    normalize = NORMALIZATIONS[
        settings.get_choice("norm_activation", NORMALIZATIONS, "dataset-wise")
    ]
    is_earlier = "encoder.weight" in weights
    tensors = (
        llama_scope.take_linear_layers(weights, settings)
        if is_earlier
        else _take_matrices(weights, settings)
    )
    d, n = weights.lengths["d"], weights.lengths["n"]
    scale = _scale(weights, site, d, factor) if normalize == "dataset" else 1.0
    if activation == "jump_relu":
        tensors["threshold"] = weights.take(
            _EARLIER_THRESHOLD if is_earlier else _THRESHOLD, "n"
        ).exp()
    weights.finish([f"{_DATASET_NORM}{site}"])
    if settings.get_typed("sparsity_include_decoder_norm", bool, True):
        _undo_decoder_norm_(tensors, activation, folder)
    k = settings.get_typed("top_k", int) if activation == "topk" else 1
    return foreign.build_sae(
        weights.file,
        Shape(d, n, k, normalize, scale, activation),
        tensors,
        hook_names.build_metadata(
            "llamascopium",
            settings.table,
            lm=settings.get_text("model_name"),
            site=hook_names.from_hook(site),
        ),
    )


def write(sae: SAE, folder: Path) -> None:
    """Write config.json and sae_weights.safetensors."""
    shape = sae.shape
    site = hook_names.to_hook(
        (sae.metadata.get("acts") or sae.metadata.get("origin") or {}).get("site", "") or "unknown"
    )
    tensors = {
        "W_E": sae.W_enc.t(),
        "b_E": foreign.uncentered_biases(sae)["b_enc"],
        "W_D": sae.W_dec,
        "b_D": sae.b_pre,
    }
    if shape.activation == "jump_relu":
        # 0 has no logarithm; the smallest normal float32 serves as well.
        smallest = torch.finfo(torch.float32).tiny
        tensors[_THRESHOLD] = sae.threshold.detach().clamp_min(smallest).log()
    if shape.normalize == "dataset":
        tensors[f"{_DATASET_NORM}{site}"] = torch.tensor(math.sqrt(shape.d_model) / shape.factor)
    foreign.write_safetensors(tensors, folder / f"{WEIGHTS}.safetensors")
    jsonio.write_json(
        folder / CONFIG,
        hook_names.original_settings(sae, "llamascopium")
        | {
            "sae_type": "sae",
            "d_model": shape.d_model,
            "expansion_factor": _expansion(shape),
            "use_decoder_bias": True,
            "act_fn": _inverse(ACTIVATIONS)[shape.activation],
            "norm_activation": _inverse(NORMALIZATIONS)[shape.normalize],
            "sparsity_include_decoder_norm": False,
            "top_k": shape.k,
            "hook_point_in": site,
            "hook_point_out": site,
            "use_glu_encoder": False,
        },
    )


def _take_matrices(weights: CheckedTensors, settings: Settings) -> dict[str, torch.Tensor]:
    tensors = {
        "W_enc": weights.take("W_E", *"dn").t(),
        "b_enc": weights.take("b_E", "n"),
        "W_dec": weights.take("W_D", *"nd"),
    }
    has_bias = settings.get_typed("use_decoder_bias", bool, True)
    tensors["b_pre"] = weights.take("b_D", "d") if has_bias else torch.zeros(weights.lengths["d"])
    foreign.center_encoder_(tensors)
    return tensors


def _scale(weights: CheckedTensors, site: str, d: int, factor: float | None) -> float:
    """Return what x is multiplied by: sqrt(d) / its mean norm."""
    key = f"{_DATASET_NORM}{site}"
    if key not in weights and factor is not None:
        return factor
    norm = weights.number(key)
    if norm <= 0:
        raise InputError(f"{weights.file}: {key} is {norm}, expected a number above 0")
    return math.sqrt(d) / norm


def _open_weights(folder: Path) -> CheckedTensors:
    """Open sae_weights.safetensors, or else sae_weights.pt."""
    if atomic.exists(folder / f"{WEIGHTS}.safetensors"):
        return foreign.safetensors_file(folder / f"{WEIGHTS}.safetensors")
    file = folder / f"{WEIGHTS}.pt"
    if atomic.exists(file):
        return foreign.check_tensors(file, foreign.load_torch_dict(file).get("sae"))
    raise InputError(
        f"{folder} holds a distributed checkpoint; ksparse reads {WEIGHTS}.safetensors and "
        f"{WEIGHTS}.pt: save it as one of these in Llamascopium"
    )


def _undo_decoder_norm_(tensors: dict[str, torch.Tensor], activation: str, folder: Path) -> None:
    """Convert, in place, an SAE that compares values times the norms of their decoder rows."""
    norms = tensors["W_dec"].norm(dim=1)
    if activation == "jump_relu":
        if not bool((norms > 0).all()):
            raise InputError(
                f"{folder}: a decoder row is 0, but thresholds apply to values times the norms of "
                "their rows"
            )
        tensors["threshold"] = tensors["threshold"] / norms
    elif activation == "topk" and not foreign.has_unit_rows(tensors["W_dec"]):
        foreign.fold_decoder_norms_(tensors)
        _log.warning(
            "%s: latents are multiplied by the norms that their decoder rows had, %.3g to %.3g, "
            "since the SAE selects by that product; reconstructions are the same",
            folder,
            norms.min().item(),
            norms.max().item(),
        )


def _expansion(shape: Shape) -> float:
    """Return the factor for which int(d_model * factor) is exactly the number of latents."""
    factor = shape.n_latents / shape.d_model
    if int(shape.d_model * factor) == shape.n_latents:
        return factor
    return math.nextafter(factor, math.inf)


def _inverse(table: dict[str, Any]) -> dict[Any, str]:
    return {value: key for key, value in table.items()}
