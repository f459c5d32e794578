"""A measured number of contexts in a pass is kept, and changes nothing but rounding."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

import ksparse
from ksparse.config.evaluation import EvalConfig
from ksparse.data import batch_size, live
from ksparse.data.batch_size import choose_lm_batch, fastest
from ksparse.data.contexts import Corpus
from ksparse.errors import CorruptError
from ksparse.evals.batches import HeldOut
from ksparse.lm.model import LM


def take(stream, count, cursor=None):
    return list(itertools.islice(stream.batches(cursor), count))


@pytest.fixture
def choose(monkeypatch):
    """Return choose(size), which makes the measurement find that size."""
    return lambda size: monkeypatch.setattr(live, "choose_lm_batch", lambda lm, corpus, sites: size)


def test_the_fastest_size_is_chosen_and_logged(small_acts, monkeypatch, caplog):
    acts = small_acts(lm_batch=0)
    lm = LM(acts=acts)
    corpus = Corpus(acts, lm.tokenizer, "train")
    tried = []

    def seconds(lm, corpus, contexts, sites):
        tried.append(len(contexts))
        return {4: 4.0, 8: 2.0, 16: 6.0, 32: 64.0, 64: 64.0}[len(contexts)]

    monkeypatch.setattr(batch_size, "_seconds", seconds)
    with caplog.at_level("INFO", "ksparse"):
        assert choose_lm_batch(lm, corpus) == 8
    assert tried == [4, 8, 16, 32, 64] * 2 and "8 contexts in a pass of the LM: 64" in caplog.text


def test_a_size_that_is_given_is_not_measured(small_acts, monkeypatch):
    acts = small_acts(lm_batch=3)
    lm = LM(acts=acts)
    monkeypatch.setattr(batch_size, "_seconds", None)
    assert choose_lm_batch(lm, Corpus(acts, lm.tokenizer, "train")) == 3


def test_a_size_that_does_not_fit_into_memory_ends_the_trial(small_acts, monkeypatch):
    acts = small_acts(lm_batch=0)
    lm = LM(acts=acts)

    def seconds(lm, corpus, contexts, sites):
        if len(contexts) > 8:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    monkeypatch.setattr(batch_size, "_seconds", seconds)
    assert choose_lm_batch(lm, Corpus(acts, lm.tokenizer, "train")) == 8


def test_of_sizes_about_as_fast_the_smallest_is_taken():
    assert fastest({4: 1.5, 8: 1.01, 16: 1.0, 32: 1.2}) == 8


def test_activations_are_the_same_up_to_rounding(small_stream, choose):
    choose(5)
    measured, given = take(small_stream(lm_batch=0), 12), take(small_stream(), 12)
    for one, other in zip(measured, given, strict=True):
        torch.testing.assert_close(one.x, other.x)
        assert torch.equal(one.documents, other.documents)


def test_a_stream_goes_on_with_the_size_that_its_cursor_names(small_stream, choose, monkeypatch):
    choose(5)
    expected = take(small_stream(lm_batch=0), 12)
    assert {batch.cursor["lm_batch"] for batch in expected} == {5}
    choose(2)
    resumed = small_stream(lm_batch=0)
    resumed.sample(16)  # measures another size, for the buffer that is then needed again
    for one, other in zip(take(resumed, 8, expected[3].cursor), expected[4:], strict=True):
        assert torch.equal(one.x, other.x) and one.cursor == other.cursor


def test_the_cursor_of_a_given_size_is_as_before(small_stream):
    assert set(take(small_stream(), 1)[0].cursor) == {"block", "place", "skip", "batch"}


def test_a_run_resumes_bit_for_bit_with_the_measured_size(small_recipe, choose, tmp_path):
    recipe = small_recipe({"acts.lm_batch": 0})
    choose(5)
    whole = ksparse.train(recipe, tmp_path / "whole")
    part = ksparse.train(recipe, tmp_path / "part")
    for file in sorted(part.path.glob("checkpoints/*"))[1:]:
        for each in file.iterdir():
            each.unlink()
        file.rmdir()
    choose(2)
    ksparse.train(recipe, tmp_path / "part")
    weights = [ksparse.load(run.path).state_dict() for run in (whole, part)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    state = json.loads(next(whole.path.glob("checkpoints/*/state.json")).read_text())
    assert state["cursor"]["lm_batch"] == 5


def test_an_impossible_size_in_a_checkpoint_is_named(tmp_path):
    from ksparse.training.resume import _check_numbers

    cursor = {"block": 0, "place": [0, 0, 0], "skip": 0, "batch": 0, "lm_batch": 0}
    with pytest.raises(CorruptError, match=r"'cursor.lm_batch' is 0, expected a number from 1"):
        _check_numbers(tmp_path, {"cursor": cursor})


def test_evaluations_take_the_default_size(small_acts):
    acts = small_acts(lm_batch=0)
    assert HeldOut(LM(acts=acts), acts, EvalConfig(device="cpu")).acts.lm_batch == 64
