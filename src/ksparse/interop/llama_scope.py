"""Llama Scope of 2024: hyperparams.json, and checkpoints/final.safetensors or another of the names
that its library tries.

    x     = raw sqrt(d) / dataset_average_activation_norm.in         norm_activation dataset-wise
    a     = W_enc x + b_enc                                          of x - b_dec on request
    acts  = a where a > s jump_relu_threshold, else 0                s = that factor of x
    recon = (W_dec acts + b_dec) / s

| ksparse | file |
|---|---|
| W_enc[n, d] | encoder.weight[n, d] |
| b_enc[n] | encoder.bias[n]; + W_enc b_dec if apply_decoder_bias_to_pre_encoder is false |
| W_dec[n, d] | decoder.weight[d, n], transposed |
| b_pre[d] | decoder.bias[d]; 0 without use_decoder_bias |
| threshold[n] | jump_relu_threshold, one number in units of the raw activations, times s |
| factor | s |

With sparsity_include_decoder_norm the library folds the norms of the decoder's rows into the
encoder when it loads, before it compares with the threshold; so does `read`. A TopK with a
threshold above 0 is used as a JumpReLU. norm_activation token-wise is ksparse's constant_norm,
inference its none; batch-wise depends on the rest of the batch and is refused. What has another
hook_point_out than hook_point_in is a transcoder.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import CheckedTensors, Settings
from ksparse.interop.recognition import refusal
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic

CONFIG = "hyperparams.json"
WEIGHTS = tuple(
    f"{stem}.{suffix}"
    for stem in ("sae_weights", "checkpoints/pruned", "checkpoints/final")
    for suffix in ("safetensors", "pt")
)
"""Names of the weights, in the order in which the library looks for them."""
ACTIVATIONS = {"relu": "relu", "topk": "topk", "jumprelu": "jump_relu"}
NORMALIZATIONS = {
    "none": "none",
    "inference": "none",
    "token-wise": "constant_norm",
    "dataset-wise": "dataset",
}
_LM = "meta-llama/Llama-3.1-8B"


def find(path: Path) -> Path | None:
    """Return `path` if it is the folder of an SAE in this format, else None."""
    return path if (path / CONFIG).is_file() else None


def read(folder: Path) -> SAE:
    """Read an SAE from a folder."""
    settings = foreign.read_settings(folder / CONFIG)
    site = settings.get_typed("hook_point_in", str)
    if settings.get("hook_point_out", site) != site:
        raise refusal(f"{settings.file}: hook_point_in and hook_point_out differ; it", "transcoder")
    settings.require(use_glu_encoder=False)
    weights = _open_weights(folder)
    tensors = take_linear_layers(weights, settings)
    weights.finish()
    n, d = weights.lengths["n"], weights.lengths["d"]
    for key, size in (("d_model", d), ("d_sae", n)):
        if settings.get_typed(key, int, size) != size:
            raise InputError(
                f"{settings.file}: {key} is {settings.get(key)}, the tensors of "
                f"{weights.file.name} have {size}"
            )
    normalize, factor = _normalization(settings, d)
    threshold = settings.get_typed("jump_relu_threshold", float, 0.0)
    activation = ACTIVATIONS[settings.get_choice("act_fn", ACTIVATIONS, "relu")]
    if activation == "topk" and threshold > 0:
        activation = "jump_relu"
    if settings.get_typed("sparsity_include_decoder_norm", bool, True):
        foreign.fold_decoder_norms_(tensors)
    if activation == "jump_relu":
        tensors["threshold"] = torch.full((n,), threshold * factor)
    k = settings.get_typed("top_k", int) if activation == "topk" else 1
    return foreign.build_sae(
        weights.file,
        Shape(d, n, k, normalize, factor, activation),
        tensors,
        hook_names.build_metadata(
            "llama_scope",
            settings.table,
            lm=_LM if "Llama3_1-8B-Base" in foreign.full_path(folder).as_posix() else None,
            site=hook_names.from_hook(site),
        ),
    )


def take_linear_layers(weights: CheckedTensors, settings: Settings) -> dict[str, Tensor]:
    """Return the tensors of an encoder and a decoder that are linear layers, in ksparse's terms.

    Llamascopium's library wrote them until March 2025.
    """
    tensors = {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("encoder.bias", "n"),
        "W_dec": weights.take("decoder.weight", *"dn").t().contiguous(),
    }
    has_bias = settings.get_typed("use_decoder_bias", bool, True)
    tensors["b_pre"] = (
        weights.take("decoder.bias", "d") if has_bias else torch.zeros(weights.lengths["d"])
    )
    # The library's default was true in 2024, and false from 2025 on; both write the key.
    if not settings.get_typed("apply_decoder_bias_to_pre_encoder", bool, False):
        foreign.center_encoder_(tensors)
    return tensors


def _open_weights(folder: Path) -> CheckedTensors:
    for name in WEIGHTS:
        file = folder / name
        if not atomic.exists(file):
            continue
        if file.suffix == ".safetensors":
            return foreign.safetensors_file(file)
        return foreign.check_tensors(file, foreign.load_torch_dict(file).get("sae"))
    raise InputError(f"{folder} has {CONFIG}, but no weights: expected one of {', '.join(WEIGHTS)}")


def _normalization(settings: Settings, d: int) -> tuple[str, float]:
    """Return ksparse's normalisation and its constant."""
    kind = NORMALIZATIONS[settings.get_choice("norm_activation", NORMALIZATIONS, "token-wise")]
    if kind != "dataset":
        return kind, 1.0
    norms: Any = settings.get_section("dataset_average_activation_norm")
    norm = norms.get_typed("in", float)
    if not 0 < norm < math.inf:
        raise InputError(
            f"{settings.file}: dataset_average_activation_norm.in is {norm}, expected a number "
            "above 0"
        )
    if norms.get_typed("out", float, norm) != norm:
        raise refusal(f"{settings.file}: the norms of input and output differ; it", "transcoder")
    return kind, math.sqrt(d) / norm
