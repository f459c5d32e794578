"""Gemma Scope: params.npz of a JumpReLU autoencoder.

    a     = x W_enc + b_enc
    acts  = a where a > threshold, else 0
    recon = acts W_dec + b_dec

| ksparse | params.npz |
|---|---|
| W_enc[n, d] | W_enc[d, n], transposed |
| b_enc[n] | b_enc[n] + W_enc b_dec, since ksparse's encoder subtracts b_pre from x |
| W_dec[n, d] | W_dec[n, d] |
| b_pre[d] | b_dec[d] |
| threshold[n] | threshold[n] |

Some releases write the names in lower case. SAEs of embeddings (in a folder `embedding`) expect
embeddings times sqrt(d), so W_enc is divided and W_dec multiplied by sqrt(d).

The path names the site: layer_L/width_W/average_l0_X, in a repository for the residual stream
(ksparse's resid_post.L), for the attention heads' outputs before their projection, or for the MLP
after the norm that follows it in Gemma.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ksparse.interop import foreign, hook_names
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic

WEIGHTS = "params.npz"
SUPPORTED = {"jump_relu": ("none",)}
_KEYS = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d", "threshold": "n"}


def find(path: Path) -> Path | None:
    """Return the .npz file of an SAE: `path` itself, or params.npz in it; else None."""
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.suffix == ".npz" and atomic.exists(file) and not file.is_dir() else None


def read(file: Path) -> SAE:
    """Read an SAE from a params.npz."""
    weights = foreign.open_npz(file)
    names = {key: key if key in weights else key.lower() for key in _KEYS}
    arrays = {key: weights.take(names[key], *dims) for key, dims in _KEYS.items()}
    foreign.check_no_scaling(weights)
    weights.finish()
    tensors = {
        "W_enc": arrays["W_enc"].t(),
        "b_enc": arrays["b_enc"],
        "W_dec": arrays["W_dec"],
        "b_pre": arrays["b_dec"],
        "threshold": arrays["threshold"],
    }
    if "embedding" in file.parts:
        tensors |= {
            "W_enc": tensors["W_enc"] / weights.lengths["d"] ** 0.5,
            "W_dec": tensors["W_dec"] * weights.lengths["d"] ** 0.5,
        }
    foreign.center_encoder_(tensors)
    shape = Shape(weights.lengths["d"], weights.lengths["n"], 1, "none", 1.0, "jump_relu")
    return foreign.build_sae(file, shape, tensors, _metadata(file))


def write(sae: SAE, folder: Path) -> None:
    """Write params.npz."""
    tensors = {
        "W_enc": sae.W_enc.t(),
        **foreign.uncentered_biases(sae),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_pre,
        "threshold": sae.threshold,
    }
    foreign.write_npz(tensors, folder / WEIGHTS)


def _metadata(file: Path) -> dict[str, Any]:
    """Return the metadata that the path of a published file contains."""
    path = file.resolve().as_posix()
    repository = re.search(r"gemma-scope-([\w.]+)-(pt|it)-(res|att|mlp)\b", path)
    layer = re.search(r"/layer_(\d+)/", path)
    if not (repository and layer):
        return hook_names.build_metadata("gemma_scope", {})
    size, tuning, sublayer = repository.groups()
    site = {
        "res": "resid_post.{}",
        "att": "model.layers.{}.self_attn.o_proj:in",
        "mlp": "model.layers.{}.post_feedforward_layernorm",
    }[sublayer]
    return hook_names.build_metadata(
        "gemma_scope",
        {},
        lm=f"google/gemma-2-{size}" + ("-it" if tuning == "it" else ""),
        site=site.format(layer[1]),
    )
