"""dictionary_learning's own files, through its own classes and `load_dictionary`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from formats import Both, fit, run
from torch import Tensor


def both(sae: Any) -> Both:
    return sae.encode, lambda latents, x: sae.decode(latents)


def made(kind: type, threshold: float | None = None, backup: float = 0.0, **options: Any) -> Any:
    def make(x: Tensor, folder: Path, n: int, k: int) -> Both:
        sizes = [n // 4, n - n // 4]
        own = {"k": k} if "k" in kind.__init__.__code__.co_varnames else {}
        sae = kind(
            x.shape[1],
            n,
            **own,
            **({"group_sizes": sizes} if kind is MatryoshkaBatchTopKSAE else {}),
        )
        fit(sae.parameters(), lambda rows: sae.decode(sae.encode(rows)), x / (backup or 1))
        if threshold is not None:
            sae.threshold.data.copy_(threshold * torch.rand(sae.threshold.shape))
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": kind.__name__,
            "trainer_class": "Trainer",
            "activation_dim": x.shape[1],
            "dict_size": n,
            "layer": 2,
            "lm_name": "some/lm",
            "submodule_name": "resid_post_layer_2",
            "lr": 1e-3,
            **own,
        }
        (folder / "config.json").write_text(
            json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64, "io": "out"}})
        )
        loaded, _ = load_dictionary(str(folder), "cpu")
        if not backup:
            return both(loaded)
        torch.save(
            {
                "step": 60,
                "ae": sae.state_dict(),
                "optimizer": {},
                "config": trainer,
                "norm_factor": backup,
            },
            folder / "ae.pt",
        )
        return (lambda rows: loaded.encode(rows / backup)), (
            lambda latents, rows: loaded.decode(latents) * backup
        )

    return make


MAKE = {
    "AutoEncoderTopK": made(AutoEncoderTopK),
    "BatchTopKSAE": made(BatchTopKSAE, threshold=0.7),
    "MatryoshkaBatchTopKSAE": made(MatryoshkaBatchTopKSAE, threshold=0.7),
    "AutoEncoder": made(AutoEncoder),
    "AutoEncoderNew": made(AutoEncoderNew),
    "GatedAutoEncoder": made(GatedAutoEncoder),
    "JumpReluAutoEncoder": made(JumpReluAutoEncoder, threshold=0.7),
    "AutoEncoderTopK-backup": made(AutoEncoderTopK, backup=7.5),
}

if __name__ == "__main__":
    run(MAKE, lambda folder: both(load_dictionary(str(folder), "cpu")[0]))
