"""sparsify: cfg.json and sae.safetensors, in a folder named like the module whose output it takes.

    acts = TopK(ReLU(encoder.weight (x - b_dec) + encoder.bias))        recon = acts W_dec + b_dec

| ours | file |
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
HOLDS = {"topk": ("none",)}


def find(path: Path) -> Path | None:
    """Return the folder of an SAE in this format, if the path is one."""
    return path if (path / CONFIG).is_file() and (path / WEIGHTS).is_file() else None


def read(folder: Path) -> SAE:
    """Read a folder."""
    settings, weights = (
        foreign.json_file(folder / CONFIG),
        foreign.safetensors_file(folder / WEIGHTS),
    )
    settings.refuse(activation="topk", signed=False, transcode=False, skip_connection=False)
    tensors = {
        "W_enc": weights.take("encoder.weight", *"nd"),
        "b_enc": weights.take("encoder.bias", "n"),
        "W_dec": weights.take("W_dec", *"nd"),
        "b_pre": weights.take("b_dec", "d"),
    }
    weights.finish()
    n, d = weights.lengths["n"], weights.lengths["d"]
    width = settings.want("d_in", int, d)
    said = settings.want("num_latents", int, 0) or width * settings.want("expansion_factor", int, 0)
    if width != d or (said and said != n):
        raise InputError(
            f"{settings.file} speaks of d_in = {settings.get('d_in')} and {said} latents, the "
            f"tensors of {WEIGHTS} have {d} and {n}"
        )
    return foreign.built(
        weights.file,
        Shape(d, n, settings.want("k", int), "none"),
        tensors,
        _metadata(folder, settings),
    )


def write(sae: SAE, folder: Path) -> None:
    """Write the two files of an SAE that this format can hold."""
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
        hook_names.carried(sae, "sparsify")
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
    run = foreign.json_file(above / RUN) if (above / RUN).is_file() else Settings(above / RUN, {})
    return hook_names.metadata(
        "sparsify",
        settings.table,
        lm=run.text("model"),
        site=hook_names.from_module(hookpoint),
        context=run.get("ctx_len"),
        text=run.text("dataset"),
    )
