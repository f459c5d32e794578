"""TransformerLens 3's copy of a Hugging Face LLaMA from a folder; its from_pretrained knows the models of the Hub alone."""

from __future__ import annotations

from typing import Any


def build(hf: Any, tokenizer: Any = None, kind: Any = None) -> Any:
    """Return a HookedTransformer, or a subclass `kind`, without processing."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    config = hf.config
    head = config.hidden_size // config.num_attention_heads
    kv_heads = config.num_key_value_heads
    cfg = HookedTransformerConfig(
        model_name="llama",
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_key_value_heads=kv_heads if kv_heads != config.num_attention_heads else None,
        d_head=head,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        eps=config.rms_norm_eps,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=head,
        rotary_base=int(
            getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
        ),
        final_rms=True,
        gated_mlp=True,
        device="cpu",
    )
    model = (kind or HookedTransformer)(cfg, tokenizer=tokenizer)
    model.load_state_dict(convert_llama_weights(hf, cfg), strict=False)
    return model.eval()
