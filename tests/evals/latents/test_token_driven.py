"""Token-driven latents: a token detector fires wherever its token is put, a context detector does not."""

from collections import Counter

import pytest
import torch

from ksparse.config.evaluation import EvalConfig
from ksparse.data.contexts import Corpus
from ksparse.evals import runner
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(tokens=10**6, device="cpu", latents=16, split="train")


@pytest.fixture
def planted(small_acts, monkeypatch):
    """Return an LM whose activations say: the token is A; it is A after B; it is C; a constant."""
    lm = LM(acts=small_acts())
    pairs, count = Counter(), Counter()
    for context in Corpus(lm.options, lm.tokenizer, "train").contexts():
        if context.start.epoch:
            break
        kept = context.tokens[1:]
        count.update(kept)
        pairs.update(zip(kept, kept[1:]))
    (before, token), _ = next(
        (pair, times)
        for pair, times in pairs.most_common()
        if times >= 12 and 0 not in pair and times < 0.3 * count[pair[1]]
    )
    other = next(t for t, _ in count.most_common() if t not in (before, token, 0))

    def acts(tokens, attention):
        x = torch.zeros(*tokens.shape, 16)
        x[..., 0] = tokens == token
        x[:, 1:, 1] = ((tokens[:, 1:] == token) & (tokens[:, :-1] == before)).float()
        x[..., 2] = tokens == other
        x[..., 3] = 1.0
        return x

    monkeypatch.setattr(lm, "acts", acts)
    sae = SAE(Shape(16, 16, 4, "none"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(16)), sae.W_dec.copy_(torch.eye(16))
        sae.b_enc.zero_(), sae.b_pre.zero_()
    return lm, sae


def test_a_token_detector_and_a_context_detector_are_told_apart(planted):
    found = runner.evaluate(planted[1], planted[0], ["token_driven"], OPTIONS)["token_driven"]
    rate = dict(zip(found.arrays["latent"].tolist(), found.arrays["rate"].tolist()))
    assert set(rate) == {0, 1, 2, 3}
    assert rate[0] == rate[2] == rate[3] == 1 and rate[1] < 0.5
    assert found["token_driven"]["value"] == 0.75
    control = dict(zip(rate, found.arrays["control_rate"].tolist()))
    assert control[3] == 1 and control[0] < 0.3 and control[1] < 0.1
    mean = sum(rate.values()) / 4 - sum(control.values()) / 4
    assert found["difference"]["value"] == pytest.approx(mean, abs=1e-6)


def test_the_same_seed_gives_the_same_cases(planted):
    one, other = (
        runner.evaluate(planted[1], planted[0], ["token_driven"], OPTIONS)["token_driven"]
        for _ in range(2)
    )
    assert one.arrays["rate"].equal(other.arrays["rate"])


def test_an_sae_without_live_latents_has_no_share(planted):
    lm, sae = planted
    with torch.no_grad():
        sae.b_enc.fill_(-10.0)
    found = runner.evaluate(sae, lm, ["token_driven"], OPTIONS)["token_driven"]
    assert found["token_driven"]["value"] is None and found["n_latents"] == 0
