"""SAELens' own run_evals on given contexts: `evals_sae_lens.py SAE CONTEXTS.npy`; prints its metrics as JSON.

SAE: SAELens' folder; its cfg.json names the LM and the hook, and SAELens' load_model loads them. CONTEXTS.npy: tokens[contexts, t]. Only the ActivationsStore
is replaced, by one that gives these contexts in their order.
"""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from typing import Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler

warnings.simplefilter("ignore")
PROMPTS = 4
"""Contexts of a batch: three copies of the logits are held."""


class Contexts:
    """What run_evals uses of an ActivationsStore."""

    store_batch_size_prompts = PROMPTS

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.context_size, self.at = tokens, tokens.shape[1], 0

    def get_batch_tokens(self, batch_size: int) -> torch.Tensor:
        batch = self.tokens[self.at : self.at + batch_size]
        self.at += batch_size
        return batch

    def reset_input_dataset(self) -> None:
        self.at = 0


def main() -> None:
    torch.set_num_threads(2)
    with contextlib.redirect_stdout(sys.stderr):
        sae: Any = SAE.load_from_disk(sys.argv[1])
        metadata = sae.cfg.metadata
        model = load_model(
            metadata.model_class_name,
            metadata.model_name,
            device="cpu",
            model_from_pretrained_kwargs={"dtype": torch.float32},
        )
        tokens = torch.from_numpy(np.load(sys.argv[2]))
        batches = len(tokens) // PROMPTS
        found, _ = run_evals(
            sae=sae,
            activation_store=Contexts(tokens),
            model=model,
            activation_scaler=ActivationScaler(),
            eval_config=EvalConfig(
                batch_size_prompts=PROMPTS,
                n_eval_reconstruction_batches=batches,
                n_eval_sparsity_variance_batches=batches,
                compute_kl=True,
                compute_ce_loss=True,
                compute_sparsity_metrics=True,
                compute_variance_metrics=True,
            ),
            exclude_special_tokens=True,
        )
    flat = {key: value for group in found.values() for key, value in group.items()}
    print(json.dumps(flat))


main()
