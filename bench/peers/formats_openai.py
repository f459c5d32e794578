"""openai/sparse_autoencoder, which is not on the package index: its own model.py makes and reads the files.

The environment variable OPENAI_SPARSE_AUTOENCODER names a clone of openai/sparse_autoencoder; torch and numpy are all that it needs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from formats import Both, fit, run
from torch import Tensor


def library() -> Any:
    if (checkout := os.environ["OPENAI_SPARSE_AUTOENCODER"]) not in sys.path:
        sys.path.insert(0, checkout)
    from sparse_autoencoder import model

    return model


def both(autoencoder: Any) -> Both:
    return (
        lambda x: autoencoder.encode(x)[0],
        lambda latents, x: autoencoder.decode(latents, autoencoder.preprocess(x)[1]),
    )


def made(activation: str) -> Any:
    def make(x: Tensor, folder: Path, n: int, k: int) -> Both:
        model, top = library(), activation == "TopK"
        autoencoder = model.Autoencoder(
            n,
            x.shape[1],
            activation=model.TopK(k) if top else torch.nn.ReLU(),
            normalize=top,
        )
        fit(autoencoder.parameters(), lambda rows: autoencoder(rows)[2], x)
        torch.save(autoencoder.state_dict(), folder / "autoencoder.pt")
        return both(autoencoder)

    return make


def load(folder: Path) -> Both:
    state = torch.load(folder / "autoencoder.pt", weights_only=True)
    return both(library().Autoencoder.from_state_dict(state))


if __name__ == "__main__":
    run({"v5-TopK": made("TopK"), "v4-ReLU": made("ReLU")}, load)
