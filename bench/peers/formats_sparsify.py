"""sparsify's own files, through its own class."""

from __future__ import annotations

from pathlib import Path

import torch
from formats import Both, fit, run
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor


def both(sae: SparseCoder) -> Both:
    def encode(x: Tensor) -> Tensor:
        found = sae.encode(x)
        return torch.zeros(len(x), sae.num_latents).scatter(
            1, found.top_indices.long(), found.top_acts.float()
        )

    return encode, lambda latents, x: sae.decode(*latents.topk(sae.cfg.k, dim=1))


def topk(x: Tensor, folder: Path, n: int, k: int) -> Both:
    sae = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=n, k=k))
    fit(sae.parameters(), lambda rows: sae(rows).sae_out, x)
    sae.save_to_disk(folder)
    return both(sae)


if __name__ == "__main__":
    run({"topk": topk}, lambda folder: both(SparseCoder.load_from_disk(folder, device="cpu")))
