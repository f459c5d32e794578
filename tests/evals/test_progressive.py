"""Another activation in the place of the trained one: its definition, its threshold, and where all runs meet."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.evals.progressive import at_threshold, positive, threshold_for, thresholds_for
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(tokens=300, per_document=60, device="cpu")


def make_sae(d: int, n: int = 64, k: int = 8, *, seed: int = 0, acts=None, **shape) -> SAE:
    sae = SAE(Shape(d, n, k, **shape), {"acts": dataclasses.asdict(acts)} if acts else {})
    generator = torch.Generator().manual_seed(seed)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / d**0.5
    return sae


@pytest.fixture
def subject(small_acts):
    acts = small_acts(lm_batch=4)
    return acts, LM(acts=acts)


@pytest.mark.parametrize("kind", ["topk", "relu", "gated"])
def test_a_threshold_gives_the_wanted_l0(kind):
    sae, x = (
        make_sae(16, activation=kind),
        torch.randn(500, 16, generator=torch.Generator().manual_seed(3)),
    )
    for l0 in (0.5, 3, 11.25):
        threshold = threshold_for(sae, x, l0)
        code = at_threshold(sae, x, threshold)
        assert (code.values > 0).sum() == round(500 * l0)
        acts = positive(sae, sae.normalize(x).x)
        assert torch.allclose(code.dense(64), torch.where(acts > threshold, acts, 0.0))
    assert thresholds_for(sae, x, [0.5, 3]) == [
        threshold_for(sae, x, 0.5),
        threshold_for(sae, x, 3),
    ]
    assert threshold_for(sae, x, 64) == 0  # not so many are positive


def test_what_a_gate_lets_through_is_what_a_gated_sae_has_at_threshold_0():
    sae, x = (
        make_sae(16, activation="gated"),
        torch.randn(50, 16, generator=torch.Generator().manual_seed(3)),
    )
    assert torch.allclose(at_threshold(sae, x, 0).dense(64), sae.encode(x).dense(64))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda sae, x: threshold_for(sae, x, 0), "no threshold gives an L0 of 0"),
        (
            lambda sae, x: threshold_for(sae, x, 65),
            "no threshold gives an L0 of 65: give more than 0, and at most the 64 latents",
        ),
        (
            lambda sae, x: threshold_for(sae, x[:0], 3),
            "a threshold needs activations to be chosen on",
        ),
        (
            lambda sae, x: at_threshold(sae, x, -0.5),
            "the threshold is -0.5; it must not be negative",
        ),
    ],
)
def test_what_is_no_threshold_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(make_sae(16), torch.ones(3, 16))


def test_at_its_own_k_the_numbers_are_those_of_stats_and_downstream(subject):
    acts, lm = subject
    found = runner.evaluate(
        make_sae(lm.d_model, acts=acts), lm, ["progressive", "stats", "downstream"], OPTIONS
    )
    result, at = found["progressive"], {point["k"]: point for point in found["progressive"]["topk"]}
    for point in (result, result["own"], at[8]):
        assert point["l0"]["value"] == pytest.approx(found["stats"]["l0"]["value"])
        assert point["nmse"]["value"] == pytest.approx(found["stats"]["nmse"]["value"])
        assert point["ce_delta"]["value"] == pytest.approx(
            found["downstream"]["ce_delta"]["value"], abs=1e-6
        )
    assert list(at) == [1, 2, 4, 6, 8, 11, 16, 23, 32, 64]
    assert [point["wanted"] for point in result["threshold"]] == list(at)


def test_each_point_is_its_definition(subject):
    acts, lm = subject
    sae = make_sae(lm.d_model, acts=acts)
    result = runner.evaluate(
        sae,
        lm,
        ["progressive"],
        dataclasses.replace(OPTIONS, tokens=10**6, progressive_tokens=10**6),
    )["progressive"]
    data = runner.HeldOut(lm, acts, dataclasses.replace(OPTIONS, tokens=10**6))
    x = sae.normalize(torch.cat([batch.x for batch in data])).x
    total = (x - x.mean(0)).double().square().sum().item()
    pre_acts = sae.pre_acts_normalized(x)

    def nmse(z):
        return (
            x.double() - (z.double() @ sae.W_dec.double() + sae.b_pre.double())
        ).square().sum().item() / total

    for point in result["topk"]:
        cut = pre_acts.topk(point["k"]).values[:, -1:]
        z = torch.where(pre_acts >= cut, pre_acts, 0.0).relu()
        assert point["nmse"]["value"] == pytest.approx(nmse(z), rel=1e-4)
        assert point["l0"]["value"] == pytest.approx((z > 0).sum(1).double().mean().item())
    for point in result["threshold"]:
        z = torch.where(pre_acts > point["threshold"], pre_acts, 0.0).relu()
        assert point["nmse"]["value"] == pytest.approx(nmse(z), rel=1e-4)
        if 0 < point["threshold"] < pre_acts.max():
            assert point["l0"]["value"] == pytest.approx(
                point["wanted"], rel=0.01
            )  # chosen on all of the text here
    assert result["all"]["l0"]["value"] == pytest.approx(
        (pre_acts > 0).sum(1).double().mean().item()
    )
    assert result["all"]["nmse"]["value"] == pytest.approx(nmse(pre_acts.relu()), rel=1e-4)


def test_saes_in_one_pass_stand_in_each_others_results(subject):
    acts, lm = subject
    saes = {
        f"runs/{name}": make_sae(lm.d_model, k=k, seed=k, acts=acts)
        for name, k in (("a", 2), ("b", 8))
    }
    found = runner.evaluate_many(saes, lm, ["progressive", "stats"], OPTIONS)
    assert found["runs/a"]["progressive"]["beside"] == {
        "b": {
            key: found["runs/b"]["progressive"][key] for key in ("own", "topk", "threshold", "all")
        }
    }
    assert "beside" not in found["runs/a"]["stats"]
    same = {f"{folder}/a": sae for folder, sae in zip(("x", "y"), saes.values())}
    assert list(
        runner.evaluate_many(same, lm, ["progressive"], OPTIONS)["x/a"]["progressive"]["beside"]
    ) == ["y/a"]
