"""One run, from the recipe to its folder."""

import dataclasses
import errno
import json
import logging
import math
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import ksparse
from ksparse.config import load_recipe, plain, to_toml
from ksparse.data.base import ActivationBatch
from ksparse.data.contexts import Corpus
from ksparse.data.shards import write
from ksparse.errors import DiskError, InputError, Interrupted, NonFiniteError, OutOfMemoryError
from ksparse.lm import agreement
from ksparse.lm.model import LM
from ksparse.sae.losses import Losses
from ksparse.sae.model import Code
from ksparse.storage import atomic, checksums, jsonio
from ksparse.training import checkpoint, source, trainer
from ksparse.training.source import ActivationSource
from ksparse.training.steps import autograd
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.explicit import ExplicitStep
from ksparse.training.train import train
from ksparse.training.trainer import (
    DeadLatents,
    checkpoint_due,
    train_step,
    update_dead_counts,
)

CPU = torch.device("cpu")
EXACT = ("seconds", "tokens_per_s", "waiting")


def everything(run):
    """Return all that a finished run holds, but for the time it took: tensors, state, metrics."""
    last = run.checkpoints()[-1]
    state = jsonio.read_json(last / "state.json")
    tensors = {file: load_file(last / file) for file in ("sae.safetensors", "optim.safetensors")}
    return (
        last.name,
        {key: value for key, value in state.items() if key not in EXACT},
        {f"{file}/{key}": value for file, table in tensors.items() for key, value in table.items()},
        [{key: value for key, value in row.items() if key not in EXACT} for row in run.metrics()],
    )


def same(one, other):
    assert one[0] == other[0] and one[1] == other[1]
    different = [key for key in one[2] | other[2] if not torch.equal(one[2][key], other[2][key])]
    assert not different, f"tensors that differ: {different}"
    assert one[3] == other[3]


@pytest.fixture
def whole(small_recipe, tmp_path):
    """Return what an uninterrupted run of small_recipe(changes) holds."""
    return lambda changes=None: everything(train(small_recipe(changes), tmp_path / "whole"))


def start(recipe):
    """Return a state, an optimiser and the stream, as a run begins."""
    shared = ActivationSource(recipe, CPU)
    return *trainer.start(recipe, shared), shared.stream


class Stop(Exception):
    pass


def stop_at(step):
    def observe(row):
        if row["step"] == step:
            raise Stop

    return observe


# ---- what a run leaves


def on_a_cpu(recipe):
    """Return a recipe with the data type that "auto" is on a CPU, as a run keeps it."""
    return dataclasses.replace(recipe, acts=dataclasses.replace(recipe.acts, lm_dtype="float32"))


def test_a_run_leaves_its_recipe_its_metrics_and_its_checkpoints(small_recipe, tmp_path):
    recipe, seen = small_recipe(), []
    run = train(recipe, tmp_path / "run", observe=seen.append)
    assert load_recipe(run.recipe_file) == on_a_cpu(recipe)
    assert run.environment()["versions"]["torch"] == torch.__version__
    assert [row["step"] for row in run.metrics()] == list(range(1, 13)) and run.metrics() == seen
    assert [path.name for path in run.checkpoints()] == ["step-00000008", "step-00000012"]
    assert all(checksums.verify(path) for path in run.checkpoints())
    assert {path.name for path in run.path.iterdir()} == {
        ".lock",
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
    }
    assert {path.name for path in run.checkpoints()[0].iterdir()} == {
        "sae.safetensors",
        "sae.json",
        "optim.safetensors",
        "state.json",
        "manifest.json",
    }


def test_metrics_are_as_documented(small_recipe, tmp_path):
    run = train(small_recipe(), tmp_path / "run")
    rows = run.metrics()
    for number, row in enumerate(rows, 1):
        assert set(row) == {
            "step",
            "tokens",
            "nmse",
            "auxk",
            "l0",
            "dead",
            "lr",
            "grad_norm",
            "skipped",
            "neighbours_in_batch",
            "waiting",
            "tokens_per_s",
            "seconds",
        }
        assert 0 <= row["waiting"] <= 1
        assert (
            row["tokens"] == number * 64
            and 0 < row["l0"] <= 4
            and 0 <= row["dead"] <= 1
            and row["lr"] == 3e-3
            and row["skipped"] == 0
        )
        assert 0 < row["nmse"] < 3 and row["grad_norm"] > 0
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert rows[0]["dead"] == 0 and rows[1]["dead"] == 0 and rows[2]["dead"] > 0, (
        "192 tokens are three steps"
    )
    assert rows[2]["auxk"] == 0 and rows[3]["auxk"] > 0


