"""Several SAEs on one stream: each is, bit for bit, what it would be alone."""

import dataclasses
import json
import logging

import pytest
import torch
from hypothesis import given, strategies
from safetensors.torch import load_file

from ksparse.config import CurveConfig, from_dict
from ksparse.data.live import LiveStream
from ksparse.errors import InputError, Interrupted, NonFiniteError
from ksparse.lm.model import LM
from ksparse.planning import flops
from ksparse.planning.sharing import stream_key
from ksparse.training import convergence, trainer
from ksparse.training.source import ActivationSource
from ksparse.training.train import shared_stream, train, train_many

EXACT = ("seconds", "tokens_per_s", "waiting")
MEMBERS = [
    {"sae.n_latents": 32, "sae.k": 2},
    {"sae.k": 8},
    {"optim.lr": 1e-2},
    {"seed": 7, "tokens": 7 * 64},
    {"sae.multi_topk": 0.125, "run.kernels": "auto"},
]


@pytest.fixture
def recipes(small_recipe):
    """Return recipes(changes): five that share a stream and differ in all else, measured on 64 held-out activations."""
    common = {"order": 3, "curve.held_out": 64, "curve.octaves": 3}
    return lambda changes=(): [small_recipe(common | dict(changes) | own) for own in MEMBERS]


def held(run):
    """Return all that a finished run holds but the time it took."""
    last = run.checkpoints()[-1]
    tensors = {
        f"{name}/{key}": value
        for name in ("sae.safetensors", "optim.safetensors")
        for key, value in load_file(last / name).items()
    }
    rows = [
        [{key: value for key, value in row.items() if key not in EXACT} for row in rows]
        for rows in (run.metrics(), run.curve())
    ]
    state = {
        key: value
        for key, value in json.loads((last / "state.json").read_text()).items()
        if key not in EXACT
    }
    return tensors, rows, state


def same(one, other):
    assert one[1:] == other[1:]
    assert one[0].keys() == other[0].keys() and all(
        torch.equal(value, other[0][key]) for key, value in one[0].items()
    )


@pytest.fixture
def alone(recipes, tmp_path):
    return [held(train(recipe, tmp_path / "alone" / str(i))) for i, recipe in enumerate(recipes())]


def outs(folder):
    return [folder / str(i) for i in range(len(MEMBERS))]


def test_each_member_is_bit_for_bit_what_it_is_alone(recipes, alone, tmp_path):
    for run, expected in zip(train_many(recipes(), outs(tmp_path / "together")), alone):
        same(held(run), expected)
    assert [len(rows[1]) > 3 for _, rows, _ in alone] == [True] * 5


def test_the_lm_runs_once_for_all(recipes, tmp_path, monkeypatch):
    calls, own = [], LM.acts
    monkeypatch.setattr(LM, "acts", lambda *args: calls.append(1) or own(*args))
    train(recipes()[0], tmp_path / "one")
    alone = len(calls)
    train_many(recipes(), outs(tmp_path / "all"))
    assert len(calls) == 2 * alone


def test_a_stopped_cohort_goes_on_to_the_same_bits(recipes, alone, tmp_path):
    """Stopped between two members' lines of step 6, with checkpoints of step 4: all is done again from there."""

    def stop(run, row):
        if row["step"] == 6 and run.name == "2":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_many(recipes(), outs(tmp_path), observe=stop)
    for run, expected in zip(train_many(recipes(), outs(tmp_path)), alone):
        same(held(run), expected)


def test_members_join_at_their_own_step(recipes, alone, tmp_path):
    """One is finished, one was stopped after step 8, the others are new."""
    folder = outs(tmp_path)
    train(recipes()[0], folder[0])
    with pytest.raises(KeyboardInterrupt):
        train(
            recipes()[1],
            folder[1],
            observe=lambda row: (
                (_ for _ in ()).throw(KeyboardInterrupt) if row["step"] == 9 else None
            ),
        )
    for run, expected in zip(train_many(recipes(), folder), alone):
        same(held(run), expected)


def test_a_finished_cohort_loads_no_lm(recipes, tmp_path, monkeypatch):
    train_many(recipes(), outs(tmp_path))
    monkeypatch.setattr(LM, "__init__", lambda *args, **kw: pytest.fail("the LM was loaded"))
    assert len(train_many(recipes(), outs(tmp_path))) == 5


