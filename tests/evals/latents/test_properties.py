"""What is said of latents is its definition, and what is planted is found by its rule."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.evals import runner
from ksparse.evals.latents import properties
from ksparse.evals.latents.moments import Moments
from ksparse.evals.latents.properties import (
    Firing,
    Latents,
    effective,
    law,
    opposites,
    repeats,
    somers,
    stratified,
)
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Code, Shape

OPTIONS = EvalConfig(tokens=300, per_document=60, device="cpu")
CONTEXTS, LENGTH, N, VOCABULARY = 400, 16, 12, 40
FIRST, LATE, EARLY, REPEATED, NOISE, ONE, TEN = range(7)


@pytest.fixture(scope="module")
def planted() -> runner.Result:
    """Return the result for codes in which latents fire by rule; position 0 is not kept."""
    draw = np.random.default_rng(0)
    tokens = torch.from_numpy(draw.integers(0, VOCABULARY, (CONTEXTS, LENGTH)))
    keep = torch.ones(CONTEXTS, LENGTH, dtype=torch.bool)
    keep[:, 0] = False
    place = torch.arange(LENGTH).expand(CONTEXTS, -1)
    again = torch.tensor(
        [[int(token in row[:i]) for i, token in enumerate(row)] for row in tokens.tolist()]
    )
    noise = torch.from_numpy(draw.random((CONTEXTS, LENGTH, N)))
    active = torch.zeros(CONTEXTS, LENGTH, N, dtype=torch.bool)
    active[..., FIRST] = (place == 1) & (noise[..., 0] < 0.95)
    active[..., LATE] = place > 10
    active[..., EARLY] = (place > 1) & (place < 6)
    active[..., REPEATED] = (again == 1) & (noise[..., 1] < 0.9)
    active[..., NOISE] = noise[..., 2] < 0.3
    active[..., ONE] = tokens == 7
    active[..., TEN] = tokens < 10
    values = active[keep].float()
    values[:, LATE] *= 2
    sae = SAE(Shape(8, N, 8, normalize="none"))
    sae.W_dec.data = torch.randn(N, 8, generator=torch.Generator().manual_seed(0))
    sae.W_dec.data[EARLY] = -3 * sae.W_dec.data[LATE]
    options = dataclasses.replace(OPTIONS, tokens=10**6).resolved()
    acts = SimpleNamespace(context=LENGTH, keep="text")
    data = SimpleNamespace(
        acts=acts, context=LENGTH, vocab=VOCABULARY, has_text=True, options=options
    )
    context = SimpleNamespace(
        sae=sae, data=data, options=options, lm=SimpleNamespace(vocab=VOCABULARY)
    )
    parts: dict = {}
    context.part = lambda kind: (
        parts[kind] if kind in parts else parts.setdefault(kind, kind(context))
    )
    part = Latents(context)
    code = Code(*values.topk(8, dim=1))
    rows = keep.nonzero(as_tuple=True)[0]
    for some in torch.arange(CONTEXTS).chunk(3):
        mine = torch.isin(rows, some)
        contexts = SimpleNamespace(
            tokens=tokens[some], attention=torch.ones(len(some), LENGTH, dtype=torch.bool)
        )
        batch = SimpleNamespace(
            code=Code(code.values[mine], code.indices[mine]),
            held_out=SimpleNamespace(keep=keep[some], contexts=contexts, documents=rows[mine]),
        )
        for kind in (Moments, Firing):
            parts[kind].update(batch)
    part.compute(lambda *_: None)
    return part.finalize()


def test_planted_recurring_latents_are_found_by_their_rules_and_no_others(planted):
    found = {
        rule: [entry["latent"] for entry in entries if entry["found"]]
        for rule, entries in planted["recurring"].items()
    }
    assert found == {"first": [FIRST], "late": [LATE], "early": [EARLY], "repetition": [REPEATED]}
    scores = planted.arrays
    assert scores["score_first"][FIRST] == pytest.approx(0.95, abs=0.05) and scores[
        "score_repetition"
    ][REPEATED] == pytest.approx(0.9, abs=0.05)
    assert all(abs(scores[f"score_{rule}"][NOISE]) < 0.06 for rule in properties.RULES)
    assert (
        abs(scores["score_repetition"][LATE]) < 1e-6
    )  # repetition comes late too, but not more so where a token is repeated
    late = planted["recurring"]["late"][0]
    assert late["density"] == pytest.approx(5 / 15) and late["mean_act"] == 2


def test_effective_tokens_of_a_uniform_distribution_are_its_tokens(planted):
    assert planted.arrays["effective_tokens"][ONE] == pytest.approx(1)
    assert planted.arrays["effective_tokens"][TEN] == pytest.approx(10, rel=1e-5)
    assert planted.arrays["effective_tokens"][LATE] == pytest.approx(VOCABULARY, rel=0.02)
    for m in (1, 2, 17):
        assert effective(np.zeros(m, int), np.full(m, 0.3), 2)[0] == pytest.approx(m)
    assert np.isnan(effective(np.zeros(3, int), np.ones(3), 2)[1])


def test_latents_that_undo_each_other_are_found(planted):
    assert planted["n_opposite_pairs"] == planted["n_opposite_among_densest"] == 1
    assert planted["opposite_pairs"][0]["latents"] == [LATE, EARLY]
    assert planted["opposite_pairs"][0]["cosine"] == pytest.approx(-1)
    assert planted.arrays["opposite"][LATE] == EARLY and planted.arrays["opposite"][EARLY] == LATE
    directions = torch.randn(9, 4, generator=torch.Generator().manual_seed(1))
    slow = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=-1)
    cosines, partners = opposites(directions, lambda *_: None)
    assert np.allclose(cosines, slow.min(1).values) and partners.tolist() == slow.argmin(1).tolist()


def test_moments_densities_and_dense_solutions_are_their_definitions(small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    sae = SAE(Shape(lm.d_model, 64, 4), {"acts": dataclasses.asdict(acts)})
    for i, parameter in enumerate(sae.parameters()):
        parameter.data = (
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) / 4
        )
    options = dataclasses.replace(OPTIONS, tokens=10**6)
    result = runner.evaluate(sae, lm, ["latents"], options)["latents"]
    a = torch.cat(
        [sae.encode(batch.x).dense(64) for batch in runner.HeldOut(lm, acts, options)]
    ).double()
    second = a.square().mean(0)
    live = second > 0
    for name, expected in (
        ("density", (a > 0).double().mean(0)),
        ("mean_act", a.mean(0)),
        ("mean_act_squared", second),
        ("skew", (a**3).mean(0) / second**1.5),
        ("kurtosis", (a**4).mean(0) / second**2),
    ):
        assert torch.allclose(result.arrays[name][live], expected[live].float(), rtol=1e-4), name
    density = (a > 0).double().mean(0).sort(descending=True).values
    assert result["densest_density"] == pytest.approx(density[:16].mean().item())
    assert result["densest_over_l0"] == pytest.approx(
        density[:16].mean().item() / density.sum().item()
    )
    assert result["densest_share"] == pytest.approx((density[:16].sum() / density.sum()).item())
    assert result["n_tokens"] == len(a) and result["l0"]["value"] == pytest.approx(
        density.sum().item()
    )


@pytest.mark.parametrize("name", ["norm", "laplace"])
def test_the_law_that_values_were_drawn_from_fits_better(name):
    logs = getattr(scipy.stats, name)(-3, 0.4).rvs(3000, random_state=0)
    found = law(10**logs)
    assert found["better"] == {"norm": "gaussian", "laplace": "laplace"}[name]
    assert abs(found["margin"]["value"]) > 3 * found["margin"]["se"]
    assert np.log10(found["mode"]) == pytest.approx(-3, abs=0.15)
    for ours, theirs in (("gaussian", scipy.stats.norm), ("laplace", scipy.stats.laplace)):
        assert found[ours]["log_likelihood"] == pytest.approx(
            theirs(*theirs.fit(logs)).logpdf(logs).mean()
        )
    assert law(np.array([0.1, 0.1, 0.0]))["better"] is None


def test_rank_scores_are_the_slow_definitions():
    draw = np.random.default_rng(2)
    position, property_, active = (
        draw.integers(0, 5, 300),
        draw.random(300) < 0.4,
        draw.random((3, 300)) < 0.3,
    )
    active[0] |= position > 2
    counts = np.stack([np.bincount(position[row], minlength=5) for row in active])
    everywhere = np.bincount(position, minlength=5)
    for row, score in zip(active, somers(counts, everywhere)):
        pairs = np.sign(position[row][:, None] - position[~row][None, :])
        assert score == pytest.approx(pairs.mean())
    with_ = np.bincount(position[property_], minlength=5)
    both = np.stack([np.bincount(position[row & property_], minlength=5) for row in active])
    for row, score in zip(active, stratified(both, with_, counts, everywhere)):
        weights, gaps = [], []
        for p in range(5):
            yes, no = row[(position == p) & property_], row[(position == p) & ~property_]
            weights.append(len(yes) * len(no) / (len(yes) + len(no)))
            gaps.append(yes.mean() - no.mean())
        assert score == pytest.approx(np.average(gaps, weights=weights))
    assert (
        np.isnan(somers(np.zeros((1, 3)), np.ones(3))).all()
        and np.isnan(stratified(counts, np.zeros(5), counts, everywhere)).all()
    )


def test_a_token_is_repeated_from_its_second_place_in_the_context_on():
    tokens = torch.tensor([[4, 5, 4, 4, 5], [5, 6, 7, 1, 1]])
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    assert repeats(tokens, attention).int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]
