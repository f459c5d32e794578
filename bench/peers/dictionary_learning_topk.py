"""dictionary_learning on saved batches: its trainSAE with a TopKTrainer and that trainer's defaults.

One default cannot be had in a run of 1,000 steps or fewer: the trainer refuses a warmup as long as the run, and its own is 1,000
steps. There the rate rises over a tenth of the steps instead, which leaves more of the run at the full rate.
"""

from __future__ import annotations

import time

from common import arguments, batches, finish
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE

WARMUP = 1000


def main() -> None:
    args = arguments()
    rows = list(batches(args))
    config = {
        "trainer": TopKTrainer,
        "steps": args.steps,
        "activation_dim": rows[0].shape[1],
        "dict_size": args.n,
        "k": args.k,
        "layer": 0,
        "lm_name": "saved",
        "device": "cpu",
        "seed": args.seed,
    }
    if args.steps <= WARMUP:
        config["warmup_steps"] = args.steps // 10
    config |= args.options
    said = {}

    class Named(TopKTrainer):
        """The trainer as it is; it tells what it chose, since trainSAE returns nothing."""

        def __init__(self, **options):
            super().__init__(**options)
            said.update(
                self.config,
                clip=1.0,
                optimizer="Adam",
                dead_feature_threshold=self.dead_feature_threshold,
                k_aux=self.top_k_aux,
            )

    began = time.monotonic()
    trainSAE(
        rows,
        [config | {"trainer": Named}],
        steps=args.steps,
        save_dir=str(args.out / "run"),
        device="cpu",
    )
    seconds = time.monotonic() - began
    sae = AutoEncoderTopK.from_pretrained(args.out / "run" / "trainer_0" / "ae.pt")
    keys = (
        "lr",
        "warmup_steps",
        "decay_start",
        "auxk_alpha",
        "dead_feature_threshold",
        "k_aux",
        "clip",
        "optimizer",
    )
    finish(
        args,
        sae.encode,
        sae.decode,
        seconds=seconds,
        defaults={key: said[key] for key in keys},
        package="dictionary-learning",
    )


main()
