"""Try it: a text's codes are the autoencoder's, and a latent is held as `steering` holds it."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest
import torch
from safetensors.torch import load_file

from ksparse import steering
from ksparse.errors import InputError, NonFiniteError, OutOfMemoryError
from ksparse.lm.tokens import token_strings
from ksparse.report.tokens import safe_token
from ksparse.sae import ranges
from ksparse.storage import checksums, jsonio
from ksparse.viewer import live
from ksparse.viewer.live import Live, LoadedLM, Stopped, mark_differences
from ksparse.viewer.requests import MOST_LATENTS, SteerRequest, read_text

from .conftest import N

TEXT = "def area(self, width):\n    return"


@pytest.fixture(scope="module")
def asked(trained) -> Live:
    return Live(trained)


@pytest.fixture(scope="module")
def parts(asked):
    return asked.parts


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


def steered(text, *latents, **options) -> SteerRequest:
    """Return the request that a page sends."""
    return SteerRequest.read({"text": text, "latents": [list(each) for each in latents]} | options)


def joined(pieces) -> str:
    return "".join(text for text, _ in pieces)


@pytest.fixture(scope="module")
def active(asked):
    """Return the largest latent of the last token."""
    return asked.activations(TEXT)["latents"][-1][0][0]


def test_holding_a_latent_where_it_is_changes_nothing(asked, parts):
    sae, lm = parts
    never = next(i for i in range(N) if not (sae.encode(lm(TEXT)).indices == i).any())
    found = asked.steer(steered(TEXT, (never, 0)))
    assert found["kl"] == pytest.approx(0, abs=1e-6) and all(
        each["plain"] == pytest.approx(each["changed"], rel=1e-3, abs=1e-6)
        for each in found["predictions"]
    )


def test_what_the_lm_predicts_is_shown_without_and_with_steering(asked, parts, active):
    sae, lm = parts
    times = {active: 3.0, (active + 1) % N: -1.5}
    found = asked.steer(steered(TEXT, *times.items(), tokens=9))
    expected = steering.compare(lm, sae, TEXT, times, tokens=9)
    assert found["kl"] == pytest.approx(expected.kl, rel=1e-4) and found["kl"] > 0
    for name, each in zip(("plain", "changed"), expected):
        assert max(row[name] for row in found["predictions"]) == pytest.approx(
            float(each.log_probs.exp().max()), rel=1e-4
        )
        assert joined(found[name]) == "".join(
            safe_token(token) for token in token_strings(lm.tokenizer, each.tokens)
        )
    assert found["plain"] != found["changed"]


def test_multiples_are_of_the_largest_activation_that_stats_found(asked, trained, active):
    largest = float(load_file(trained.arrays_file("stats"))["max_act"][active])
    (row,) = asked.steer(steered(TEXT, (active, -0.5), tokens=1))["latents"]
    assert (row["latent"], row["times"], row["largest_of"]) == (active, -0.5, "stats")
    assert row["largest"] == pytest.approx(largest, rel=1e-4)
    assert row["value"] == pytest.approx(-0.5 * largest, rel=1e-4)


def test_without_stats_multiples_are_of_the_largest_value_on_the_text_or_any_input(
    run, active, parts
):
    for file in run.eval_file("stats").parent.glob("stats.*"):
        file.unlink()
    sae, lm = parts
    code = sae.encode(lm(TEXT))
    never = next(i for i in range(N) if not (code.indices == i).any() and ranges.reach(sae, i) > 0)
    rows = Live(run).steer(steered(TEXT, (active, 1), (never, 1), tokens=1))["latents"]
    assert [row["largest_of"] for row in rows] == ["text", "any input"]
    here = (code.values * (code.indices == active)).sum(-1).max()
    assert rows[0]["value"] == pytest.approx(float(here), rel=1e-4)
    assert rows[1]["value"] == pytest.approx(ranges.reach(sae, never), rel=1e-4)


def test_sampling_repeats_with_its_seed_and_is_that_of_steering(asked, parts, active):
    sae, lm = parts
    options = {"temperature": 1.0, "seed": 3, "tokens": 12}
    request = steered(TEXT, (active, 2), **options)
    found = asked.steer(request)
    assert found == asked.steer(request)
    expected = steering.compare(lm, sae, TEXT, {active: 2.0}, **options)
    for name, each in zip(("plain", "changed"), expected):
        strings = token_strings(lm.tokenizer, each.tokens)
        assert joined(found[name]) == "".join(map(safe_token, strings))
    other = asked.steer(dataclasses.replace(request, seed=4))
    assert joined(other["plain"]) != joined(found["plain"])


@pytest.mark.parametrize("at", [0, 3, -1])
def test_a_latent_steered_at_one_token_is_changed_there_alone(asked, parts, at):
    sae, lm = parts
    read = asked.activations(TEXT)
    at = range(len(read["tokens"]))[at]
    latent = read["latents"][at][0][0]
    found = asked.steer(steered(TEXT, (latent, 2), at=at))
    value = found["latents"][0]["value"]
    with torch.inference_mode():
        tokens = lm.tokenize(TEXT)
        place = tokens.shape[1] - len(read["tokens"]) + at
        watched = lm.run_with_cache(tokens, torch.ones_like(tokens, dtype=torch.bool))

        def hold(x):
            x = x.clone()
            code, scale = sae.encode(x[:, place]), sae.normalize(x[:, place]).scale
            x[:, place] += (
                (value - (code.values * (code.indices == latent)).sum(-1, keepdim=True))
                * sae.W_dec[latent]
                * scale
            )
            return x

        expected = lm.run_patched(watched, hold)[0, -1].softmax(-1)
    assert max(row["changed"] for row in found["predictions"]) == pytest.approx(
        float(expected.max()), rel=1e-3
    )
    assert joined(found["plain"]) == joined(asked.steer(steered(TEXT, (latent, 2)))["plain"])


@pytest.mark.parametrize(
    "request_, why",
    [
        ({"text": ""}, "there is no text"),
        ({"text": 1}, "the text to read is missing"),
        ({"latents": None}, "there is no latent to steer; add one by its number"),
        ({"latents": []}, "there is no latent to steer"),
        ({"latents": [[1, 1]] * (MOST_LATENTS + 1)}, "17 latents are to be steered; at most 16"),
        ({"latents": [[1, 1], [1, 2]]}, "latent 1 is given twice"),
        ({"latents": [[N, 0]]}, f"latent {N} does not exist"),
        ({"latents": [["1", 0]]}, "a latent is named by its number, not by '1'"),
        ({"latents": [[True, 0]]}, "a latent is named by its number, not by True"),
        ({"latents": [{"a": 1}]}, "named by its number, not by a dict"),
        ({"latents": [[1, None]]}, "at a multiple of its largest activation, not at None"),
        ({"latents": [[1, float("nan")]]}, "at a multiple .*, not at nan; give a number"),
        ({"latents": [[1, True]]}, "at a multiple .*, not at True"),
        ({"latents": [[1, 10**400]]}, "at a multiple .*; give a number of at most 1,000,000"),
        ({"at": 999}, "token 999 is not one of 0 to"),
        ({"at": True}, "the token to steer at is True; it must be a whole number from 0"),
        ({"tokens": 0}, "the number of tokens to write is 0; .* from 1 to 256"),
        ({"tokens": 257}, "the number of tokens to write is 257"),
        ({"tokens": 2.5}, "the number of tokens to write is 2.5"),
        ({"temperature": -1}, "the temperature is -1; it must be 0, for the likeliest token, or"),
        ({"temperature": 1e-5}, "the temperature is 1e-05"),
        ({"temperature": 10**400}, "the temperature is 1000"),
        ({"temperature": "hot"}, "the temperature is 'hot'; it must be a number"),
        ({"seed": -1}, "the seed is -1; it must be a whole number from 0"),
        ({"text": "x " * 5_000}, "the text has [0-9,]+ tokens; at most"),
    ],
)
def test_what_cannot_be_steered_is_said(asked, request_, why):
    with pytest.raises(InputError, match=why):
        asked.steer(SteerRequest.read({"text": TEXT, "latents": [[1, 1]]} | request_))


def test_a_text_that_leaves_no_room_for_its_continuation_is_refused(asked, parts):
    _, lm = parts
    long = "x " * lm.context
    text = lm.tokenizer.decode(lm.tokenize(long)[0, 1 : lm.context - 20].tolist())
    if (length := lm.tokenize(text).shape[1]) > live.MOST_TOKENS:
        pytest.skip("the LM takes more tokens than are read")
    room = lm.context - length
    with pytest.raises(InputError, match=f"tokens; at most .* before a continuation of {room + 1}"):
        asked.steer(steered(text, (1, 1), tokens=room + 1))


def test_half_a_character_is_read_as_a_question_mark(asked):
    assert asked.activations(read_text({"text": "x \ud800"}))["tokens"][-1].endswith("?")
    assert asked.steer(steered("x \ud800", (1, 0.5))) == asked.steer(steered("x ?", (1, 0.5)))


def test_a_value_that_float32_does_not_have_is_refused(asked, monkeypatch):
    monkeypatch.setattr(live, "MOST_VALUE", 1e-6)
    with pytest.raises(InputError, match="latent 1 would be held at .*; at most 1.0e-06 either"):
        asked.steer(steered(TEXT, (1, 3)))


def test_predictions_of_nan_are_no_result(asked, parts, monkeypatch):
    monkeypatch.setattr(live, "_values", lambda *given: {1: -1e38})
    with pytest.raises(
        NonFiniteError,
        match="with latent 1 at -1e.38 the LM predicts NaN; hold it nearer to the values",
    ):
        asked.steer(steered(TEXT, (1, 1)))


def test_a_value_far_beyond_the_largest_is_warned_about(asked, active):
    assert asked.steer(steered(TEXT, (active, 3), tokens=1))["warnings"] == []
    (warning,) = asked.steer(steered(TEXT, (active, 30), tokens=1))["warnings"]
    assert f"latent {active} at" in warning and "is 30 times its largest value" in warning


def test_a_continuation_ends_at_the_next_pass_after_nobody_waits(asked, parts, active):
    _, lm = parts
    stop, passes = threading.Event(), []

    def count(*given):
        passes.append(1)
        if len(passes) == 3:
            stop.set()

    hook = lm.model.register_forward_pre_hook(count)
    try:
        with pytest.raises(Stopped):
            asked.steer(steered(TEXT, (active, 1), tokens=40), stop)
    finally:
        hook.remove()
    assert len(passes) in (3, 4)
    assert asked.steer(steered(TEXT, (active, 1), tokens=2))["kl"] > 0  # it goes on as before


def test_differences_are_marked_and_the_pieces_are_the_texts():
    plain, changed = [5, 1, 2, 3, 9], [1, 2, 7, 3]
    marked = mark_differences(
        (plain, [f" {i}" for i in plain]), (changed, [f" {i}" for i in changed])
    )
    assert marked == (
        [[" 5", True], [" 1 2", False], [" 3", False], [" 9", True]],
        [[" 1 2", False], [" 7", True], [" 3", False]],
    )
    assert mark_differences(([1], ["a"]), ([1], ["a"])) == ([["a", False]], [["a", False]])


def test_runs_that_read_the_same_lm_share_it_and_another_takes_its_place(run):
    acts, loaded = run.subject().acts, LoadedLM()
    first = loaded.get(acts, trust_remote_code=False)
    other_text = dataclasses.replace(acts, text="another", mix=7)
    assert loaded.get(other_text, trust_remote_code=False) is first
    other_site = loaded.get(dataclasses.replace(acts, site="resid_post.0"), trust_remote_code=False)
    assert other_site.model is first.model and other_site.options.site == "resid_post.0"
    assert first.options.site == acts.site
    bare = loaded.get(dataclasses.replace(acts, bos="none"), trust_remote_code=False)
    assert bare.model is not first.model and len(loaded._at_sites) == 1


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
        asked.steer(steered(TEXT, (1, 1)))


def test_an_endless_text_is_refused_before_it_is_tokenized():
    with pytest.raises(
        InputError, match="the text has 20,001 characters; at most 20,000 are read here"
    ):
        read_text({"text": "x" * 20_001})


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
