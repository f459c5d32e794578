"""Does an SAE see in TransformerLens what it sees in the model itself? With each way of processing the weights.

    PYTHONPATH=src ENV/bin/python bench/lens.py        in an environment with sae-lens or transformer-lens, and transformers

Two models: pylm/0.3m (RMSNorm, trained), and a GPT-2 of random weights (LayerNorm). The largest difference of activations at resid_post.1, in units of their root mean
square, the share of latents chosen that are not the same, and the largest difference of values and reconstructions, of SAEs with three normalisations.
"""

from __future__ import annotations

import torch
import transformer_lens as tl
import transformers
from transformer_lens.pretrained.weight_conversions import (
    convert_gpt2_weights,
    convert_llama_weights,
)

from ksparse import pylm
from ksparse.sae.model import SAE, Shape
from ksparse.steering import attach

SITE, HOOK = "resid_post.1", "blocks.1.hook_resid_post"


def main() -> None:
    torch.manual_seed(0)
    for name, model, theirs in (("pylm/0.3m", *of_llama()), ("gpt2, random", *of_gpt2())):
        tokens = torch.randint(2, model.config.vocab_size, (8, 32))
        for how, processing in (
            (
                "no processing",
                {
                    "fold_ln": False,
                    "center_writing_weights": False,
                    "center_unembed": False,
                    "fold_value_biases": False,
                },
            ),
            (
                "fold_ln",
                {"fold_ln": True, "center_writing_weights": False, "center_unembed": False},
            ),
            ("default", {}),
        ):
            other = tl.HookedTransformer(theirs.cfg, tokenizer=None)
            other.load_and_process_state_dict(dict(theirs.state), **processing)
            for normalize in ("none", "unit_norm", "layer_norm"):
                sae = made(model.config.hidden_size, normalize)
                with torch.no_grad(), attach(model, sae, SITE, positions="all") as ours:
                    model(input_ids=tokens)
                with torch.no_grad(), attach(other, sae, HOOK, positions="all") as there:
                    other(tokens)
                size = ours.x.square().mean().sqrt()
                chosen = (
                    (ours.code.indices.sort().values != there.code.indices.sort().values)
                    .float()
                    .mean()
                )
                print(
                    f"{name:<14}{how:<15}{normalize:<12}x {(ours.x - there.x).abs().max() / size:.1e}   latents chosen otherwise {chosen:.2%}   "
                    f"values {(ours.code.values - there.code.values).abs().max():.1e}   recon {(ours.recon - there.recon).abs().max() / size:.1e}"
                )


def made(d: int, normalize: str) -> SAE:
    sae = SAE(Shape(d, 8 * d, 8, normalize))
    sae.W_dec.data.normal_(generator=torch.Generator().manual_seed(0))
    sae.normalize_decoder_()
    sae.W_enc.data.copy_(sae.W_dec)
    return sae


class Theirs:
    """A model in TransformerLens' terms: its configuration, and its weights before they are processed."""

    def __init__(self, cfg: tl.HookedTransformerConfig, convert, model):
        self.cfg, self.state = cfg, convert(model, cfg)


def of_llama() -> tuple[transformers.PreTrainedModel, Theirs]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pylm.folder("0.3m"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    c = model.config
    cfg = tl.HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=c.max_position_embeddings,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        act_fn="silu",
        d_vocab=c.vocab_size,
        normalization_type="RMS",
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=10000,
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        device="cpu",
        default_prepend_bos=False,
    )
    return model, Theirs(cfg, convert_llama_weights, model)


def of_gpt2() -> tuple[transformers.PreTrainedModel, Theirs]:
    c = transformers.GPT2Config(vocab_size=300, n_embd=64, n_layer=3, n_head=2, n_positions=64)
    model = transformers.AutoModelForCausalLM.from_config(c, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    cfg = tl.HookedTransformerConfig(
        n_layers=3,
        d_model=64,
        n_ctx=64,
        d_head=32,
        n_heads=2,
        d_mlp=256,
        act_fn="gelu_new",
        d_vocab=300,
        normalization_type="LN",
        eps=c.layer_norm_epsilon,
        original_architecture="GPT2LMHeadModel",
        device="cpu",
        default_prepend_bos=False,
    )
    return model, Theirs(cfg, convert_gpt2_weights, model)


if __name__ == "__main__":
    main()
