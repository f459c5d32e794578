"""Llamascopium's own files, through its own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from formats import Both, fit, run
from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
from torch import Tensor

SITE = "blocks.2.hook_resid_post"


def both(sae: SparseAutoEncoder) -> Both:
    def encode(x: Tensor) -> Tensor:
        return sae.encode(sae.normalize_activations({SITE: x})[SITE])

    def decode(latents: Tensor, x: Tensor) -> Tensor:
        _, factors = sae.normalize_activations({SITE: x}, return_scale_factor=True)
        return sae.denormalize_activations({SITE: sae.decode(latents)}, factors)[SITE]

    return encode, decode


def made(act_fn: str, free_norms: bool = False, **options: Any) -> Any:
    def make(x: Tensor, folder: Path, n: int, k: int) -> Both:
        sae = SparseAutoEncoder(
            SAEConfig(
                hook_point_in=SITE,
                hook_point_out=SITE,
                d_model=x.shape[1],
                expansion_factor=n / x.shape[1],
                act_fn=act_fn,
                top_k=k,
                **options,
            )
        )
        with torch.no_grad():
            sae.W_D.normal_().div_(sae.W_D.norm(dim=1, keepdim=True))
            sae.W_E.copy_(sae.W_D.t())
            for bias in (sae.b_E, sae.b_D) if sae.cfg.use_decoder_bias else (sae.b_E,):
                bias.zero_()
            if act_fn == "jumprelu":
                sae.activation_function.log_jumprelu_threshold.uniform_(-3, 0)
            if free_norms:
                sae.W_D.mul_(torch.rand(n, 1) + 0.5)
        sae.set_dataset_average_activation_norm({SITE: 1.3 * x.shape[1] ** 0.5})
        encode, decode = both(sae)
        fit(sae.parameters(), lambda rows: decode(encode(rows), rows), x)
        if not free_norms and act_fn == "topk":
            sae.transform_to_unit_decoder_norm()
        sae.save_pretrained(folder)
        sae.cfg.save_hyperparameters(folder)
        if not (act_fn == "topk" and free_norms):
            return encode, decode
        norms = sae.decoder_norm().detach()  # the values by which it chooses are what ksparse gives
        return (lambda rows: encode(rows) * norms), (
            lambda latents, rows: decode(latents / norms, rows)
        )

    return make


MAKE = {
    "topk-dataset": made("topk"),
    "topk-inference": made("topk", norm_activation="inference"),
    "topk-token": made("topk", norm_activation="token-wise"),
    "topk-decoder_norm": made("topk", free_norms=True),
    "relu": made("relu"),
    "jumprelu": made("jumprelu", free_norms=True),
    "jumprelu-plain": made("jumprelu", sparsity_include_decoder_norm=False),
    "relu-no_bias": made("relu", use_decoder_bias=False),
}


def load(folder: Path) -> Both:
    return both(SparseAutoEncoder.from_pretrained(str(folder)))


if __name__ == "__main__":
    run(MAKE, load)
