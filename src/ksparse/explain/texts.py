"""The chosen latents and texts, kept in a run: explain/texts.json.

Choosing them takes a pass over held-out text and N2G's patterns, minutes with a large LM. A command
that goes on with what is missing needs neither, nor the LM.

{"key": what the texts were chosen from and how, "checksum": of the rest, "texts": …}
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch

from ksparse.config import ActsConfig
from ksparse.explain.examples import Specimen, Specimens, Window
from ksparse.explain.options import ExplainConfig
from ksparse.sae.model import SAE
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder

FORMAT = 1
"""Changes with what is written, and with how texts are chosen."""
_OPTIONS = ("latents", "latent", "examples", "test", "tokens", "seed")


def key_of(sae: SAE, acts: ActsConfig, options: ExplainConfig) -> str:
    """Return a hash of what decides about the texts: weights, LM and text, options."""
    weights = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    facts = {
        "format": FORMAT,
        "weights": weights.hexdigest(),
        "acts": repr(acts),
        **{name: getattr(options, name) for name in _OPTIONS},
    }
    return jsonio.digest(facts)


def write(run: RunFolder, key: str, specimens: Specimens) -> None:
    """Keep texts in a run."""
    texts = {
        "strings": {str(token): string for token, string in specimens.strings.items()},
        "too_few": specimens.too_few,
        "origin": specimens.origin,
        "latents": [
            {
                "latent": specimen.latent,
                "train": [_pack(window) for window in specimen.train],
                "test": [_pack(window) for window in specimen.test],
            }
            for specimen in specimens.of
        ],
    }
    file = run.file("explain", "texts.json")
    with atomic.translate_oserrors(file):
        file.parent.mkdir(exist_ok=True)
    table = {"key": key, "checksum": jsonio.digest(texts), "texts": texts}
    atomic.write_text(file, json.dumps(table) + "\n")


def read(run: RunFolder, key: str) -> Specimens | None:
    """Return the texts that a run has; None if there are none of this key, or they are damaged."""
    file = run.file("explain", "texts.json")
    if not file.is_file():
        return None
    with atomic.read_errors(file):
        content = file.read_bytes()
    try:
        table = json.loads(content)
        if table["key"] != key or table["checksum"] != jsonio.digest(table["texts"]):
            return None
        texts = table["texts"]
        return Specimens(
            [
                Specimen(
                    row["latent"],
                    [_unpack(window) for window in row["train"]],
                    [_unpack(window) for window in row["test"]],
                )
                for row in texts["latents"]
            ],
            {int(token): string for token, string in texts["strings"].items()},
            texts["too_few"],
            texts["origin"],
        )
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return None


def _pack(window: Window) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in window._asdict().items()
    }


def _unpack(table: dict[str, Any]) -> Window:
    return Window(
        np.array(table["tokens"], np.int64),
        np.array(table["acts"], np.float64),
        np.array(table["marked"], bool),
        table["begins"],
        np.array(table["predicted"], bool),
        np.array(table["dealt"], bool),
    )
