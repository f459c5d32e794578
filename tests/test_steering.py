"""An SAE in a running LM changes what its decoder says and nothing else, whatever calls the LM."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers as T
from torch import nn

from ksparse import steering
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.lm.sites import resolve
from ksparse.lm.tokens import token_strings
from ksparse.sae.model import SAE, Shape
from ksparse.steering import (
    attach,
    attribute,
    attribute_positions,
    clamped,
    compare,
    continue_text,
    logit_difference,
    scaled,
    steer,
)
from ksparse.steering.calls import holds_tokens

D, N, K, VOCABULARY = 8, 24, 3, 11


class Linear(nn.Module):
    """A causal LM that is linear after its site: embedding, a block that passes on, unembedding."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed, self.block, self.head = (
            nn.Embedding(VOCABULARY, D),
            nn.Identity(),
            nn.Linear(D, VOCABULARY),
        )
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.head(self.block(self.embed(input_ids))))


def make_sae(d=D, n=N, k=K, *, seed=0, dtype=torch.float64, metadata=None, **shape) -> SAE:
    sae = SAE(Shape(d, n, k, **shape), metadata or {})
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype) / d**0.5
    return sae


@pytest.fixture
def tiny(small_acts):
    """Return (lm, its sae) on a tiny GPT-2, with the policy that training would have given."""
    acts = small_acts()
    lm = LM(acts=acts)
    return lm, make_sae(
        lm.d_model,
        32,
        4,
        dtype=torch.float32,
        metadata={
            "acts": dataclasses.asdict(acts),
            "policy": {"keep": "text", "bos_token": 0, "separator_token": 0},
        },
    )


@pytest.mark.parametrize("kind", ["unit_norm", "none"])
def test_clamping_changes_logits_as_the_decoder_row_predicts(kind):
    model, sae, ids = Linear(), make_sae(normalize=kind), torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    before = model(ids).logits
    inputs = sae.normalize(model.embed(ids))
    code = sae.encode_normalized(inputs.x)
    inactive = next(i for i in range(N) if not (code.indices == i).any())
    active = int(code.indices[0, 0, 0])
    for latent, value in ((active, -5.0), (active, 0.0), (inactive, 2.5)):
        with steer(model, sae, {latent: value}, unit="value", site="block"):
            after = model(ids).logits
        acts = (code.values * (code.indices == latent)).sum(-1, keepdim=True)
        expected = (value - acts) * inputs.scale * (sae.W_dec[latent] @ model.head.weight.T)
        assert torch.allclose(after - before, expected, atol=1e-10)
    assert torch.equal(model(ids).logits, before)


def test_scaling_multiplies_the_latents_own_activation():
    model, sae, ids = Linear(), make_sae(), torch.tensor([[3, 1, 4]])
    latent = int(sae.encode(model.embed(ids)).indices[0, 1, 0])
    with steer(model, sae, scale={latent: 0.0}, site="block"):
        none = model(ids).logits
    with steer(model, sae, {latent: 0.0}, unit="value", site="block"):
        assert torch.equal(model(ids).logits, none)
    with steer(model, sae, scale={latent: 2.0}, site="block"):
        assert torch.allclose(
            model(ids).logits - model.head(model.embed(ids)), model.head(model.embed(ids)) - none
        )