def test_a_member_that_fails_leaves_and_the_others_go_on(recipes, alone, tmp_path, monkeypatch):
    own = trainer.train_step

    def poisoned(optimizer, x, state, recipe, dead):
        nan = recipe.sae.k == 8 and state.step == 6
        return own(optimizer, x * torch.nan if nan else x, state, recipe, dead)

    monkeypatch.setattr(trainer, "train_step", poisoned)
    with pytest.raises(
        NonFiniteError,
        match=r"NaN or infinite at step 6, on documents .*; the last good checkpoint is .*1/checkpoints/step-00000004",
    ):
        train_many(recipes(), outs(tmp_path))
    monkeypatch.setattr(trainer, "train_step", own)
    for run, expected in zip(train_many(recipes(), outs(tmp_path)), alone):
        same(held(run), expected)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"acts.context": 12},
            r"cannot share a stream of activations: acts\.context: 16 -> 12\. Train them apart$",
        ),
        ({"batch": 32}, r"batch: 64 -> 32"),
        ({"seed": 4}, r"order: 0 -> 4\. Train them apart, or give all of them one `order`"),
        ({"threads": 2}, "threads: 1 -> 2"),
        ({"curve.held_out": 8}, r"curve\.held_out: 0 -> 8"),
    ],
    ids=str,
)
def test_recipes_that_cannot_share_a_stream_are_named(small_recipe, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        train_many([small_recipe(), small_recipe(changes)], [tmp_path / "a", tmp_path / "b"])
    assert not list(tmp_path.iterdir())


CHANGES = {
    "acts.context": 12,
    "acts.normalize": "none",
    "batch": 32,
    "curve.held_out": 8,
    "curve.octaves": 2,
    "mesh.capacity": 2.0,
    "mesh.timeout": 60.0,
    "optim.lr": 0.1,
    "order": 0,
    "run.ahead": "on",
    "run.device": "auto",
    "run.kernels": "auto",
    "sae.activation": {"kind": "relu"},
    "sae.k": 2,
    "seed": 1,
    "threads": 2,
    "tokens": 640,
}


@given(
    strategies.sets(strategies.sampled_from(sorted(CHANGES))),
    strategies.sets(strategies.sampled_from(sorted(CHANGES))),
)
def test_recipes_are_accepted_together_exactly_if_their_stream_keys_are_equal(one, other):
    def make(names):
        table = {"run": {"device": "cpu"}, "batch": 64, "threads": 1, "mesh": {}, "curve": {}}
        for name in names:
            section, _, key = name.rpartition(".")
            (table.setdefault(section, {}) if section else table)[key] = CHANGES[name]
        return from_dict(table)

    first, second = make(one), make(other)
    try:
        accepted = shared_stream([first, second]) is first
    except InputError:
        accepted = False
    assert accepted == (stream_key(first) == stream_key(second))
    shared = {"acts.context", "acts.normalize", "batch", "curve.held_out", "threads", "run.device"}
    shared |= {"mesh.capacity", "mesh.timeout"}
    same_order = first.data_seed == second.data_seed
    assert accepted == (one & shared == other & shared and same_order)


def test_no_recipe_is_refused():
    with pytest.raises(InputError, match="at least one recipe"):
        train_many([], [])


def test_stopping_says_how_many_are_left(recipes, tmp_path):
    import os
    import signal

    def stop(run, row):
        if row["step"] == 3 and run.name == "0":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        Interrupted,
        match=r"stopped at step 3 after \d+ s, with 5 SAEs to finish; everything is saved",
    ):
        train_many(recipes(), outs(tmp_path), observe=stop)
    assert all((folder / "checkpoints" / "step-00000003").is_dir() for folder in outs(tmp_path))


# ---- the curve


def test_points_are_log_spaced_and_end_with_the_last_step(small_recipe):
    recipe = small_recipe(
        {"tokens": 1024 * 64, "curve.held_out": 8, "curve.octaves": 3, "curve.per_octave": 2}
    )
    assert sorted(convergence.points(recipe)) == [128, 181, 256, 362, 512, 724, 1024]
    assert convergence.points(dataclasses.replace(recipe, curve=CurveConfig())) == set()


