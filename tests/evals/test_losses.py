"""Losses and divergences computed in slices are those of whole logits in float64."""

from __future__ import annotations

import dataclasses
import math
import weakref

import pytest
import torch

from ksparse import limits
from ksparse.config.evaluation import EvalConfig
from ksparse.evals import batches, losses, runner
from ksparse.evals.batches import HeldOut, SAEBatch
from ksparse.lm import head
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(tokens=400, device="cpu")
VOCABULARY = 262_144


def make_sae(acts, d, *, seed=0) -> SAE:
    torch.manual_seed(seed)
    sae = SAE(Shape(d, 64, 4), {"acts": dataclasses.asdict(acts)})
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape) / math.sqrt(d)
    return sae


def definition(clean, changed, targets):
    p, q = (logits.double().log_softmax(-1) for logits in (clean, changed))
    picked = [-log.gather(1, targets[:, None]).squeeze(1) for log in (p, q)]
    return *picked, (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("vocabulary", [VOCABULARY, 97])
@pytest.mark.parametrize("shift", [0.0, 50.0])
def test_losses_and_divergence_are_their_float64_definition(vocabulary, shift):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(5, vocabulary, generator=generator) * 3
    changed = clean + torch.randn(5, vocabulary, generator=generator) + shift
    targets = torch.randint(vocabulary, (5,), generator=generator)
    found = losses.compare(clean, changed, targets)
    for value, expected in zip(found, definition(clean, changed, targets), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=5e-7)
    assert torch.equal(losses.cross_entropy(clean, targets), found.clean)


def test_logits_far_apart_neither_overflow_nor_become_nan():
    clean = torch.tensor([[200.0, -200.0, 0.0], [3e4, -3e4, 0.0]])
    found = losses.compare(clean, clean.flip(1), torch.tensor([0, 0]))
    assert found.kl.tolist() == [200.0, 3e4] and found.clean.tolist() == [0.0, 0.0]


@pytest.fixture
def large(tiny_lm, small_acts):
    """An LM with Gemma's vocabulary, whose predictions are no uniform noise."""
    folder = tiny_lm("llama", vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16)
    acts = small_acts(lm=str(folder), site="resid_post.0", lm_batch=2)
    lm = LM(acts=acts)
    lm.model.get_output_embeddings().weight.data *= 100
    return acts, lm


def test_spliced_losses_of_a_large_vocabulary_are_those_of_whole_logits_in_float64(large):
    acts, lm = large
    saes = [make_sae(acts, lm.d_model, seed=seed) for seed in (0, 1)]
    held_out = next(iter(HeldOut(lm, acts, OPTIONS)))
    parts = [SAEBatch(sae, held_out) for sae in saes]
    at, targets = held_out.predicted, held_out.contexts.tokens[:, 1:][held_out.predicted]
    cached = lm.run_with_cache(held_out.contexts.tokens, held_out.contexts.attention)
    clean, x = cached.logits[:, :-1][at], held_out.x
    for part in parts:

        def change(at_site, recon=part.sae(x)):
            at_site = at_site.clone()
            at_site[held_out.keep] = recon
            return at_site

        changed = lm.run_patched(cached, change)[:, :-1][at]
        expected = definition(clean, changed, targets)
        found = (held_out.clean_losses, part.spliced.losses, part.spliced.kl)
        for value, exact in zip(found, expected, strict=True):
            assert float(value.sum()) == pytest.approx(float(exact.sum()), rel=1e-6)
        assert float(expected[2].mean()) > 0.01


@pytest.fixture
def heads(monkeypatch):
    """The rows of logits that each call of the head made."""
    rows, run_head = [], head.run_head

    def count(model, kind, hidden):
        logits = run_head(model, kind, hidden)
        rows.append(logits.shape[1])
        return logits

    monkeypatch.setattr(head, "run_head", count)
    return rows


@pytest.fixture
def subject(small_acts):
    acts = small_acts(lm_batch=4)
    return acts, LM(acts=acts)


@pytest.mark.parametrize("names", [["downstream"], ["positions", "downstream", "progressive"]])
def test_the_unchanged_head_runs_once_for_all_saes_of_a_batch(subject, heads, names):
    acts, lm = subject
    options = dataclasses.replace(OPTIONS, tokens=100)
    spent = {}
    for count in (1, 4):
        saes = {str(seed): make_sae(acts, lm.d_model, seed=seed) for seed in range(count)}
        heads.clear()
        results = runner.evaluate_many(saes, lm, names, options)
        spent[count] = sum(heads)
    predictions = results["0"]["downstream"]["n_predictions"]
    if names == ["downstream"]:  # unchanged, zeros and mean once; each SAE once
        assert spent == {1: 4 * predictions, 4: 7 * predictions}
    else:
        assert (spent[4] - spent[1]) % (3 * predictions) == 0


def test_an_sae_has_the_same_losses_alone_and_beside_others(subject, monkeypatch):
    acts, lm = subject
    saes = {str(seed): make_sae(acts, lm.d_model, seed=seed) for seed in range(3)}
    together = runner.evaluate_many(saes, lm, ["downstream"], OPTIONS)
    monkeypatch.setattr(batches, "LOGITS_BYTES", 4)  # so that each SAE is a group of its own
    apart = runner.evaluate_many(saes, lm, ["downstream"], OPTIONS)
    for label, sae in saes.items():
        alone = runner.evaluate(sae, lm, ["downstream"], OPTIONS)["downstream"]
        for key in ("ce_clean", "ce_spliced", "kl"):
            assert alone[key] == together[label]["downstream"][key]
            assert alone[key] == apart[label]["downstream"][key]


def test_the_logits_of_one_sae_are_gone_before_those_of_the_next(subject, monkeypatch):
    acts, lm = subject
    alive, most, read = weakref.WeakSet(), [0], head.LogitRows.__getitem__

    def count(self, rows):
        logits = read(self, rows)
        alive.add(logits)
        most[0] = max(most[0], len(alive))
        return logits

    monkeypatch.setattr(head.LogitRows, "__getitem__", count)
    saes = {str(seed): make_sae(acts, lm.d_model, seed=seed) for seed in range(4)}
    runner.evaluate_many(saes, lm, ["downstream"], dataclasses.replace(OPTIONS, tokens=100))
    assert most[0] == 2  # the unchanged LM's, and one SAE's


def test_a_batch_whose_saes_are_gone_is_freed_with_them(subject):
    acts, lm = subject
    held_out = next(iter(HeldOut(lm, acts, OPTIONS)))
    part = SAEBatch(make_sae(acts, lm.d_model), held_out)
    assert len(part.spliced.losses)
    gone = weakref.ref(part), weakref.ref(held_out)
    del part, held_out
    assert [reference() for reference in gone] == [None, None]


def test_the_limit_is_that_of_the_planner():
    assert batches.LOGITS_BYTES == limits.LOGITS_BYTES and head.logit_rows is limits.logit_rows
