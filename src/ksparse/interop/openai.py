"""openai/sparse_autoencoder: one torch.save file, as published for GPT-2 small (v1, v4: ReLU; v5:
TopK).

    x     = raw                                  for ReLU
          = (raw - mean) / (deviation + 1e-5)    for TopK; unbiased deviation; undone at the end
    acts  = f(encoder.weight (x - pre_bias) + latent_bias)
    recon = decoder.weight acts + pre_bias

| ksparse | file |
|---|---|
| W_enc[n, d] | encoder.weight[n, d] |
| b_enc[n] | latent_bias[n] |
| W_dec[n, d] | decoder.weight[d, n], transposed |
| W_dec[n, d], tied | decoder.linear.weight[n, d], equal to encoder.weight |
| b_pre[d] | pre_bias[d] |
| k | activation_state_dict.k |
| activation | activation: TopK or ReLU |

The state_dict has k and postact_fn twice, also as activation.k and activation.postact_fn, since the
activation is a module too. The statistics stats_last_nonzero, latents_activation_frequency and
latents_mean_square [n] do not affect the SAE; they are written as zeros.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import CheckedTensors, Settings
from ksparse.sae.model import SAE, Shape

WEIGHTS = "autoencoder.pt"
ACTIVATIONS = {"TopK": "topk", "ReLU": "relu"}
SUPPORTED = {"topk": ("layer_norm",), "relu": ("none",)}
STATISTICS = {
    "stats_last_nonzero": torch.int64,
    "latents_activation_frequency": torch.float32,
    "latents_mean_square": torch.float32,
}
_SETTING_KEYS = {"activation", "activation_state_dict", "activation.k", "activation.postact_fn"}
_IDENTIFYING_KEYS = {"pre_bias", "latent_bias", "encoder.weight"}


def find(path: Path) -> Path | None:
    """Return the file of an SAE in this format: `path` itself, or the only .pt file in it; else
    None."""
    candidates = [path] if path.is_file() else sorted(path.glob("*.pt"))
    if len(candidates) != 1 or candidates[0].suffix != ".pt":
        return None
    return (
        candidates[0] if set(foreign.load_torch_dict(candidates[0])) >= _IDENTIFYING_KEYS else None
    )


def read(file: Path) -> SAE:
    """Read an SAE from a file."""
    table = foreign.load_torch_dict(file)
    settings = Settings(
        file, {key: value for key, value in table.items() if not isinstance(value, torch.Tensor)}
    )
    weights = foreign.check_tensors(
        file, {key: value for key, value in table.items() if key not in _SETTING_KEYS}
    )
    activation = ACTIVATIONS[settings.get_choice("activation", ACTIVATIONS, "ReLU")]
    tensors = {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("latent_bias", "n"),
        "b_pre": weights.take("pre_bias", "d"),
        "W_dec": _decoder(weights),
    }
    weights.finish(STATISTICS)
    k, normalize = 1, "none"
    if activation == "topk":
        inner = settings.get_section("activation_state_dict")
        inner.get_choice("postact_fn", ("ReLU",), "ReLU")
        k, normalize = inner.get_typed("k", int), "layer_norm"
    shape = Shape(weights.lengths["d"], weights.lengths["n"], k, normalize, 1.0, activation)
    return foreign.build_sae(
        file,
        shape,
        tensors,
        hook_names.build_metadata(
            "openai", {"activation": settings.get("activation")}, **_metadata_from_path(file)
        ),
    )


def write(sae: SAE, folder: Path) -> None:
    """Write autoencoder.pt."""
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[sae.shape.activation]
    state: dict[str, Any] = {"k": sae.shape.k, "postact_fn": "ReLU"} if activation == "TopK" else {}
    tensors = {
        "pre_bias": sae.b_pre,
        "encoder.weight": sae.W_enc,
        "latent_bias": sae.b_enc,
        "decoder.weight": sae.W_dec.t(),
    }
    statistics = {
        name: torch.zeros(sae.shape.n_latents, dtype=dtype) for name, dtype in STATISTICS.items()
    }
    foreign.write_torch(
        tensors | statistics | {"activation": activation, "activation_state_dict": state},
        folder / WEIGHTS,
    )


def _decoder(weights: CheckedTensors) -> torch.Tensor:
    """Return the decoder [n, d]; raise InputError if a tied one differs from the encoder."""
    if "decoder.weight" in weights or "decoder.linear.weight" not in weights:
        return weights.take("decoder.weight", *"dn").t()
    tied = weights.take("decoder.linear.weight", *"nd")
    if not torch.equal(tied, weights.take("encoder.weight", *"nd")):
        raise InputError(
            f"{weights.file}: decoder.linear.weight is that of a tied decoder, but differs from "
            "encoder.weight"
        )
    return tied


def _metadata_from_path(file: Path) -> dict[str, Any]:
    """Return the metadata in a published path, …/gpt2-small/LOCATION[_vN…]/autoencoders/LAYER.pt;
    {} for other paths."""
    parts = foreign.full_path(file).parts
    if len(parts) < 4 or parts[-2] != "autoencoders" or not file.stem.isdecimal():
        return {}
    sites = {
        "resid_delta_attn": "attn_out",
        "resid_delta_mlp": "mlp_out",
        "resid_post_attn": "resid_mid",
        "resid_post_mlp": "resid_post",
    }
    location = parts[-3].partition("_v")[0]
    site = (
        f"{sites[location]}.{file.stem}"
        if location in sites
        else f"transformer.h.{file.stem}.mlp.c_proj:in"
        if location == "mlp_post_act"
        else None
    )
    return {"lm": hook_names.hub_model_name(parts[-4]), "site": site, "context": 64}
