"""openai/sparse_autoencoder: one file of torch.save, as published for GPT-2 small (v1, v4: ReLU;
v5: TopK).

    TopK: x = (raw - mean) / (deviation + 1e-5), unbiased, and back at the end         ReLU: x = raw
    acts = f(encoder.weight (x - pre_bias) + latent_bias)                              recon =
        decoder.weight acts + pre_bias

| ours | file |
|---|---|
| W_enc[n, d] | encoder.weight[n, d] |
| b_enc[n] | latent_bias[n] |
| W_dec[n, d] | decoder.weight[d, n], transposed |
| the same of a tied decoder | decoder.linear.weight[n, d], which is encoder.weight |
| b_pre[d] | pre_bias[d] |
| k | activation_state_dict.k |
| activation | activation: TopK or ReLU |

Their state_dict holds k and postact_fn a second time, as activation.k and activation.postact_fn,
since the activation is a module too. The statistics stats_last_nonzero,
latents_activation_frequency and latents_mean_square [n] change nothing; they are written as zeros.
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
HOLDS = {"topk": ("layer_norm",), "relu": ("none",)}
STATISTICS = {
    "stats_last_nonzero": torch.int64,
    "latents_activation_frequency": torch.float32,
    "latents_mean_square": torch.float32,
}
_SETTINGS = {"activation", "activation_state_dict", "activation.k", "activation.postact_fn"}
_MARKS = {"pre_bias", "latent_bias", "encoder.weight"}


def find(path: Path) -> Path | None:
    """Return the file of an SAE in this format, if the path is one or its folder holds just one .pt
    file and that is one."""
    candidates = [path] if path.is_file() else sorted(path.glob("*.pt"))
    if len(candidates) != 1 or candidates[0].suffix != ".pt":
        return None
    return candidates[0] if set(foreign.torch_file(candidates[0])) >= _MARKS else None


def read(file: Path) -> SAE:
    """Read one file."""
    found = foreign.torch_file(file)
    settings = Settings(
        file, {key: value for key, value in found.items() if not isinstance(value, torch.Tensor)}
    )
    weights = foreign.tensors_of(
        file, {key: value for key, value in found.items() if key not in _SETTINGS}
    )
    activation = ACTIVATIONS[settings.among("activation", ACTIVATIONS, "ReLU")]
    tensors = {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("latent_bias", "n"),
        "b_pre": weights.take("pre_bias", "d"),
        "W_dec": _decoder(weights),
    }
    weights.finish(STATISTICS)
    k, normalize = 1, "none"
    if activation == "topk":
        inner = settings.under("activation_state_dict")
        inner.among("postact_fn", ("ReLU",), "ReLU")
        k, normalize = inner.want("k", int), "layer_norm"
    shape = Shape(weights.lengths["d"], weights.lengths["n"], k, normalize, 1.0, activation)
    return foreign.built(
        file,
        shape,
        tensors,
        hook_names.metadata(
            "openai", {"activation": settings.get("activation")}, **_published(file)
        ),
    )


def write(sae: SAE, folder: Path) -> None:
    """Write an SAE that this format can hold."""
    activation = {ours: theirs for theirs, ours in ACTIVATIONS.items()}[sae.shape.activation]
    state: dict[str, Any] = {"k": sae.shape.k, "postact_fn": "ReLU"} if activation == "TopK" else {}
    tensors = {
        "pre_bias": sae.b_pre,
        "encoder.weight": sae.W_enc,
        "latent_bias": sae.b_enc,
        "decoder.weight": sae.W_dec.t(),
    }
    statistics = {
        name: torch.zeros(sae.shape.n_latents, dtype=kind) for name, kind in STATISTICS.items()
    }
    foreign.write_torch(
        tensors | statistics | {"activation": activation, "activation_state_dict": state},
        folder / WEIGHTS,
    )


def _decoder(weights: CheckedTensors) -> torch.Tensor:
    """Return the decoder [n, d], which is the encoder itself where the two are tied."""
    if "decoder.weight" in weights or "decoder.linear.weight" not in weights:
        return weights.take("decoder.weight", *"dn").t()
    tied = weights.take("decoder.linear.weight", *"nd")
    if not torch.equal(tied, weights.take("encoder.weight", *"nd")):
        raise InputError(
            f"{weights.file}: decoder.linear.weight is that of a tied decoder, and differs from "
            f"encoder.weight"
        )
    return tied


def _published(file: Path) -> dict[str, Any]:
    """Return what the path of a published file says:
    …/gpt2-small/LOCATION[_vN…]/autoencoders/LAYER.pt."""
    parts = file.resolve().parts
    if len(parts) < 4 or parts[-2] != "autoencoders" or not file.stem.isdecimal():
        return {}
    kinds = {
        "resid_delta_attn": "attn_out",
        "resid_delta_mlp": "mlp_out",
        "resid_post_attn": "resid_mid",
        "resid_post_mlp": "resid_post",
    }
    location = parts[-3].partition("_v")[0]
    site = (
        f"{kinds[location]}.{file.stem}"
        if location in kinds
        else f"transformer.h.{file.stem}.mlp.c_proj:in"
        if location == "mlp_post_act"
        else None
    )
    return {"lm": hook_names.from_model(parts[-4]), "site": site, "context": 64}
