"""Gemma Scope: params.npz of a JumpReLU autoencoder.

    acts = a where a > threshold, a = x W_enc + b_enc         recon = acts W_dec + b_dec

| ours | file |
|---|---|
| W_enc[n, d] | W_enc[d, n], transposed |
| b_enc[n] | b_enc[n] + W_enc b_dec, since ours takes b_pre off the input |
| W_dec[n, d] | W_dec[n, d] |
| b_pre[d] | b_dec[d] |
| threshold[n] | threshold[n] |

Some releases write the names in lower case. Those of embeddings (a folder `embedding`) are for
embeddings times sqrt(d): W_enc / sqrt(d), W_dec sqrt(d). The site is in the path:
layer_L/width_W/average_l0_X of a repository for the residual stream (our resid_post.L), the
attention heads' outputs before their projection, or the MLP after Gemma's norm behind it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ksparse.interop import foreign, hook_names
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic

WEIGHTS = "params.npz"
HOLDS = {"jump_relu": ("none",)}
_KEYS = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d", "threshold": "n"}


def find(path: Path) -> Path | None:
    """Return the file of an SAE in this format, if the path is one or its folder holds one."""
    file = path / WEIGHTS if path.is_dir() else path
    return file if file.suffix == ".npz" and atomic.exists(file) and not file.is_dir() else None


def read(file: Path) -> SAE:
    """Read one file."""
    weights = foreign.npz_file(file)
    names = {key: key if key in weights else key.lower() for key in _KEYS}
    taken = {key: weights.take(names[key], *dims) for key, dims in _KEYS.items()}
    foreign.no_scaling(weights)
    weights.finish()
    tensors = {
        "W_enc": taken["W_enc"].t(),
        "b_enc": taken["b_enc"],
        "W_dec": taken["W_dec"],
        "b_pre": taken["b_dec"],
        "threshold": taken["threshold"],
    }
    if "embedding" in file.parts:
        tensors |= {
            "W_enc": tensors["W_enc"] / weights.lengths["d"] ** 0.5,
            "W_dec": tensors["W_dec"] * weights.lengths["d"] ** 0.5,
        }
    foreign.centre_(tensors)
    shape = Shape(weights.lengths["d"], weights.lengths["n"], 1, "none", 1.0, "jump_relu")
    return foreign.built(file, shape, tensors, _metadata(file))


def write(sae: SAE, folder: Path) -> None:
    """Write an SAE that this format can hold."""
    tensors = {
        "W_enc": sae.W_enc.t(),
        **foreign.uncentred(sae),
        "W_dec": sae.W_dec,
        "b_dec": sae.b_pre,
        "threshold": sae.threshold,
    }
    foreign.write_npz(tensors, folder / WEIGHTS)


def _metadata(file: Path) -> dict[str, Any]:
    """Return what the path of a published file says."""
    path = file.resolve().as_posix()
    repository = re.search(r"gemma-scope-([\w.]+)-(pt|it)-(res|att|mlp)\b", path)
    layer = re.search(r"/layer_(\d+)/", path)
    if not (repository and layer):
        return hook_names.metadata("gemma_scope", {})
    size, tuned, kind = repository.groups()
    site = {
        "res": "resid_post.{}",
        "att": "model.layers.{}.self_attn.o_proj:in",
        "mlp": "model.layers.{}.post_feedforward_layernorm",
    }[kind]
    return hook_names.metadata(
        "gemma_scope",
        {},
        lm=f"google/gemma-2-{size}" + ("-it" if tuned == "it" else ""),
        site=site.format(layer[1]),
    )
