"""sparsify: its chunk_and_tokenize and Trainer, as its command line puts them together. A step is a batch of whole sequences."""

import itertools
import os

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # read on import; the kernels need an accelerator

from common import Clock, arguments, texts  # noqa: E402
from datasets import Dataset  # noqa: E402
from sparsify import SparseCoderConfig, TrainConfig, Trainer  # noqa: E402
from sparsify.data import chunk_and_tokenize  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402


def main() -> None:
    args = arguments()
    clock = Clock()
    model = AutoModel.from_pretrained(args.lm, dtype="float32")
    rows = Dataset.from_dict(
        {
            "text": list(
                itertools.islice(texts(args), sum(1 for _ in args.text.open(encoding="utf-8")))
            )
        }
    )
    tokens = chunk_and_tokenize(
        rows, AutoTokenizer.from_pretrained(args.lm), max_seq_len=args.context, num_proc=1
    )
    sequences = args.tokens // args.batch * (args.batch // args.context)
    tokens = tokens.shuffle(args.seed).select(range(sequences))
    config = TrainConfig(
        SparseCoderConfig(num_latents=args.n, k=args.k),
        batch_size=args.batch // args.context,
        hookpoints=[f"layers.{args.layer}"],
        init_seeds=[args.seed],
        log_to_wandb=False,
        save_dir=str(args.out),
        run_name="run",
    )
    trainer = Trainer(config, tokens, model)
    trainer.fit()
    clock.stop(
        args,
        "eai-sparsify",
        sequences * args.context,
        optimizer=config.optimizer,
        auxk=config.auxk_alpha,
        buffer="none: the sequences of a step",
    )


main()
