"""Gemma Scope's files: written by hand to the documented layout, read by SAELens' loader for them."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import torch
from formats import Both, fit, run
from formats_sae_lens import both
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import Tensor


def load(folder: Path) -> Both:
    """Load as SAELens loads those of the Hub, with the file in the place of the download."""
    shape = np.load(folder / "params.npz")["W_enc"].shape
    config = {
        "architecture": "jumprelu",
        "d_in": shape[0],
        "d_sae": shape[1],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "finetuning_scaling_factor": False,
    }
    with (
        mock.patch.object(loaders, "hf_hub_download", return_value=str(folder / "params.npz")),
        mock.patch.object(loaders, "get_gemma_2_config_from_hf", return_value=config),
    ):
        config, tensors, _ = loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", "layer_2/width_16k/average_l0_71"
        )
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=shape[0], d_sae=shape[1], apply_b_dec_to_input=False))
    sae.load_state_dict(tensors)
    return both(sae)


def made(x: Tensor, folder: Path, n: int, k: int) -> Both:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=x.shape[1], d_sae=n, apply_b_dec_to_input=False))
    sae.threshold.data.uniform_(0, 1)
    fit(sae.parameters(), sae, x)
    np.savez(
        folder / "params.npz",
        **{key: value.detach().numpy() for key, value in sae.state_dict().items()},
    )
    return load(folder)


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    run({"jumprelu": made}, load)
