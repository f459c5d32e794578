"""ksparse on saved batches: `ksparse.training.train.train` itself, with only the source of activations replaced."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time

import numpy as np
import torch
from common import arguments, finish, training_rows
from safetensors.torch import load_file

import ksparse
from ksparse.config import Recipe, from_dict, to_dict
from ksparse.data.base import ActivationBatch
from ksparse.sae.model import SAE
from ksparse.training import source, train


class Saved:
    """The saved batches, as the stream that training reads from."""

    def __init__(self, rows: torch.Tensor, batch: int):
        self.rows, self.batch, self.d_model = rows, batch, rows.shape[1]

    def batches(self, cursor=None):
        for step, x in enumerate(self.rows.split(self.batch), 1):
            yield ActivationBatch(x, torch.zeros(len(x), dtype=torch.long), {"step": step})

    def sample(self, rows: int) -> torch.Tensor:
        return self.rows[:rows]

    def document_names(self, documents) -> list[str]:
        return ["saved"]

    def same_context_fraction(self) -> None:
        return None


def recipe_of(args) -> Recipe:
    """Return the default recipe, on inputs that are normalised already."""
    recipe = from_dict(
        {
            "acts": {"normalize": "none"},
            "sae": {"n_latents": args.n, "k": args.k} | args.options.pop("sae", {}),
            "optim": args.options.pop("optim", {}),
            "run": {"device": "cpu", "save_minutes": 1e9, "log_every": 10**9},
            "tokens": args.steps * args.batch,
            "batch": args.batch,
            "seed": args.seed,
            "threads": args.threads,
        }
    )
    return dataclasses.replace(recipe, **args.options)


def raw_weights(sae: SAE, run) -> SAE:
    """Return the autoencoder before averaging, to see what the average does."""
    tensors = load_file(run.newest_intact()[0] / "optim.safetensors")
    raw = SAE(sae.shape)
    raw.load_state_dict({key: tensors[f"raw.{key}"] for key in raw.state_dict()})
    return raw


@torch.no_grad()
def reconstruct(sae: SAE, rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([sae(x) for x in rows.split(4096)])


def main() -> None:
    args = arguments()
    logging.disable(logging.INFO)
    stream = Saved(training_rows(args), args.batch)
    source.open_stream = lambda recipe, device, mesh, others: (stream, {})
    recipe, folder = recipe_of(args), args.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    run = train.train(recipe, folder)
    seconds = time.monotonic() - began
    sae = ksparse.load(folder)
    held_out = torch.from_numpy(np.load(args.data / "held_out.npy"))
    raw = reconstruct(raw_weights(sae, run), held_out).numpy()
    facts = {key: to_dict(recipe)[key] for key in ("sae", "optim")} | {
        "lr": recipe.lr,
        "dead_after": recipe.dead_after,
    }
    finish(
        args,
        lambda x: sae.encode(x).dense(args.n),
        lambda acts: acts @ sae.W_dec + sae.b_pre,
        seconds=seconds,
        defaults=facts,
        package="ksparse",
        raw_recon=raw,
    )
    shutil.rmtree(folder)


main()
