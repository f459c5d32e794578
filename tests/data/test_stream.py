"""Every kept activation is used once an epoch, shuffled, and any cursor resumes with the same bits."""

import dataclasses
import itertools
import json
import threading
import time
from collections import Counter
from contextlib import closing

import pytest
import torch

from ksparse.data.contexts import Corpus, TextCursor
from ksparse.data.live import LiveStream, memory_bytes
from ksparse.data.prefetch import Prefetcher
from ksparse.errors import InputError, NonFiniteError
from ksparse.lm.model import LM


@pytest.fixture
def exact_stream(small_stream):
    """Return exact_stream(...): a stream whose activations name their token, their position, and all tokens before them.

    Whole numbers, so that they are the same bits however contexts are batched, and multisets can be compared.
    """

    def acts(tokens, attention):
        columns = torch.stack(
            [
                tokens,
                torch.arange(tokens.shape[1]).expand_as(tokens),
                tokens.cumsum(1),
                (tokens**2).cumsum(1),
            ],
            -1,
        ).float()
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
    contexts = stream.corpus.batch(
        list(
            itertools.takewhile(
                lambda context: context.start.epoch < epochs, stream.corpus.contexts()
            )
        )
    )
    return stream.lm.acts(contexts.tokens, contexts.attention)[contexts.keep], contexts.documents[
        contexts.keep
    ]


def take(stream, number, cursor=None):
    with closing(stream.batches(cursor)) as batches:
        return list(itertools.islice(batches, number))