def test_training_lowers_the_error(small_recipe, tmp_path):
    rows = train(
        small_recipe({"tokens": 60 * 64, "run.save_every": 60}), tmp_path / "run"
    ).metrics()
    assert sum(row["nmse"] for row in rows[-5:]) < 0.8 * sum(row["nmse"] for row in rows[:5])


def test_the_checkpoint_is_an_autoencoder_with_all_that_is_needed_to_use_it(small_recipe, tmp_path):
    recipe = small_recipe({"acts.normalize": "dataset"})
    run = train(recipe, tmp_path / "run")
    sae = ksparse.load(run.path)
    assert (
        sae.shape.normalize == "dataset"
        and sae.shape.factor != 1
        and (sae.shape.n_latents, sae.shape.k) == (64, 4)
    )
    assert (
        sae.metadata["acts"] == plain(dataclasses.asdict(on_a_cpu(recipe).acts))
        and sae.metadata["step"] == 12
        and sae.metadata["tokens"] == 768
    )
    assert (
        sae.metadata["policy"]["bos_token"] == 0
        and sae.metadata["policy"]["context"] == 16
        and sae.metadata["dead_after"] == 192
    )
    torch.testing.assert_close(sae.W_dec.detach().norm(dim=1), torch.ones(64))
    assert ksparse.load(run.checkpoints()[0]).metadata["step"] == 8


def test_logging_less_often_keeps_the_first_and_the_last_step(small_recipe, tmp_path):
    run = train(small_recipe({"run.log_every": 5}), tmp_path / "run")
    assert [row["step"] for row in run.metrics()] == [1, 5, 10, 12]


@pytest.mark.parametrize(
    "keep, every, expected",
    [(1, 4, [12]), (3, 4, [4, 8, 12]), (2, 5, [10, 12]), (9, 4, [4, 8, 12]), (2, 100, [12])],
)
def test_the_newest_checkpoints_are_kept(small_recipe, tmp_path, keep, every, expected):
    run = train(small_recipe({"run.keep": keep, "run.save_every": every}), tmp_path / "run")
    assert [int(path.name[5:]) for path in run.checkpoints()] == expected


def test_the_number_of_steps_covers_the_tokens(small_recipe, tmp_path):
    run = train(small_recipe({"tokens": 3 * 64 + 1}), tmp_path / "run")
    assert run.metrics()[-1]["step"] == 4 and run.metrics()[-1]["tokens"] == 256


def test_checkpoints_are_due_by_steps_or_by_minutes(small_recipe, monkeypatch):
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    by_steps, by_minutes = (
        small_recipe({"run.save_every": 4}),
        small_recipe({"run.save_every": 0, "run.save_minutes": 2.0}),
    )
    assert [checkpoint_due(step, 0.0, by_steps) for step in (3, 4, 8)] == [False, True, True]
    assert checkpoint_due(3, 1000.0 - 120, by_minutes) and not checkpoint_due(
        4, 1000.0 - 119, by_minutes
    )


# ---- the same run again


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small_recipe, tmp_path):
    first, second, other = (
        everything(train(small_recipe({"seed": seed}), tmp_path / name))
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    same(first, second)
    assert not torch.equal(
        first[2]["optim.safetensors/raw.W_enc"], other[2]["optim.safetensors/raw.W_enc"]
    )


def test_a_finished_run_is_left_as_it_is(small_recipe, tmp_path):
    run = train(small_recipe(), tmp_path / "run")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    train(small_recipe(), tmp_path / "run", observe=lambda row: pytest.fail("a step was run"))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "changes",
    [{}, {"optim.ema": 0.0, "sae.b_enc": False, "acts.borders": "split", "acts.mix": 64}],
    ids=["plain", "other_options"],
)
def test_going_on_after_every_step_is_bitwise_the_same_run(small_recipe, tmp_path, whole, changes):
    recipe = small_recipe({"run.save_every": 1} | changes)
    for step in range(1, 13):
        with pytest.raises(Stop):
            train(recipe, tmp_path / "run", observe=stop_at(step))
    run = train(recipe, tmp_path / "run")
    same(everything(run), whole({"run.save_every": 1} | changes))
    assert len(run.metrics_file.read_text().splitlines()) == 12, (
        "a step that was run again left its line twice"
    )


