"""A fork gives what `replay` gives, at a part of the cost: on every architecture, at every kind of site, from every position on."""

import logging

import pytest
import torch

from ksparse.config import ActsConfig
from ksparse.errors import InputError
from ksparse.lm import continuations
from ksparse.lm.model import LM

KINDS = [
    "gpt2",
    "gpt_neox",
    "gpt_neox_serial",
    "gpt_neo",
    "llama",
    "mistral",
    "gemma",
    "gemma2",
    "qwen2",
]
SITES = ["resid_pre.0", "resid_mid.1", "resid_post.1", "resid_post.2", "attn_out.1", "mlp_out.1"]
LENGTH = 24  # three times the windows of the tiny Gemma 2 and GPT-Neo


@pytest.fixture(scope="module")
def models(tiny_lm):
    """Return models(kind, site, **config), made once; a forced kind of fork does not outlive its test."""
    made = {}

    def get(kind, site, **config):
        key = (kind, site, repr(config))
        if key not in made:
            made[key] = LM(str(tiny_lm(kind, **config)), site)
        return made[key]

    return get


def tokens(rows=3, length=LENGTH, seed=0):
    return torch.randint(2, 300, (rows, length), generator=torch.Generator().manual_seed(seed))


def full(ids):
    return torch.ones_like(ids, dtype=torch.bool)


def replayed(lm, ids, rows, x, at, length, attention=None):
    """Return what `replay` gives at the fork's positions, each row on its own."""
    out = []
    for row, new in zip(rows.tolist(), x):

        def edit(old, new=new):
            old = old.clone()
            old[0, at] = new
            return old

        watched = lm.watch(
            ids[row : row + 1], (full(ids) if attention is None else attention)[row : row + 1]
        )
        out.append(lm.replay(watched, edit)[0, at : at + length])
    return torch.stack(out)


def check(lm, at, length=5, ids=None):
    ids = tokens() if ids is None else ids
    fork = lm.fork(ids, full(ids), at, length)
    watched = lm.watch(ids, full(ids))
    torch.testing.assert_close(fork.x, watched.x[:, at], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        fork.logits, watched.logits[:, at : at + length], rtol=1e-4, atol=1e-4
    )
    rows = torch.tensor([2, 0, 2, 1, 0])
    x = fork.x[rows] * torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0])[:, None]
    found = fork(rows, x)
    torch.testing.assert_close(found, replayed(lm, ids, rows, x, at, length), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found[2], fork.logits[2], rtol=1e-4, atol=1e-4
    )  # its activation as it was
    assert not torch.allclose(found[0], fork.logits[2], atol=1e-2)
    return lm._fork


@pytest.mark.parametrize("at", [0, 1, 13, LENGTH - 5])
@pytest.mark.parametrize(
    "kind, site",
    [
        (kind, site)
        for kind in KINDS
        for site in SITES
        if (kind, site) != ("gpt_neox", "resid_mid.1")
    ],
)
def test_a_fork_equals_replay(models, kind, site, at):
    assert check(models(kind, site), at) is continuations._CachedFork, (
        "no architecture here needs the slow way"
    )


@pytest.mark.parametrize("at", [0, 1, 13])
@pytest.mark.parametrize(
    "kind, site",
    [
        ("gpt2", "transformer.h.1.mlp.c_fc:in"),
        ("gpt2", "transformer.h.2.attn:in"),
        ("gpt2", "transformer.h.1.ln_1"),
        ("gpt2", "transformer.wte"),
        ("gpt2", "transformer.ln_f"),
        ("llama", "model.layers.1.self_attn:in"),
        ("gemma2", "model.layers.1.self_attn.o_proj:in"),
    ],
)
def test_a_fork_works_at_named_modules_and_at_their_inputs(models, kind, site, at):
    assert check(models(kind, site), at) is continuations._CachedFork


@pytest.mark.parametrize("at", [3, 13])
def test_a_full_sliding_window_of_mistral_is_continued(models, at):
    assert (
        check(models("mistral", "resid_post.0", sliding_window=8), at) is continuations._CachedFork
    )


def test_only_the_positions_asked_for_are_run_and_no_block_before_the_site(models):
    lm, ids = models("gpt2", "resid_post.1"), tokens()
    fork = lm.fork(ids, full(ids), 10, 4)
    seen = []
    handles = [
        block.mlp.register_forward_hook(
            lambda _, args, output, i=i: seen.append((i, *output.shape[:2]))
        )
        for i, block in enumerate(lm.model.transformer.h)
    ]
    fork(torch.tensor([0, 1, 1]), fork.x[[0, 1, 1]])
    for handle in handles:
        handle.remove()
    assert seen == [(2, 3, 4)]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