def test_attribution_on_a_linear_model_is_what_ablation_takes_away():
    model, sae = Linear(), make_sae(metadata={"policy": {"keep": "all"}})
    lm = SimpleNamespace(
        model=model,
        site=resolve(model, "block"),
        module=model.block,
        options=SimpleNamespace(lm="linear", site="block"),
        check_changes=lambda: None,
        tokenize=lambda prompt: torch.tensor([[int(c) for c in prompt]]),
    )
    model.embed.weight.data, model.head.weight.data, model.head.bias.data = (
        t.float() for t in (model.embed.weight, model.head.weight, model.head.bias)
    )
    sae = sae.float()
    contributions = attribute_positions(lm, sae, "31415", lambda logits: logits[2] - logits[7])
    scores = attribute(lm, sae, ["31415", "926"], lambda logits: logits[2] - logits[7])
    assert (
        contributions.values[:-1].abs().max() == 0
    )  # nothing before the last token reaches its logits here
    for latent in range(N):
        lost = []
        for prompt in ("31415", "926"):
            ids = lm.tokenize(prompt)
            with steer(model, sae, {latent: 0.0}, unit="value", site="block"):
                gone = model(ids).logits[0, -1]
            lost.append((model(ids).logits[0, -1] - gone)[[2, 7]])
        assert scores[latent].item() == pytest.approx(
            sum((each[0] - each[1]).item() for each in lost) / 2, abs=1e-5
        )
    assert (scores != 0).sum() >= K


@pytest.mark.parametrize("site", ["resid_mid.1", "mlp_out.1"])
def test_attribution_at_a_site_that_is_a_sum_is_the_slope_of_scaling(small_acts, site):
    lm = LM(acts=small_acts(site=site))
    torch.manual_seed(0)
    for name, parameter in lm.model.named_parameters():  # large enough for slopes to be measured
        parameter.data = torch.randn(parameter.shape) * (0.3 if parameter.ndim > 1 else 0.5)
    sae = make_sae(lm.d_model, 32, 4, dtype=torch.float32, metadata={"policy": {"keep": "all"}})
    metric, prompt = lambda logits: logits[5] - logits[6], "the cat sat on a mat"
    scores = attribute(lm, sae, [prompt], metric)
    latent = int(scores.abs().argmax())

    def scored(factor):
        with steer(lm.model, sae, scale={latent: factor}, site=site):
            return metric(lm.model(lm.tokenize(prompt)).logits[0, -1].double()).item()

    assert abs(scores[latent]) > 1e-3
    slope = (scored(1.01) - scored(0.99)) / 0.02
    assert scores[latent].item() == pytest.approx(slope, rel=0.02)


def test_attributions_add_up_to_the_first_order_effect_through_a_real_lm(tiny):
    lm, sae = tiny
    metric = lambda logits: logits[5] - logits[6]  # noqa: E731
    code = attribute_positions(lm, sae, "the cat sat on a mat", metric)
    latent = int(code.indices.flatten()[code.values.abs().argmax()])
    score = attribute(lm, sae, ["the cat sat on a mat"], metric)[latent].item()
    with torch.no_grad():
        ids = lm.tokenize("the cat sat on a mat")
        ends = []
        for factor in (1 - 1e-2, 1 + 1e-2):
            with steer(lm.model, sae, scale={latent: factor}):
                ends.append(metric(lm.model(ids).logits[0, -1].double()).item())
    assert score == pytest.approx((ends[1] - ends[0]) / 2e-2, rel=1e-2)


def test_the_first_position_and_bos_are_left_alone_as_in_training(tiny):
    lm, sae = tiny
    ids = torch.tensor([[7, 9, 0, 12, 11]])  # without BOS first: position 0 takes its role
    with attach(lm.model, sae, change=clamped({3: 9.0})) as tap:
        lm.model(ids)
    assert tap.keep.tolist() == [[False, True, False, True, True]]
    assert tap.code.values.shape == (1, 5, 4) and tap.x.shape == (1, 5, 16)
    with attach(lm.model, sae, change=clamped({3: 9.0}), positions="all") as tap:
        lm.model(ids)
    assert tap.keep.all()
    mask = torch.tensor([[True, False, False, False, True]])
    with attach(lm.model, sae, change=clamped({3: 9.0}), positions=mask) as tap, torch.no_grad():
        lm.model(ids)
    assert torch.equal(tap.keep, mask)
    padded = torch.tensor([[1, 1, 7, 9, 12]])
    with attach(lm.model, sae) as tap:
        lm.model(padded, attention_mask=torch.tensor([[0, 0, 1, 1, 1]]))
    assert tap.keep.tolist() == [[False, False, False, True, True]]


