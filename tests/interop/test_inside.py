"""An SAE in a plain model: what is read is what is there, what is changed is what was asked for, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.sae.model import SAE
from ksparse.steering import attach, steer

SITE = "resid_post.1"


@pytest.fixture(scope="module")
def model(tiny_lm):
    return AutoModelForCausalLM.from_pretrained(tiny_lm("gpt2")).eval().requires_grad_(False)


@pytest.fixture
def tokens():
    return torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def sae(make_sae):
    return make_sae("topk", "layer_norm", d=16, n=40, k=4)


def logits(model, tokens):
    return model(input_ids=tokens).logits


def test_reading_changes_nothing_and_sees_what_our_lm_sees(model, sae, tokens, tiny_lm):
    clean = logits(model, tokens)
    with attach(model, sae, SITE, positions="all") as at:
        assert torch.equal(logits(model, tokens), clean)
    lm = LM(str(tiny_lm("gpt2")), site=SITE)
    x = lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert torch.equal(at.x, x)
    assert torch.equal(at.code.values, sae.encode(x).values) and torch.equal(sae(at.x), sae(x))
    assert torch.equal(logits(model, tokens), clean)  # and no hook is left


def test_splicing_is_the_replay_of_the_evaluations(model, sae, tokens, tiny_lm):
    with attach(model, sae, SITE, error="drop", positions="all"):
        spliced = logits(model, tokens)
    lm = LM(str(tiny_lm("gpt2")), site=SITE)
    torch.testing.assert_close(
        spliced,
        lm.run_patched(lm.run_with_cache(tokens, torch.ones_like(tokens, dtype=torch.bool)), sae),
    )


def test_ablating_takes_out_a_latents_own_contribution_and_keeps_the_error(model, sae, tokens):
    with attach(model, sae, SITE, positions="all") as at:
        logits(model, tokens)
    latent = int(at.code.indices[0, 3, 0])
    value = (at.code.values * (at.code.indices == latent)).sum(-1, keepdim=True)
    wanted = at.x - value * sae.W_dec[latent] * sae.normalize(at.x).scale
    seen = []
    handle = model.transformer.h[2].register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    with steer(model, sae, {latent: 0.0}, unit="value", site=SITE, positions="all"):
        logits(model, tokens)
    handle.remove()
    torch.testing.assert_close(seen[0], wanted)


def test_ablating_what_is_not_active_changes_nothing(model, sae, tokens):
    with attach(model, sae, SITE, positions="all") as at:
        clean = logits(model, tokens)
    active = set(at.code.indices[at.code.values > 0].tolist())
    with steer(model, sae, dict.fromkeys(set(range(40)) - active, 0.0), site=SITE, positions="all"):
        torch.testing.assert_close(logits(model, tokens), clean)


def test_several_saes_at_once_are_one_after_the_other(model, sae, make_sae, tokens):
    other = make_sae("topk", "none", d=16, n=24, k=3)
    with (
        attach(model, sae, "resid_post.0", error="drop", positions="all") as first,
        attach(model, other, "mlp_out.2", error="drop", positions="all") as second,
    ):
        logits(model, tokens)
    assert first.code.values.shape[-1] == 4 and second.code.values.shape[-1] == 3
    with attach(model, other, "mlp_out.2", positions="all") as alone:
        logits(model, tokens)
    assert not torch.allclose(second.x, alone.x)


def test_gradients_reach_the_activation_through_the_sae(model, sae, tokens):
    with attach(model, sae, SITE, positions="all") as at:
        logits(model, tokens)
    latent = int(at.code.indices[0, 3, 0])
    with steer(model, sae, {latent: 0.0}, unit="value", site=SITE, positions="all"):
        logits(model, tokens)[..., 0].sum().backward()
    assert sae.W_dec.grad[latent].abs().sum() > 0 and sae.W_enc.grad[latent].abs().sum() > 0


def test_hooks_are_gone_after_an_error(model, sae, tokens):
    clean = logits(model, tokens)
    with pytest.raises(RuntimeError), attach(model, sae, SITE, error="drop", positions="all"):
        raise RuntimeError
    assert torch.equal(logits(model, tokens), clean)


def test_a_model_with_hook_points_of_its_own_is_used_by_their_names(sae, tokens):
    """As TransformerLens' models are: modules that pass what they get, named blocks.I.hook_resid_post."""
    block = torch.nn.Module()
    block.hook_resid_post = torch.nn.Identity()
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    x = torch.randn(2, 5, 16)
    with attach(model, sae, "blocks.0.hook_resid_post", error="drop", positions="all") as at:
        assert torch.equal(model.blocks[0].hook_resid_post(x), sae(x))
    assert torch.equal(at.code.indices, sae.encode(x).indices)


def test_unit_norm_does_not_see_whether_a_model_was_centred(make_sae):
    """TransformerLens centres what writes to the residual stream of models with LayerNorm, unless told not to."""
    sae = make_sae("topk", "unit_norm", d=16, n=40, k=4)
    x = 3 * torch.randn(50, 16) + 1
    centred = x - x.mean(-1, keepdim=True)
    assert torch.equal(sae.encode(x).indices, sae.encode(centred).indices)
    torch.testing.assert_close(
        sae.encode(x).values, sae.encode(centred).values, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        sae(x) - x.mean(-1, keepdim=True), sae(centred), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    "use, message",
    [
        (
            lambda m, s: attach(m, SAE(s.shape)),
            "does not say at which site it was trained; give one",
        ),
        (
            lambda m, s: attach(m, s, "resid_post.9", positions="all"),
            "site 'resid_post.9' does not exist",
        ),
        (
            lambda m, s: attach(m, s, SITE, error="forget", positions="all"),
            "error is 'forget'; it must be 'keep' or 'drop'",
        ),
    ],
)
def test_what_is_wrong_is_named(model, sae, use, message):
    with pytest.raises(InputError, match=message), use(model, sae):
        pass


def test_a_latent_that_there_is_not_is_named(model, sae, tokens):
    with (
        pytest.raises(InputError, match="latent 40 does not exist: this SAE has latents 0 to 39"),
        steer(model, sae, {40: 0.0}, unit="value", site=SITE, positions="all"),
    ):
        logits(model, tokens)
