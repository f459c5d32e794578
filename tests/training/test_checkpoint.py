"""What a checkpoint says is checked before a run goes on from it: an older one is read, a newer or
altered one is refused by its key.
"""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ksparse.errors import CorruptError, InputError
from ksparse.storage import checksums
from ksparse.storage.run_folder import RunFolder, shard_file
from ksparse.training import checkpoint, resume
from ksparse.training.train import train

LIVE = {"block": 0, "place": [0, 0, 0], "skip": 0, "batch": 3}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains a recipe once, and gives a copy of its folder."""
    made = tmp_path_factory.mktemp("trained")

    def copy(recipe, folder):
        if not (made / "run").exists():
            train(recipe, made / "run")
        shutil.copytree(made / "run", folder)
        return RunFolder(folder)

    return copy


@pytest.fixture
def run(trained, small_recipe, tmp_path):
    return trained(small_recipe(), tmp_path / "run")


def altered(run, name, change):
    """Change a file of the last checkpoint, with sums that fit, as somebody who alters a run
    can.
    """
    path = run.checkpoints()[-1]
    facts = {key: value for key, value in checksums.verify(path).items() if key != "sha256"}
    with checksums.checksummed_dir(path, **facts) as tmp:
        for file in path.iterdir():
            if file.name != checksums.MANIFEST:
                shutil.copy(file, tmp / file.name)
        change(tmp / name)
    return run


def rewrite(**changes):
    def change(file):
        table = json.loads(file.read_text()) | changes
        file.write_text(
            json.dumps({key: value for key, value in table.items() if value is not ...})
        )

    return change


def retensor(**changes):
    def change(file):
        found = load_file(file) | changes
        save_file({key: value for key, value in found.items() if value is not None}, file)

    return change


def test_a_checkpoint_says_its_format(run):
    assert (
        json.loads((run.checkpoints()[-1] / "state.json").read_text())["format"]
        == checkpoint.FORMAT
        == 2
    )


def test_the_fields_of_a_state_are_listed_as_the_file_has_them(run):
    """A new field must be added to the list, so that none lands in the file unseen."""
    fields = [field.name for field in dataclasses.fields(checkpoint.TrainState)]
    assert sorted(fields) == sorted(["since", *checkpoint.SAVED])
    table = json.loads((run.checkpoints()[-1] / "state.json").read_text())
    assert set(table) == {"format", "updates", *checkpoint.SAVED} - {"mesh"}


def test_a_state_is_read_as_it_was_written():
    since = torch.tensor([3, 0])
    state = checkpoint.TrainState(
        since, 0.5, 7, 448, 1, True, 1e9, {"step": 7}, 2.5, threads=3, mesh=[2, 4]
    )
    table = json.loads(json.dumps(state.to_json(updates=6)))
    assert table["updates"] == 6
    assert vars(checkpoint.TrainState.from_json(table, since)) == vars(state)


def test_a_checkpoint_of_before_the_format_had_a_number_is_gone_on_with(run, small_recipe):
    for older in (
        {"format": ...},
        {"format": ..., "skipped": ..., "flops_auxk": ..., "seconds": ...},
    ):
        altered(run, "state.json", rewrite(**older))
        assert train(small_recipe(), run.path).checkpoints() == run.checkpoints()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (
            {"format": 3},
            InputError,
            r"state.json was written by a newer ksparse \(format 3\); this one reads up to 2",
        ),
        ({"format": "2"}, CorruptError, "state.json has format '2'"),
        (
            {"momentum": 1},
            CorruptError,
            "state.json has the key 'momentum', which this ksparse does not know in format 2",
        ),
        ({"updates": ...}, CorruptError, "state.json has no key 'updates'"),
        ({"step": True}, CorruptError, "'step' is 'True', expected int"),
        ({"step": 10**9}, CorruptError, "'step' is 1000000000, though its folder is named step-"),
        ({"tokens": -1}, CorruptError, "'tokens' is -1, expected a number from 0"),
        ({"tokens": 10**30}, CorruptError, "'tokens' is too large a number"),
        ({"baseline": "1"}, CorruptError, "'baseline' is '1', expected int or float"),
        ({"baseline": -0.5}, CorruptError, "'baseline' is -0.5"),
        ({"converged": 1}, CorruptError, "'converged' is '1', expected bool"),
        ({"seconds": None}, CorruptError, "'seconds' is 'None', expected int or float"),
        ({"threads": 0}, CorruptError, "'threads' is 0, expected a number from 1"),
        ({"mesh": [1]}, CorruptError, r"'mesh' is \[1\], expected 2 whole numbers"),
        ({"mesh": [0, 1]}, CorruptError, "'mesh.0' is 0, expected a number from 1"),
        ({"cursor": []}, CorruptError, r"'cursor' is '\[\]', expected dict or null"),
        (
            {"cursor": {"x": 1}},
            CorruptError,
            "'cursor' has the keys x, expected block, place, skip, batch",
        ),
        ({"cursor": {}}, CorruptError, "'cursor' has the keys none, expected"),
        (
            {"cursor": LIVE | {"place": [0, 0]}},
            CorruptError,
            r"'cursor.place' is \[0, 0\], expected 3 whole numbers",
        ),
        (
            {"cursor": LIVE | {"place": [0, "a", 0]}},
            CorruptError,
            "'cursor.place' is .* expected 3 whole numbers",
        ),
        ({"cursor": LIVE | {"batch": -1}}, CorruptError, "'cursor.batch' is -1"),
        ({"cursor": LIVE | {"skip": 0.5}}, CorruptError, "'cursor.skip' is '0.5', expected int"),
    ],
)
def test_what_state_json_says_is_checked_key_by_key(run, small_recipe, changes, error, message):
    altered(run, "state.json", rewrite(**changes))
    with pytest.raises(error, match=message):
        train(small_recipe(), run.path)


def test_the_cursor_of_shards_is_refused_by_live_activations(run, small_recipe):
    from ksparse.data.live import LiveStream

    altered(run, "state.json", rewrite(cursor={"step": 3}))
    assert resume.read_state(run.checkpoints()[-1] / "state.json")["cursor"] == {"step": 3}
    with pytest.raises(
        CorruptError, match="cursor has step and no 'block': it is not of these activations"
    ):
        next(LiveStream.batches(object(), {"step": 3}))


NAN = torch.tensor(torch.nan)


@pytest.mark.parametrize(
    "key, change, message",
    [
        ("raw.W_enc", lambda t: t * NAN, "tensor 'raw.W_enc' holds NaN or infinity"),
        (
            "exp_avg_sq.W_dec",
            lambda t: t + torch.inf,
            "tensor 'exp_avg_sq.W_dec' holds NaN or infinity",
        ),
        (
            "average.b_pre",
            lambda t: t.bool(),
            "tensor 'average.b_pre' is of type BOOL, expected float64",
        ),
        ("exp_avg.b_enc", lambda t: t.to(torch.complex64), "tensor 'exp_avg.b_enc' is of type C64"),
        ("exp_avg.W_enc", lambda t: t[:, :-1].contiguous(), "tensor 'exp_avg.W_enc' has shape"),
        ("exp_avg.W_enc", lambda t: None, "lacks the tensor 'exp_avg.W_enc'"),
        ("step.W_enc", lambda t: None, "lacks the tensor 'step.W_enc'"),
        ("since", lambda t: t.float(), "tensor 'since' is of type float32, expected int64"),
        (
            "since",
            lambda t: t - 10**9,
            "tensor 'since' holds -[0-9]+, expected counts of at least 0",
        ),
        ("since", lambda t: None, "lacks the tensor 'since'"),
        (
            "momentum.W_enc",
            lambda t: torch.ones(2),
            "holds momentum.W_enc, which an SAE of this kind does not have",
        ),
    ],
)
def test_what_adam_knows_is_checked_tensor_by_tensor(run, small_recipe, key, change, message):
    altered(
        run,
        "optim.safetensors",
        lambda file: retensor(**{key: change(load_file(file).get(key))})(file),
    )
    with pytest.raises(CorruptError, match=message) as caught:
        train(small_recipe(), run.path)
    assert "optim.safetensors" in str(caught.value)


def test_slices_of_what_adam_knows_are_checked_too(run, small_recipe):
    def cut(file):
        whole = load_file(file)
        n = len(whole["since"])
        for i, rows in enumerate((slice(0, n // 2), slice(n // 2, n))):
            own = {
                key: value[rows].clone() if value.ndim and not key.endswith("b_pre") else value
                for key, value in whole.items()
            }
            if i:
                own["exp_avg.W_enc"][0, 0] = torch.nan
            save_file(own, file.with_name(shard_file("optim", i, 2)))
        file.unlink()

    altered(run, "optim.safetensors", cut)
    with pytest.raises(CorruptError, match="optim.*tensor 'exp_avg.W_enc' holds NaN or infinity"):
        train(small_recipe(), run.path)