def test_generation_with_a_cache_is_steered_like_the_whole_context(tiny):
    lm, sae = tiny
    ids = lm.tokenize("the cat sat on")
    with steer(lm.model, sae, {5: 3.0}, unit="value"), torch.no_grad():
        new = lm.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        whole = lm.model(new.sequences[:, :-1], use_cache=False).logits[0, ids.shape[1] - 1 :]
    assert torch.allclose(torch.cat(new.logits), whole, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(
            lm.model(new.sequences[:, :-1]).logits[0, ids.shape[1] - 1 :], whole, atol=1e-2
        )


def test_dropping_the_error_splices_the_reconstruction_in(tiny):
    lm, sae = tiny
    ids = lm.tokenize("two black dogs run over old green hills")
    watched = lm.run_with_cache(ids, torch.ones_like(ids, dtype=torch.bool))

    def spliced(x):
        return torch.cat([x[:, :1], sae(x[:, 1:])], 1)

    with torch.no_grad(), attach(lm.model, sae, error="drop"):
        logits = lm.model(ids).logits
    assert torch.allclose(logits, lm.run_patched(watched, spliced), atol=1e-5)


def test_reading_changes_no_bit_and_hooks_are_gone_afterwards(tiny):
    lm, sae = tiny
    ids = lm.tokenize("the cat sat on")
    before = lm.model(ids).logits
    with attach(lm.model, sae) as tap:
        assert torch.equal(lm.model(ids).logits, before)
    assert torch.equal(tap.x[0, 1:], lm("the cat sat on")) and torch.allclose(tap.recon, sae(tap.x))
    with pytest.raises(ZeroDivisionError), steer(lm.model, sae, {1: 50.0}, unit="value"):
        1 / 0
    assert torch.equal(lm.model(ids).logits, before)


def test_two_saes_at_two_sites_are_attached_at_once(tiny):
    lm, sae = tiny
    ids = lm.tokenize("the cat sat on")
    with steer(lm.model, sae, {1: 4.0}, unit="value", site="resid_post.0"):
        one = lm.model(ids).logits
        with steer(lm.model, sae, {2: 4.0}, unit="value", site="resid_post.1") as tap:
            two = lm.model(ids).logits
            seen = tap.x
    assert not torch.allclose(one, two) and not torch.allclose(seen[0, 1:], lm("the cat sat on"))


def test_a_bfloat16_lm_is_steered_in_its_own_precision(small_acts):
    acts = small_acts(lm_dtype="bfloat16")
    lm = LM(acts=acts)
    sae = make_sae(
        lm.d_model, 32, 4, dtype=torch.float32, metadata={"acts": dataclasses.asdict(acts)}
    )
    with steer(lm.model, sae, {3: 2.0}, unit="value"):
        assert lm.model(lm.tokenize("the cat")).logits.dtype == torch.bfloat16


def test_continuations_are_the_same_for_the_same_seed_and_the_shown_tokens_moved_most(tiny):
    lm, sae = tiny
    found = compare(lm, sae, "the cat", {4: 6.0}, unit="value", tokens=5, temperature=1.0, seed=3)
    again = continue_text(lm, "the cat", tokens=5, temperature=1.0, seed=3)
    assert found.before.tokens == again.tokens and 1 <= len(again.tokens) <= 5
    assert found.kl > 0
    moved = found.moved(4)
    changes = (found.after.log_probs.exp() - found.before.log_probs.exp()).abs()
    assert [token for token, _, _ in moved] == changes.topk(4).indices.tolist()
    assert (
        compare(lm, sae, "the cat", {4: 6.0}, unit="value", tokens=5).before.tokens
        == continue_text(lm, "the cat", tokens=5).tokens
    )


def test_changes_are_sums_of_their_parts():
    sae = make_sae()
    code = sae.encode(
        torch.randn(5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    )
    both = steering.sum_changes(clamped({1: 2.0}), scaled({2: 3.0}), clamped({}))(code)
    dense = code.dense(N)
    expected = torch.zeros_like(dense)
    expected[:, 1], expected[:, 2] = 2 - dense[:, 1], 2 * dense[:, 2]
    assert torch.allclose(both.dense(N), expected)


def masked(lm, sae):
    with attach(lm.model, sae, positions=torch.ones(1, 2, dtype=torch.bool)):
        lm.model(lm.tokenize("the"))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda lm, sae: steer(lm.model, sae).__enter__(), "steering needs a latent"),
        (
            lambda lm, sae: steer(lm.model, sae, {32: 1.0}, unit="value").__enter__(),
            "latent 32 does not exist: this SAE has latents 0 to 31",
        ),
        (
            lambda lm, sae: steer(lm.model, sae, {-1: 1.0}, unit="value").__enter__(),
            "latent -1 does not exist",
        ),
        (
            lambda lm, sae: steer(lm.model, sae, {3: float("nan")}, unit="value").__enter__(),
            "latent 3 cannot be clamped to or scaled by nan; give a finite number",
        ),
        (
            lambda lm, sae: steer(lm.model, sae, scale={3: float("inf")}).__enter__(),
            "latent 3 cannot be clamped to or scaled by inf; give a finite number",
        ),
        (
            lambda lm, sae: steer(lm.model, sae, {3: torch.ones(2)}, unit="value").__enter__(),
            "latent 3 cannot be clamped to or scaled by tensor.*; give a finite number",
        ),
        (
            lambda lm, sae: steer(lm.model, sae, {3.0: 1.0}, unit="value").__enter__(),
            "latent 3.0 is not a latent",
        ),
        (
            lambda lm, sae: steer(lm.model, sae, {True: 1.0}, unit="value").__enter__(),
            "latent True is not a latent",
        ),
        (
            lambda lm, sae: attach(lm, sae).__enter__(),
            "attached to a torch module, got LM; of a ksparse.LM, give lm.model",
        ),
        (
            lambda lm, sae: attach(lm.model, sae, positions=torch.tensor([[0.2, 0.9]])).__enter__(),
            "other values than True and False",
        ),
        (
            lambda lm, sae: steer(
                lm.model, sae, {3: 1.0}, unit="value", scale={3: 0.5}
            ).__enter__(),
            "latent 3 is both clamped and scaled",
        ),
        (
            lambda lm, sae: attach(lm.model, SAE(sae.shape)).__enter__(),
            "does not say at which site",
        ),
        (
            lambda lm, sae: attach(lm.model, sae, "resid_post.9").__enter__(),
            "site 'resid_post.9' does not exist",
        ),
        (
            lambda lm, sae: attach(lm.model, sae, error="lose").__enter__(),
            "error is 'lose'; it must be 'keep' or 'drop'",
        ),
        (
            lambda lm, sae: attach(lm.model, sae, positions="some").__enter__(),
            "positions is 'some'; it must be 'trained', 'all', or a mask",
        ),
        (
            lambda lm, sae: attach(lm.model, sae).__enter__().recon,
            "no activation has reached the site yet, so there is no x",
        ),
        (
            lambda lm, sae: masked(lm, sae),
            r"positions are of shape \[1, 2\], the activations of \[1, 4\]",
        ),
        (
            lambda lm, sae: continue_text(lm, "the", tokens=200),
            "the prompt has 4 tokens, 200 more make 204; .* takes 128",
        ),
        (lambda lm, sae: continue_text(lm, "the", tokens=0), "a continuation of 0 tokens"),
        (lambda lm, sae: continue_text(lm, "the", temperature=-1), "temperature is -1"),
        (lambda lm, sae: attribute(lm, sae, [], lambda logits: logits[0]), "at least one prompt"),
        (
            lambda lm, sae: logit_difference(lm, ["the cat sat"]),
            r"'the cat sat' is \d+ tokens of .*; give a text that is a single token",
        ),
        (lambda lm, sae: logit_difference(lm, []), "at least one token to look toward"),
        (
            lambda lm, sae: steering.load_lm(SAE(sae.shape)),
            "does not say which LM it was trained on",
        ),
    ],
)
def test_what_cannot_be_steered_is_refused_with_the_reason(tiny, call, message):
    with pytest.raises(InputError, match=message):
        call(*tiny)