@pytest.mark.parametrize("borders", ["pack", "split"])
@pytest.mark.parametrize(
    "mix, batch",
    [(256, 32), (96, 96), (50, 7)],
    ids=["8_batches_a_block", "1_batch_a_block", "odd_sizes"],
)
def test_every_kept_activation_is_used_exactly_once_an_epoch(exact_stream, mix, batch, borders):
    stream = exact_stream(mix=mix, batch=batch, borders=borders)
    x, owners = text_rows(stream)
    block = mix // batch * batch
    blocks = len(x) // block
    batches = take(stream, blocks * block // batch)
    used = rows(
        torch.cat([each.x for each in batches]), torch.cat([each.documents for each in batches])
    )
    assert blocks > 5 and used == rows(x[: blocks * block], owners[: blocks * block])
    assert all(each.x.shape == (batch, 16) and each.x.dtype == torch.float32 for each in batches)


def test_blocks_take_the_text_in_order(exact_stream):
    stream = exact_stream(mix=50, batch=7)
    x, owners = text_rows(stream)
    batches = take(stream, 7 * 20)
    for number in range(20):
        part = batches[7 * number : 7 * number + 7]
        assert rows(
            torch.cat([each.x for each in part]), torch.cat([each.documents for each in part])
        ) == rows(x[49 * number : 49 * number + 49], owners[49 * number : 49 * number + 49])


def test_after_the_end_the_text_begins_again_without_a_gap(exact_stream):
    stream = exact_stream(mix=96, batch=32)
    one, _ = text_rows(stream)
    x, owners = text_rows(stream, epochs=3)
    assert len(x) == 3 * len(one)
    batches = take(stream, len(x) // 96 * 3)
    used = rows(
        torch.cat([each.x for each in batches]), torch.cat([each.documents for each in batches])
    )
    assert used == rows(x[: len(x) // 96 * 96], owners[: len(x) // 96 * 96])
    assert [batches[at].cursor["place"][0] for at in (0, len(batches) // 2, -1)] == [0, 1, 2]


def test_going_on_from_every_cursor_gives_the_same_bits(small_stream):
    stream = small_stream(mix=96, batch=32)

    def fresh():
        return LiveStream(
            stream.lm, Corpus(stream.lm.options, stream.lm.tokenizer, "train"), batch=32, seed=0
        )

    whole = take(stream, 40)
    assert any(each.cursor["skip"] for each in whole), "no context crosses the end of a block"
    for number in range(39):
        cursor = json.loads(json.dumps(whole[number].cursor))
        after = take(fresh(), 1, cursor)[0]
        assert torch.equal(after.x, whole[number + 1].x) and torch.equal(
            after.documents, whole[number + 1].documents
        )
        assert after.cursor == whole[number + 1].cursor


def test_the_seed_decides_the_order_and_nothing_else(exact_stream):
    first, same, other = (
        torch.cat([each.x for each in take(exact_stream(seed=seed), 8)]) for seed in (0, 0, 1)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert rows(first, torch.zeros(256)) == rows(other, torch.zeros(256))


def test_blocks_are_mixed_in_different_orders(small_stream):
    stream = small_stream()
    numbers = itertools.count()
    stream.lm.acts = lambda tokens, attention: (
        torch.tensor([next(numbers) for _ in range(tokens.numel())])
        .view(*tokens.shape, 1)
        .expand(*tokens.shape, 16)
        .float()
    )
    batches = take(stream, 24)
    orders = []
    for at in (0, 8, 16):
        rows_in_order = torch.cat([each.x[:, 0] for each in batches[at : at + 8]])
        orders.append(tuple(rows_in_order.argsort().argsort().tolist()))
    assert len(set(orders)) == 3 and tuple(range(256)) not in orders


@pytest.mark.parametrize("batches", [1, 2, 4, 8])
def test_the_share_of_neighbours_in_a_batch_is_about_one_over_the_batches_of_a_block(
    small_stream, batches
):
    """In the order of the text it would be about 1."""
    stream = small_stream(mix=512, batch=512 // batches)
    assert stream.same_context_fraction() is None
    take(stream, 1)
    assert stream.same_context_fraction() == pytest.approx(1 / batches, abs=0.08)


def test_a_batch_holds_many_documents(small_stream):
    batch = take(small_stream(mix=512, batch=64), 1)[0]
    assert len(batch.documents.unique()) > 6


def test_a_sample_does_not_move_the_stream(small_stream):
    """Estimating from the training iterator uses it up, and makes resumption inexact."""
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
    """A sink in the sample moves b_pre and the scale."""
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
    with pytest.raises(
        NonFiniteError,
        match=rf"1 of \d+ activations at resid_post\.1 are NaN or infinite, the first in document 'words\.txt:{fifth}'",
    ):
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


def test_a_text_of_which_nothing_is_kept_is_refused_and_does_not_go_on_for_ever(
    small_stream, monkeypatch
):
    stream = small_stream(batch=8, mix=8)
    monkeypatch.setattr(
        stream.corpus,
        "batch",
        lambda contexts, own=stream.corpus.batch: own(contexts)._replace(
            keep=torch.zeros(len(contexts), 16, dtype=torch.bool)
        ),
    )
    one = next(stream.corpus.contexts())
    monkeypatch.setattr(stream.corpus, "contexts", lambda place=TextCursor(): itertools.repeat(one))
    with pytest.raises(InputError, match="has only special tokens and padding: nothing is kept"):
        take(stream, 1)


def test_documents_of_a_batch_have_names(small_stream):
    stream = small_stream()
    batch = take(stream, 1)[0]
    names = stream.document_names(batch.documents)
    assert len(names) == len(batch.documents.unique()) and all(
        name.startswith("words.txt:") for name in names
    )


def test_a_mix_that_is_no_multiple_of_the_batch_is_rounded_down(small_stream):
    stream = small_stream(mix=100, batch=32)
    assert stream.batches_per_buffer == 3
    acts = stream.corpus.acts
    assert memory_bytes(acts, 32, 16) == 96 * (4 * 16 + 16)
    assert memory_bytes(dataclasses.replace(acts, store="bfloat16"), 32, 16) == 96 * (2 * 16 + 16)


def test_the_text_is_read_on_and_not_from_its_beginning_for_each_block(small_stream, monkeypatch):
    stream, places = small_stream(), []
    own = stream.corpus.contexts
    monkeypatch.setattr(
        stream.corpus, "contexts", lambda place=TextCursor(): places.append(place) or own(place)
    )
    take(stream, 40)  # 5 blocks
    assert places == [TextCursor()]


# ---- kept in bfloat16


def test_activations_kept_in_bfloat16_are_rounded_and_else_the_same(small_stream):
    exact, kept = take(small_stream(), 12), take(small_stream(store="bfloat16"), 12)
    for one, other in zip(exact, kept):
        assert other.x.dtype == torch.float32 and torch.equal(other.x, one.x.bfloat16().float())
        assert torch.equal(other.documents, one.documents) and other.cursor == one.cursor
    sample = small_stream(store="bfloat16").sample(20)
    assert torch.equal(sample, small_stream().sample(20).bfloat16().float())


def test_of_an_lm_in_bfloat16_nothing_is_lost(small_stream):
    exact, kept = (
        take(small_stream(lm_dtype="bfloat16"), 3),
        take(small_stream(lm_dtype="bfloat16", store="bfloat16"), 3),
    )
    assert all(torch.equal(one.x, other.x) for one, other in zip(exact, kept))


# ---- prefetched


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "ksparse-stream"]


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_a_prefetcher_gives_the_same_batches_cursors_and_fractions(small_stream, depth):
    plain, prefetched = small_stream(), Prefetcher(small_stream(), depth)
    expected, found = [], []
    for stream, rows_ in ((plain, expected), (prefetched, found)):
        with closing(stream.batches()) as batches:
            for batch in itertools.islice(batches, 20):
                rows_.append((batch, stream.same_context_fraction()))
    for (one, mixed), (other, other_mixed) in zip(expected, found, strict=True):
        assert torch.equal(one.x, other.x) and torch.equal(one.documents, other.documents)
        assert one.cursor == other.cursor and mixed == other_mixed
    middle = json.loads(json.dumps(expected[11][0].cursor))
    assert torch.equal(take(prefetched, 1, middle)[0].x, expected[12][0].x)
    assert running() == []


def test_a_prefetcher_holds_no_more_than_its_depth(small_stream):
    stream, made = small_stream(), []
    own = stream.batches

    def counted(cursor=None):
        for batch in own(cursor):
            made.append(batch.cursor)
            yield batch

    stream.batches = counted
    with closing(Prefetcher(stream, 2).batches()) as batches:
        next(batches)
        for _ in range(200):
            if len(made) == 4:
                break
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(made) == 4  # one given out, two that wait, one that waits to wait
    assert running() == []


def test_an_error_in_the_thread_comes_out_where_the_batch_is_asked_for(small_stream, monkeypatch):
    stream = small_stream()
    own, calls = stream.lm.acts, itertools.count()

    def broken(tokens, attention):
        x = own(tokens, attention).clone()
        return x * torch.nan if next(calls) >= 6 else x

    monkeypatch.setattr(stream.lm, "acts", broken)
    given = 0
    with pytest.raises(
        NonFiniteError, match="are NaN or infinite, the first in document 'words.txt:"
    ):
        for _ in Prefetcher(stream, 4).batches():
            given += 1
    assert given >= 8 and running() == []


def test_closing_gives_up_the_block_that_is_being_computed(small_stream, monkeypatch):
    stream = small_stream(mix=2048, lm_batch=1)
    own, calls, began = stream.lm.acts, [], threading.Event()

    def slow(tokens, attention):
        calls.append(1)
        if len(calls) > 200:
            began.set()
            time.sleep(0.01)
        return own(tokens, attention)

    monkeypatch.setattr(stream.lm, "acts", slow)
    prefetched = Prefetcher(stream, 64)
    batches = prefetched.batches()
    next(batches)
    assert began.wait(20)
    batches.close()
    assert running() == [] and len(calls) < 260  # a block is 150 and more
    monkeypatch.setattr(stream.lm, "acts", own)
    assert torch.equal(
        take(prefetched, 1)[0].x, take(small_stream(mix=2048, lm_batch=1), 1)[0].x
    )  # and it can begin again


def test_a_sample_may_be_asked_for_while_the_thread_computes(small_stream):
    prefetched, expected = Prefetcher(small_stream(), 8), take(small_stream(), 24)
    sample = small_stream().sample(50)
    with closing(prefetched.batches()) as batches:
        for one in expected:
            assert torch.equal(next(batches).x, one.x) and torch.equal(
                prefetched.sample(50), sample
            )


def test_names_of_documents_are_known_for_the_batch_in_hand(small_stream):
    prefetched = Prefetcher(small_stream(), 8)
    batch = take(prefetched, 1)[0]
    assert prefetched.document_names(batch.documents) == small_stream_names(
        prefetched.stream, batch
    )


def small_stream_names(stream, batch):
    return [f"words.txt:{i}" for i in batch.documents.unique().tolist()]


def test_the_lm_is_asked_for_activations_of_whole_contexts_of_its_options(small_stream):
    stream = small_stream(lm_batch=3)
    seen = []
    own = stream.lm.acts
    stream.lm.acts = lambda tokens, attention: (
        seen.append(tuple(tokens.shape)) or own(tokens, attention)
    )
    take(stream, 1)
    assert {shape[1] for shape in seen} == {16} and max(shape[0] for shape in seen) == 3
    assert isinstance(stream.lm, LM)
