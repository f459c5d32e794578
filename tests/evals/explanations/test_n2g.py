"""Explanations are right where the truth is known, and scored on text that they were not built from."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Corpus
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.evals.base import EvalContext
from ksparse.evals.batches import HeldOut, SAEBatch, acts_of
from ksparse.evals.explanations.builder import (
    ActivationExample,
    Activations,
    LatentReader,
    Reservoir,
    choose_pad,
    explain,
    shortest_suffixes,
)
from ksparse.evals.explanations.explained_loss import ExplainedLoss
from ksparse.evals.explanations.n2g import N2G, f1, over_latents
from ksparse.evals.explanations.ngrams import Ngrams
from ksparse.evals.explanations.patterns import ANY, predict
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(
    tokens=20_000, per_document=100, latents=8, n2g_examples=16, ngram_tokens=2_000, device="cpu"
)
A, B, C, PAD = range(4)
WORDS = (" cat", " on", " black", " run", " grey")


# ---- building, on functions that are known


def reads(rule):
    """Return a reader of one latent whose activation at the end of a sequence is rule(sequence)."""
    return lambda sequences, latents: np.array(
        [rule(tuple(row)) for row in sequences.tolist()], np.float32
    )


def build(rule, *sequences, official=False):
    examples = [
        ActivationExample(0, tuple(sequence), rule(tuple(sequence))) for sequence in sequences
    ]
    return explain(examples, reads(rule), PAD, official=official).get(0, [])


@pytest.mark.parametrize("official", [True, False])
def test_a_latent_of_the_first_position_is_anchored(official):
    found = build(lambda row: float(len(row) == 1), (A,), (B,), official=official)
    assert {pattern[:2] for pattern in found} == {((ANY,), True)}


@pytest.mark.parametrize("official", [True, False])
def test_a_latent_of_a_token_is_that_token(official):
    found = build(lambda row: float(row[-1] == C), (A, B, C), (B, C), official=official)
    assert {pattern[:2] for pattern in found} == {((C,), False)}


@pytest.mark.parametrize("official", [True, False])
def test_a_token_that_does_not_matter_becomes_any(official):
    found = build(
        lambda row: float(row[-1] == C and A in row[:-1]),
        (A, B, C),
        (B, A, C),
        (A, C),
        official=official,
    )
    assert {pattern[:2] for pattern in found} == {((A, ANY, C), False), ((A, C), False)}


@pytest.mark.parametrize("official", [True, False])
def test_without_examples_or_activation_there_is_no_pattern(official):
    """The published code divides by the activation."""
    assert build(lambda row: 0.0, official=official) == []
    assert build(lambda row: 0.0, (A, B), (C,), official=official) == []


def test_the_suffix_is_the_shortest_with_half_of_the_activation():
    rule = lambda row: {1: 0.49, 2: 0.5, 3: 1.0}[len(row)]
    found = shortest_suffixes([ActivationExample(0, (A, B, C), 1.0)], reads(rule))
    assert found.tokens == [(B, C)] and found.values.tolist() == [0.5]


def test_where_no_suffix_has_half_the_whole_is_the_pattern_with_its_own_activation():
    found = shortest_suffixes([ActivationExample(0, (A, B), 2.0)], reads(lambda row: 0.1))
    assert found.tokens == [(A, B)] and found.values.tolist() == [2.0]


def test_the_pattern_predicts_the_activation_on_its_suffix():
    found = build(lambda row: 0.6 if len(row) == 1 else 1.0, (A, B), (C, B))
    assert [pattern.value for pattern in found] == pytest.approx([0.6]) and found[0].support == 2


def test_every_round_asks_for_the_right_latent():
    rule = {7: A, 9: B}
    read = lambda sequences, latents: np.array(
        [
            float(row[-1] == rule[latent])
            for row, latent in zip(sequences.tolist(), latents.tolist())
        ]
    )
    found = explain(
        [
            ActivationExample(7, (C, A), 1.0),
            ActivationExample(9, (A, B), 1.0),
            ActivationExample(7, (B, A), 1.0),
        ],
        read,
        PAD,
    )
    assert {
        latent: [pattern[:2] for pattern in patterns] for latent, patterns in found.items()
    } == {7: [((A,), False)], 9: [((B,), False)]}


# ---- what the LM reads


class Planted(LM):
    """A tiny LM whose activations are replaced by rules on tokens: x[b, t, i] = scale of rule i where it holds."""

    def plant(self, rules) -> Planted:
        self.rules, self.d_model, self.read = rules, len(rules), []
        return self

    def acts(self, tokens, attention):
        if not hasattr(self, "rules"):
            return super().acts(tokens, attention)
        rows = tokens.tolist()
        self.read.append(rows)
        return torch.tensor(
            [
                [
                    [(1 + i) * float(rule(row, t)) for i, rule in enumerate(self.rules)]
                    for t in range(len(row))
                ]
                for row in rows
            ]
        )


def random_words(documents):
    """Return documents of words that are one token each, a space before it included."""
    generator = np.random.default_rng(0)
    return "<|endoftext|>".join("".join(generator.choice(WORDS, 30)) for _ in range(documents))


def planted(small_acts, tmp_path, rules, **changes):
    file = tmp_path / "text.txt"
    file.write_text(random_words(300))
    lm = Planted(acts=small_acts(text=str(file), context=24, **changes)).plant(rules)
    sae = SAE(
        Shape(len(rules), len(rules), len(rules), normalize="none"),
        {"acts": dataclasses.asdict(lm.options)},
    )
    sae.W_enc.data = sae.W_dec.data = torch.eye(len(rules))
    return sae, lm


def ids(lm, text):
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def rules_of(lm):
    """Token; bigram; gap; trigram; beginning of a document; none at all."""
    (one,), (two,), (three,), bos = (
        *(ids(lm, word) for word in WORDS[:3]),
        lm.tokenizer.bos_token_id,
    )
    at = lambda row, t, back: row[t - back] if t >= back else None
    return [
        lambda row, t: at(row, t, 0) == one,
        lambda row, t: at(row, t, 1) == one and at(row, t, 0) == two,
        lambda row, t: at(row, t, 2) == three and at(row, t, 0) == one,
        lambda row, t: at(row, t, 2) == two and at(row, t, 1) == two and at(row, t, 0) == three,
        lambda row, t: t > 0 and at(row, t, 1) == bos,
        lambda row, t: False,
    ]


def test_planted_latents_are_explained_without_a_fault(small_acts, tmp_path):
    sae, lm = planted(small_acts, tmp_path, rules_of(LM(acts=small_acts())))
    result = runner.evaluate(sae, lm, ["n2g"], OPTIONS)["n2g"]
    assert result["n_latents"] == 5
    for name in ("precision", "recall", "f1"):
        assert result[name]["value"] == 1 and result.arrays[name].tolist() == [1.0] * 5
    assert result["shuffled_f1"]["value"] < 0.5
    assert 5 not in result.arrays["pattern_latent"] and result["too_few"] == []


def test_what_is_read_begins_like_a_context(small_acts, tmp_path):
    """A suffix without BOS is not what the model normally gets."""
    rules = rules_of(LM(acts=small_acts()))
    sae, lm = planted(small_acts, tmp_path, rules)
    LatentReader(sae, lm, lm.options)(np.array([[40, 41]]), np.array([0]))
    assert lm.read[-1] == [[lm.tokenizer.bos_token_id, 40, 41]]
    LatentReader(sae, lm, lm.options, official=True)(np.array([[40, 41]]), np.array([0]))
    assert lm.read[-1] == [[40, 41]]


def test_without_bos_the_first_position_is_no_activation(small_acts, tmp_path):
    rules = [lambda row, t: True]
    sae, lm = planted(small_acts, tmp_path, rules, bos="none")
    read = LatentReader(sae, lm, lm.options)
    assert read(np.array([[40]]), np.array([0])).tolist() == [0]
    assert read(np.array([[40, 41]]), np.array([0])).tolist() == [1]


def test_equal_sequences_are_read_once(small_acts, tmp_path):
    sae, lm = planted(
        small_acts, tmp_path, [lambda row, t: row[t] == 40, lambda row, t: row[t] == 41]
    )
    values = LatentReader(sae, lm, lm.options)(
        np.array([[40], [41], [40], [40], [42]]), np.array([0, 1, 1, 0, 0])
    )
    assert values.tolist() == [1, 2, 0, 1, 0]
    assert sum(map(len, lm.read)) == 3


def test_sequences_are_read_right_in_small_batches(small_acts, tmp_path, monkeypatch):
    from ksparse.evals.explanations import builder

    sae, lm = planted(
        small_acts, tmp_path, [lambda row, t: row[t] % 2, lambda row, t: row[t] % 3 == 0]
    )
    sequences = np.random.default_rng(0).integers(10, 60, (50, 2))
    latents = np.arange(50) % 2
    whole = LatentReader(sae, lm, lm.options)(sequences, latents)
    monkeypatch.setattr(builder, "_TOKENS", 12)
    np.testing.assert_array_equal(LatentReader(sae, lm, lm.options)(sequences, latents), whole)
    np.testing.assert_array_equal(
        whole, np.where(latents == 0, sequences[:, -1] % 2, 2 * (sequences[:, -1] % 3 == 0))
    )


# ---- scoring


def test_latents_with_too_few_activations_are_named(small_acts, tmp_path):
    rare = {}

    def once(row, t):
        return t == 5 and rare.setdefault(tuple(row), len(rare)) == 20  # in one context alone

    sae, lm = planted(small_acts, tmp_path, [rules_of(LM(acts=small_acts()))[0], once])
    result = runner.evaluate(sae, lm, ["n2g"], OPTIONS)["n2g"]
    assert result["too_few"] == [1] and result.arrays["scored"].tolist() == [0]
    assert any("1 latents fired, but less than 2 times" in note for note in result["notes"])
    assert result["shuffled_f1"] == {
        "value": None,
        "se": None,
    }  # there is no other latent's explanation
    assert any("only 1 latents could be scored" in note for note in result["notes"])


def test_a_dead_autoencoder_has_no_scores_and_no_crash(small_acts, tmp_path):
    sae, lm = planted(small_acts, tmp_path, [lambda row, t: False] * 3)
    result = runner.evaluate(sae, lm, ["n2g"], OPTIONS)["n2g"]
    assert result["n_latents"] == 0 and result["f1"] == {"value": None, "se": None}


def test_precision_and_recall_are_their_definitions(small_acts):
    """On a random SAE, against loops over positions: no document for building is scored, positives are drawn from the others."""
    acts = small_acts(lm_batch=4)
    lm, options = (
        LM(acts=acts),
        dataclasses.replace(OPTIONS, n2g_examples=4, tokens=10**6).resolved(),
    )
    sae = random_sae(acts, lm.d_model)
    context = EvalContext(sae, HeldOut(lm, acts_of(sae, lm, options), options))
    part = context.part(N2G)
    builder = part.builder
    contexts, codes = [], []
    with torch.inference_mode():
        for metric in context.parts.values():
            metric.prepare()
        for batch in context.data:
            sae_batch = SAEBatch(sae, batch)
            for metric in context.parts.values():
                metric.update(sae_batch)
            contexts += list(
                zip(
                    batch.contexts.tokens.tolist(),
                    batch.keep.tolist(),
                    batch.contexts.documents.tolist(),
                )
            )
            codes += list(
                sae_batch.code_grid.values.new_zeros(*batch.keep.shape, 64)
                .scatter(-1, sae_batch.code_grid.indices.clamp_min(0), sae_batch.code_grid.values)
                .numpy()
            )
        for metric in context.parts.values():
            metric.compute(lambda what, done, total: None)
    result = part.finalize()
    rows = {name: result.arrays[name].numpy() for name in ("precision", "recall")}
    drawn = part.positives.sample()
    for slot, latent in enumerate(result.arrays["scored"].tolist()):
        predicted = right = 0
        by_place = {}
        for number, ((tokens, keep, documents), act) in enumerate(zip(contexts, codes)):
            begins = [True] + [token in builder.special_ids for token in tokens[1:-1]]
            guess = predict(builder.explanations[latent], tokens[1:], begins)
            for t, (kept, document) in enumerate(zip(keep, documents)):
                if t and kept and document % 4 >= 2:
                    by_place[number, t] = guess[t - 1] > 0
                    predicted += guess[t - 1] > 0
                    right += guess[t - 1] > 0 and act[t, latent] > 0
        mine = [
            (c, p)
            for c, p, owner in zip(
                drawn.context.tolist(), drawn.position.tolist(), drawn.latent.tolist()
            )
            if owner == latent
        ]
        assert rows["recall"][slot] == pytest.approx(np.mean([by_place[place] for place in mine]))
        if predicted:
            assert rows["precision"][slot] == pytest.approx(right / predicted)
        else:
            assert np.isnan(rows["precision"][slot])


def random_sae(acts, d, n=64, k=4) -> SAE:
    sae = SAE(Shape(d, n, k), {"acts": dataclasses.asdict(acts)})
    generator = torch.Generator().manual_seed(0)
    for parameter in (sae.W_enc, sae.W_dec):
        parameter.data = torch.randn(parameter.shape, generator=generator) / d**0.5
    return sae


def test_a_reservoir_draws_every_activation_alike_and_keeps_few():
    reservoir, counts = Reservoir(3, 0), np.zeros(100)
    for trial in range(400):
        reservoir = Reservoir(3, trial)
        for at in range(0, 100, 10):
            positions = np.arange(at, at + 10)
            reservoir.add(
                Activations(positions % 2, positions, positions, positions.astype(float), positions)
            )
        drawn = reservoir.sample()
        assert (
            np.bincount(drawn.latent).tolist() == [3, 3]
            and (drawn.position % 2 == drawn.latent).all()
        )
        counts[drawn.position] += 1
    assert 5 < counts.min() and counts.max() < 50 and counts.sum() == 400 * 6


def test_a_reservoir_drops_what_it_cannot_use(monkeypatch):
    from ksparse.evals.explanations import builder

    monkeypatch.setattr(builder, "_COMPACT", 50)
    reservoir = Reservoir(2, 0)
    for at in range(20):
        positions = np.arange(30) + 30 * at
        reservoir.add(
            Activations(positions % 3, positions, positions, positions.astype(float), positions)
        )
        assert len(reservoir) <= 50 + 30
    assert len(reservoir.sample().latent) == 6


def test_f1_is_defined_where_precision_is():
    np.testing.assert_allclose(
        f1(np.array([1, 0.5, 0, np.nan]), np.array([1, 1, 0, 0.5])), [1, 2 / 3, 0, np.nan]
    )
    assert over_latents(np.array([1.0, np.nan, 2.0])) == {"value": 1.5, "se": pytest.approx(0.5)}


def test_the_padding_token_is_a_token_and_no_special_one(tiny_lm):
    tokenizer = LM(str(tiny_lm("gpt2")), "resid_post.1").tokenizer
    token, text = choose_pad(tokenizer, "", {0})
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [token] and token != 0
    assert choose_pad(tokenizer, " cat", {0})[1] == " cat"
    with pytest.raises(
        InputError,
        match="n2g_pad 'xylophone' is no single token of this tokenizer; give a text that is one",
    ):
        choose_pad(tokenizer, "xylophone", {0})


def test_the_padding_token_is_found_where_a_tokenizer_puts_a_space_before_every_text(shared_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "models" / "stories260k")
    assert len(tokenizer("_", add_special_tokens=False)["input_ids"]) > 1
    token, text = choose_pad(tokenizer, "", {1, 2})
    assert text == "_" and tokenizer("_", add_special_tokens=False)["input_ids"][-1] == token


def test_without_any_of_the_usual_padding_tokens_the_unknown_one_serves():
    class Letters:
        unk_token_id = 1

        def __len__(self):
            return 3

        def convert_ids_to_tokens(self, ids):
            return [["<s>", "<unk>", "b"][i] for i in ids]

        def batch_decode(self, rows, **options):
            return ["".join(self.convert_ids_to_tokens(row)) for row in rows]

    assert choose_pad(Letters(), "", {0}) == (1, "<unk>")
    letters = Letters()
    letters.unk_token_id = None
    assert choose_pad(letters, "", {0, 1}) == (2, "b")


def test_the_official_variant_is_there_to_compare(small_acts, tmp_path):
    sae, lm = planted(small_acts, tmp_path, rules_of(LM(acts=small_acts()))[:3])
    result = runner.evaluate(
        sae, lm, ["n2g"], dataclasses.replace(OPTIONS, n2g_variant="official")
    )["n2g"]
    assert result["n_latents"] == 3 and result["precision"]["value"] == 1
    assert result["options"]["n2g_variant"] == "official"


# ---- explained loss


def test_explanations_that_are_always_right_cost_what_the_reconstruction_costs(
    small_acts, tmp_path
):
    """At the embedding a latent depends on the token alone, so single tokens explain it exactly."""
    file = tmp_path / "text.txt"
    file.write_text(random_words(200))
    acts = small_acts(site="transformer.wte", text=str(file))
    lm = LM(acts=acts)
    embedding = lm.model.get_input_embeddings().weight
    sae = SAE(
        Shape(lm.d_model, len(embedding), 1, normalize="none"), {"acts": dataclasses.asdict(acts)}
    )
    sae.W_enc.data = sae.W_dec.data = embedding / embedding.norm(
        dim=1, keepdim=True
    )  # a latent for each token
    result = runner.evaluate(sae, lm, ["explained_loss"], OPTIONS)["explained_loss"]
    for name in ("n2g", "spliced"):
        assert result[f"ce_{name}"]["value"] == pytest.approx(result["ce_clean"]["value"], abs=1e-4)
    assert result["ce_bias"]["value"] != pytest.approx(result["ce_clean"]["value"], abs=5e-4)
    assert result["predicted_l0"] == pytest.approx(1, abs=0.2)
    torch.testing.assert_close(
        result.arrays["scale"], torch.ones(len(embedding)), rtol=1e-4, atol=1e-4
    )


def test_losses_are_the_same_whether_n2g_runs_beside_them_or_not(small_acts):
    acts = small_acts(lm_batch=4)
    lm = LM(acts=acts)
    sae = random_sae(acts, lm.d_model)
    options = dataclasses.replace(OPTIONS, tokens=2_000, explained_examples=2, latents=20)
    alone = runner.evaluate(sae, lm, ["explained_loss"], options)["explained_loss"]
    both = runner.evaluate(sae, lm, ["n2g", "explained_loss"], options)
    assert both["explained_loss"]["ce_n2g"] == alone["ce_n2g"]
    assert alone["n_explained"] > 20
    more = dataclasses.replace(options, explained_examples=16)
    other = runner.evaluate(sae, lm, ["explained_loss"], more)["explained_loss"]
    assert other["ce_n2g"] != alone["ce_n2g"], "it depends on the examples"
    n2g = runner.evaluate(sae, lm, ["n2g"], options)["n2g"]
    assert n2g["f1"] == both["n2g"]["f1"]


def test_a_scale_is_the_least_squares_fit_on_documents_of_its_own(small_acts):
    acts = small_acts(lm_batch=4)
    lm, options = (
        LM(acts=acts),
        dataclasses.replace(OPTIONS, tokens=10**6, n2g_examples=4).resolved(),
    )
    sae = random_sae(acts, lm.d_model)
    context = EvalContext(sae, HeldOut(lm, acts_of(sae, lm, options), options))
    part = context.part(ExplainedLoss)
    contexts = []
    with torch.inference_mode():
        for metric in context.parts.values():
            metric.prepare()
        for batch in context.data:
            sae_batch = SAEBatch(sae, batch)
            for metric in context.parts.values():
                metric.update(sae_batch)
            grid = sae_batch.code_grid
            acts_ = grid.values.new_zeros(*batch.keep.shape, 64).scatter(
                -1, grid.indices.clamp_min(0), grid.values
            )
            contexts += list(
                zip(
                    batch.contexts.tokens.tolist(),
                    batch.keep.tolist(),
                    batch.contexts.documents.tolist(),
                    acts_.tolist(),
                )
            )
        for metric in context.parts.values():
            metric.compute(lambda what, done, total: None)
    product, square = np.zeros(64), np.zeros(64)
    for tokens, keep, documents, act in contexts:
        begins = [True] + [token in part.builder.special_ids for token in tokens[1:-1]]
        for latent, patterns in part.builder.explanations.items():
            for t, s in enumerate(predict(patterns, tokens[1:], begins), 1):
                if keep[t] and documents[t] % 4 == 2:
                    product[latent] += s * act[t][latent]
                    square[latent] += s * s
    expected = np.where(square > 0, product / np.where(square > 0, square, 1), 1)
    assert (square > 0).sum() > 5
    np.testing.assert_allclose(part.scale, expected, rtol=1e-5)


def test_all_losses_are_there_and_in_order(small_acts):
    acts = small_acts(lm_batch=4)
    lm = LM(acts=acts)
    result = runner.evaluate(
        random_sae(acts, lm.d_model),
        lm,
        ["explained_loss", "n2g"],
        dataclasses.replace(OPTIONS, tokens=10**6),
    )["explained_loss"]
    for name in ("clean", "spliced", "n2g", "unigram", "bigram", "zero", "bias"):
        assert result[f"ce_{name}"]["value"] > 0 and result[f"ce_{name}"]["se"] > 0
    assert result["delta_to_bigram"]["value"] == pytest.approx(
        result["ce_n2g"]["value"] - result["ce_bigram"]["value"]
    )
    assert result["n_predictions"] > 20 and result["n_explained"] > 0


def test_ngrams_are_counted_where_losses_are_measured(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    corpus = Corpus(acts, lm.tokenizer, "train", per_document=100)
    ngrams = Ngrams.count(corpus, lm.vocab, 10**9)
    pairs = {}
    for context in corpus.contexts():
        if context.start.epoch:
            break
        batch = corpus.batch([context])
        for t in range(len(context.tokens) - 1):
            if batch.keep[0, t] and batch.keep[0, t + 1]:
                key = tuple(context.tokens[t : t + 2])
                pairs[key] = pairs.get(key, 0) + 1
    total = sum(pairs.values())
    after, kinds, single = {}, {}, {}
    for (v, w), count in pairs.items():
        after[v], kinds[v], single[w] = (
            after.get(v, 0) + count,
            kinds.get(v, 0) + 1,
            single.get(w, 0) + count,
        )
    (v, w), count = next(iter(pairs.items()))
    unigram = lambda token: (single.get(token, 0) + 1) / (total + lm.vocab)
    assert ngrams.unigram(np.array([w, 299]))[0] == pytest.approx(-np.log(unigram(w)))
    assert ngrams.bigram(np.array([v]), np.array([w]))[0] == pytest.approx(
        -np.log((count - 0.75) / after[v] + 0.75 * kinds[v] / after[v] * unigram(w))
    )


def test_bigrams_after_any_token_sum_to_one(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    ngrams = Ngrams.count(Corpus(acts, lm.tokenizer, "train"), lm.vocab, 500)
    seen = int(ngrams.keys[0] // lm.vocab)
    unseen = int(np.flatnonzero(ngrams.after == 0)[0])
    for before in (seen, unseen):
        assert np.exp(
            -ngrams.bigram(np.full(lm.vocab, before), np.arange(lm.vocab))
        ).sum() == pytest.approx(1)


# ---- several at once


def test_autoencoders_that_share_a_pass_get_the_results_they_get_alone(small_acts):
    acts = small_acts(lm_batch=4)
    lm = LM(acts=acts)
    saes = {"one": random_sae(acts, lm.d_model), "other": random_sae(acts, lm.d_model, n=48, k=3)}
    names, options = (
        ["stats", "downstream", "n2g", "explained_loss"],
        dataclasses.replace(OPTIONS, tokens=10**6),
    )
    together = runner.evaluate_many(saes, lm, names, options)
    for label, sae in saes.items():
        alone = runner.evaluate(sae, lm, names, options)
        for name in names:
            for key, value in alone[name].items():
                if key != "seconds":
                    assert together[label][name][key] == value, (label, name, key)


def test_autoencoders_of_different_contexts_do_not_share_a_pass(small_acts):
    one, other = small_acts(), small_acts(context=8)
    lm = LM(acts=one)
    with pytest.raises(
        InputError,
        match=r"a and b cannot share a pass: acts.context is 16 of one and 8 of the other; evaluate them one by one",
    ):
        runner.evaluate_many(
            {"a": random_sae(one, lm.d_model), "b": random_sae(other, lm.d_model)},
            lm,
            ["stats"],
            OPTIONS,
        )


def test_an_evaluation_runs_the_lm_once_for_all_that_share_it(small_acts, monkeypatch):
    acts = small_acts(lm_batch=4)
    lm = LM(acts=acts)
    calls = []
    whole = LM.acts
    monkeypatch.setattr(
        LM,
        "acts",
        lambda self, tokens, attention: calls.append(1) or whole(self, tokens, attention),
    )
    runner.evaluate_many({"a": random_sae(acts, lm.d_model)}, lm, ["stats"], OPTIONS)
    alone = len(calls)
    runner.evaluate_many(
        {name: random_sae(acts, lm.d_model) for name in "abc"}, lm, ["stats"], OPTIONS
    )
    assert len(calls) == 2 * alone
