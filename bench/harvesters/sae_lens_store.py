"""SAELens: ActivationsStore.get_activations over its wrapper of a transformers model, which its runner uses for an
AutoModelForCausalLM."""

import torch
from common import arguments, serve
from datasets import Dataset
from sae_lens.load_model import load_model
from sae_lens.training.activations_store import ActivationsStore

args, tokens = arguments()
hook = f"model.layers.{args.layer}"
model = load_model(
    "AutoModelForCausalLM", args.lm, "cpu", {"dtype": torch.float32}, hook_names=[hook]
)
store = ActivationsStore(
    model=model,
    dataset=Dataset.from_dict({"text": ["one two three"] * 4}),
    streaming=False,
    hook_name=hook,
    hook_head_index=None,
    context_size=tokens.shape[1],
    d_in=model.model.config.hidden_size,
    n_batches_in_buffer=2,
    total_training_tokens=1_000,
    store_batch_size_prompts=len(tokens),
    train_batch_size_tokens=64,
    prepend_bos=True,
    normalize_activations="none",
    device=torch.device("cpu"),
    dtype="float32",
)


@torch.no_grad()
def read() -> torch.Tensor:
    return store.get_activations(tokens)


serve(read)
