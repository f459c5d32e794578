"""Try it: a text's codes are the autoencoder's, and a latent is held as `steering` holds it."""

from __future__ import annotations

import json

import pytest
import torch

from ksparse import steering
from ksparse.errors import InputError, NonFiniteError, OutOfMemoryError
from ksparse.lm.tokens import token_strings
from ksparse.report.tokens import safe_token
from ksparse.storage import checksums, jsonio
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
    for row, (values, indices) in zip(
        found["latents"], zip(code.values.tolist(), code.indices.tolist())
    ):
        assert row == [[i, pytest.approx(v, rel=1e-4)] for v, i in zip(values, indices) if v > 0]


def test_holding_a_latent_where_it_is_changes_nothing(asked, parts):
    sae, lm = parts
    never = next(i for i in range(N) if not (sae.encode(lm(TEXT)).indices == i).any())
    found = asked.change(TEXT, never, 0)
    assert found["kl"] == pytest.approx(0, abs=1e-6) and all(
        each["plain"] == pytest.approx(each["changed"], rel=1e-3, abs=1e-6)
        for each in found["predictions"]
    )


def test_what_the_lm_predicts_is_shown_as_it_is_and_held(asked, parts):
    sae, lm = parts
    latent = asked.activations(TEXT)["latents"][-1][0][0]
    found, expected = (
        asked.change(TEXT, latent, 3.0),
        steering.compare(lm, sae, TEXT, {latent: 3.0}, unit="value", tokens=CONTINUED),
    )
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-4) and found["kl"] > 0
    for name, each in zip(("plain", "changed"), expected):
        assert max(row[name] for row in found["predictions"]) == pytest.approx(
            float(each.log_probs.exp().max()), rel=1e-4
        )
        assert found[name] == [
            safe_token(token) for token in token_strings(lm.tokenizer, each.tokens)
        ]
    assert found["plain"] != found["changed"]


@pytest.mark.parametrize("at", [0, 3, -1])
def test_a_latent_held_at_one_token_is_changed_there_alone(asked, parts, at):
    sae, lm = parts
    read = asked.activations(TEXT)
    at = range(len(read["tokens"]))[at]
    latent = read["latents"][at][0][0]
    found = asked.change(TEXT, latent, 3.0, at)
    with torch.inference_mode():
        tokens = lm.tokenize(TEXT)
        place = tokens.shape[1] - len(read["tokens"]) + at
        watched = lm.run_with_cache(tokens, torch.ones_like(tokens, dtype=torch.bool))

        def hold(x):
            x = x.clone()
            code, scale = sae.encode(x[:, place]), sae.normalize(x[:, place]).scale
            x[:, place] += (
                (3.0 - (code.values * (code.indices == latent)).sum(-1, keepdim=True))
                * sae.W_dec[latent]
                * scale
            )
            return x

        expected = lm.run_patched(watched, hold)[0, -1].softmax(-1)
    assert max(row["changed"] for row in found["predictions"]) == pytest.approx(
        float(expected.max()), rel=1e-3
    )
    assert found["plain"] == asked.change(TEXT, latent, 3.0)["plain"]


@pytest.mark.parametrize(
    "text, latent, value, at, why",
    [
        ("", 1, 0, None, "there is no text"),
        (TEXT, N, 0, None, f"latent {N} does not exist"),
        (TEXT, "1", 0, None, "a latent is named by its number"),
        (TEXT, 1, None, None, "held at a number, not at None"),
        (TEXT, 1, float("nan"), None, "held at a number"),
        (TEXT, 1, True, None, "held at a number"),
        (TEXT, 1, 0, 999, "token 999 is not one of 0 to"),
        (TEXT, 1, 0, True, "token True"),
        ("x " * 5_000, 1, 0, None, "at most"),
    ],
)
def test_what_cannot_be_held_is_said(asked, text, latent, value, at, why):
    with pytest.raises(InputError, match=why):
        asked.change(text, latent, value, at)


def test_half_a_character_is_read_as_a_question_mark(asked):
    assert asked.activations("x \ud800")["tokens"][-1].endswith("?")
    assert asked.change("x \ud800", 1, 0.5) == asked.change("x ?", 1, 0.5)


@pytest.mark.parametrize("value", [10**400, -(10**400), 1e308, 3e38, float("inf")])
def test_a_value_that_float32_does_not_have_is_refused(asked, value):
    with pytest.raises(
        InputError, match="a latent is held at a number, not at .*; at most 1.7e.38 either way"
    ):
        asked.change(TEXT, 1, value)


def test_predictions_of_nan_are_no_result(asked):
    with pytest.raises(
        NonFiniteError,
        match="with latent 1 held at -1e.38 the LM predicts NaN; hold it nearer to the values",
    ):
        asked.change(TEXT, 1, -1e38)


def test_activations_of_nan_are_no_result(asked, parts, monkeypatch):
    monkeypatch.setattr(
        type(parts[1]),
        "acts",
        lambda self, tokens, attention: torch.full(
            (*tokens.shape, parts[0].shape.d_model), float("nan")
        ),
    )
    with pytest.raises(NonFiniteError, match="gives NaN or infinity on this text"):
        asked.activations(TEXT)


def test_too_little_memory_is_said(asked, parts, monkeypatch):
    def full(self, text):
        raise RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
        )

    monkeypatch.setattr(type(parts[1]), "tokenize", full)
    with pytest.raises(
        OutOfMemoryError, match="out of memory: DefaultCPUAllocator.* Take a shorter text"
    ):
        asked.change(TEXT, 1, 1.0)


def test_an_endless_text_is_refused_before_it_is_tokenized(asked, parts, monkeypatch):
    monkeypatch.setattr(
        type(parts[1]), "tokenize", lambda self, text: pytest.fail("it was tokenized")
    )
    with pytest.raises(
        InputError, match="the text has 20,001 characters; at most 20,000 are read here"
    ):
        asked.activations("x" * 20_001)


def test_code_that_comes_with_the_lm_runs_only_where_the_viewer_was_told_so(run, tmp_path):
    """Whatever the run's recipe says: it may be somebody else's."""
    folder = tmp_path / "lm"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            }
        )
    )
    (folder / "evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise ValueError('it ran')\n"
    )
    recipe = run.recipe_file.read_text().replace('lm = "pylm/0.3m"', f'lm = "{folder}"')
    run.recipe_file.write_text(recipe.replace("[run]", "[run]\ntrust_remote_code = true"))
    manifest = run.checkpoints()[-1] / checksums.MANIFEST
    jsonio.write_json(
        manifest,
        {key: value for key, value in jsonio.read_table(manifest).items() if key != "recipe"},
        sealed=True,
    )
    with pytest.raises(InputError, match="cannot be loaded .*give --trust-remote-code True"):
        Live(run).activations(TEXT)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(InputError, match="it ran"):
        Live(run, trust_remote_code=True).activations(TEXT)
    assert (tmp_path / "ran").exists()
