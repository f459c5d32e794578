"""SAELens' own files, through its own classes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from formats import Both, fit, run
from sae_lens import SAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from torch import Tensor

warnings.simplefilter("ignore")
CLASSES = {
    "standard": (StandardSAE, StandardSAEConfig),
    "topk": (TopKSAE, TopKSAEConfig),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig),
    "gated": (GatedSAE, GatedSAEConfig),
}


def both(sae: Any) -> Both:
    def decode(latents: Tensor, x: Tensor) -> Tensor:
        sae.encode(x)  # what is normalised for each token is kept in the module until decode
        return sae.decode(latents)

    return sae.encode, decode


def made(architecture: str, free_norms: bool = False, **options: Any) -> Any:
    def make(x: Tensor, folder: Path, n: int, k: int) -> Both:
        kind, config = CLASSES[architecture]
        more = {"k": k} if architecture == "topk" else {}
        sae = kind(config(d_in=x.shape[1], d_sae=n, **more, **options))
        sae.cfg.metadata.model_name, sae.cfg.metadata.hook_name, sae.cfg.metadata.context_size = (
            "gpt2-small",
            "blocks.2.hook_resid_post",
            64,
        )
        if architecture == "jumprelu":
            sae.threshold.data.uniform_(0, 1)
        if free_norms:
            sae.W_dec.data.mul_(torch.rand(n, 1) + 0.5)
        fit(sae.parameters(), sae, x)
        sae.save_model(folder)
        return both(sae)

    return make


def batchtopk(inference: bool, nested: bool = False) -> Any:
    kind, config = BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    if nested:
        kind, config = MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig

    def make(x: Tensor, folder: Path, n: int, k: int) -> Both:
        widths = {"matryoshka_widths": [n // 4, n // 2, n]} if nested else {}
        sae = kind(
            config(d_in=x.shape[1], d_sae=n, k=k, rescale_acts_by_decoder_norm=True, **widths)
        )
        fit(sae.parameters(), sae, x)
        sae.topk_threshold.fill_(0.7)
        if inference:
            sae.save_inference_model(folder)
            return both(SAE.load_from_disk(folder))
        sae.save_model(folder)
        other = folder.parent / "inference"
        sae.save_inference_model(other)
        return both(SAE.load_from_disk(other))

    return make


MAKE = {
    "standard": made("standard"),
    "topk": made("topk"),
    "jumprelu": made("jumprelu"),
    "gated": made("gated"),
    "topk-not_centred": made("topk", apply_b_dec_to_input=False),
    "gated-not_centred": made("gated", apply_b_dec_to_input=False),
    "topk-layer_norm": made("topk", normalize_activations="layer_norm"),
    "topk-constant_norm": made("topk", normalize_activations="constant_norm_rescale"),
    "topk-decoder_norm": made("topk", free_norms=True, rescale_acts_by_decoder_norm=True),
    "batchtopk": batchtopk(True),
    "batchtopk-training": batchtopk(False),
    "matryoshka": batchtopk(True, nested=True),
    "matryoshka-training": batchtopk(False, nested=True),
}

if __name__ == "__main__":
    run(MAKE, lambda folder: both(SAE.load_from_disk(folder)))
