"""Try it: a text's codes are the autoencoder's, and holding a latent changes that latent alone."""

from __future__ import annotations

import pytest
import torch

import ksparse
from ksparse.errors import InputError
from ksparse.viewer import live
from ksparse.viewer.live import CONTINUED, Live

from .conftest import N

TEXT = "def area(self, width):\n    return"


@pytest.fixture(scope="module")
def asked(trained) -> Live:
    return Live(trained)


@pytest.fixture(scope="module")
def parts(asked):
    return asked._loaded


def test_a_texts_latents_are_its_code(asked, parts):
    sae, lm = parts
    found = asked.activations(TEXT)
    with torch.no_grad():
        code = sae.encode(lm(TEXT))
    assert len(found["tokens"]) == len(found["latents"]) == len(code.values)
    for row, (values, indices) in zip(found["latents"], zip(code.values.tolist(), code.indices.tolist())):
        assert row == [[i, pytest.approx(v, rel=1e-4)] for v, i in zip(values, indices) if v > 0]


@pytest.mark.parametrize("value", [0.0, 0.5, -0.2])
def test_holding_a_latent_changes_its_own_direction_alone(parts, value):
    sae, lm = parts
    with torch.no_grad():
        x = lm(TEXT)
        inputs = sae.normalize(x)
        code = sae.encode(x)
        latent = int(code.indices[3, 0])
        dense = code.dense(N)
        dense[:, latent] = value
        recon, error = inputs.restore(sae.decode(code)), x - inputs.restore(sae.decode(code))
        expected = inputs.restore(dense @ sae.W_dec + sae.b_pre) + error  # the definition: error kept
        assert torch.allclose(live.held(sae, x, latent, value), expected, atol=1e-5 * float(recon.abs().max()))


def test_holding_a_latent_where_it_is_changes_nothing(asked, parts):
    sae, lm = parts
    never = next(i for i in range(N) if not (sae.encode(lm(TEXT)).indices == i).any())
    found = asked.change(TEXT, never, 0)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and all(each["plain"] == pytest.approx(each["changed"], rel=1e-3, abs=1e-6) for each in found["predictions"])
    assert found["was"] == [0] * len(found["tokens"])


def test_what_the_lm_predicts_is_shown_as_it_is_and_changed(asked, parts):
    sae, lm = parts
    latent = asked.activations(TEXT)["latents"][-1][0][0]
    found = asked.change(TEXT, latent, 3.0)
    with torch.no_grad():
        tokens = lm.tokenize(TEXT)
        watched = lm.watch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        plain = watched.logits[0, -1].softmax(-1)
        lead = tokens.shape[1] - len(found["tokens"])
        changed = lm.replay(watched, lambda x: torch.cat([x[:, :lead], live.held(sae, x[:, lead:], latent, 3.0)], 1))[0, -1].softmax(-1)
    assert found["kl"] == pytest.approx(float((plain * (plain / changed).log()).sum()), rel=1e-3)
    assert max(each["plain"] for each in found["predictions"]) == pytest.approx(float(plain.max()), rel=1e-3)
    assert max(each["changed"] for each in found["predictions"]) == pytest.approx(float(changed.max()), rel=1e-3)
    assert len(found["plain"]) == len(found["changed"]) == CONTINUED and found["plain"] != found["changed"]
    greedy = lm.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=CONTINUED, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert "".join(found["plain"]).replace("·", " ") == "".join(map(live.safe_token, ksparse.acts.text.token_strings(lm.tokenizer, greedy[0, tokens.shape[1]:].tolist()))).replace("·", " ")


def test_a_latent_held_at_one_token_is_changed_there_alone(asked):
    latent = asked.activations(TEXT)["latents"][-1][0][0]
    last = len(asked.activations(TEXT)["tokens"]) - 1
    everywhere, here = asked.change(TEXT, latent, 3.0), asked.change(TEXT, latent, 3.0, last)
    assert here["kl"] > 0 and here["plain"] == everywhere["plain"]


@pytest.mark.parametrize("text, latent, value, at, why", [
    ("", 1, 0, None, "there is no text"), (TEXT, N, 0, None, f"latent {N} is not one of"), (TEXT, "1", 0, None, "is not one of"), (TEXT, 1, None, None, "held at a number, not at None"),
    (TEXT, 1, float("nan"), None, "held at a number"), (TEXT, 1, True, None, "held at a number"), (TEXT, 1, 0, 999, "token 999 is not one of 0 to"), (TEXT, 1, 0, True, "token True"),
    ("x " * 5_000, 1, 0, None, "at most")])
def test_what_cannot_be_held_is_said(asked, text, latent, value, at, why):
    with pytest.raises(InputError, match=why):
        asked.change(text, latent, value, at)


def test_half_a_character_is_read_as_a_question_mark(asked):
    assert asked.activations("x \ud800")["tokens"][-1].endswith("?")
