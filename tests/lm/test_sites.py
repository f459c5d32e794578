"""An alias is what its definition says on every architecture, or is refused: by passes that must agree, not by modules' names."""

import pytest
import torch
import transformers as T
from torch import nn

from ksparse.errors import InputError
from ksparse.lm.hooks import Site, hooked
from ksparse.lm.model import LM
from ksparse.lm.sites import resolve

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
CONFIGS = {
    "llama": lambda: T.LlamaConfig(**COMMON),
    "olmo2": lambda: T.Olmo2Config(**COMMON),
    "olmo3": lambda: T.Olmo3Config(**COMMON),
    "flex_olmo": lambda: T.FlexOlmoConfig(**COMMON, num_experts=4, num_experts_per_tok=2),
    "exaone4": lambda: T.Exaone4Config(**COMMON),
    "afmoe": lambda: T.AfmoeConfig(**COMMON, **EXPERTS, head_dim=8),
    "gemma3": lambda: T.Gemma3TextConfig(**COMMON, head_dim=8, query_pre_attn_scalar=8),
    "granite": lambda: T.GraniteConfig(
        **COMMON, residual_multiplier=0.22, attention_multiplier=0.3, embedding_multiplier=2.0
    ),
    "mixtral": lambda: T.MixtralConfig(**COMMON, num_local_experts=4),
    "bloom": lambda: T.BloomConfig(
        hidden_size=32,
        n_layer=3,
        n_head=4,
        vocab_size=300,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    ),
    "mpt": lambda: T.MptConfig(
        d_model=32, n_layers=3, n_heads=4, vocab_size=300, max_seq_len=128, expansion_ratio=2
    ),
    "phi": lambda: T.PhiConfig(
        **{key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
    ),
    "rwkv": lambda: T.RwkvConfig(
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=3,
        vocab_size=300,
        context_length=128,
    ),
}
POST_NORM = {
    "olmo2": "post_attention_layernorm",
    "olmo3": "post_attention_layernorm",
    "flex_olmo": "post_attention_layernorm",
    "exaone4": "post_attention_layernorm",
    "afmoe": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
}
PARALLEL = {"phi"}


@pytest.fixture(scope="module")
def made():
    """Return made(kind), a tiny random LM whose parts all weigh; made once."""
    models = {}

    def get(kind):
        if kind not in models:
            torch.manual_seed(0)
            model = (
                T.AutoModelForCausalLM.from_config(CONFIGS[kind]())
                .eval()
                .float()
                .requires_grad_(False)
            )
            generator = torch.Generator().manual_seed(1)
            for parameter in model.parameters():
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator) * 0.15
                    if parameter.ndim > 1
                    else parameter + 0.3 * torch.rand(parameter.shape, generator=generator)
                )
            models[kind] = model
        return models[kind]

    return get


def ids(rows=2, length=7):
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(5))


def read(model, *sites, edited=None, change=None):
    """Return x at several sites of one pass, and its logits, perhaps with a change at another."""
    seen, hooks = {}, []
    if edited:
        hooks.append(hooked(resolve(model, edited), change))
    hooks += [
        hooked(resolve(model, site), lambda x, site=site: seen.update({site: x.clone()}))
        for site in sites
    ]
    for hook in hooks:
        hook.__enter__()
    with torch.no_grad():
        logits = model(ids(), use_cache=False).logits
    for hook in reversed(hooks):
        hook.__exit__(None, None, None)
    return [seen[site] for site in sites] + [logits]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("number", [1, 2])
def test_what_attention_and_mlp_add_sums_up_to_what_the_block_adds(made, kind, number):
    pre, attention, mlp, post, _ = read(
        made(kind),
        *(f"{alias}.{number}" for alias in ("resid_pre", "attn_out", "mlp_out", "resid_post")),
    )
    torch.testing.assert_close(pre + attention + mlp, post)
    assert attention.norm() > 0.01 * pre.norm() and mlp.norm() > 0.01 * pre.norm()
    if kind not in PARALLEL:
        middle, _ = read(made(kind), f"resid_mid.{number}")
        torch.testing.assert_close(middle, pre + attention)


