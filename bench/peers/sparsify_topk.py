"""sparsify on saved batches: its Trainer, with the defaults of TrainConfig and SparseCoderConfig.

The Trainer wants tokens and a language model. It gets row numbers as tokens, and a "model" that looks those rows up: a
sequence is then a batch, and every line of its loop is its own. Evaluated is what it saves, which is the average of the weights
that its schedule-free optimizer keeps.
"""

from __future__ import annotations

import dataclasses
import os
import time

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read on import; the kernels need an accelerator

import torch  # noqa: E402
from common import arguments, finish, training_rows, write_facts  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer  # noqa: E402


class Lookup(torch.nn.Module):
    """A "language model" whose one layer outputs the saved row of each token."""

    def __init__(self, rows: torch.Tensor):
        super().__init__()
        self.site = torch.nn.Identity()
        self.rows = rows
        self.device = rows.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> Lookup:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.site(self.rows[input_ids])


def main() -> None:
    args = arguments()
    rows = training_rows(args).mul_(args.belongs.get("factor", 1.0))
    tokens = [{"input_ids": numbers} for numbers in torch.arange(len(rows)).split(args.batch)]
    shape = SparseCoderConfig(num_latents=args.n, k=args.k)
    config = TrainConfig(
        shape,
        batch_size=1,
        hookpoints=["site"],
        init_seeds=[args.seed],
        log_to_wandb=False,
        save_dir=str(args.out),
        run_name="run",
        **args.options,
    )
    trainer = Trainer(config, tokens, Lookup(rows))
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    began = time.monotonic()
    trainer.fit()
    seconds = time.monotonic() - began
    sae = SparseCoder.load_from_disk(args.out / "run" / "site")

    def encode(x: torch.Tensor) -> torch.Tensor:
        values, indices, _ = sae.encode(x)
        return x.new_zeros(len(x), args.n).scatter_(1, indices, values)

    keys = ("optimizer", "lr", "auxk_alpha", "dead_feature_threshold", "loss_fn")
    defaults = {key: dataclasses.asdict(config)[key] for key in keys} | {
        "lr": rate,
        "momentum": 0.95,
        "schedule_free": config.optimizer == "signum",
        **{key: getattr(shape, key) for key in ("activation", "normalize_decoder", "multi_topk")},
    }
    if args.save:
        with torch.no_grad():  # TopK of f x is f times TopK of x with the biases over f
            sae.encoder.bias.div_(args.belongs["factor"])
            sae.b_dec.div_(args.belongs["factor"])
        sae.save_to_disk(args.save)
        write_facts(args.out, seconds, defaults, "eai-sparsify")
        return
    finish(
        args,
        encode,
        lambda acts: acts @ sae.W_dec + sae.b_dec,
        seconds=seconds,
        defaults=defaults,
        package="eai-sparsify",
    )


main()
