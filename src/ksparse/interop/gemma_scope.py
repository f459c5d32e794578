"""Gemma Scope and Gemma Scope 2: JumpReLU autoencoders in params.npz, or in config.json and
params.safetensors.

    a     = x W_enc + b_enc
    acts  = a where a > threshold, else 0
    recon = acts W_dec + b_dec

| ksparse | params.npz; params.safetensors in lower case |
|---|---|
| W_enc[n, d] | W_enc[d, n], transposed |
| b_enc[n] | b_enc[n] + W_enc b_dec, since ksparse's encoder subtracts b_pre from x |
| W_dec[n, d] | W_dec[n, d] |
| b_pre[d] | b_dec[d] |
| threshold[n] | threshold[n] |

Some of the first releases also write the names in lower case. SAEs of embeddings (in a folder
`embedding`) expect embeddings times sqrt(d), which is what Gemma 2's first block reads, so W_enc is
divided and W_dec multiplied by sqrt(d); b_dec is taken as it is, as in SAELens.

Gemma Scope: the path names the site, layer_L/width_W/average_l0_X in a repository for the residual
stream (ksparse's resid_post.L), for the MLP after the norm that follows it (mlp_out.L), or for the
attention heads' outputs before their projection. Gemma Scope 2: config.json names it; where that
file is missing, the path does, attn_out/layer_L_width_W_l0_X. Its `attn_out` too is what o_proj
reads, not ksparse's attn_out. Transcoders, crosscoders and cross-layer transcoders are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import CheckedTensors, Settings
from ksparse.interop.recognition import refusal
from ksparse.sae.model import SAE, Shape
from ksparse.storage import atomic

WEIGHTS = "params.npz"
CONFIG, WEIGHTS_2 = "config.json", "params.safetensors"
SUPPORTED = {"jump_relu": ("none",)}
_KEYS = {"W_enc": "dn", "b_enc": "n", "W_dec": "nd", "b_dec": "d", "threshold": "n"}
_CONTEXT = 1024
"""Tokens in a context, all of which begin with BOS (technical reports of both suites)."""
_SITES = {
    "resid_post": "resid_post.{}",
    "attn_out": "model.layers.{}.self_attn.o_proj:in",
    "mlp_out": "mlp_out.{}",
}
_HOOKS = {
    r"model\.layers\.(\d+)\.output": _SITES["resid_post"],
    r"model\.layers\.(\d+)\.post_feedforward_layernorm\.output": _SITES["mlp_out"],
}


def find(path: Path) -> Path | None:
    """Return the weights of an SAE, `path` itself or the file in it; else None."""
    for file in [path / WEIGHTS, path / WEIGHTS_2] if path.is_dir() else [path]:
        is_named = file.suffix == ".npz" or file.name == WEIGHTS_2
        if is_named and atomic.exists(file) and not file.is_dir():
            return file
    return None


def read(file: Path) -> SAE:
    """Read an SAE from params.npz or params.safetensors."""
    if file.suffix == ".npz":
        path = foreign.full_path(file).as_posix()
        if re.search(r"gemma-scope-[\w.]+-(pt|it)-transcoders", path):
            raise refusal(file, "transcoder")
        weights, metadata = foreign.open_npz(file), _metadata(path)
    else:
        weights = foreign.safetensors_file(file)
        metadata = _metadata_2(file, weights)
    tensors = _take_tensors(weights)
    if "embedding" in file.parts:
        root_d = weights.lengths["d"] ** 0.5
        tensors |= {"W_enc": tensors["W_enc"] / root_d, "W_dec": tensors["W_dec"] * root_d}
    foreign.center_encoder_(tensors)
    shape = Shape(weights.lengths["d"], weights.lengths["n"], 1, "none", 1.0, "jump_relu")
    return foreign.build_sae(file, shape, tensors, metadata)


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


def _take_tensors(weights: CheckedTensors) -> dict[str, Tensor]:
    names = {key: key if key in weights else key.lower() for key in _KEYS}
    taken = {key: weights.take(names[key], *dims) for key, dims in _KEYS.items()}
    foreign.check_no_scaling(weights)
    weights.finish()
    return {
        "W_enc": taken["W_enc"].t(),
        "b_enc": taken["b_enc"],
        "W_dec": taken["W_dec"],
        "b_pre": taken["b_dec"],
        "threshold": taken["threshold"],
    }


def _metadata(path: str) -> dict[str, Any]:
    """Return the metadata that the path of a published params.npz contains."""
    repository = re.search(r"gemma-scope-([\w.]+)-(pt|it)-(res|att|mlp)\b", path)
    layer = re.search(r"/layer_(\d+)/", path)
    is_embedding = "/embedding/" in path
    if not repository or not (layer or is_embedding):
        return hook_names.build_metadata("gemma_scope", {})
    size, tuning, sublayer = repository.groups()
    kind = {"res": "resid_post", "att": "attn_out", "mlp": "mlp_out"}[sublayer]
    return hook_names.build_metadata(
        "gemma_scope",
        {},
        lm=f"google/gemma-2-{size}" + ("-it" if tuning == "it" else ""),
        site=_SITES[kind].format(layer[1]) if layer else "resid_pre.0",
        context=_CONTEXT,
        bos=True,
    )


def _metadata_2(file: Path, weights: CheckedTensors) -> dict[str, Any]:
    """Return the metadata in config.json, or else in the path; refuse what is not an SAE."""
    config = file.parent / CONFIG
    settings = foreign.read_settings(config) if config.is_file() else _infer_settings(file)
    _check_is_sae(settings, weights)
    width = settings.get_typed("width", int, None)
    if width is not None and "b_enc" in weights and (width,) != weights.stored("b_enc").shape:
        raise InputError(
            f"{settings.file}: width is {width}, the tensor b_enc of {file.name} has shape "
            f"{list(weights.stored('b_enc').shape)}"
        )
    hook = settings.get_text("hf_hook_point_in")
    return hook_names.build_metadata(
        "gemma_scope",
        settings.table if config.is_file() else {},
        lm=_lm_name(settings.get_text("model_name")),
        site=hook and _site_of_hook(hook),
        context=_CONTEXT,
        bos=True,
    )


def _check_is_sae(settings: Settings, weights: CheckedTensors) -> None:
    """Raise InputError for another kind, by what config.json says and the tensors that only it
    has."""
    kind, hook = settings.get_text("type") or "sae", settings.get("hf_hook_point_in")
    other = {"clt": "cross-layer transcoder"}.get(kind, kind)
    if settings.get("affine_connection") is True or "affine_skip_connection" in weights:
        raise refusal(settings.file, "skip transcoder")
    if other in ("transcoder", "crosscoder", "cross-layer transcoder"):
        raise refusal(f"{settings.file}: type is {kind!r}; it", other)
    if settings.get("hf_hook_point_out", hook) != hook:
        raise refusal(f"{settings.file}: hf_hook_point_in and _out differ; it", "transcoder")
    settings.get_choice("type", ("sae",), "sae")
    settings.get_choice("architecture", ("jump_relu",), "jump_relu")


def _infer_settings(file: Path) -> Settings:
    """Return what the path of a file without config.json says, in the terms of config.json."""
    path = foreign.full_path(file).as_posix()
    repository = re.search(r"gemma-scope-2-(\w+-(?:pt|it))\b", path)
    folder = re.search(r"/(resid_post|attn_out|mlp_out|transcoder|clt|crosscoder)(?:_all)?/", path)
    layer = re.search(r"/layer_(\d+)", path)
    table: dict[str, Any] = {}
    if repository:
        table["model_name"] = f"google/gemma-3-{repository[1]}"
    if folder and folder[1] not in _SITES:
        table["type"] = folder[1]
    elif folder and layer:
        end = {
            "resid_post": "output",
            "attn_out": "self_attn.o_proj.input",
            "mlp_out": "post_feedforward_layernorm.output",
        }[folder[1]]
        table["hf_hook_point_in"] = f"model.layers.{layer[1]}.{end}"
    return Settings(file, table)


def _lm_name(name: str | None) -> str | None:
    """Return the Hub's name of a model, given that in config.json."""
    if name is None:
        return None
    name = (name if "/" in name else f"google/{name}").replace("-v3-", "-3-")
    return name.replace("-270m-pt", "-270m")  # the only base model without -pt


def _site_of_hook(hook: str) -> str:
    """Return the site of a module's end, given as MODULE.input or MODULE.output."""
    for pattern, site in _HOOKS.items():
        if match := re.fullmatch(pattern, hook):
            return site.format(match[1])
    module, _, end = hook.rpartition(".")
    return {"output": module, "input": f"{module}:in"}.get(end, hook)
