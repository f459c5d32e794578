"""sparsify: cfg.json and sae.safetensors, in a folder named after the module whose output x is.

    acts  = TopK(ReLU(encoder.weight (x - b_dec) + encoder.bias))
    recon = acts W_dec + b_dec

| ksparse | sparsify |
|---|---|
| W_enc[n, d] | encoder.weight[n, d] |
| b_enc[n] | encoder.bias[n] |
| W_dec[n, d] | W_dec[n, d] |
| b_pre[d] | b_dec[d] |
| k | k |
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ksparse.errors import InputError
from ksparse.interop import foreign, hook_names
from ksparse.interop.foreign import Settings
from ksparse.sae.model import SAE, Shape
from ksparse.storage import jsonio

CONFIG, WEIGHTS, RUN = "cfg.json", "sae.safetensors", "config.json"
SUPPORTED = {"topk": ("none",)}


def find(path: Path) -> Path | None:
    """Return `path` if it is the folder of an SAE in this format, else None."""
    return path if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() else None


def read(folder: Path) -> SAE:
    """Read an SAE from a folder."""
    settings, weights = (
        foreign.read_settings(folder / CONFIG),
        foreign.safetensors_file(folder / WEIGHTS),
    )
    settings.require(activation="topk", signed=False, transcode=False, skip_connection=False)
    tensors = {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("encoder.bias", "n"),
        "W_dec": weights.take("W_dec", *"nd"),
        "b_pre": weights.take("b_dec", "d"),
    }
    weights.finish()
    n, d = weights.lengths["n"], weights.lengths["d"]
    width = settings.get_typed("d_in", int, d)
    n_latents = settings.get_typed("num_latents", int, 0) or width * settings.get_typed(
        "expansion_factor", int, 0
    )
    if width != d or (n_latents and n_latents != n):
        raise InputError(
            f"{settings.file} says d_in = {settings.get('d_in')} and {n_latents} latents, the "
            f"tensors of {WEIGHTS} have {d} and {n}"
        )
    return foreign.build_sae(
        weights.file,
        Shape(d, n, settings.get_typed("k", int), "none"),
        tensors,
        _metadata(folder, settings),
    )


def write(sae: SAE, folder: Path) -> None:
    """Write cfg.json and sae.safetensors."""
    foreign.write_safetensors(
        {
            "encoder.weight": sae.W_enc,
            "encoder.bias": sae.b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_pre,
        },
        folder / WEIGHTS,
    )
    jsonio.write_json(
        folder / CONFIG,
        hook_names.original_settings(sae, "sparsify")
        | {
            "activation": "topk",
            "expansion_factor": 32,
            "normalize_decoder": True,
            "num_latents": sae.shape.n_latents,
            "k": sae.shape.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": False,
            "d_in": sae.shape.d_model,
        },
    )


def _metadata(folder: Path, settings: Settings) -> dict[str, Any]:
    """Return what the folder's name says, and the run's config.json above it."""
    hookpoint = folder.parent.name if folder.name.startswith("seed") else folder.name
    above = folder.parent.parent if folder.name.startswith("seed") else folder.parent
    run = (
        foreign.read_settings(above / RUN) if (above / RUN).is_file() else Settings(above / RUN, {})
    )
    # A folder may have any name; sparsify's own have a layer's number, or lie in a run's folder.
    is_hookpoint = bool(run.table) or hook_names.layer_of(hookpoint) is not None
    return hook_names.build_metadata(
        "sparsify",
        settings.table,
        lm=run.get_text("model"),
        site=hook_names.from_module(hookpoint) if is_hookpoint else None,
        context=run.get("ctx_len"),
        text=run.get_text("dataset"),
    )
