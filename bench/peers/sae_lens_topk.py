"""SAELens on saved batches: its SAETrainer, with the defaults of SAETrainerConfig and TopKTrainingSAEConfig.

Those of LanguageModelSAERunnerConfig, which drives the same trainer from a language model, are the same values.
"""

from __future__ import annotations

import dataclasses
import time

from common import arguments, batches, finish, write_facts
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer


def main() -> None:
    args = arguments()
    source = batches(args)
    first = next(source)
    source = iter([first, *source])
    shape = TopKTrainingSAEConfig(
        d_in=first.shape[1], d_sae=args.n, k=args.k, **args.options.pop("sae", {})
    )
    config = SAETrainerConfig(
        total_training_samples=args.steps * args.batch,
        train_batch_size_samples=args.batch,
        **args.options,
    )
    config.lr_end = (
        config.lr / 10
    )  # as LanguageModelSAERunnerConfig sets it; the constant schedule does not read it
    sae = TopKTrainingSAE(shape)
    trainer = SAETrainer(config, sae, source)
    if args.save:  # as normalize_activations="expected_average_only_in": fit folds it at the end
        trainer.activation_scaler.scaling_factor = args.belongs["factor"]
    began = time.monotonic()
    trainer.fit()
    seconds = time.monotonic() - began
    sae.eval()
    said = (
        "lr",
        "lr_scheduler_name",
        "lr_warm_up_steps",
        "lr_decay_steps",
        "adam_beta1",
        "adam_beta2",
        "dead_feature_window",
    )
    of_sae = (
        "aux_loss_coefficient",
        "rescale_acts_by_decoder_norm",
        "decoder_init_norm",
        "normalize_activations",
        "apply_b_dec_to_input",
    )
    defaults = {key: getattr(config, key) for key in said} | {
        key: dataclasses.asdict(shape)[key] for key in of_sae
    }
    defaults |= {"optimizer": "Adam", "clip": 1.0}
    if args.save:
        metadata = sae.cfg.metadata
        metadata.model_name = args.belongs["model_name"]
        metadata.hook_name = args.belongs["module"]
        metadata.model_class_name = "AutoModelForCausalLM"
        metadata.context_size = args.belongs["context"]
        metadata.exclude_special_tokens = True
        sae.save_inference_model(args.save)
        write_facts(args.out, seconds, defaults, "sae-lens")
        return
    finish(
        args,
        sae.encode,
        sae.decode,
        seconds=seconds,
        defaults=defaults,
        package="sae-lens",
    )


main()
