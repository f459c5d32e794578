"""An SAE in a plain model: what is read is what is there, what is changed is what was asked for, and nothing stays behind."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from ksparse.acts.lm import LM
from ksparse.errors import InputError
from ksparse.interop.inside import ablate, attached, steer
from ksparse.sae.model import SAE, Code

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
    with attached(model, sae, SITE) as at:
        assert torch.equal(logits(model, tokens), clean)
    lm = LM(str(tiny_lm("gpt2")), site=SITE)
    x = lm.acts(tokens, torch.ones_like(tokens, dtype=torch.bool))
    assert torch.equal(at.x, x)
    assert torch.equal(at.code.values, sae.encode(x).values) and torch.equal(at.recon, sae(x))
    assert torch.equal(logits(model, tokens), clean)  # and no hook is left


def test_splicing_is_the_replay_of_the_evaluations(model, sae, tokens, tiny_lm):
    with attached(model, sae, SITE, error="drop"):
        spliced = logits(model, tokens)
    lm = LM(str(tiny_lm("gpt2")), site=SITE)
    torch.testing.assert_close(spliced, lm.replay(lm.watch(tokens, torch.ones_like(tokens, dtype=torch.bool)), sae))


def test_ablating_takes_out_a_latents_own_contribution_and_keeps_the_error(model, sae, tokens):
    with attached(model, sae, SITE) as at:
        logits(model, tokens)
    latent = int(at.code.indices[0, 3, 0])
    value = (at.code.values * (at.code.indices == latent)).sum(-1, keepdim=True)
    wanted = at.x - value * sae.W_dec[latent] * sae.normalize(at.x).scale
    seen = []
    handle = model.transformer.h[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with attached(model, sae, SITE, edit=ablate(latent)):
        logits(model, tokens)
    handle.remove()
    torch.testing.assert_close(seen[0], wanted)


def test_ablating_what_is_not_active_changes_nothing(model, sae, tokens):
    with attached(model, sae, SITE) as at:
        clean = logits(model, tokens)
    active = set(at.code.indices[at.code.values > 0].tolist())
    with attached(model, sae, SITE, edit=ablate(*(set(range(40)) - active))):
        torch.testing.assert_close(logits(model, tokens), clean)


def test_steering_sets_a_latent_whether_it_was_active_or_not(sae):
    code = Code(torch.tensor([[3.0, 1.0]]), torch.tensor([[5, 7]]))
    dense = steer({5: 0.5, 9: 2.0})(code, sae).dense(40)
    assert dense[0, [5, 7, 9]].tolist() == [0.5, 1.0, 2.0] and dense.count_nonzero() == 3


def test_where_confines_the_change(model, sae, tokens):
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[:, 5] = True
    clean = logits(model, tokens)
    with attached(model, sae, SITE, error="drop", where=where):
        changed = logits(model, tokens)
    assert torch.equal(changed[:, :5], clean[:, :5]) and not torch.allclose(changed[:, 5:], clean[:, 5:])
    with pytest.raises(InputError, match=r"where is of shape \[3, 2\], the activations at resid_post.1 are of \[3, 9\]"), attached(model, sae, SITE, error="drop", where=where[:, :2]):
        logits(model, tokens)


def test_several_saes_at_once_are_one_after_the_other(model, sae, make_sae, tokens):
    other = make_sae("topk", "none", d=16, n=24, k=3)
    with attached(model, sae, "resid_post.0", error="drop") as first, attached(model, other, "mlp_out.2", error="drop") as second:
        logits(model, tokens)
    assert first.code.values.shape[-1] == 4 and second.code.values.shape[-1] == 3
    with attached(model, other, "mlp_out.2") as alone:
        logits(model, tokens)
    assert not torch.allclose(second.x, alone.x)


def test_gradients_reach_the_activation_through_the_sae(model, sae, tokens):
    with attached(model, sae, SITE) as at:
        logits(model, tokens)
    latent = int(at.code.indices[0, 3, 0])
    with attached(model, sae, SITE, edit=ablate(latent)):
        logits(model, tokens)[..., 0].sum().backward()
    assert sae.W_dec.grad[latent].abs().sum() > 0 and sae.W_enc.grad[latent].abs().sum() > 0


def test_hooks_are_gone_after_an_error(model, sae, tokens):
    clean = logits(model, tokens)
    with pytest.raises(RuntimeError), attached(model, sae, SITE, error="drop"):
        raise RuntimeError
    assert torch.equal(logits(model, tokens), clean)


def test_a_model_with_hook_points_of_its_own_is_used_by_their_names(sae, tokens):
    """As TransformerLens' models are: modules that pass what they get, named blocks.I.hook_resid_post."""
    block = torch.nn.Module()
    block.hook_resid_post = torch.nn.Identity()
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([block])
    x = torch.randn(2, 5, 16)
    with attached(model, sae, "blocks.0.hook_resid_post", error="drop") as at:
        assert torch.equal(model.blocks[0].hook_resid_post(x), sae(x))
    assert torch.equal(at.code.indices, sae.encode(x).indices)


def test_unit_norm_does_not_see_whether_a_model_was_centred(make_sae):
    """TransformerLens centres what writes to the residual stream of models with LayerNorm, unless told not to."""
    sae = make_sae("topk", "unit_norm", d=16, n=40, k=4)
    x = 3 * torch.randn(50, 16) + 1
    centred = x - x.mean(-1, keepdim=True)
    assert torch.equal(sae.encode(x).indices, sae.encode(centred).indices)
    torch.testing.assert_close(sae.encode(x).values, sae.encode(centred).values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae(x) - x.mean(-1, keepdim=True), sae(centred), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("use, message", [
    (lambda m, s: attached(m, SAE(s.shape)), "does not say at which site it belongs; name it"),
    (lambda m, s: attached(m, s, "resid_post.9"), "site 'resid_post.9' does not exist"),
    (lambda m, s: attached(m, s, SITE, error="forget"), "error is 'forget'; it must be 'keep' or 'drop'"),
])
def test_what_is_wrong_is_named(model, sae, use, message):
    with pytest.raises(InputError, match=message), use(model, sae):
        pass


def test_a_latent_that_there_is_not_is_named(model, sae, tokens):
    with pytest.raises(InputError, match="there is no latent 40; this SAE has 0 to 39"), attached(model, sae, SITE, edit=ablate(40)):
        logits(model, tokens)
    with attached(model, sae, SITE) as at, pytest.raises(InputError, match="nothing has gone through resid_post.1 yet, so there is no code"):
        at.code
