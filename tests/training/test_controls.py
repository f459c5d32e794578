"""Controls: weights that stay at, or near, their start values, and an LM and a text without what was learnt or said."""

import dataclasses
import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity

import ksparse
from ksparse.config import ActsConfig, Recipe, SAEConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Corpus
from ksparse.data.shards import Shards, write
from ksparse.errors import InputError
from ksparse.evals import comparison
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.planning.steps import choose_step
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape
from ksparse.training.steps.autograd import AutogradStep, hold_
from ksparse.training.steps.explicit import ExplicitStep
from ksparse.training.train import train

D, N = 16, 64
FROZEN = {"decoder": {"W_dec"}, "encoder": {"W_enc", "b_enc"}}


def made(kind, **sae):
    """Return a training step of an SAE of random start values, and a copy of these."""
    recipe = Recipe(sae=SAEConfig(n_latents=N, k=4, **sae), tokens=64 * 64, batch=64)
    model = SAE(Shape(D, N, 4, "none", 1.0, recipe.sae.activation.kind), {})
    generator = torch.Generator().manual_seed(0)
    initialize_(model, torch.randn(256, D, generator=generator), recipe.sae, generator)
    return kind(model, recipe), {key: w.detach().clone() for key, w in model.named_parameters()}


def take(optimizer, steps, lr_of=None):
    """Take steps on random batches; yield after each."""
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        x = torch.randn(64, D, generator=generator)
        optimizer.backward(x, baseline=1.0, dead=torch.arange(5), k_aux=4)
        optimizer.step(step)
        yield step


@pytest.mark.parametrize("kind", [AutogradStep, ExplicitStep])
@pytest.mark.parametrize("freeze", FROZEN)
@pytest.mark.parametrize("changes", [{}, {"unit_norm": False}], ids=str)
def test_frozen_weights_have_the_bits_of_the_start_and_all_others_move(kind, freeze, changes):
    optimizer, start = made(kind, freeze=freeze, **changes)
    assert list(take(optimizer, 5))
    for sae in (optimizer.sae, optimizer.averaged()):
        unmoved = {key for key, w in sae.named_parameters() if torch.equal(w, start[key])}
        assert unmoved == FROZEN[freeze]


def test_a_frozen_weight_has_no_moments_and_no_average():
    optimizer, _ = made(ExplicitStep, freeze="decoder")
    assert list(take(optimizer, 2))
    kept = optimizer.tensors()
    assert "raw.W_dec" in kept and not {"average.W_dec", "exp_avg.W_dec"} & set(kept)


def test_frozen_weights_are_not_in_the_norm_of_the_gradient():
    for kind in (AutogradStep, ExplicitStep):
        (free, _), (frozen, _) = made(kind), made(kind, freeze="decoder")
        x = torch.randn(64, D, generator=torch.Generator().manual_seed(2))
        norms = []
        for optimizer in (free, frozen):
            optimizer.backward(x, baseline=1.0, dead=torch.arange(0), k_aux=4)
            norms.append(optimizer.step(1))
        assert 0 < norms[1] < norms[0]


@pytest.mark.parametrize("kind", [AutogradStep, ExplicitStep])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_a_held_decoder_has_its_least_cosine_after_every_step_and_reaches_it(kind, unit_norm):
    optimizer, start = made(kind, decoder_cosine_min=0.8, unit_norm=unit_norm)
    optimizer.adam.param_groups[0]["base"] = 0.3  # so that a row would go far in one step
    for _ in take(optimizer, 12):
        for sae in (optimizer.sae, optimizer.averaged()):
            cosines = cosine_similarity(sae.W_dec.double(), start["W_dec"].double())
            assert cosines.min() >= 0.8
            if unit_norm:
                assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert cosine_similarity(optimizer.sae.W_dec, start["W_dec"]).min() < 0.801


def test_holding_leaves_rows_within_the_cone_and_norms_as_they_are():
    start = torch.nn.functional.normalize(torch.randn(50, D), dim=1)
    rows = 3 * start + 0.2 * torch.randn(50, D)
    far = torch.randn(50, D)
    both = torch.cat([rows, far, -start])
    held = both.clone()
    hold_(held, torch.cat([start, start, start]), 0.9)
    near = cosine_similarity(both, torch.cat([start, start, start])) >= 0.9
    assert near[:50].all() and torch.equal(held[near], both[near])
    torch.testing.assert_close(held.norm(dim=1), both.norm(dim=1))
    assert cosine_similarity(held.double(), torch.cat([start] * 3).double()).min() >= 0.9