def test_the_loss_is_that_of_the_definition_and_1_for_the_mean(small_recipe):
    feed = ActivationSource(small_recipe({"curve.held_out": 3000}), torch.device("cpu"))
    state, optimizer = trainer.start(small_recipe(), feed)
    raw, sae = feed.held_out, optimizer.sae
    x, recon = (
        sae.normalize(raw).x.double(),
        sae.decode_normalized(sae.encode_normalized(sae.normalize(raw).x)).detach().double(),
    )
    assert len(raw) == 3000
    assert convergence.loss(sae, raw) == pytest.approx(
        ((x - recon).square().sum() / (x - x.mean(0)).square().sum()).item(), rel=1e-6
    )
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_pre.copy_(x.mean(0))
    assert convergence.loss(sae, raw) == pytest.approx(1, rel=1e-6)
    sae.b_pre.data.fill_(torch.nan)
    assert convergence.loss(sae, raw) == float("inf")


def test_held_out_rows_are_of_the_validation_side(small_recipe, monkeypatch):
    seen, own = [], LiveStream.__init__
    monkeypatch.setattr(
        LiveStream,
        "__init__",
        lambda self, lm, corpus, **kw: seen.append(corpus.split) or own(self, lm, corpus, **kw),
    )
    assert (
        len(ActivationSource(small_recipe({"curve.held_out": 40}), torch.device("cpu")).held_out)
        == 40
    )
    assert seen == ["train", "validation"]


def test_the_curve_counts_flops_by_the_formula(small_recipe, tmp_path):
    recipe = small_recipe({"curve.held_out": 64, "sae.dead_after": 64})
    run = train(recipe, tmp_path / "run")
    last, d = run.curve()[-1], 16
    assert (
        last["tokens"] == 768
        and last["flops_encoder"] == 768 * 2 * 64 * d
        and last["flops_decoder"] == 768 * 8 * 4 * d
    )
    assert (
        0 < last["flops_auxk"] <= 768 * flops.auxk(8, d)
        and last["flops"] == last["flops_encoder"] + last["flops_decoder"] + last["flops_auxk"]
    )
    assert last["flops_lm"] == 768 * 2 * 2 * (4 + 8) * d * d, "two blocks of GPT-2 of width 16"
    assert last["loss"] == min(last["loss_raw"], last["loss_ema"])


def falling(power, octaves, floor=0.0):
    return [
        {"tokens": 1000 * 2 ** (i / 2), "loss": floor + 2 ** (-power * i / 2)}
        for i in range(2 * octaves + 1)
    ]


@pytest.mark.parametrize(
    "rows, ended",
    [
        (falling(0.1, 4), False),
        (falling(0.01, 4), True),
        (falling(0.01, 1), False),
        (falling(-0.1, 4), True),
        (falling(1, 9, floor=1.0), True),
        ([], False),
    ],
)
def test_converged_is_a_slope_below_the_limit_over_the_whole_window(rows, ended):
    assert convergence.converged(rows, CurveConfig(held_out=8, converged=0.02, window=1.5)) is ended


def test_a_run_ends_where_it_has_converged_and_is_not_gone_on_with(small_recipe, tmp_path):
    recipe = small_recipe(
        {
            "curve.held_out": 64,
            "curve.converged": 0.9,
            "curve.octaves": 4,
            "tokens": 64 * 64,
            "run.save_every": 1000,
        }
    )
    run = train(recipe, tmp_path / "run")
    last = run.metrics()[-1]["step"]
    assert (
        last < 64
        and [path.name for path in run.checkpoints()] == [f"step-{last:08d}"]
        and run.curve()[-1]["step"] == last
    )
    before = held(run)
    same(held(train(recipe, tmp_path / "run")), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"curve.converged": 0.1}, r"curve\.converged needs a held-out loss: give curve\.held_out"),
        ({"curve.converged": 1.0}, r"curve\.converged is 1\.0; it is the share"),
        (
            {"curve.converged": 0.1, "curve.held_out": 8, "optim.decay": 0.2},
            r"optim\.decay needs to know where the run ends",
        ),
        (
            {"curve.converged": 0.1, "curve.held_out": 8, "curve.window": 0.5},
            r"a slope needs at least 3 points",
        ),
        ({"curve.held_out": -1}, r"curve\.held_out is -1; it must not be negative"),
    ],
    ids=str,
)
def test_curves_that_cannot_be_are_refused(small_recipe, changes, message):
    with pytest.raises(InputError, match=message):
        small_recipe(changes)


def test_curves_are_not_taken_unless_asked_for(small_recipe, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run = train(small_recipe(), tmp_path / "run")
    assert not run.curve_file.exists() and run.curve() == []