# ---- what is called with what


def test_a_site_that_no_call_reaches_is_not_steered_in_silence(tiny):
    lm, sae = tiny
    lm.model.aside = nn.Linear(16, 16)
    with pytest.raises(
        InputError,
        match="site 'aside' was not reached in 2 calls of the model, so nothing was read or changed",
    ):
        with steer(lm.model, sae, {1: 4.0}, unit="value", site="aside"):
            lm.model(lm.tokenize("the"))
            lm.model(lm.tokenize("the"))
    with steer(lm.model, sae, {1: 4.0}, unit="value", site="aside"):
        pass  # nothing was asked of the model


def test_a_site_that_runs_twice_in_a_call_is_refused_and_one_in_two_calls_is_not(tiny):
    lm, sae = tiny
    mlp, block = lm.model.transformer.h[1].mlp, lm.model.transformer.h[1]
    with steer(lm.model, sae, {1: 4.0}, unit="value", site="transformer.h.1.mlp"):
        lm.model(lm.tokenize("the"))
        lm.model(lm.tokenize("the"))
        mlp(torch.zeros(1, 2, 16))  # by somebody else, outside a call
    handle = block.register_forward_hook(lambda module, args, output: (mlp(args[0]), None)[1])
    with pytest.raises(
        InputError, match="site 'transformer.h.1.mlp' runs several times in one call"
    ):
        with steer(lm.model, sae, {1: 4.0}, unit="value", site="transformer.h.1.mlp"):
            lm.model(lm.tokenize("the"))
    handle.remove()


