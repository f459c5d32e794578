"""Every kept activation once an epoch, mixed, and from any cursor on the same bits."""

import itertools
import json
from collections import Counter

import pytest
import torch

from ksparse.acts.lm import LM
from ksparse.acts.stream import LiveStream, blocks_for, memory_bytes
from ksparse.acts.text import Corpus, Place
from ksparse.errors import InputError, NonFiniteError


@pytest.fixture
def exact_stream(small_stream):
    """Return exact_stream(...): a stream whose activations name their token, their position, and all tokens before them.

    Whole numbers, so that they are the same bits however contexts are batched, and multisets can be compared.
    """

    def acts(tokens, attention):
        columns = torch.stack([tokens, torch.arange(tokens.shape[1]).expand_as(tokens), tokens.cumsum(1), (tokens**2).cumsum(1)], -1).float()
        return torch.cat([columns, torch.zeros(*tokens.shape, 12)], -1)

    def make(**options):
        stream = small_stream(**options)
        stream.lm.acts = acts
        return stream

    return make


def rows(x, documents):
    """Return a multiset of activations, with the document of each."""
    return Counter((*row, owner) for row, owner in zip(x[:, :4].tolist(), documents.tolist()))


def text_rows(stream, epochs=1):
    """Return all kept activations of so many epochs, in the order of the text."""
    contexts = stream.corpus.batch(list(itertools.takewhile(lambda context: context.start.epoch < epochs, stream.corpus.contexts())))
    return stream.lm.acts(contexts.tokens, contexts.attention)[contexts.keep], contexts.documents[contexts.keep]


def take(stream, number, cursor=None):
    return list(itertools.islice(stream.batches(cursor), number))


