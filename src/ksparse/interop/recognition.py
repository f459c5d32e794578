"""Name what is not read: dictionaries that are no autoencoders, and files of no known format.

A transcoder, a crosscoder or a temporal SAE has tensors that look like an SAE's. `refusal` says
which it is, and `find_other` recognises one by the names of its files, so that none is half-read.
`explain` says which files were seen where no format fits, and which formats are close.
"""

from __future__ import annotations

import re
from pathlib import Path

from ksparse.errors import InputError
from ksparse.interop import foreign
from ksparse.sae import serialization

OTHER_KINDS = {
    "transcoder": "it reconstructs another activation than the one it reads",
    "skip transcoder": "it reconstructs another activation than the one it reads",
    "cross-layer transcoder": "it reads one layer and writes to many",
    "crosscoder": "it reads and reconstructs several layers at once",
    "temporal SAE": "its code of a token depends on earlier tokens",
    "matching-pursuit SAE": "it selects its latents one after another",
    "AbsTopK SAE": "its latents may be negative",
}
"""What ksparse recognises without reading it, and why it is not read."""

LAYOUTS = {
    "ksparse": (serialization.CONFIG, serialization.WEIGHTS),
    "sae_lens": ("cfg.json", "sae_weights.safetensors"),
    "sparsify": ("cfg.json", "sae.safetensors"),
    "dictionary_learning": ("config.json", "ae.pt"),
    "gemma_scope": ("params.npz",),
    "gemma_scope (2)": ("config.json", "params.safetensors"),
    "llamascopium": ("config.json", "sae_weights.*"),
    "llama_scope": ("hyperparams.json", "checkpoints/final.*"),
    "qwen_scope": ("layer*.sae.pt",),
    "openai": ("*.pt",),
}
"""The files by which the formats are recognised, as patterns of names."""

_OTHER_FILES = (
    ("temporal SAE", ("conf.yaml", "latest_ckpt.safetensors")),
    ("cross-layer transcoder", ("W_enc_*.safetensors", "W_dec_*.safetensors")),
    ("transcoder", ("*config.yaml", "layer_*.safetensors")),
)
_SHOWN = 8


def refusal(where: Path | str, kind: str) -> InputError:
    """Return the error for a dictionary that is no autoencoder of one activation.

    Args:
        where: the file that says so, with the setting where there is one.
        kind: a key of `OTHER_KINDS`.
    """
    article = "an" if kind[0] in "Aaeiou" else "a"
    return InputError(
        f"{where} is {article} {kind}: {OTHER_KINDS[kind]}. ksparse reads autoencoders, which "
        "reconstruct the activation that they read, token by token"
    )


def find_other(path: Path) -> InputError | None:
    """Return the error for a dictionary of another kind, recognised by names; else None."""
    folder = path if path.is_dir() else path.parent
    for kind, patterns in _OTHER_FILES:
        if all(any(folder.glob(pattern)) for pattern in patterns) and (
            path.is_dir() or any(path.match(pattern) for pattern in patterns)
        ):
            return refusal(path, kind)
    if any(folder.glob("params_layer_*.safetensors")):
        full = foreign.full_path(folder).as_posix()
        is_clt = re.search(r"/clt(_all)?/", f"{full}/")
        return refusal(path, "cross-layer transcoder" if is_clt else "crosscoder")
    return None


def explain(path: Path) -> InputError:
    """Return the error for a path that no format recognises: what is there, and what is close."""
    if path.is_dir():
        names = sorted(entry.name for entry in path.iterdir())
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        found = f"found {', '.join(names[:_SHOWN]) or 'nothing'}{more}"
    else:
        found = f"found a file named {path.name[:80]}"
    close = [
        f"{name} (also needs {' and '.join(missing)})"
        for name, patterns in LAYOUTS.items()
        if (missing := _missing(path, patterns)) and len(missing) < len(patterns)
    ]
    hint = f"; close to {', '.join(close)}" if close else ""
    return InputError(
        f"{path} holds no SAE: expected {serialization.CONFIG} and {serialization.WEIGHTS}, or a "
        f"run with recipe.toml; {found}{hint}. docs/interop.md lists the files of other libraries"
    )


def _missing(path: Path, patterns: tuple[str, ...]) -> list[str]:
    folder = path if path.is_dir() else path.parent
    return [pattern for pattern in patterns if not any(folder.glob(pattern))]