@pytest.mark.parametrize("kind", POST_NORM)
def test_what_a_norm_makes_of_attention_is_what_is_added(made, kind):
    model = made(kind)
    norm = getattr(resolve(model, "resid_pre.1").module, POST_NORM[kind])
    seen = []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    pre, middle, attention, _ = read(model, "resid_pre.1", "resid_mid.1", "attn_out.1")
    handle.remove()
    torch.testing.assert_close(attention, seen[-1])
    torch.testing.assert_close(middle, pre + seen[-1])


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind not in PARALLEL])
def test_a_change_of_resid_mid_moves_the_stream_and_what_the_mlp_reads(made, kind):
    model = made(kind)
    shift = torch.randn(32, generator=torch.Generator().manual_seed(2))
    pre, mlp, post, before = read(model, "resid_pre.1", "mlp_out.1", "resid_post.1")
    pre_then, mlp_then, post_then, after = read(
        model,
        "resid_pre.1",
        "mlp_out.1",
        "resid_post.1",
        edited="resid_mid.1",
        change=lambda x: x + shift,
    )
    assert torch.equal(pre, pre_then) and not torch.allclose(before, after)
    torch.testing.assert_close(post_then - post, shift + mlp_then - mlp, rtol=1e-4, atol=1e-5)
    assert (mlp_then - mlp).norm() > 1e-3 * mlp.norm()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("alias", ["resid_pre", "attn_out", "mlp_out", "resid_post"])
def test_what_is_written_is_what_is_read(made, kind, alias):
    """And unchanged activations change no bit."""
    model, wanted = made(kind), torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(4))
    same, clean = read(model, edited=f"{alias}.1", change=lambda x: x.clone()), read(model)
    assert torch.equal(same[0], clean[0])
    pre, attention, mlp, post, changed = read(
        model,
        "resid_pre.1",
        "attn_out.1",
        "mlp_out.1",
        "resid_post.1",
        edited=f"{alias}.1",
        change=lambda x: wanted,
    )
    got = {"resid_pre": pre, "attn_out": attention, "mlp_out": mlp, "resid_post": post}[alias]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        pre + attention + mlp, post, rtol=1e-4, atol=1e-4
    ) if alias != "resid_post" else None
    assert not torch.allclose(changed, clean[0])


@pytest.mark.parametrize("alias", ["resid_mid"])
def test_a_stream_of_zeros_is_zeros_to_the_last_bit(made, alias):
    """A norm after it would blow up what rounding leaves."""
    *_, post, _ = read(
        made("llama"), "mlp_out.1", "resid_post.1", edited=f"{alias}.1", change=torch.zeros_like
    )
    assert torch.equal(post, torch.zeros_like(post))


def test_saes_at_sites_within_a_block_see_each_others_changes_in_any_order(made):
    model, shift = made("llama"), torch.ones(32)
    for order in (("resid_pre.1", "resid_mid.1"), ("resid_mid.1", "resid_pre.1")):
        seen = {}
        hooks = [
            hooked(
                resolve(model, site),
                (lambda x: x + shift)
                if site == "resid_pre.1"
                else lambda x: seen.update(mid=x.clone()),
            )
            for site in order
        ]
        for hook in hooks:
            hook.__enter__()
        pre, attention, _ = read(model, "resid_pre.1", "attn_out.1")
        for hook in reversed(hooks):
            hook.__exit__(None, None, None)
        torch.testing.assert_close(seen["mid"], pre + attention)