RECURRENT = {
    "mamba": lambda: T.MambaConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=300, state_size=4
    ),
    "mamba2": lambda: T.Mamba2Config(
        hidden_size=16,
        num_hidden_layers=2,
        vocab_size=300,
        state_size=4,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        expand=2,
    ),
    "falcon_mamba": lambda: T.FalconMambaConfig(
        hidden_size=16, num_hidden_layers=2, vocab_size=300, state_size=4
    ),
    "rwkv": lambda: T.RwkvConfig(
        hidden_size=16,
        attention_hidden_size=16,
        num_hidden_layers=2,
        vocab_size=300,
        context_length=128,
    ),
    "jamba": lambda: T.JambaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=300,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=4,
        use_mamba_kernels=False,
    ),
    "llama": lambda: T.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=300,
    ),
    "bart": lambda: T.BartConfig(  # whose base module is not called by the model
        d_model=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        vocab_size=300,
        max_position_embeddings=64,
        is_decoder=True,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", RECURRENT)
def test_generation_is_steered_alike_with_every_kind_of_memory(kind):
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(RECURRENT[kind]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    sae = make_sae(
        16,
        32,
        4,
        dtype=torch.float32,
        metadata={"policy": {"keep": "text", "bos_token": 1, "separator_token": 1}},
    )
    ids, block = torch.tensor([[1, 70, 80, 90, 100]]), resolve(model, "resid_post.0").module
    name = next(name for name, module in model.named_modules() if module is block)
    how = {
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    logits = []
    for cache in (True, False):
        with steer(model, sae, {3: 4.0}, unit="value", site=name):
            logits.append(
                torch.stack(
                    model.generate(
                        ids, attention_mask=torch.ones_like(ids), use_cache=cache, **how
                    ).logits
                )
            )
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)
    plain = torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **how).logits)
    assert not torch.allclose(plain[0], logits[0][0], atol=1e-3), "the prompt is steered too"


