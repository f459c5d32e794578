"""As sparsify's Trainer reads activations: the whole base model (AutoModel, no head) under no_grad, with a forward hook on
the layer. sparsify itself is not imported: its Trainer cannot read without taking a step."""

import torch
from common import arguments, serve
from transformers import AutoModel

args, tokens = arguments()
model = AutoModel.from_pretrained(args.lm, dtype=torch.float32)
layer = model.get_submodule(f"layers.{args.layer}")


def read() -> torch.Tensor:
    found = []
    handle = layer.register_forward_hook(
        lambda module, inputs, output: found.append(
            output[0] if isinstance(output, tuple) else output
        )
    )
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        handle.remove()
    return found[0]


serve(read)