@pytest.mark.parametrize(
    "kind, site, why",
    [
        (
            "phi",
            "resid_mid.1",
            "attention and MLP of its block read the same activations, so there is no stream between them",
        ),
        (
            "rwkv",
            "attn_out.0",
            "no outputs of its block's parts sum up to what the block adds",
        ),  # its first block normalises the stream itself
    ],
)
def test_an_alias_without_a_meaning_is_refused_with_the_reason(made, kind, site, why):
    with pytest.raises(InputError, match=f"site '{site}' is refused: {why}.*Name a module instead"):
        resolve(made(kind), site)


class Block(nn.Module):
    """x + attention, then + MLP; with `twist` what is added is no sum of the parts' outputs."""

    def __init__(self, twist):
        super().__init__()
        self.attn, self.mlp, self.twist = nn.Linear(8, 8), nn.Linear(8, 8), twist

    def forward(self, x):
        x = x + torch.tanh(self.attn(x)) if self.twist == "tanh" else x + self.attn(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, twist="", times=1):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.times, self.twist = (
            nn.Embedding(50, 8),
            nn.ModuleList(Block(twist) for _ in range(3)),
            times,
            twist,
        )

    def forward(self, ids):
        if self.twist == "fails":
            raise ZeroDivisionError("not today")
        x = self.embed(ids)
        for _ in range(self.times):
            for block in self.blocks:
                x = block(x)
                x = x + 1 if self.twist == "between" else x
        return x


def test_any_model_with_blocks_has_the_aliases():
    model = Model()
    assert resolve(model, "attn_out.1") == Site(model.blocks[1].attn, "out")
    assert resolve(model, "resid_mid.-1").module is model.blocks[2].attn


@pytest.mark.parametrize(
    "model, site, why",
    [
        (
            Model("tanh"),
            "attn_out.1",
            "no outputs of its block's parts sum up to what the block adds to the residual stream",
        ),
        (Model(times=2), "resid_post.1", "its block runs 2 times in one pass"),
        (Model("between"), "resid_post.1", "what its block gives is not what the next block takes"),
        (
            Model("fails"),
            "resid_pre.0",
            r"a pass over 8 tokens fails \(ZeroDivisionError: not today\)",
        ),
    ],
    ids=["twisted", "repeated", "between", "failing"],
)
def test_what_a_pass_does_not_confirm_is_refused(model, site, why):
    with pytest.raises(InputError, match=f"site '{site}' is refused: {why}"):
        resolve(model, site)


def test_confirming_leaves_a_model_as_it_was():
    model = Model().train()
    resolve(model, "resid_mid.1")
    assert all(module.training for module in model.modules())
    assert all(
        not module._forward_hooks
        and not module._forward_pre_hooks
        and "forward" not in vars(module)
        for module in model.modules()
    )


def test_a_block_that_goes_on_in_place_does_not_change_what_was_seen(tiny_lm):
    lm = LM(str(tiny_lm("llama")), "resid_post.0")
    tokens, full = ids(), torch.ones(2, 7, dtype=torch.bool)
    clean = lm.run_with_cache(tokens, full)
    handle = lm.model.model.layers[1].register_forward_pre_hook(
        lambda module, args: args[0].mul_(1.5) is None or None
    )
    cached = lm.run_with_cache(tokens, full)
    first, second = lm.run_patched(cached, lambda x: x), lm.run_patched(cached, lambda x: x)
    handle.remove()
    assert torch.equal(cached.x, clean.x)
    assert torch.equal(first, second) and torch.equal(first, cached.logits)


def test_looking_at_a_model_is_not_seen_by_what_is_attached_to_it():
    model, seen = Model(), []
    with hooked(resolve(model, "blocks.0.mlp"), lambda x: seen.append(x.shape)):
        resolve(model, "attn_out.1")
        assert seen == []
        model(torch.zeros(1, 3, dtype=torch.long))
    assert seen == [(1, 3, 8)]


def test_a_module_may_be_named_from_the_base_model_on(made):
    model = made("llama")
    assert resolve(model, "layers.1.mlp") == resolve(model, "model.layers.1.mlp")
    assert resolve(model, "layers.1:in").module is resolve(model, "resid_pre.1").module