class Wrapped(nn.Module):
    """A model within another, as users keep them; whoever generates calls the inner one alone."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.times = inner, 1

    def forward(self, ids):
        return [
            self.inner(input_ids=part, use_cache=False).logits for part in ids.chunk(self.times)
        ]


def test_a_model_within_a_model_is_steered_alike_whichever_is_called(tiny):
    lm, sae = tiny
    wrapped, ids = Wrapped(lm.model), torch.tensor([[0, 5, 6, 7], [0, 8, 9, 5]])
    name = "inner." + next(name for name, module in lm.model.named_modules() if module is lm.module)
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with steer(lm.model, sae, {3: 9.0}, unit="value"):
        expected = lm.model.generate(ids, attention_mask=torch.ones_like(ids), **how)
        logits = lm.model(ids).logits
    with steer(wrapped, sae, {3: 9.0}, unit="value", site=name):
        made = wrapped.inner.generate(ids, attention_mask=torch.ones_like(ids), **how)
        assert torch.equal(made, expected)
        assert torch.equal(wrapped(ids)[0], logits)
        wrapped.times = 2  # each part of the batch is a call of its own
        torch.testing.assert_close(torch.cat(wrapped(ids)), logits)


def test_a_call_that_fails_leaves_nothing_behind(tiny):
    lm, sae = tiny
    ids = torch.tensor([[0, 5, 6, 7]])
    with steer(lm.model, sae, {3: 9.0}, unit="value"):
        expected = lm.model(ids).logits
    with steer(lm.model, sae, {3: 9.0}, unit="value"):
        bad = lm.model.get_output_embeddings().register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.model(ids)
        bad.remove()
        assert torch.equal(lm.model(ids).logits, expected)


def test_contexts_longer_than_the_sae_was_trained_on_have_a_word_once(tiny, caplog):
    lm, sae = tiny
    sae.metadata["policy"] |= {"context": 6}
    with attach(lm.model, sae), caplog.at_level("WARNING", logger="ksparse"):
        lm.model(torch.full((1, 6), 7))
        assert not caplog.records
        lm.model(torch.full((1, 9), 7))
        lm.model(torch.full((1, 9), 7))
    assert [record.getMessage() for record in caplog.records] == [
        "contexts of 9 tokens are longer than the 6 that this autoencoder was trained on; it has not seen the positions beyond"
    ]


@pytest.mark.parametrize(
    "state, continues",
    [
        (None, False),
        ([], False),
        ([None], False),
        ([torch.zeros(1)], True),
        (torch.zeros(1), True),
        (SimpleNamespace(seqlen_offset=0), False),
        (SimpleNamespace(seqlen_offset=3), True),
        (SimpleNamespace(get_seq_length=lambda: 0), False),
        (SimpleNamespace(get_seq_length=lambda: 4), True),
        (SimpleNamespace(has_previous_state=True), True),
        (SimpleNamespace(has_previous_state=False), False),
    ],
)
def test_a_memory_says_whether_it_holds_earlier_tokens(state, continues):
    assert holds_tokens(state) is continues


def test_a_value_far_beyond_what_a_latent_can_reach_is_warned_of(tiny, caplog):
    lm, sae = tiny
    with caplog.at_level("WARNING", logger="ksparse"):
        with steer(lm.model, sae, {1: 0.5}, unit="value", largest={1: 0.4}):
            pass
        assert not caplog.records
        with steer(lm.model, sae, {1: 4.0}, unit="value", largest={1: 0.4}):
            pass
        with steer(lm.model, sae, {1: 4e6}, unit="value"):
            pass
    assert [record.getMessage()[:20] for record in caplog.records] == [
        "latent 1 at 4 is 10 ",
        "latent 1 at 4e+06 is",
    ]


def test_an_sae_at_another_site_than_its_own_is_not_used_in_silence(tiny, caplog):
    lm, sae = tiny
    with (
        caplog.at_level("WARNING", logger="ksparse"),
        attach(lm.model, sae, "transformer.h.1"),
        attach(lm.model, sae),
    ):
        assert not caplog.records, "its own site by another name"
    with attach(lm.model, sae, "resid_post.0"):
        assert "is attached at resid_post.0, but was trained at resid_post.1" in caplog.text
    elsewhere = lm.at_site("resid_post.0")
    for call in (
        lambda force: compare(
            elsewhere, sae, "the cat", {1: 0.1}, unit="value", tokens=2, force=force
        ),
        lambda force: attribute(elsewhere, sae, ["the cat"], lambda logits: logits[3], force=force),
    ):
        with pytest.raises(
            InputError, match="site is 'resid_post.0', but 'resid_post.1' where the SAE was trained"
        ):
            call(False)
        call(True)


def test_a_continuation_is_the_likeliest_tokens_whatever_the_models_folder_says_of_generation(
    tiny_lm, tmp_path
):
    shutil.copytree(tiny_lm("llama"), tmp_path / "lm")
    plain = steering.continue_text(LM(str(tmp_path / "lm"), "resid_post.1"), "a cat", tokens=8)
    (tmp_path / "lm" / "generation_config.json").write_text(
        json.dumps(
            {
                "num_beams": 3,
                "repetition_penalty": 9.0,
                "suppress_tokens": plain.tokens[:1],
                "eos_token_id": "odd",
                "stop_strings": ["a"],
                "max_length": 2,
            }
        )
    )
    lm = LM(str(tmp_path / "lm"), "resid_post.1")
    told = lm.model.generation_config
    assert steering.continue_text(lm, "a cat", tokens=8).tokens == plain.tokens
    assert lm.model.generation_config is told


def test_a_choice_is_attributed_as_the_metric_of_its_tokens(tiny):
    lm, sae = tiny
    prompt, (toward, away, *_) = "the cat sat on", lm.tokens("ab")
    found = steering.attribute_choice(lm, sae, prompt, toward, away)
    metric = logit_difference(lm, [toward], [away])
    effects = torch.zeros(sae.n_latents, dtype=torch.float64)
    for latent, effect in found.effects().items():
        effects[latent] = effect
    torch.testing.assert_close(effects, attribute(lm, sae, [prompt], metric))
    with torch.no_grad():
        logits = lm.model(lm.tokenize(prompt)).logits[0, -1]
    assert found.value == pytest.approx(float(metric(logits)), abs=1e-5)
    assert "".join(found.tokens[1:]) == prompt and len(found.code.values) == len(found.tokens)
    first = next(iter(found.effects()))
    assert f"{first} " in repr(found).splitlines()[2] and f"latent {first}: " in found._repr_html_()
    sums = torch.tensor([abs(effect) for effect in found.effects().values()])
    assert (sums.diff() <= 0).all()


def test_a_comparison_marks_the_tokens_that_steering_changes_and_those_alone(tiny):
    lm, sae = tiny
    prompt = "the cat <b>"
    latent = int(sae.encode(lm(prompt)).indices[-1, 0])
    same = compare(lm, sae, prompt, {latent: 1.0}, unit="value", scale={}, tokens=1)
    found = compare(lm, sae, prompt, {latent: -300.0}, unit="value", tokens=4)
    differ = sum(a != b for a, b in zip(found.before.tokens, found.after.tokens))
    assert differ and found._repr_html_().count("background:") == differ
    assert (same.before.tokens == same.after.tokens) == ("background:" not in same._repr_html_())
    assert "<b>" not in found._repr_html_() and "&lt;b&gt;" in found._repr_html_()
    assert found.before.strings == token_strings(lm.tokenizer, found.before.tokens)
    assert f"KL {found.kl:.4f}" in repr(found) and prompt + found.after.text in repr(found)