@pytest.mark.parametrize(
    "changes",
    [
        {"sae.freeze": "decoder"},
        {"sae.freeze": "encoder"},
        {"sae.decoder_cosine_min": 0.99, "optim.lr": 0.1},
        {"sae.freeze": "decoder", "sae.activation": {"kind": "batch_topk"}},
        {"sae.freeze": "decoder", "sae.activation": {"kind": "relu", "resample": 2}},
        {"sae.decoder_cosine_min": 0.9, "sae.activation": {"kind": "relu", "resample": 2}},
    ],
    ids=str,
)
def test_a_resumed_control_ends_with_the_bits_of_an_undisturbed_one(
    small_recipe, tmp_path, changes
):
    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 7:
            raise Stop

    recipe = small_recipe({"run.save_every": 2} | changes)
    whole = ksparse.load(train(recipe, tmp_path / "whole"))
    with pytest.raises(Stop):
        train(recipe, tmp_path / "run", observe=stop)
    resumed = ksparse.load(train(recipe, tmp_path / "run"))
    for key, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[key]), key
    start = torch.nn.functional.normalize(
        torch.randn(whole.W_dec.shape, generator=torch.Generator().manual_seed(recipe.seed)), dim=1
    )
    least = recipe.sae.decoder_cosine_min
    if least:
        assert cosine_similarity(whole.W_dec.double(), start.double()).min() >= least
    if recipe.sae.freeze == "decoder":
        torch.testing.assert_close(whole.W_dec, start, rtol=0, atol=1e-6)


def test_the_fingerprint_of_a_recipe_without_controls_has_no_word_of_them():
    table = Recipe().fingerprint()
    words = {"freeze", "decoder_cosine_min", "lm_weights", "shuffle_tokens"}
    assert not words & (table["sae"].keys() | table["acts"].keys())
    changed = Recipe(sae={"freeze": "decoder"}, acts={"lm_weights": "redrawn"}).fingerprint()
    assert changed["sae"]["freeze"] == "decoder" and changed["acts"]["lm_weights"] == "redrawn"


@pytest.mark.parametrize("control", [{"freeze": "encoder"}, {"decoder_cosine_min": 0.5}], ids=str)
def test_controls_take_the_step_in_plain_torch_and_the_log_says_so(control, caplog):
    recipe = Recipe(sae=control)
    assert choose_step(recipe, "cpu") == "torch"
    assert choose_step(recipe, "cuda", elsewhere=True) == "torch"
    with caplog.at_level("INFO", "ksparse"):
        from ksparse.training.steps.select import build_step

        build_step(SAE(Shape(D, N, 4, "none", 1.0, "topk"), {}), recipe)
    assert "the step is taken in plain torch" in caplog.text
    with pytest.raises(InputError, match=r"without Multi-TopK, sae\.freeze and"):
        choose_step(dataclasses.replace(recipe, run=recipe.run.__class__(kernels="native")), "cpu")


@pytest.mark.parametrize(
    "section, says",
    [
        ({"freeze": "decoder", "decoder_cosine_min": 0.8}, "a frozen decoder stays at cosine 1"),
        ({"decoder_cosine_min": 1.0}, "decoder_cosine_min is 1.0"),
        ({"freeze": "both"}, "freeze"),
    ],
)
def test_controls_that_cannot_be_are_named(section, says):
    with pytest.raises(InputError, match=says):
        Recipe(sae=section)


# ---- the LM drawn anew


@pytest.fixture
def lm_of(small_acts):
    return lambda weights, **changes: LM(acts=small_acts(lm_weights=weights, **changes))


def test_redrawn_weights_have_the_mean_and_spread_of_the_trained_and_no_value_of_theirs(lm_of):
    trained, redrawn = lm_of("trained").model, lm_of("redrawn").model
    for (name, old), (_, new) in zip(trained.named_parameters(), redrawn.named_parameters()):
        if old.std(correction=0) == 0:
            continue
        assert not (old == new).any(), name
        if old.numel() >= 256:
            assert (new.mean() - old.mean()).abs() < 5 * old.std() / old.numel() ** 0.5
            assert new.std() / old.std() == pytest.approx(1, abs=0.2)