@pytest.mark.parametrize("borders", ["pack", "split"])
@pytest.mark.parametrize("mix, batch", [(256, 32), (96, 96), (50, 7)], ids=["8_batches_a_block", "1_batch_a_block", "odd_sizes"])
def test_every_kept_activation_is_used_exactly_once_an_epoch(exact_stream, mix, batch, borders):
    stream = exact_stream(mix=mix, batch=batch, borders=borders)
    x, owners = text_rows(stream)
    block = mix // batch * batch
    blocks = len(x) // block
    batches = take(stream, blocks * block // batch)
    used = rows(torch.cat([each.x for each in batches]), torch.cat([each.documents for each in batches]))
    assert blocks > 5 and used == rows(x[: blocks * block], owners[: blocks * block])
    assert all(each.x.shape == (batch, 16) and each.x.dtype == torch.float32 for each in batches)


def test_blocks_take_the_text_in_order(exact_stream):
    stream = exact_stream(mix=50, batch=7)
    x, owners = text_rows(stream)
    batches = take(stream, 7 * 20)
    for number in range(20):
        part = batches[7 * number : 7 * number + 7]
        assert rows(torch.cat([each.x for each in part]), torch.cat([each.documents for each in part])) == rows(
            x[49 * number : 49 * number + 49], owners[49 * number : 49 * number + 49])


def test_after_the_end_the_text_begins_again_without_a_gap(exact_stream):
    stream = exact_stream(mix=96, batch=32)
    one, _ = text_rows(stream)
    x, owners = text_rows(stream, epochs=3)
    assert len(x) == 3 * len(one)
    batches = take(stream, len(x) // 96 * 3)
    used = rows(torch.cat([each.x for each in batches]), torch.cat([each.documents for each in batches]))
    assert used == rows(x[: len(x) // 96 * 96], owners[: len(x) // 96 * 96])
    assert [batches[at].cursor["place"][0] for at in (0, len(batches) // 2, -1)] == [0, 1, 2]


def test_going_on_from_every_cursor_gives_the_same_bits(small_stream):
    stream = small_stream(mix=96, batch=32)

    def fresh():
        return LiveStream(stream.lm, Corpus(stream.lm.options, stream.lm.tokenizer, "train"), batch=32, seed=0)

    whole = take(stream, 40)
    assert any(each.cursor["skip"] for each in whole), "no context crosses the end of a block"
    for number in range(39):
        cursor = json.loads(json.dumps(whole[number].cursor))
        after = take(fresh(), 1, cursor)[0]
        assert torch.equal(after.x, whole[number + 1].x) and torch.equal(after.documents, whole[number + 1].documents)
        assert after.cursor == whole[number + 1].cursor


def test_the_seed_decides_the_order_and_nothing_else(exact_stream):
    first, same, other = (torch.cat([each.x for each in take(exact_stream(seed=seed), 8)]) for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert rows(first, torch.zeros(256)) == rows(other, torch.zeros(256))


def test_blocks_are_mixed_in_different_orders(small_stream):
    stream = small_stream()
    numbers = itertools.count()
    stream.lm.acts = lambda tokens, attention: torch.tensor([next(numbers) for _ in range(tokens.numel())]).view(*tokens.shape, 1).expand(
        *tokens.shape, 16).float()
    batches = take(stream, 24)
    orders = []
    for at in (0, 8, 16):
        rows_in_order = torch.cat([each.x[:, 0] for each in batches[at : at + 8]])
        orders.append(tuple(rows_in_order.argsort().argsort().tolist()))
    assert len(set(orders)) == 3 and tuple(range(256)) not in orders


@pytest.mark.parametrize("batches", [1, 2, 4, 8])
def test_the_share_of_neighbours_in_a_batch_is_about_one_over_the_batches_of_a_block(small_stream, batches):
    """T22: in the order of the text it would be about 1."""
    stream = small_stream(mix=512, batch=512 // batches)
    assert stream.mixing() is None
    take(stream, 1)
    assert stream.mixing() == pytest.approx(1 / batches, abs=0.08)


def test_a_batch_holds_many_documents(small_stream):
    batch = take(small_stream(mix=512, batch=64), 1)[0]
    assert len(batch.documents.unique()) > 6


def test_a_sample_does_not_move_the_stream(small_stream):
    """T25: estimating from the training iterator uses it up, and makes going on inexact."""
    untouched = take(small_stream(), 12)
    stream = small_stream()
    sample = stream.sample(100)
    iterator = stream.batches()
    batches = []
    for _ in range(12):
        batches.append(next(iterator))
        stream.sample(5)
    assert all(torch.equal(a.x, b.x) and a.cursor == b.cursor for a, b in zip(batches, untouched))
    assert sample.shape == (100, 16) and torch.equal(sample, stream.sample(100))
    assert stream.sample(10**6).shape == (256, 16)


def test_a_sample_leaves_out_first_positions(small_stream):
    """T18: a sink in the sample moves b_pre and the scale."""
    stream = small_stream()
    corpus, lm = stream.corpus, stream.lm
    contexts = corpus.batch(list(itertools.islice(corpus.contexts(), 30)))
    first = lm.acts(contexts.tokens, contexts.attention)[:, 0]
    assert torch.cdist(stream.sample(256), first).min() > 1e-3


def test_a_block_is_not_computed_twice_when_it_is_sampled_first(small_stream, monkeypatch):
    stream = small_stream()
    calls = []
    own = stream.lm.acts
    monkeypatch.setattr(stream.lm, "acts", lambda *args: calls.append(1) or own(*args))
    stream.sample(50)
    once = len(calls)
    take(stream, 8)
    assert len(calls) == once > 0


def test_nan_activations_name_the_document(small_stream, monkeypatch):
    stream = small_stream(borders="split")
    corpus = stream.corpus
    fifth = list(itertools.islice(corpus.contexts(), 12))[5].documents[0]
    own = stream.lm.acts

    def broken(tokens, attention):
        x = own(tokens, attention).clone()
        for row, context in enumerate(tokens.tolist()):
            if context == bad:
                x[row, 3, 0] = torch.inf
        return x

    bad = list(itertools.islice(corpus.contexts(), 12))[5].tokens
    monkeypatch.setattr(stream.lm, "acts", broken)
    with pytest.raises(NonFiniteError, match=rf"1 of \d+ activations at resid_post\.1 are NaN or infinite, the first in document 'words\.txt:{fifth}'"):
        take(stream, 1)


def test_nan_where_nothing_is_kept_does_no_harm(small_stream, monkeypatch):
    stream = small_stream()
    own = stream.lm.acts

    def broken(tokens, attention):
        x = own(tokens, attention).clone()
        x[:, 0] = torch.nan
        return x

    monkeypatch.setattr(stream.lm, "acts", broken)
    assert torch.isfinite(take(stream, 1)[0].x).all()


def test_a_text_of_which_nothing_is_kept_is_refused_and_does_not_go_on_for_ever(small_stream, monkeypatch):
    stream = small_stream(batch=8, mix=8)
    monkeypatch.setattr(stream.corpus, "batch", lambda contexts, own=stream.corpus.batch: own(contexts)._replace(
        keep=torch.zeros(len(contexts), 16, dtype=torch.bool)))
    one = next(stream.corpus.contexts())
    monkeypatch.setattr(stream.corpus, "contexts", lambda place=Place(): itertools.repeat(one))
    with pytest.raises(InputError, match="has only special tokens and padding: nothing is kept"):
        take(stream, 1)


def test_documents_of_a_batch_have_names(small_stream):
    stream = small_stream()
    batch = take(stream, 1)[0]
    names = stream.document_names(batch.documents)
    assert len(names) == len(batch.documents.unique()) and all(name.startswith("words.txt:") for name in names)


def test_a_mix_that_is_no_multiple_of_the_batch_is_rounded_down(small_stream):
    stream = small_stream(mix=100, batch=32)
    assert stream.per_block == 3 and blocks_for(960, 32, 100) == 10 and blocks_for(961, 32, 100) == 11
    assert memory_bytes(100, 32, 16) == 96 * (4 * 16 + 16)


def test_the_lm_is_asked_for_activations_of_whole_contexts_of_its_options(small_stream):
    stream = small_stream(lm_batch=3)
    seen = []
    own = stream.lm.acts
    stream.lm.acts = lambda tokens, attention: seen.append(tuple(tokens.shape)) or own(tokens, attention)
    take(stream, 1)
    assert {shape[1] for shape in seen} == {16} and max(shape[0] for shape in seen) == 3
    assert isinstance(stream.lm, LM)
