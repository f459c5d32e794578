"""An SAE is asked about what it was trained on; what contradicts that is refused, or said in every number."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from ksparse.config.evaluation import EvalConfig
from ksparse.errors import InputError
from ksparse.evals import runner
from ksparse.lm import provenance
from ksparse.lm.model import LM
from ksparse.sae.model import SAE, Shape

OPTIONS = EvalConfig(tokens=100, examples=0, device="cpu")


def sae_of(acts, d=16, **metadata) -> SAE:
    return SAE(Shape(d, 32, 4), {"acts": dataclasses.asdict(acts), **metadata})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"site": "resid_post.0"},
            "site is 'resid_post.0', but 'resid_post.1' where the SAE was trained",
        ),
        ({"site": "transformer.h.1.mlp"}, "site is 'transformer.h.1.mlp', but 'resid_post.1'"),
        ({"bos": "none"}, "bos is 'none', but 'auto' where"),
        ({"context": 32}, "context is 32, but 16 where"),
        ({"context": 8}, "context is 8, but 16 where"),
        ({"borders": "split"}, "borders is 'split', but 'pack' where"),
        ({"keep": "all"}, "keep is 'all', but 'text' where"),
    ],
    ids=str,
)
def test_what_contradicts_an_sae_is_an_error_that_names_both_and_the_way_to_insist(
    changes, message, small_acts
):
    sae, lm = sae_of(small_acts()), LM(acts=small_acts(**changes))
    with pytest.raises(InputError, match=rf"{message}.*force=True \(--force True\)"):
        runner.evaluate(sae, lm, "stats", OPTIONS)
    result = runner.evaluate(sae, lm, "stats", OPTIONS, force=True)["stats"]
    assert any(message in note and note.startswith("by force: ") for note in result["notes"])
    for key, value in changes.items():
        assert (result["site"] if key == "site" else result["policy"].get(key, value)) == value, (
            "what was asked for is what was read"
        )


def test_contexts_longer_than_those_of_training_are_said(small_acts):
    result = runner.evaluate(
        sae_of(small_acts()), LM(acts=small_acts(context=32)), "stats", OPTIONS, force=True
    )["stats"]
    assert (
        "contexts of 32 tokens are longer than the 16 that the SAE was trained on; it never saw such positions"
        in result["notes"]
    )


def test_more_text_and_the_same_place_by_another_name_are_no_contradiction(small_acts, tmp_path):
    acts = small_acts()
    lm = LM(acts=dataclasses.replace(acts, site="transformer.h.1"))
    assert provenance.check(sae_of(acts).metadata, lm) == []
    copy = shutil.copytree(acts.lm, tmp_path / "elsewhere" / acts.lm.rpartition("/")[2])
    assert (
        provenance.check(sae_of(acts).metadata, LM(acts=dataclasses.replace(acts, lm=str(copy))))
        == []
    )


def test_another_lm_of_the_same_size_is_said_and_one_of_another_architecture_is_refused(
    small_acts, tiny_lm, tmp_path
):
    acts = small_acts()
    lm = LM(acts=acts)
    renamed = LM(
        acts=dataclasses.replace(acts, lm=str(shutil.copytree(acts.lm, tmp_path / "renamed")))
    )
    notes = runner.evaluate(
        sae_of(acts, subject=provenance.describe_lm(lm.model)), renamed, "stats", OPTIONS
    )["stats"]["notes"]
    assert any(
        "'renamed'" in note.replace(str(tmp_path) + "/", "") and "one LM under two names" in note
        for note in notes
    )
    other = LM(acts=dataclasses.replace(acts, lm=str(tiny_lm("llama"))))
    with pytest.raises(
        InputError, match="the LM's model_type is 'llama', but 'gpt2' where the SAE was trained"
    ):
        runner.evaluate(
            sae_of(acts, subject=provenance.describe_lm(lm.model)), other, "stats", OPTIONS
        )


@pytest.mark.parametrize("key, value", [("revision", "step1000"), ("tokenizer", "other")])
def test_another_revision_or_tokenizer_is_a_contradiction(key, value, small_acts):
    acts = small_acts()
    lm = LM(acts=acts)
    lm.folder = None  # as of a model on the Hub
    with pytest.raises(InputError, match=rf"{key} is .*, but '{value}' where the SAE was trained"):
        provenance.check(sae_of(dataclasses.replace(acts, **{key: value})).metadata, lm)


def test_an_sae_that_says_nothing_is_evaluated_and_that_is_said(small_acts):
    acts = small_acts()
    result = runner.evaluate(SAE(Shape(16, 32, 4)), LM(acts=acts), "stats", OPTIONS)["stats"]
    assert any(
        "does not say what it was trained on" in note and acts.site in note
        for note in result["notes"]
    )


def test_what_a_converted_sae_knows_of_its_origin_counts(small_acts):
    acts = small_acts()
    sae = SAE(
        Shape(16, 32, 4),
        {
            "origin": {
                "format": "sae_lens",
                "lm": acts.lm,
                "site": "resid_post.0",
                "context": 8,
                "settings": {},
            }
        },
    )
    with pytest.raises(InputError, match="site is 'resid_post.1', but 'resid_post.0'"):
        runner.evaluate(sae, LM(acts=acts), "stats", OPTIONS)


def test_a_name_alone_is_one_evaluation(small_acts):
    acts = small_acts()
    assert list(runner.evaluate(sae_of(acts), LM(acts=acts), "stats", OPTIONS)) == ["stats"]


@pytest.mark.parametrize(
    "sae, lm, message",
    [
        ("runs/x", None, r"an SAE, not 'runs/x'; ksparse\.load"),
        (None, "gpt2", r"lm is 'gpt2'; it must be an LM with its site: ksparse\.LM"),
    ],
)
def test_a_path_or_a_name_in_the_place_of_an_object_is_told_what_makes_one(
    sae, lm, message, small_acts
):
    with pytest.raises(InputError, match=message):
        runner.evaluate(sae or sae_of(small_acts()), lm, "stats", OPTIONS)
