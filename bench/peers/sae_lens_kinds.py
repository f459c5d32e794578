"""SAELens' kinds on saved rows: its SAETrainer, one job after another, each saved in its own format.

Standard input has a JSON list of jobs: {"out", "rows", "kind", "n", "k", "batch", "seed", "sae",
"trainer", "center"}. `sae` and `trainer` change the defaults of the kind's config and of
SAETrainerConfig. With `center` the rows' mean is subtracted before, and added to the decoder's bias
after, which leaves the SAE the same function of the rows.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer


def train(job: dict[str, Any]) -> float:
    """Train and save one SAE; return the seconds of training."""
    torch.manual_seed(job["seed"])
    rows = torch.from_numpy(np.load(job["rows"]))
    center = rows[: 2**16].mean(0) if job["center"] else torch.zeros(rows.shape[1])
    rows = rows - center
    sae_class, config_class = get_sae_training_class(job["kind"])
    sae = sae_class(config_class(d_in=rows.shape[1], d_sae=job["n"], **job["sae"]))
    config = SAETrainerConfig(
        total_training_samples=len(rows), train_batch_size_samples=job["batch"], **job["trainer"]
    )
    config.lr_end = config.lr / 10  # the constant schedule does not read it
    trainer = SAETrainer(config, sae, iter(rows.split(job["batch"])))
    began = time.monotonic()
    trainer.fit()
    seconds = time.monotonic() - began
    sae.eval()
    with torch.no_grad():
        assert sae.cfg.apply_b_dec_to_input, "else the centre would belong into b_enc"
        sae.b_dec += center
    sae.save_inference_model(job["out"])
    return seconds


def main() -> None:
    torch.set_num_threads(1)
    for job in json.load(sys.stdin):
        with contextlib.redirect_stdout(sys.stderr):
            seconds = train(job)
        (Path(job["out"]) / "seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
        print(job["out"], flush=True)


main()