@pytest.mark.parametrize("source", ["live", "shards"])
def test_computing_ahead_changes_no_bit_interrupted_or_not(
    small_recipe, small_acts, tmp_path, source
):
    changes = {"run.save_every": 3}
    if source == "shards":
        lm = LM(acts=small_acts())
        changes |= {
            "acts.shards": str(
                write(lm, Corpus(lm.options, lm.tokenizer, "train"), tmp_path / "acts", rows=400)
            )
        }
    whole = everything(train(small_recipe(changes | {"run.ahead": "off"}), tmp_path / "whole"))
    same(everything(train(small_recipe(changes | {"run.ahead": "on"}), tmp_path / "ahead")), whole)
    recipe = small_recipe(changes | {"run.ahead": "on"})
    with pytest.raises(Stop):
        train(recipe, tmp_path / "run", observe=stop_at(4))
    with pytest.raises(Interrupted):
        train(
            recipe,
            tmp_path / "run",
            observe=lambda row: row["step"] == 8 and signal.raise_signal(signal.SIGINT),
        )
    with pytest.raises(KeyboardInterrupt):
        train(
            recipe,
            tmp_path / "run",
            observe=lambda row: [signal.raise_signal(signal.SIGINT) for _ in range(2)],
        )
    assert not [thread for thread in threading.enumerate() if thread.name == "ksparse-stream"], (
        "a thread was left behind"
    )
    same(everything(train(recipe, tmp_path / "run")), whole)


@pytest.mark.parametrize("step", [2, 4, 5, 11])
def test_going_on_from_the_last_checkpoint_is_bitwise_the_same_run(
    small_recipe, tmp_path, whole, step
):
    with pytest.raises(Stop):
        train(small_recipe(), tmp_path / "run", observe=stop_at(step))
    same(everything(train(small_recipe(), tmp_path / "run")), whole())


def test_going_on_from_shards_is_bitwise_the_same_run(small_recipe, small_acts, tmp_path):
    lm = LM(acts=small_acts())
    folder = write(lm, Corpus(lm.options, lm.tokenizer, "train"), tmp_path / "acts", rows=400)
    recipe = small_recipe({"acts.shards": str(folder), "run.save_every": 3})
    with pytest.raises(Stop):
        train(recipe, tmp_path / "run", observe=stop_at(8))
    same(everything(train(recipe, tmp_path / "run")), everything(train(recipe, tmp_path / "whole")))


def test_seconds_go_on_counting(small_recipe, tmp_path):
    with pytest.raises(Stop):
        train(small_recipe(), tmp_path / "run", observe=stop_at(9))
    state = jsonio.read_json(
        sorted((tmp_path / "run" / "checkpoints").iterdir())[-1] / "state.json"
    )
    run = train(small_recipe(), tmp_path / "run")
    assert run.metrics()[8]["seconds"] > state["seconds"] > 0


def test_what_does_not_change_the_result_may_change_on_going_on(small_recipe, tmp_path, whole):
    with pytest.raises(Stop):
        train(small_recipe(), tmp_path / "run", observe=stop_at(6))
    run = train(small_recipe({"run.keep": 1, "run.save_every": 3}), tmp_path / "run")
    assert len(run.checkpoints()) == 1
    one, other = everything(run), whole()
    same((*one[:3], other[3]), other)


def test_another_recipe_is_refused_and_the_keys_named(small_recipe, tmp_path):
    with pytest.raises(Stop):
        train(small_recipe(), tmp_path / "run", observe=stop_at(2))
    before = (tmp_path / "run" / "recipe.toml").read_bytes()
    with pytest.raises(
        InputError,
        match=r"was begun with another recipe: optim\.lr: 0\.003 -> 0\.1; sae\.k: 4 -> 5\. Give another --out",
    ):
        train(small_recipe({"sae.k": 5, "optim.lr": 0.1}), tmp_path / "run")
    assert (tmp_path / "run" / "recipe.toml").read_bytes() == before


