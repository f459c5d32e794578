"""The decoder projection: its definition, and the L0 of planted features found within 25 %."""

import numpy as np
import pytest
import torch

from ksparse.config import Recipe, SAEConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.evals import decoder_projection as module
from ksparse.evals import runner
from ksparse.evals.decoder_projection import RANK, at_rank, best_k, mean_cosine, project
from ksparse.lm.model import LM
from ksparse.sae.init import initialize_
from ksparse.sae.model import SAE, Shape
from ksparse.training.steps.autograd import AutogradStep

FEATURES, WIDTH, TRUE_L0 = 32, 40, 6


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99, 1.0])
def test_the_value_at_a_rank_is_that_of_the_sorted_list(share):
    values = torch.randn(30, 17, generator=torch.Generator().manual_seed(0))
    ordered = values.flatten().sort(descending=True).values
    expected = ordered[min(len(ordered) - 1, round(share * len(ordered)))]
    assert at_rank(values, share) == pytest.approx(float(expected))


def test_the_mean_cosine_is_over_pairs_of_different_rows(monkeypatch):
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(rows, dim=1).double().numpy()
    pairs = [abs(unit[i] @ unit[j]) for i in range(9) for j in range(9) if i != j]
    assert mean_cosine(rows) == pytest.approx(np.mean(pairs), rel=1e-5)
    monkeypatch.setattr(module, "PROJECTIONS", 80)
    assert mean_cosine(rows) == pytest.approx(np.mean(pairs), rel=1e-5)


@pytest.mark.parametrize(
    "values, expected",
    [
        ([3.0, 1.0, 3.0], (8.0, True)),
        ([1.0, 2.0, 3.0], (4.0, False)),
        ([3.0, 2.0, 1.0], (16.0, False)),
    ],
)
def test_the_best_k_is_between_those_tried_or_at_an_end(values, expected):
    assert best_k([4, 8, 16], values) == pytest.approx(expected)


def batch(rows, seed):
    """Return activations [rows, WIDTH]: orthogonal features that fire together, TRUE_L0 at a time on average."""
    fixed = torch.Generator().manual_seed(100)
    directions = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=fixed))[0][:FEATURES]
    shared = 0.7 * torch.randn(FEATURES, 4, generator=fixed)
    rate = torch.linspace(0.35, 0.05, FEATURES)
    rate = rate / rate.sum() * TRUE_L0
    drawn = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, FEATURES, generator=drawn)
    score = torch.randn(rows, 4, generator=drawn) @ shared.T + noise
    score = score / (shared.square().sum(1) + 1).sqrt()
    fires = score > torch.distributions.Normal(0, 1).icdf(1 - rate)
    size = 1 + 0.15 * torch.randn(rows, FEATURES, generator=drawn)
    return (fires * size) @ directions, fires


def trained(k, steps=300, size=256):
    recipe = Recipe(
        sae=SAEConfig(n_latents=FEATURES, k=k, activation={"kind": "batch_topk"}),
        tokens=steps * size,
        batch=size,
        optim={"lr": 1e-2},
    )
    sae, sample = SAE(Shape(WIDTH, FEATURES, k, "none", 1.0, "batch_topk"), {}), batch(2048, 3)[0]
    initialize_(sae, sample, recipe.sae, torch.Generator().manual_seed(0))
    step = AutogradStep(sae, recipe)
    baseline = (sample - sample.mean(0)).square().mean().item()
    for number in range(1, steps + 1):
        x = batch(size, 1000 + number)[0]
        step.backward(x, baseline=baseline, dead=torch.arange(0), k_aux=4)
        step.step(number)
    return step.averaged()


def test_the_l0_of_planted_features_is_found_within_a_quarter():
    x, fires = batch(2000, 8)
    assert fires.sum(1).float().mean() == pytest.approx(TRUE_L0, rel=0.05)
    ks = [3, 6, 12]
    values = [at_rank(project(trained(k), x), RANK) for k in ks]
    found, inside = best_k(ks, values)
    assert inside and abs(found / TRUE_L0 - 1) < 0.25


def test_the_evaluation_is_that_of_the_activations_it_saw(small_acts):
    lm = LM(acts=small_acts())
    sae = SAE(Shape(16, 64, 4))
    with torch.no_grad():
        sae.W_dec.normal_(generator=torch.Generator().manual_seed(0))
        sae.normalize_decoder_(), sae.W_enc.copy_(sae.W_dec)
    options = EvalConfig(tokens=200, device="cpu", split="train")
    found = runner.evaluate(sae, lm, ["decoder_projection", "stats"], options)
    result = found["decoder_projection"]
    assert result["l0"]["value"] == pytest.approx(found["stats"]["l0"]["value"])
    assert [point["rank"] for point in result["ranks"]] == list(module.RANKS)
    values = [point["projection"]["value"] for point in result["ranks"]]
    assert values == sorted(values, reverse=True)
    assert result["projection"]["se"] > 0
    assert result["mean_cosine"]["value"] == pytest.approx(mean_cosine(sae.W_dec))
