"""An SAE in the models of TransformerLens and nnsight, by their own names of a site. Run where the library and ksparse can be imported (PYTHONPATH=src).

    python clients_attach.py FOLDER SITE SAE

FOLDER: a Hugging Face LM of the LLaMA kind. SITE: resid_post.I. Prints, as JSON, for each object and name the largest difference of the activations that the
tap read, and of the logits with the reconstruction spliced in, from those of the Hugging Face model at SITE; and whether the model is as before.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import llama_hooked
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ksparse

warnings.simplefilter("ignore")


def main() -> None:
    folder, site, path = sys.argv[1:]
    torch.set_num_threads(1)
    sae = ksparse.load(path)
    hf = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = torch.randint(
        10, hf.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0)
    )
    tokens[:, 0] = tokenizer.bos_token_id
    with ksparse.attach(hf, sae, site, error="drop") as expected:
        logits = hf(tokens).logits
    rows = []
    layer = site.rpartition(".")[2]
    for name, (model, run, names) in objects(folder, hf, tokenizer, layer).items():
        before = run(model, tokens)
        for own in names:
            with ksparse.attach(model, sae, own, error="drop") as tap:
                spliced = run(model, tokens)
            rows.append(
                {
                    "object": name,
                    "site": own,
                    "x": float((tap.x - expected.x).abs().max()),
                    "logits": float((centred(spliced) - centred(logits)).abs().max()),
                    "effect": float((centred(spliced) - centred(before)).abs().max()),
                    "restored": bool(torch.equal(run(model, tokens), before)),
                }
            )
    print(json.dumps(rows))


def centred(logits: torch.Tensor) -> torch.Tensor:
    return (logits - logits.mean(-1, keepdim=True)).detach()


def objects(folder: str, hf: Any, tokenizer: Any, layer: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    own = (f"blocks.{layer}.hook_resid_post", f"resid_post.{layer}")
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        TransformerBridge = None  # noqa: N806
    if TransformerBridge is not None and hasattr(TransformerBridge, "boot_transformers"):
        copied = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()  # the bridge changes it
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=copied, tokenizer=tokenizer, device="cpu"
        )
        found["TransformerBridge"] = (
            bridge,
            lambda model, tokens: model(tokens),
            (*own, f"blocks.{layer}.hook_out"),
        )
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        HookedTransformer = None  # noqa: N806
    if HookedTransformer is not None:
        found["HookedTransformer"] = (
            llama_hooked.build(hf),
            lambda model, tokens: model(tokens),
            own,
        )
    try:
        from nnsight import LanguageModel
    except ImportError:
        return found

    def trace(model: Any, tokens: torch.Tensor) -> torch.Tensor:
        with model.trace(tokens):
            out = model.lm_head.output.save()
        return out if isinstance(out, torch.Tensor) else out.value

    plain = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )
    names = (
        f"model.layers.{layer}.output",
        f"model.layers.{layer}",
        f"model.model.layers.{layer}",
        f"resid_post.{layer}",
    )
    found["nnsight"] = (LanguageModel(plain, tokenizer=tokenizer), trace, names)
    return found


if __name__ == "__main__":
    main()