def test_a_folder_that_is_not_empty_and_no_run_is_refused_and_left_alone(small_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(
        InputError, match="is not empty and not a run; give another --out, or empty it"
    ):
        train(small_recipe(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"thesis.tex", ".lock"}


def test_a_process_killed_before_its_first_line_does_not_block_the_folder(
    small_recipe, tmp_path, monkeypatch
):
    """It wrote environment.json, half of the recipe, and no recipe.toml."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "environment.json").write_text("{}")
    (tmp_path / "run" / ".tmp-recipe.toml-123").write_text("seed = ")
    run = train(small_recipe({"tokens": 64}), tmp_path / "run")
    assert run.metrics()[-1]["step"] == 1


def test_a_second_process_in_the_same_folder_is_refused(small_recipe, tmp_path):
    from ksparse.storage.run_folder import RunFolder

    with RunFolder(tmp_path / "run").locked():
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            train(small_recipe(), tmp_path / "run")


# ---- damage


def test_a_truncated_newest_checkpoint_is_passed_over_with_a_warning(
    small_recipe, tmp_path, whole, caplog
):
    with pytest.raises(Stop):
        train(small_recipe(), tmp_path / "run", observe=stop_at(11))
    newest = tmp_path / "run" / "checkpoints" / "step-00000008" / "optim.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    steps = []
    with caplog.at_level(logging.WARNING, "ksparse"):
        run = train(small_recipe(), tmp_path / "run", observe=lambda row: steps.append(row["step"]))
    assert steps[0] == 5 and "step-00000008/optim.safetensors is damaged" in caplog.text
    same(everything(run), whole())


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(
    small_recipe, tmp_path, keep
):
    """It has the highest number, so that the new ones would be removed as the older ones."""
    options = {"run.keep": keep, "run.save_every": 1}
    with pytest.raises(Stop):
        train(small_recipe(options), tmp_path / "run", observe=stop_at(9))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "state.json").write_text("{")
    with pytest.raises(Stop):
        train(small_recipe(options), tmp_path / "run", observe=stop_at(5))
    assert (
        sorted(path.name[-1] for path in (tmp_path / "run" / "checkpoints").iterdir())
        == ["3", "4"][-keep:]
    )
    steps = []
    with pytest.raises(Stop):
        train(
            small_recipe(options),
            tmp_path / "run",
            observe=lambda row: (steps.append(row["step"]), stop_at(7)(row)),
        )
    assert steps[0] == 5, "what was trained after the damage was thrown away"


def test_all_checkpoints_damaged_begins_anew(small_recipe, tmp_path, whole, caplog):
    with pytest.raises(Stop):
        train(small_recipe(), tmp_path / "run", observe=stop_at(11))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "sae.safetensors").write_bytes(b"")
    same(everything(train(small_recipe(), tmp_path / "run")), whole())
    assert caplog.text.count("sae.safetensors is damaged") == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_while_saving_leaves_the_checkpoint_before(
    small_recipe, tmp_path, whole, monkeypatch, code
):
    own, calls = checkpoint.save_file, []

    def full(tensors, path, *args):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(code, os.strerror(code))
        return own(tensors, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            DiskError,
            match="disk full while writing .*step-00000008.*what was saved before is intact",
        ):
            train(small_recipe(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    same(everything(train(small_recipe(), tmp_path / "run")), whole())


def test_a_disk_too_small_for_the_checkpoints_is_refused_before_training(
    small_recipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(
        DiskError,
        match="disk too small for .*run: checkpoints need .* MB, 0 MB are free; make room, lower --run.keep",
    ):
        train(small_recipe(), tmp_path / "run", observe=lambda row: pytest.fail("a step was run"))


# ---- stopping


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    small_recipe, tmp_path, whole, signum
):
    if signal.getsignal(signum) == signal.SIG_IGN:
        pytest.skip(f"{signum.name} is ignored here, as under nohup, and stays so")
    before = signal.getsignal(signum)
    with pytest.raises(
        Interrupted,
        match=r"stopped at step 6 of 12; everything is saved\. Go on with: ksparse resume .*run",
    ) as caught:
        train(
            small_recipe(),
            tmp_path / "run",
            observe=lambda row: row["step"] == 6 and signal.raise_signal(signum),
        )
    assert caught.value.exit_code == 128 + signum and signal.getsignal(signum) is before
    assert (tmp_path / "run" / "checkpoints" / "step-00000006").is_dir()
    steps = []
    run = train(small_recipe(), tmp_path / "run", observe=lambda row: steps.append(row["step"]))
    assert steps[0] == 7
    same(everything(run), whole())


@pytest.mark.parametrize("ignored", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored(small_recipe, tmp_path, whole, ignored):
    """As SIGINT is in a script's background jobs, and SIGHUP under nohup."""

    def observe(row):
        for signum in (ignored, signal.SIGTERM):
            seen.append(signal.getsignal(signum))
        if row["step"] == 6:
            signal.raise_signal(ignored)

    before, seen = signal.signal(ignored, signal.SIG_IGN), []
    try:
        run = train(small_recipe(), tmp_path / "run", observe=observe)
        assert signal.getsignal(ignored) is signal.SIG_IGN
        with pytest.raises(Interrupted, match="everything is saved"):
            train(
                small_recipe({"seed": 1}),
                tmp_path / "other",
                observe=lambda row: row["step"] == 6 and signal.raise_signal(signal.SIGTERM),
            )
    finally:
        signal.signal(ignored, before)
    assert set(seen[::2]) == {signal.SIG_IGN} and signal.SIG_DFL not in seen[1::2]
    same(everything(run), whole())


def test_a_second_signal_stops_at_once(small_recipe, tmp_path):
    def twice(row):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(small_recipe(), tmp_path / "run", observe=twice)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_in_the_last_step_is_no_interruption(small_recipe, tmp_path):
    run = train(
        small_recipe(),
        tmp_path / "run",
        observe=lambda row: row["step"] == 12 and signal.raise_signal(signal.SIGTERM),
    )
    assert run.checkpoints()[-1].name == "step-00000012"


def test_training_in_another_thread_leaves_signals_alone(small_recipe, tmp_path):
    done = []
    worker = threading.Thread(
        target=lambda: done.append(train(small_recipe({"tokens": 64}), tmp_path / "run"))
    )
    worker.start()
    worker.join()
    assert done and done[0].metrics()


# ---- what is not finite


def poison(monkeypatch, *, at):
    """Let an activation of the steps `at` be NaN."""
    own, calls = trainer.train_step, []

    def poisoned(optimizer, x, *args):
        calls.append(1)
        if len(calls) in at:
            x = x.clone()
            x[5, 3] = torch.nan
        return own(optimizer, x, *args)

    monkeypatch.setattr(trainer, "train_step", poisoned)


def test_a_loss_that_is_not_finite_stops_and_names_documents_and_the_last_good_checkpoint(
    small_recipe, tmp_path, monkeypatch
):
    poison(monkeypatch, at=[6])
    with pytest.raises(
        NonFiniteError,
        match=r"NaN or infinite at step 6, on documents words\.txt:\d+.* and \d+ more; the last good checkpoint is "
        r".*step-00000004\. A smaller --optim\.lr",
    ):
        train(small_recipe(), tmp_path / "run")
    assert [
        row["step"]
        for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    ] == [1, 2, 3, 4, 5]


def test_a_loss_that_is_not_finite_at_first_says_that_there_is_no_checkpoint(
    small_recipe, tmp_path, monkeypatch
):
    poison(monkeypatch, at=[1])
    with pytest.raises(NonFiniteError, match="the last good checkpoint is none"):
        train(small_recipe(), tmp_path / "run")


def test_a_finite_loss_with_an_infinite_gradient_is_not_applied(
    small_recipe, tmp_path, monkeypatch
):
    own, calls = ExplicitStep.constrain_gradient, []

    def poisoned(optimizer):
        calls.append(own(optimizer))
        return float("inf") if len(calls) == 3 else calls[-1]

    monkeypatch.setattr(ExplicitStep, "constrain_gradient", poisoned)
    with pytest.raises(
        NonFiniteError, match="the loss or its gradient is NaN or infinite at step 3"
    ):
        train(small_recipe(), tmp_path / "run")


def test_skipped_batches_are_counted_and_move_nothing(small_recipe, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, at=[3, 5])
    run = train(small_recipe({"run.on_nonfinite": "skip"}), tmp_path / "run")
    rows = run.metrics()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"step {step} left out: its loss or gradient is not finite ({number} so far)"
        for step, number in ((3, 1), (5, 2))
    ]
    assert [row["skipped"] for row in rows] == [0, 0, 1, 1, 2] + [2] * 7
    assert (
        rows[2]["nmse"] is None
        and rows[2]["auxk"] is None
        and rows[2]["grad_norm"] is None
        and rows[3]["nmse"] > 0
    )
    state = jsonio.read_json(run.checkpoints()[-1] / "state.json")
    assert state["skipped"] == 2 and state["updates"] == 10 and state["step"] == 12
    assert all(
        torch.isfinite(value).all()
        for value in load_file(run.checkpoints()[-1] / "optim.safetensors").values()
    )
    assert load_file(run.checkpoints()[-1] / "optim.safetensors")["step.W_enc"] == 10


def raising(error):
    def fail(*args):
        raise error

    return fail


@pytest.mark.parametrize(
    "fail",
    [
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")),
        raising(MemoryError()),
        lambda *args: torch.empty(2**50),
    ],
    ids=["a_gpus", "pythons", "the_machines"],
)
def test_out_of_memory_names_the_plan_and_what_needs_less(
    small_recipe, tmp_path, monkeypatch, fail
):
    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(
        OutOfMemoryError, match=r"^out of memory: .*`ksparse plan` .*--batch"
    ) as caught:
        train(small_recipe(), tmp_path / "run")
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_another_error_of_torch_is_not_taken_for_one_of_memory(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "train_step", raising(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(small_recipe(), tmp_path / "run")


def test_nan_activations_stop_the_run_and_name_the_document(small_recipe, tmp_path, monkeypatch):
    own = LM.acts

    def broken(self, tokens, attention):
        x = own(self, tokens, attention).clone()
        x[-1, -1] = torch.nan
        return x

    monkeypatch.setattr(agreement, "check_passes_agree", lambda lm: None)
    monkeypatch.setattr(LM, "acts", broken)
    with pytest.raises(
        NonFiniteError,
        match=r"activations at resid_post\.1 are NaN or infinite, the first in document 'words\.txt:\d+'",
    ):
        train(small_recipe(), tmp_path / "run")


def test_activations_that_are_all_the_same_are_refused(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(agreement, "check_passes_agree", lambda lm: None)
    monkeypatch.setattr(LM, "acts", lambda self, tokens, attention: torch.ones(*tokens.shape, 16))
    with pytest.raises(
        InputError,
        match=r"all 256 activations at resid_post\.1 are the same: there is nothing to learn",
    ):
        train(small_recipe({"acts.normalize": "none"}), tmp_path / "run")


# ---- the parts


def test_dead_counters_count_tokens_by_value_above_0(small_recipe):
    """T5: a latent that is chosen with a value of 0 has not fired. T11: tokens, not steps."""
    since = torch.tensor([5, 5, 5, 5, 5])
    code = Code(torch.tensor([[1.0, 0.0], [0.5, 1e-30]]), torch.tensor([[0, 1], [0, 3]]))
    assert update_dead_counts(since, Losses(torch.zeros(()), {}, code), 7).tolist() == [
        0,
        12,
        12,
        0,
        12,
    ]
    assert since.tolist() == [5] * 5


def test_dead_latents_are_those_silent_for_dead_after_tokens(small_recipe, monkeypatch):
    recipe = small_recipe()
    state, optimizer, stream = start(recipe)
    state.since[:5] = torch.tensor([191, 192, 193, 0, 10**9])
    seen = []
    own = optimizer.backward
    optimizer.backward = lambda x, **kw: (
        seen.append((kw["dead"].tolist(), kw["k_aux"])) or own(x, **kw)
    )
    state.step = 1
    train_step(optimizer, optimizer.sae.normalize(next(stream.batches()).x).x, state, recipe)
    assert seen == [([1, 2, 4], 8)]


def test_a_step_says_which_latents_are_dead_in_the_next(small_recipe):
    recipe = small_recipe({"sae.dead_after": 128})
    state, optimizer, stream = start(recipe)
    batches, dead = stream.batches(), DeadLatents(128)
    for state.step in (1, 2, 3):
        before, (part, norm) = (
            state.since,
            train_step(optimizer, optimizer.sae.normalize(next(batches).x).x, state, recipe, dead),
        )
        assert torch.equal(state.since, update_dead_counts(before, part, 64)) and math.isfinite(
            norm
        )
        latents = dead.indices(torch.zeros(0))  # known without the counters
        assert torch.equal(latents, (state.since >= 128).nonzero().squeeze(1))
    assert 0 < len(latents) < recipe.sae.n_latents
    since, state.step = state.since, 4
    part, norm = train_step(optimizer, torch.full((64, 16), torch.nan), state, recipe, dead)
    assert math.isnan(norm) and not math.isfinite(part.total) and torch.equal(state.since, since)


def test_auxk_brings_dead_latents_back(small_recipe):
    """The same batches with and without: latents that never fire get into the top k again."""
    alive = {}
    for coefficient in (0.0, 1.0):
        recipe = small_recipe(
            {
                "sae.auxk_coef": coefficient,
                "sae.k_aux": 16,
                "optim.lr": 1e-2,
                "acts.normalize": "layer_norm",
            }
        )
        state, optimizer, stream = start(recipe)
        with torch.no_grad():
            optimizer.sae.W_enc[:32] *= 0.02  # too weak to be chosen
        state.since[:32] = 10**6
        batches = stream.batches()
        for step in range(1, 81):
            state.step = min(step, recipe.steps)
            train_step(optimizer, optimizer.sae.normalize(next(batches).x).x, state, recipe)
        alive[coefficient] = int((state.since[:32] < 10**6).sum())
    assert alive[1.0] > alive[0.0] + 8


@pytest.mark.parametrize(
    "options", [{}, {"sae.multi_topk": 0.125}, {"sae.auxk_coef": 0.0}], ids=str
)
def test_a_batch_in_parts_gives_the_gradient_of_the_whole_batch(small_recipe, monkeypatch, options):
    recipe = small_recipe(options)
    state, optimizer, stream = start(recipe)
    optimizer = AutogradStep(optimizer.sae, recipe)  # the one by autograd
    state.since[:20] = 10**6
    batch = next(stream.batches())
    results = {}
    for rows in (64, 48, 1):
        monkeypatch.setattr(autograd, "PRE_ACTS", 64 * rows)
        optimizer.adam.zero_grad()
        x, dead = optimizer.sae.normalize(batch.x).x, DeadLatents(recipe.dead_after)
        part = optimizer.backward(
            x, baseline=state.baseline, dead=dead.indices(state.since), k_aux=8
        )
        results[rows] = (
            part,
            {key: value.grad.clone() for key, value in optimizer.sae.named_parameters()},
        )
    for rows in (48, 1):
        for field in ("total", "nmse", "auxk"):
            torch.testing.assert_close(
                getattr(results[rows][0], field), getattr(results[64][0], field)
            )
        assert torch.equal(
            results[rows][0].code.indices.sort(1).values, results[64][0].code.indices.sort(1).values
        )
        for key, grad in results[64][1].items():
            torch.testing.assert_close(results[rows][1][key], grad, rtol=1e-4, atol=1e-6)


def test_the_start_does_not_move_the_stream(small_recipe):
    """T25."""
    recipe = small_recipe()
    _, _, stream = start(recipe)
    fresh, _ = source.open_stream(recipe, CPU)
    first, second = next(stream.batches()), next(fresh.batches())
    assert torch.equal(first.x, second.x) and isinstance(first, ActivationBatch)


def test_the_baseline_is_the_variance_of_the_sample_and_stays(small_recipe, tmp_path):
    """T19."""
    recipe = small_recipe()
    state, optimizer, stream = start(recipe)
    x = optimizer.sae.normalize(stream.sample(source.SAMPLE)).x.double()
    assert state.baseline == pytest.approx((x - x.mean(0)).square().mean().item(), rel=1e-5)
    run = train(recipe, tmp_path / "run")
    assert {jsonio.read_json(path / "state.json")["baseline"] for path in run.checkpoints()} == {
        state.baseline
    }


def test_the_initial_weights_do_not_depend_on_training_options(small_recipe):
    one, other = (
        start(small_recipe(changes))[1].sae
        for changes in ({}, {"optim.lr": 0.5, "sae.auxk_coef": 0.0, "tokens": 640})
    )
    assert all(
        torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items()
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"acts.mix": 32}, r"acts\.mix is 32, less than one batch of 64; give several batches"),
        ({"run.device": "cuda:7"}, r"device 'cuda:7' is not available: .*cpu always is"),
        ({"run.device": "abacus"}, r"device 'abacus' is not available"),
        ({"acts.text": "/no/such.txt"}, r"text /no/such\.txt does not exist"),
        ({"acts.site": "resid_post.9"}, r"site 'resid_post\.9' does not exist"),
        ({"acts.shards": "/no/such"}, r"/no/such is no folder of shards"),
        (
            {"run.loggers": ["wandb"]},
            r"the logger wandb is not installed: pip install 'ksparse\[loggers\]'",
        ),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(small_recipe, tmp_path, changes, message):
    if "run.loggers" in changes and __import__("importlib.util").util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with pytest.raises(InputError, match=message):
        train(
            small_recipe(changes),
            tmp_path / "run",
            observe=lambda row: pytest.fail("a step was run"),
        )


def test_a_run_that_could_not_begin_can_be_corrected(small_recipe, tmp_path):
    with pytest.raises(InputError):
        train(small_recipe({"run.device": "abacus"}), tmp_path / "run")
    assert train(small_recipe({"tokens": 64 * 12}), tmp_path / "run").metrics()[-1]["step"] == 12


def test_a_run_without_a_name_is_named_by_its_recipe(small_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, same_one, other = (train(small_recipe({"tokens": 64, "seed": seed})) for seed in (0, 0, 1))
    assert one.path == same_one.path != other.path and one.path.parent.name == "runs"


def test_every_option_of_the_autoencoder_trains(small_recipe, tmp_path):
    for number, changes in enumerate(
        [
            {"sae.auxk_norm": "batch"},
            {"sae.auxk_share": 0.1},
            {"sae.multi_topk": 0.125},
            {"sae.b_enc": False},
            {"sae.init": "independent"},
            {"sae.init_scale": "unit"},
            {"sae.b_pre_init": "mean"},
            {"sae.b_pre_init": "zero"},
            {"sae.unit_norm": False},
            {"acts.normalize": "layer_norm"},
            {"acts.normalize": "none"},
            {"optim.warmup": 3, "optim.decay": 0.5, "optim.clip": 0.1},
            {"acts.bos": "none"},
            {"acts.keep": "all"},
        ]
    ):
        rows = train(
            small_recipe({"tokens": 5 * 64, "sae.dead_after": 64} | changes), tmp_path / str(number)
        ).metrics()
        assert all(math.isfinite(row["nmse"]) for row in rows) and rows[-1]["auxk"] > 0, changes


# ---- a start that fails, and the corrected one


@pytest.mark.parametrize(
    "wrong",
    [
        {"acts.site": "resid_post.99"},
        {"acts.lm": "./nowhere"},
        {"acts.text": "./nowhere.txt"},
        {"acts.field": "nothing"},
        {"optim.lr": 1e30},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_after_a_start_that_failed_the_corrected_recipe_is_trained_in_the_same_folder(
    small_recipe, tmp_path, wrong, monkeypatch
):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": f"the cat sat on a mat and saw {i} black dogs " * 4}) + "\n"
            for i in range(60)
        )
    )
    if "optim.lr" in wrong:
        own = train_step
        monkeypatch.setattr(
            trainer,
            "train_step",
            lambda optimizer, x, *args: (own(optimizer, x, *args)[0], math.nan),
        )
    with pytest.raises((InputError, NonFiniteError)):
        train(small_recipe({"acts.text": str(text)} | wrong), tmp_path / "run")
    monkeypatch.undo()
    right = small_recipe({"acts.text": str(text)})
    run = train(right, tmp_path / "run")
    assert load_recipe(run.recipe_file) == on_a_cpu(right)
    same(everything(run), everything(train(right, tmp_path / "fresh")))
    assert {path.name for path in run.path.iterdir()} == {
        path.name for path in (tmp_path / "fresh").iterdir()
    }


def test_another_recipe_is_refused_once_a_step_was_taken_even_without_a_checkpoint(
    small_recipe, tmp_path
):
    run = train(small_recipe(), tmp_path / "run")
    for gone in (run.path / "checkpoints", run.metrics_file):
        with pytest.raises(InputError, match="was begun with another recipe: sae.k: 4 -> 2"):
            train(small_recipe({"sae.k": 2}), run.path)
        atomic.remove(gone) if gone.is_dir() else gone.unlink()
    jsonio.write_json(run.eval_file("stats"), {"name": "stats"})
    with pytest.raises(InputError, match="was begun with another recipe"):
        train(small_recipe({"sae.k": 2}), run.path)


def test_a_recipe_that_somebody_put_there_is_not_replaced(small_recipe, tmp_path):
    (tmp_path / "recipe.toml").write_text("# mine\n" + to_toml(small_recipe()))
    with pytest.raises(InputError, match="was begun with another recipe: sae.k: 4 -> 2"):
        train(small_recipe({"sae.k": 2}), tmp_path)
    assert (tmp_path / "recipe.toml").read_text().startswith("# mine\n")


def test_a_run_is_not_trained_where_a_link_leads(small_recipe, tmp_path):
    """In somebody's unfinished run that is gone on with."""
    (tmp_path / "out").mkdir()
    for name in ("checkpoints", "metrics.jsonl", "environment.json", "recipe.toml", ".lock"):
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        (folder / "environment.json").write_text("{}")
        (folder / "recipe.toml").write_text(to_toml(small_recipe()))
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../out" if name == "checkpoints" else "../out/x")
        with pytest.raises(InputError, match=f"{name} leads out of .*with-{name}, to .*out"):
            train(small_recipe(), folder)
    assert list((tmp_path / "out").iterdir()) == []