def test_the_embedding_is_kept_on_request_and_the_draw_is_the_same_each_time(lm_of):
    trained, kept, again = lm_of("trained"), *(lm_of("redrawn_keep_embedding") for _ in range(2))
    embedding = kept.model.get_input_embeddings().weight
    assert torch.equal(embedding, trained.model.get_input_embeddings().weight)
    same = [torch.equal(a, b) for a, b in zip(kept.model.parameters(), again.model.parameters())]
    assert all(same)
    text = "the cat sat on a mat"
    assert torch.equal(kept(text), again(text)) and not torch.allclose(kept(text), trained(text))


def test_an_sae_of_a_redrawn_lm_is_judged_there_and_nowhere_else(small_recipe, tmp_path, lm_of):
    run = train(small_recipe({"acts.lm_weights": "redrawn"}), tmp_path / "run")
    sae = ksparse.load(run)
    result = ksparse.evaluate(sae, names=["stats"], options=EvalConfig(tokens=64, examples=0))
    assert result["stats"]["lm_weights"] == "redrawn"
    with pytest.raises(InputError, match="lm_weights is 'trained', but 'redrawn'"):
        provenance.check(sae.metadata, lm_of("trained"))
    other = ksparse.load(train(small_recipe(), tmp_path / "other"))
    plain = ksparse.evaluate(other, names=["stats"], options=EvalConfig(tokens=64, examples=0))
    assert "lm_weights" not in plain["stats"]
    with pytest.raises(InputError, match="cannot be ranked by stats: lm_weights is None"):
        comparison.check({"a": plain, "b": result})


def test_quantized_weights_are_not_drawn_anew():
    with pytest.raises(InputError, match="cannot be drawn anew"):
        ActsConfig(lm_weights="redrawn", lm_quantize="8bit")


def test_shards_of_the_trained_lm_do_not_serve_a_redrawn_one(small_acts, tmp_path):
    lm = LM(acts=small_acts())
    shards = Shards(write(lm, Corpus(lm.options, lm.tokenizer, "train"), tmp_path, rows=64))
    shards.check_fits(small_acts())
    for control in ({"lm_weights": "redrawn"}, {"shuffle_tokens": True}):
        with pytest.raises(InputError, match=f"acts.{next(iter(control))}: the shards have"):
            shards.check_fits(small_acts(**control))


# ---- shuffled tokens


@pytest.mark.parametrize("borders", ["pack", "split"])
def test_shuffled_contexts_keep_their_tokens_and_documents_in_another_order(small_acts, borders):
    acts = small_acts(borders=borders)
    tokenizer = LM(acts=acts).tokenizer

    def contexts(shuffle, first=None):
        corpus = Corpus(dataclasses.replace(acts, shuffle_tokens=shuffle), tokenizer, "train")
        return list(itertools.islice(corpus.contexts(*([first] if first else [])), 20))

    plain, shuffled = contexts(False), contexts(True)
    moved = 0
    for one, other in zip(plain, shuffled):
        assert one.start == other.start and one.next == other.next
        assert sorted(zip(one.tokens, one.documents)) == sorted(zip(other.tokens, other.documents))
        special = [i for i, t in enumerate(one.tokens) if t == 0 or one.documents[i] < 0]
        assert all(one.tokens[i] == other.tokens[i] for i in special)
        moved += sum(a != b for a, b in zip(one.tokens, other.tokens))
    assert moved > 100
    assert contexts(True) == shuffled
    assert contexts(True, shuffled[5].start)[:3] == shuffled[5:8]


def test_an_sae_of_shuffled_text_says_so_and_is_judged_on_shuffled_text(small_recipe, tmp_path):
    run = train(small_recipe({"acts.shuffle_tokens": True}), tmp_path / "run")
    sae = ksparse.load(run)
    result = ksparse.evaluate(sae, names=["stats"], options=EvalConfig(tokens=64, examples=0))
    assert result["stats"]["policy"]["shuffle_tokens"] is True
