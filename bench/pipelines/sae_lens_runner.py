"""SAELens: its LanguageModelSAETrainingRunner, with a model of transformers and a data set of texts in memory."""

import itertools

from common import Clock, arguments, texts
from datasets import Dataset
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TopKTrainingSAEConfig,
)


def main() -> None:
    args = arguments()
    clock = Clock()
    rows = Dataset.from_dict(
        {
            "text": list(
                itertools.islice(texts(args), sum(1 for _ in args.text.open(encoding="utf-8")))
            )
        }
    )
    config = LanguageModelSAERunnerConfig(
        sae=TopKTrainingSAEConfig(d_in=args.d, d_sae=args.n, k=args.k),
        model_name=str(args.lm),
        model_class_name="AutoModelForCausalLM",
        hook_name=f"model.layers.{args.layer}",
        dataset_path="",
        is_dataset_tokenized=False,
        streaming=False,
        context_size=args.context,
        store_batch_size_prompts=args.lm_batch,
        n_batches_in_buffer=args.mix // (args.lm_batch * args.context),
        training_tokens=args.tokens,
        train_batch_size_tokens=args.batch,
        seed=args.seed,
        logger=LoggingConfig(log_to_wandb=False),
        n_checkpoints=0,
        checkpoint_path=None,
        output_path=str(args.out / "sae"),
        verbose=False,
    )
    LanguageModelSAETrainingRunner(config, override_dataset=rows).run()
    clock.stop(
        args,
        "sae-lens",
        args.tokens // args.batch * args.batch,
        lr=config.lr,
        prefetch=config.prefetch_llm_batches,
        mixing=config.activations_mixing_fraction,
        exclude_special=config.exclude_special_tokens,
    )


main()
