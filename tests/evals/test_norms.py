"""Norm bias: an inner product gives large activations the slots and the strongest examples; a cosine does not."""

import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.evals import runner
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(tokens=10**6, device="cpu", split="train")


@pytest.fixture
def result(small_acts, monkeypatch):
    """Return result(normalize): of a ReLU SAE with thresholds, on random directions whose norms differ by a factor of ten."""
    lm = LM(acts=small_acts())
    table = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    table = torch.nn.functional.normalize(table - table.mean(1, keepdim=True), dim=1)
    norms = torch.logspace(0, 1, 300)[
        torch.randperm(300, generator=torch.Generator().manual_seed(1))
    ]
    monkeypatch.setattr(lm, "acts", lambda tokens, attention: (table * norms[:, None])[tokens])

    def evaluate(normalize, threshold):
        sae = SAE(Shape(16, 64, 4, normalize, 1.0, "relu"))
        with torch.no_grad():
            sae.W_dec.normal_(generator=torch.Generator().manual_seed(2))
            sae.normalize_decoder_()
            sae.W_enc.copy_(sae.W_dec)
            sae.b_enc.fill_(-threshold), sae.b_pre.zero_()
        return runner.evaluate(sae, lm, ["norms", "stats"], OPTIONS)

    return evaluate


def test_inner_products_give_large_activations_the_slots_and_unit_norm_does_not(result):
    inner, cosine = result("none", 1.0)["norms"], result("unit_norm", 0.4)["norms"]
    assert (inner["score"], cosine["score"]) == ("inner product", "cosine")
    assert inner["slots_of_top"]["value"] > 0.15
    l0 = [each["value"] for each in inner["l0"]]
    assert l0[0] < 0.5 * l0[-1]
    assert cosine["slots_of_top"]["value"] == pytest.approx(
        0.1, abs=4 * cosine["slots_of_top"]["se"] + 0.01
    )
    assert inner["strongest_in_top"]["value"] > 0.4 > 2 * cosine["strongest_in_top"]["value"]
    assert cosine["strongest_in_top_inner"]["value"] > 2 * cosine["strongest_in_top"]["value"]
    assert inner["strongest_in_top"] == inner["strongest_in_top_inner"]
    assert cosine["strongest_in_top"] == cosine["strongest_in_top_cosine"]


def test_deciles_have_rising_norms_and_add_up_to_the_whole(result):
    found = result("none", 1.0)
    norms, stats = found["norms"], found["stats"]
    rising = [each["value"] for each in norms["norm"]]
    assert rising == sorted(rising) and len(rising) == 10
    assert sum(each["value"] for each in norms["slots"]) == pytest.approx(1)
    assert sum(each["value"] for each in norms["l0"]) / 10 == pytest.approx(
        stats["l0"]["value"], rel=0.02
    )
    for shares in norms["strongest"].values():
        assert sum(shares) == pytest.approx(1)
