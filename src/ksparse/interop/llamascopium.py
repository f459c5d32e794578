"""Llamascopium (Language-Model-SAEs): config.json and sae_weights.safetensors or sae_weights.pt.

    acts = f(x W_E + b_E)        recon = acts W_D + b_D        x and recon times sqrt(d) over a norm

| ours | file | |
|---|---|---|
| W_enc[n, d] | W_E[d, n] | transposed |
| b_enc[n] | b_E[n] | + W_enc b_D, since ours takes b_pre off the input |
| W_dec[n, d] | W_D[n, d] | |
| b_pre[d] | b_D[d] | 0 without use_decoder_bias |
| threshold[n] | activation_function.log_jumprelu_threshold[n] | its exponential; of values times decoder norms with sparsity_include_decoder_norm |
| factor | dataset_average_activation_norm.SITE | sqrt(d) over it, with norm_activation dataset-wise |

norm_activation inference is our none, token-wise our constant_norm. batch-wise and batchtopk depend
on what else is in the batch and are refused. A TopK that chooses by value times decoder norm is
read with unit rows, so that its latents are multiplied by the norms they had: reconstructions stay,
latents' units change.
"""  # noqa: E501 (a table)

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import CheckedTensors
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic, jsonio

CONFIG, WEIGHTS = "config.json", "sae_weights"
ACTIVATIONS = {"relu": "relu", "topk": "topk", "jumprelu": "jump_relu"}
NORMALIZATIONS = {"inference": "none", "dataset-wise": "dataset", "token-wise": "constant_norm"}
HOLDS = {activation: tuple(NORMALIZATIONS.values()) for activation in ACTIVATIONS.values()}
_THRESHOLD, _NORM = "activation_function.log_jumprelu_threshold", "dataset_average_activation_norm."
_log = logging.getLogger("ksparse")


def find(path: Path) -> Path | None:
    """Return the folder of an SAE in this format, if the path is one."""
    return path if (path / CONFIG).is_file() and any(path.glob(f"{WEIGHTS}.*")) else None


def read(folder: Path) -> SAE:
    """Read a folder."""
    settings, weights = foreign.json_file(folder / CONFIG), _weights(folder)
    settings.refuse(sae_type="sae", use_glu_encoder=False)
    site = settings.want("hook_point_in", str)
    settings.refuse(hook_point_out=site)
    flags = {
        key: settings.want(key, bool, True)
        for key in ("use_decoder_bias", "sparsity_include_decoder_norm")
    }
    activation = ACTIVATIONS[settings.among("act_fn", ACTIVATIONS, "relu")]
    normalize = NORMALIZATIONS[settings.among("norm_activation", NORMALIZATIONS, "dataset-wise")]
    tensors = {
        "W_enc": weights.take("W_E", *"dn").t(),
        "b_enc": weights.take("b_E", "n"),
        "W_dec": weights.take("W_D", *"nd"),
    }
    d, n = weights.lengths["d"], weights.lengths["n"]
    tensors["b_pre"] = weights.take("b_D", "d") if flags["use_decoder_bias"] else torch.zeros(d)
    foreign.centre_(tensors)
    factor = 1.0
    if normalize == "dataset":
        norm = weights.number(f"{_NORM}{site}")
        if norm <= 0:
            raise InputError(f"{weights.file}: {_NORM}{site} is {norm}, expected a number above 0")
        factor = math.sqrt(d) / norm
    if activation == "jump_relu":
        tensors["threshold"] = weights.take(_THRESHOLD, "n").exp()
    weights.finish([f"{_NORM}{site}"])
    if flags["sparsity_include_decoder_norm"]:
        _choose_by_decoder_norm_(tensors, activation, folder)
    k = settings.want("top_k", int) if activation == "topk" else 1
    return foreign.built(
        weights.file,
        Shape(d, n, k, normalize, factor, activation),
        tensors,
        hook_names.metadata(
            "llamascopium",
            settings.table,
            lm=settings.text("model_name"),
            site=hook_names.from_hook(site),
        ),
    )


def write(sae: SAE, folder: Path) -> None:
    """Write the two files of an SAE that this format can hold."""
    shape = sae.shape
    site = hook_names.to_hook(
        (sae.metadata.get("acts") or sae.metadata.get("origin") or {}).get("site", "") or "unknown"
    )
    tensors = {
        "W_E": sae.W_enc.t(),
        "b_E": foreign.uncentred(sae)["b_enc"],
        "W_D": sae.W_dec,
        "b_D": sae.b_pre,
    }
    if shape.activation == "jump_relu":
        tensors[_THRESHOLD] = (
            sae.threshold.detach().clamp_min(torch.finfo(torch.float32).tiny).log()
        )  # 0 has no logarithm; nothing lies between
    if shape.normalize == "dataset":
        tensors[f"{_NORM}{site}"] = torch.tensor(math.sqrt(shape.d_model) / shape.factor)
    foreign.write_safetensors(tensors, folder / f"{WEIGHTS}.safetensors")
    jsonio.write_json(
        folder / CONFIG,
        hook_names.carried(sae, "llamascopium")
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


def _weights(folder: Path) -> CheckedTensors:
    """Return the tensors of whichever file there is."""
    if atomic.exists(folder / f"{WEIGHTS}.safetensors"):
        return foreign.safetensors_file(folder / f"{WEIGHTS}.safetensors")
    file = folder / f"{WEIGHTS}.pt"
    if atomic.exists(file):
        return foreign.tensors_of(file, foreign.torch_file(file).get("sae"))
    raise InputError(
        f"{folder} holds a distributed checkpoint; ksparse reads {WEIGHTS}.safetensors and "
        f"{WEIGHTS}.pt: save it as one of these in "
        "Llamascopium"
    )


def _choose_by_decoder_norm_(
    tensors: dict[str, torch.Tensor], activation: str, folder: Path
) -> None:
    """Account, in place, for values that are compared after multiplying them by the norm of their
    decoder row."""
    norms = tensors["W_dec"].norm(dim=1)
    if activation == "jump_relu":
        if not bool((norms > 0).all()):
            raise InputError(
                f"{folder}: a decoder row is 0, though thresholds are of values times the norms "
                f"of their rows"
            )
        tensors["threshold"] = tensors["threshold"] / norms
    elif activation == "topk" and not foreign.unit_rows(tensors["W_dec"]):
        foreign.weigh_by_decoder_(tensors)
        _log.warning(
            "%s: latents are multiplied by the norms that their decoder rows had, %.3g to %.3g, "
            "because they are chosen by that; "
            "reconstructions are the same",
            folder,
            norms.min().item(),
            norms.max().item(),
        )


def _expansion(shape: Shape) -> float:
    """Return the number whose product with d_model, rounded down, is the number of latents."""
    found = shape.n_latents / shape.d_model
    return (
        found if int(shape.d_model * found) == shape.n_latents else math.nextafter(found, math.inf)
    )


def _inverse(table: dict[str, Any]) -> dict[Any, str]:
    return {value: key for key, value in table.items()}