def test_a_call_leaves_the_fork_and_the_lm_as_they_were(models, kind):
    lm, ids = models(kind, "resid_post.0"), tokens()
    clean = lm.watch(ids, full(ids)).logits
    fork = lm.fork(ids, full(ids), 13, 5)
    rows, x = (
        torch.tensor([1, 1, 0]),
        torch.randn(3, 16, generator=torch.Generator().manual_seed(1)),
    )
    first = fork(rows, x)
    logits = fork.logits.clone()
    fork(torch.tensor([2, 0, 1, 1]), torch.zeros(4, 16))
    assert torch.equal(fork(rows, x), first) and torch.equal(fork.logits, logits)
    assert torch.equal(lm.watch(ids, full(ids)).logits, clean)


def test_the_order_of_rows_does_not_matter(models):
    lm, ids = models("llama", "resid_post.1"), tokens()
    fork = lm.fork(ids, full(ids), 7, 3)
    rows = torch.tensor([2, 1, 0, 1])
    x, order = (
        torch.randn(4, 16, generator=torch.Generator().manual_seed(2)),
        torch.tensor([3, 0, 2, 1]),
    )
    torch.testing.assert_close(fork(rows[order], x[order]), fork(rows, x)[order])


def test_padding_after_the_fork_does_not_matter_and_padding_within_is_refused(models):
    lm, ids = models("gpt2", "resid_post.1"), tokens()
    attention = full(ids)
    attention[1, 15:] = False
    fork = lm.fork(ids, attention, 10, 5)
    rows, x = torch.tensor([1, 0]), torch.zeros(2, 16)
    torch.testing.assert_close(fork(rows, x), replayed(lm, ids, rows, x, 10, 5, attention))
    with pytest.raises(
        InputError,
        match="positions 10 to 15 cannot be forked: some context has padding before position 16",
    ):
        lm.fork(ids, attention, 10, 6)


@pytest.mark.parametrize("at, length", [(-1, 3), (22, 3), (4, 0)])
def test_positions_outside_the_context_are_refused(models, at, length):
    ids = tokens()
    with pytest.raises(InputError, match="cannot be forked: the contexts have positions 0 to 23"):
        models("gpt2", "resid_post.1").fork(ids, full(ids), at, length)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_bfloat16_lm_is_forked_from_its_cache(tiny_lm, kind):
    lm, ids = (
        LM(acts=ActsConfig(lm=str(tiny_lm(kind)), site="resid_post.1", lm_dtype="bfloat16")),
        tokens(),
    )
    fork = lm.fork(ids, full(ids), 13, 5)
    assert (
        type(fork) is continuations._CachedFork
        and fork.x.dtype == torch.float32
        and fork.logits.dtype == torch.bfloat16
    )
    rows, x = torch.tensor([1, 0]), torch.zeros(2, 16)
    expected = replayed(lm, ids, rows, x, 13, 5).float()
    assert (fork(rows, x).float() - expected).norm() < 0.03 * expected.norm()


# ---- the slow way


@pytest.fixture
def fresh(tiny_lm):
    return lambda kind="gpt2", site="resid_post.1": LM(str(tiny_lm(kind)), site)


def test_a_cache_that_gives_something_else_is_found_out_and_whole_contexts_are_run(
    fresh, monkeypatch, caplog
):
    lm, whole = fresh(), continuations._past

    def shifted(model, ids):
        return whole(model, ids.roll(1, 1))

    monkeypatch.setattr(continuations, "_past", shifted)
    with caplog.at_level(logging.WARNING, logger="ksparse"):
        assert check(lm, 13) is continuations._ReplayedFork
        check(lm, 0)
    assert len(caplog.records) == 1, "one warning for a site"
    assert (
        "does not give what the whole context gives (relative difference" in caplog.text
        and "resid_post.1" in caplog.text
    )


def test_a_cache_that_only_fails_deep_in_the_context_is_found_out_at_the_first_fork(
    fresh, monkeypatch
):
    whole = continuations._past
    monkeypatch.setattr(
        continuations,
        "_past",
        lambda model, ids: whole(model, ids if ids.shape[1] < 9 else ids.roll(1, 1)),
    )
    assert check(fresh(), 2) is continuations._ReplayedFork


def test_an_lm_without_keys_and_values_is_replayed(fresh, monkeypatch, caplog):
    lm = fresh("llama")
    forward = type(lm.model.model).forward

    def without(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.past_key_values = None
        return output

    monkeypatch.setattr(type(lm.model.model), "forward", without)
    with caplog.at_level(logging.WARNING, logger="ksparse"):
        assert check(lm, 13) is continuations._ReplayedFork
    assert "TypeError: its cache is a NoneType of nothing" in caplog.text


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
@pytest.mark.parametrize("at", [0, 13])
def test_the_slow_way_equals_replay(fresh, monkeypatch, kind, at):
    lm = fresh(kind, "resid_mid.1")
    lm._fork = continuations._ReplayedFork
    assert check(lm, at) is continuations._ReplayedFork
