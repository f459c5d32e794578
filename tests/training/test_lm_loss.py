"""`sae.lm_loss`: the LM behind the site pulls at the reconstructions as autograd says, on whole contexts."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from contextlib import closing

import pytest
import torch

from ksparse.config import Recipe, SAEConfig, from_dict
from ksparse.data.contexts import Corpus
from ksparse.data.live import LiveStream
from ksparse.errors import InputError
from ksparse.evals.batches import HeldOutBatch
from ksparse.lm.head import LogitRows
from ksparse.lm.hooks import hooked
from ksparse.lm.model import LM
from ksparse.lm.sites import resolve
from ksparse.planning import flops
from ksparse.planning.sharing import stream_key
from ksparse.planning.steps import choose_step, prefetches
from ksparse.sae.model import SAE, Shape
from ksparse.training.lm_loss import LMLoss
from ksparse.training.source import ActivationSource
from ksparse.training.steps import autograd
from ksparse.training.train import train
from ksparse.training.trainer import start

CPU = torch.device("cpu")
SITES = ["resid_post.0", "resid_mid.1", "mlp_out.1", "attn_out.0", "resid_post.2"]


def contexts_of(lm, number=5, borders="pack"):
    """Return contexts of which some positions are left out, as at the borders of a batch."""
    acts = dataclasses.replace(lm.options, borders=borders)
    corpus = Corpus(acts, lm.tokenizer, "train")
    batch = corpus.batch(list(itertools.islice(corpus.contexts(), number)))
    keep = batch.keep.clone()
    keep[0, :4], keep[-1, 9:] = False, False
    return batch._replace(keep=keep)


def definition(lm, kind, contexts, recon):
    """Return the mean loss of whole logits, in float64 and with gradient, from a plain forward pass."""
    model = copy.deepcopy(lm.model).double()
    site, keep = resolve(model, lm.options.site), contexts.keep
    inputs = {"input_ids": contexts.tokens, "attention_mask": contexts.attention.long()}
    with torch.no_grad():
        clean = model(**inputs).logits.log_softmax(-1)

    def replace(x):
        x = x.clone()
        x[keep] = recon
        return x

    with hooked(site, replace):
        spliced = model(**inputs).logits.log_softmax(-1)
    scored = keep[:, :-1] & keep[:, 1:]
    clean, spliced = clean[:, :-1][scored], spliced[:, :-1][scored]
    if kind == "kl":
        return (clean.exp() * (clean - spliced)).sum(-1).mean()
    picked = contexts.tokens[:, 1:][scored][:, None]
    return (clean.gather(1, picked) - spliced.gather(1, picked)).mean()


@pytest.mark.parametrize("borders", ["pack", "split"])
@pytest.mark.parametrize("kind", ["kl", "ce"])
@pytest.mark.parametrize("site", SITES)
def test_value_and_gradient_are_those_of_a_plain_pass_in_float64(
    small_acts, monkeypatch, site, kind, borders
):
    lm = LM(acts=small_acts(site=site, lm_batch=2))
    contexts = contexts_of(lm, borders=borders)
    recon = torch.randn(
        int(contexts.keep.sum()),
        16,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(1),
    ).requires_grad_()
    expected = definition(lm, kind, contexts, recon)
    (slope,) = torch.autograd.grad(expected, recon)
    monkeypatch.setattr(
        LogitRows, "slices", lambda rows: (slice(i, i + 7) for i in range(0, len(rows), 7))
    )
    found = LMLoss(lm).spliced(kind, contexts, recon.detach().float())
    value = (found.kl if kind == "kl" else found.ce_delta) / found.predictions
    assert value == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(
        found.gradient.double() / found.predictions, slope, rtol=1e-3, atol=1e-4 * slope.abs().max()
    )
    assert not any(weight.requires_grad for weight in lm.model.parameters())


@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_the_gradient_is_the_slope_of_finite_differences(small_acts, kind):
    lm = LM(acts=small_acts())
    contexts, g = contexts_of(lm), torch.Generator().manual_seed(2)
    recon = torch.randn(int(contexts.keep.sum()), 16, dtype=torch.float64, generator=g)
    way = torch.randn(recon.shape, dtype=torch.float64, generator=g)
    step = 1e-5
    with torch.no_grad():
        above, below = (
            definition(lm, kind, contexts, recon + sign * step * way).item() for sign in (1, -1)
        )
    found = LMLoss(lm).spliced(kind, contexts, recon.float())
    slope = (found.gradient.double() * way).sum().item() / found.predictions
    assert slope == pytest.approx((above - below) / (2 * step), rel=1e-3)


def test_a_soft_cap_of_the_head_has_its_gradient(small_acts, tiny_lm):
    capped = tiny_lm("gemma2", final_logit_softcapping=2.0)
    lm = LM(acts=small_acts(lm=str(capped), site="resid_post.1"))
    contexts = contexts_of(lm)
    recon = torch.randn(int(contexts.keep.sum()), 16, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(definition(lm, "kl", contexts, recon), recon)
    found = LMLoss(lm).spliced("kl", contexts, recon.detach().float())
    torch.testing.assert_close(
        found.gradient.double() / found.predictions, slope, rtol=1e-3, atol=1e-4 * slope.abs().max()
    )


def test_the_numbers_are_those_of_the_evaluation_on_the_same_contexts(small_acts):
    lm = LM(acts=small_acts())
    corpus = Corpus(lm.options, lm.tokenizer, "train")
    batch = corpus.batch(list(itertools.islice(corpus.contexts(), 6)))
    held_out = HeldOutBatch(lm, corpus, batch)
    rows = held_out.x * 0.7
    found = LMLoss(lm).spliced("kl", batch, rows)
    delta = held_out.losses_with(rows).sum() - held_out.clean_losses.sum()
    assert found.predictions == len(held_out.clean_losses)
    assert found.ce_delta == pytest.approx(delta.item(), rel=1e-6)


def test_the_unchanged_activations_have_no_divergence(small_acts):
    lm = LM(acts=small_acts())
    contexts = contexts_of(lm)
    found = LMLoss(lm).spliced("kl", contexts, lm.acts(*contexts[:2])[contexts.keep])
    assert abs(found.kl) < 1e-6 and found.gradient.abs().max() < 1e-6


# ---- the step


def begun(recipe):
    """Return a step, its batch, and what it is trained with."""
    source = ActivationSource(recipe, CPU)
    state, step = start(recipe, source)
    batch = next(source.stream.batches())
    step.lm_loss = source.lm_loss.of(step.sae, recipe.sae, batch)
    return source, state, step, batch


def lm_recipe(small_recipe, loss="kl", **changes):
    return small_recipe(
        {"sae.lm_loss": loss} | {key.replace("__", "."): value for key, value in changes.items()}
    )


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "loss, share, balance",
    [("kl", 0.5, True), ("kl", 1.0, True), ("ce", 0.3, False), ("ce", 0.5, True)],
)
def test_the_step_has_the_gradient_of_both_losses(
    small_recipe, monkeypatch, loss, share, balance, parts
):
    """(1 - s) NMSE + s L scale, with L through the LM and the scale a constant: NMSE / KL."""
    recipe = lm_recipe(
        small_recipe, loss, sae__lm_share=share, sae__lm_balance=balance, sae__auxk_coef=0.0
    )
    source, state, step, batch = begun(recipe)
    monkeypatch.setattr(autograd, "PRE_ACTS", 64 * 64 // parts)
    inputs = step.sae.normalize(batch.x)
    part = step.backward(inputs.x, baseline=state.baseline, dead=torch.tensor([]).long(), k_aux=8)

    sae = copy.deepcopy(step.sae).double()
    sae.zero_grad()
    x, mean, scale = (field.double() for field in inputs)
    recon = sae.decode_normalized(sae.encode_normalized(x))
    nmse = (recon - x).square().mean() / state.baseline
    raw = recon * scale + mean
    kl = definition(source.source.lm, "kl", batch.contexts, raw)
    value = kl if loss == "kl" else definition(source.source.lm, "ce", batch.contexts, raw)
    factor = (nmse / kl).detach() if balance else 1.0
    total = (1 - share) * nmse + share * factor * value
    total.backward()
    assert part.total.item() == pytest.approx(total.item(), rel=1e-4)
    assert part.terms["kl" if loss == "kl" else "ce_delta"].item() == pytest.approx(
        value.item(), rel=1e-4
    )
    for name, weight in sae.named_parameters():
        mine = dict(step.sae.named_parameters())[name].grad.double()
        torch.testing.assert_close(
            mine, weight.grad, rtol=2e-3, atol=2e-4 * weight.grad.abs().max()
        )


def test_the_decoder_stays_at_norm_1_and_loses_the_gradient_along_its_rows(small_recipe):
    _, state, step, batch = begun(lm_recipe(small_recipe, sae__lm_share=1.0))
    x = step.sae.normalize(batch.x).x
    step.backward(x, baseline=state.baseline, dead=torch.tensor([]).long(), k_aux=8)
    step.constrain_gradient()
    along = (step.sae.W_dec.grad * step.sae.W_dec).sum(1)
    assert along.abs().max() < 1e-6 < step.sae.W_dec.grad.norm(dim=1).max()
    before = step.sae.W_dec.detach().clone()
    step.step(1)
    assert not torch.equal(step.sae.W_dec, before)
    torch.testing.assert_close(step.sae.W_dec.norm(dim=1), torch.ones(64))


def test_auxk_is_what_it_is_without_the_lm(small_recipe):
    dead = torch.arange(40)
    found = []
    for loss in ("none", "kl"):
        _, state, step, batch = begun(lm_recipe(small_recipe))
        step.recipe = lm_recipe(small_recipe, loss)
        step.lm_loss = step.lm_loss if loss == "kl" else None
        x = step.sae.normalize(batch.x).x
        found.append(step.backward(x, baseline=state.baseline, dead=dead, k_aux=8).terms)
    assert found[0]["auxk"] == found[1]["auxk"] > 0 and set(found[1]) - set(found[0]) == {"kl"}


@pytest.mark.parametrize("kind", ["batch_topk", "relu", "jump_relu", "gated", "prolu"])
def test_every_activation_trains_with_it_and_the_kl_falls(small_recipe, tmp_path, kind):
    recipe = lm_recipe(
        small_recipe, sae__activation={"kind": kind}, sae__lm_share=1.0, tokens=40 * 64
    )
    rows = train(recipe, tmp_path / kind).metrics()
    assert sum(row["kl"] for row in rows[-5:]) < sum(row["kl"] for row in rows[:5])


def test_a_matryoshka_sae_keeps_the_errors_of_its_prefixes(small_recipe, tmp_path):
    recipe = lm_recipe(small_recipe, sae__prefixes=[8, 32])
    assert {"nmse", "nmse_8", "nmse_32", "kl"} <= set(train(recipe, tmp_path / "run").metrics()[0])


# ---- whole contexts


def whole(small_stream, **options):
    stream = small_stream(**options)
    return LiveStream(
        stream.lm, stream.corpus, batch=stream.batch, seed=stream.seed, whole_contexts=True
    )


def take(stream, number, cursor=None):
    with closing(stream.batches(cursor)) as batches:
        return list(itertools.islice(batches, number))


@pytest.mark.parametrize("mix, batch", [(256, 32), (96, 96), (50, 7)])
def test_batches_have_the_contexts_of_their_rows(small_stream, mix, batch):
    stream, usual = (
        make(mix=mix, batch=batch) for make in (lambda **o: whole(small_stream, **o), small_stream)
    )
    number = 3 * stream.batches_per_buffer
    batches = take(stream, number)
    for each in batches:
        tokens, attention, keep, documents = each.contexts
        assert keep.sum() == len(each.x) == batch
        torch.testing.assert_close(stream.lm.acts(tokens, attention)[keep], each.x)
        assert torch.equal(documents[keep], each.documents)
        together = keep[:, :-1] & keep[:, 1:]
        assert together.sum() >= batch / 2, "neighbours are together"
    rows = torch.cat([each.x for each in batches])
    same = torch.cat([each.x for each in take(usual, number)])
    assert torch.equal(rows.sort(0).values, same.sort(0).values), "the same activations"
    assert not torch.equal(rows, same)


def test_going_on_from_every_cursor_gives_the_same_contexts(small_stream):
    stream = whole(small_stream, mix=96, batch=32)

    def fresh():
        corpus = Corpus(stream.lm.options, stream.lm.tokenizer, "train")
        return LiveStream(stream.lm, corpus, batch=32, seed=0, whole_contexts=True)

    batches = take(stream, 20)
    assert any(each.cursor["skip"] for each in batches), "no context crosses the end of a buffer"
    for before, expected in itertools.pairwise(batches):
        found = take(fresh(), 1, before.cursor)[0]
        assert torch.equal(found.x, expected.x) and found.cursor == expected.cursor
        assert all(map(torch.equal, found.contexts, expected.contexts))


def test_contexts_are_shuffled_in_each_buffer(small_stream):
    stream = whole(small_stream, mix=256, batch=256)
    orders = [each.documents.unique_consecutive().tolist() for each in take(stream, 3)]
    assert all(order != sorted(order) for order in orders)


# ---- runs


def final(run):
    last = run.checkpoints()[-1]
    rows = [
        {key: row[key] for key in row if key not in ("seconds", "tokens_per_s", "waiting")}
        for row in run.metrics()
    ]
    return [(last / f"{name}.safetensors").read_bytes() for name in ("sae", "optim")], rows


class Killed(Exception):
    pass


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(small_recipe, tmp_path):
    recipe = lm_recipe(small_recipe)

    def stop(row):
        if row["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "stopped", observe=stop)
    assert final(train(recipe, tmp_path / "stopped")) == final(train(recipe, tmp_path / "whole"))


def test_curve_counts_the_flops_of_the_lm_behind_the_site(small_recipe, tmp_path):
    recipe = lm_recipe(small_recipe, curve__held_out=64)
    run = train(recipe, tmp_path / "run")
    model = LM(acts=recipe.acts).model
    matrices = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if getattr(module, "weight", None) is not None
        and module.weight.ndim == 2
        and "wte" not in name
        and "wpe" not in name
    }
    before = sum(size for name, size in matrices.items() if ".h.0." in name or ".h.1." in name)
    total = sum(matrices.values())
    per_token = 2 * before + 2 * total + 4 * (total - before)
    row = run.curve()[-1]
    assert row["flops_lm"] == row["tokens"] * per_token
    assert flops.lm_loss(total, before) == per_token - 2 * before


def test_older_recipes_keep_their_fingerprint():
    assert not [key for key in Recipe().fingerprint()["sae"] if key.startswith("lm_")]
    changed = from_dict({"sae": {"lm_loss": "kl"}})
    assert changed.fingerprint() != Recipe().fingerprint()
    assert stream_key(changed) != stream_key(Recipe())
    assert stream_key(changed) == stream_key(from_dict({"sae": {"lm_loss": "ce"}}))
    assert choose_step(changed, "cuda:0", elsewhere=True) == "autograd"
    assert not prefetches(changed, "cuda") and prefetches(Recipe(), "cuda")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"acts": {"shards": "acts/"}}, "shards hold single activations"),
        ({"mesh": {"data": 2}}, "the mesh is 2 x 1"),
        ({"mesh": {"latent": 2}}, "the mesh is 1 x 2"),
        ({"run": {"ahead": "on"}}, "leave run.ahead at 'auto'"),
        ({"sae": {"lm_share": 0.0}}, "sae.lm_share is 0.0"),
        ({"sae": {"lm_share": 1.5}}, "sae.lm_share is 1.5"),
    ],
)
def test_what_the_loss_of_the_lm_cannot_have_is_refused(changes, message):
    sae = {"sae": {"lm_loss": "kl", **changes.pop("sae", {})}}
    with pytest.raises(InputError, match=message):
        from_dict(sae | changes)


def test_a_site_that_can_only_be_read_is_refused(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(LM, "_set_site", _read_only(LM._set_site))
    with pytest.raises(InputError, match="can be read but not changed: a test"):
        train(lm_recipe(small_recipe), tmp_path / "run")


def test_activations_without_contexts_are_refused(small_acts, small_stream):
    batch = take(small_stream(), 1)[0]
    with pytest.raises(InputError, match="come without the contexts of an LM"):
        LMLoss(LM(acts=small_acts())).of(SAE(Shape(16, 8, 2)), SAEConfig(lm_loss="kl"), batch)


def _read_only(own):
    def set_site(lm, site):
        own(lm, site)
        lm.read_only_reason = "a test"

    return set_site
