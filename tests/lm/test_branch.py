"""A branch gives what `run_patched` gives, at a part of the cost: on every architecture, at every kind of site, from every position on."""

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
    """Return models(kind, site, **config), made once; a forced kind of branch does not outlive its test."""
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


def patched(lm, ids, rows, x, at, length, attention=None):
    """Return what `run_patched` gives at the branch's positions, each row on its own."""
    out = []
    for row, new in zip(rows.tolist(), x):

        def edit(old, new=new):
            old = old.clone()
            old[0, at] = new
            return old

        cached = lm.run_with_cache(
            ids[row : row + 1], (full(ids) if attention is None else attention)[row : row + 1]
        )
        out.append(lm.run_patched(cached, edit)[0, at : at + length])
    return torch.stack(out)


def check(lm, at, length=5, ids=None):
    ids = tokens() if ids is None else ids
    branch = lm.branch_from(ids, full(ids), at, length)
    cached = lm.run_with_cache(ids, full(ids))
    torch.testing.assert_close(branch.x, cached.x[:, at], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        branch.logits, cached.logits[:, at : at + length], rtol=1e-4, atol=1e-4
    )
    rows = torch.tensor([2, 0, 2, 1, 0])
    x = branch.x[rows] * torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0])[:, None]
    found = branch(rows, x)
    torch.testing.assert_close(found, patched(lm, ids, rows, x, at, length), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found[2], branch.logits[2], rtol=1e-4, atol=1e-4
    )  # its activation as it was
    assert not torch.allclose(found[0], branch.logits[2], atol=1e-2)
    return lm._branch_type


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
def test_a_branch_equals_replay(models, kind, site, at):
    assert check(models(kind, site), at) is continuations.CachedBranch, (
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
def test_a_branch_works_at_named_modules_and_at_their_inputs(models, kind, site, at):
    assert check(models(kind, site), at) is continuations.CachedBranch


@pytest.mark.parametrize("at", [3, 13])
def test_a_full_sliding_window_of_mistral_is_continued(models, at):
    assert (
        check(models("mistral", "resid_post.0", sliding_window=8), at) is continuations.CachedBranch
    )


def test_only_the_positions_asked_for_are_run_and_no_block_before_the_site(models):
    lm, ids = models("gpt2", "resid_post.1"), tokens()
    branch = lm.branch_from(ids, full(ids), 10, 4)
    seen = []
    handles = [
        block.mlp.register_forward_hook(
            lambda _, args, output, i=i: seen.append((i, *output.shape[:2]))
        )
        for i, block in enumerate(lm.model.transformer.h)
    ]
    branch(torch.tensor([0, 1, 1]), branch.x[[0, 1, 1]])
    for handle in handles:
        handle.remove()
    assert seen == [(2, 3, 4)]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
def test_a_call_leaves_the_branch_and_the_lm_as_they_were(models, kind):
    lm, ids = models(kind, "resid_post.0"), tokens()
    clean = lm.run_with_cache(ids, full(ids)).logits
    branch = lm.branch_from(ids, full(ids), 13, 5)
    rows, x = (
        torch.tensor([1, 1, 0]),
        torch.randn(3, 16, generator=torch.Generator().manual_seed(1)),
    )
    first = branch(rows, x)
    logits = branch.logits.clone()
    branch(torch.tensor([2, 0, 1, 1]), torch.zeros(4, 16))
    assert torch.equal(branch(rows, x), first) and torch.equal(branch.logits, logits)
    assert torch.equal(lm.run_with_cache(ids, full(ids)).logits, clean)


def test_the_order_of_rows_does_not_matter(models):
    lm, ids = models("llama", "resid_post.1"), tokens()
    branch = lm.branch_from(ids, full(ids), 7, 3)
    rows = torch.tensor([2, 1, 0, 1])
    x, order = (
        torch.randn(4, 16, generator=torch.Generator().manual_seed(2)),
        torch.tensor([3, 0, 2, 1]),
    )
    torch.testing.assert_close(branch(rows[order], x[order]), branch(rows, x)[order])


def test_padding_after_the_branch_does_not_matter_and_padding_within_is_refused(models):
    lm, ids = models("gpt2", "resid_post.1"), tokens()
    attention = full(ids)
    attention[1, 15:] = False
    branch = lm.branch_from(ids, attention, 10, 5)
    rows, x = torch.tensor([1, 0]), torch.zeros(2, 16)
    torch.testing.assert_close(branch(rows, x), patched(lm, ids, rows, x, 10, 5, attention))
    with pytest.raises(
        InputError,
        match="positions 10 to 15 cannot be branched from: some context has padding before position 16",
    ):
        lm.branch_from(ids, attention, 10, 6)


@pytest.mark.parametrize("at, length", [(-1, 3), (22, 3), (4, 0)])
def test_positions_outside_the_context_are_refused(models, at, length):
    ids = tokens()
    with pytest.raises(
        InputError, match="cannot be branched from: the contexts have positions 0 to 23"
    ):
        models("gpt2", "resid_post.1").branch_from(ids, full(ids), at, length)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_bfloat16_lm_is_branched_from_its_cache(tiny_lm, kind):
    lm, ids = (
        LM(acts=ActsConfig(lm=str(tiny_lm(kind)), site="resid_post.1", lm_dtype="bfloat16")),
        tokens(),
    )
    branch = lm.branch_from(ids, full(ids), 13, 5)
    assert (
        type(branch) is continuations.CachedBranch
        and branch.x.dtype == torch.float32
        and branch.logits.dtype == torch.bfloat16
    )
    rows, x = torch.tensor([1, 0]), torch.zeros(2, 16)
    expected = patched(lm, ids, rows, x, 13, 5).float()
    assert (branch(rows, x).float() - expected).norm() < 0.03 * expected.norm()


# ---- the slow way


@pytest.fixture
def fresh(tiny_lm):
    return lambda kind="gpt2", site="resid_post.1": LM(str(tiny_lm(kind)), site)


def test_a_cache_that_gives_something_else_is_found_out_and_whole_contexts_are_run(
    fresh, monkeypatch, caplog
):
    lm, whole = fresh(), continuations._run_past

    def shifted(model, ids):
        return whole(model, ids.roll(1, 1))

    monkeypatch.setattr(continuations, "_run_past", shifted)
    with caplog.at_level(logging.WARNING, logger="ksparse"):
        assert check(lm, 13) is continuations.PatchedBranch
        check(lm, 0)
    assert len(caplog.records) == 1, "one warning for a site"
    assert (
        "does not give what the whole context gives (relative difference" in caplog.text
        and "resid_post.1" in caplog.text
    )


def test_a_cache_that_only_fails_deep_in_the_context_is_found_out_at_the_first_branch(
    fresh, monkeypatch
):
    whole = continuations._run_past
    monkeypatch.setattr(
        continuations,
        "_run_past",
        lambda model, ids: whole(model, ids if ids.shape[1] < 9 else ids.roll(1, 1)),
    )
    assert check(fresh(), 2) is continuations.PatchedBranch


def test_an_lm_without_keys_and_values_is_replayed(fresh, monkeypatch, caplog):
    lm = fresh("llama")
    forward = type(lm.model.model).forward

    def without(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.past_key_values = None
        return output

    monkeypatch.setattr(type(lm.model.model), "forward", without)
    with caplog.at_level(logging.WARNING, logger="ksparse"):
        assert check(lm, 13) is continuations.PatchedBranch
    assert "TypeError: its cache is a NoneType of nothing" in caplog.text


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "gpt_neo"])
@pytest.mark.parametrize("at", [0, 13])
def test_the_slow_way_equals_replay(fresh, monkeypatch, kind, at):
    lm = fresh(kind, "resid_mid.1")
    lm._branch_type = continuations.PatchedBranch
    assert check(lm, at) is continuations.PatchedBranch
