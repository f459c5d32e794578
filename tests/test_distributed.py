"""Processes share a run: the same weights up to rounding, the same latents, files that any mesh reads, one named error where a process is lost."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ksparse import distributed as meshes
from ksparse.config import Recipe, from_dict, to_toml
from ksparse.distributed import Mesh
from ksparse.errors import InputError, PeerError
from ksparse.limits import first_offer
from ksparse.sae import serialization
from ksparse.sae.model import Shape
from ksparse.storage.run_folder import RunFolder
from ksparse.training import checkpoint
from ksparse.training.train import train

ROOT = Path(__file__).resolve().parents[1]
D, N, K, BATCH = 32, 1024, 8, 256  # of bench/mesh.py


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return what bench/mesh.py finds in 16 steps, all on one group of four processes."""
    folder = tmp_path_factory.mktemp("mesh")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "bench" / "mesh.py",
            "--steps",
            "16",
            "--kinds",
            "topk",
            "multi_topk",
            "--brief",
            "native_int8",
            "batch_topk",
            "--no-elastic",
            "--json",
            folder / "found.json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
def test_every_mesh_trains_the_same_weights_up_to_rounding(measured):
    rows = [row for row in measured["rows"] if row["mesh"] != "reversed"]
    assert [(row["kind"], row["mesh"]) for row in rows] == [
        (kind, mesh)
        for kind in ("topk", "multi_topk", "native_int8", "batch_topk")
        for mesh in ("4x1", "2x2", "1x4")
    ]
    assert all(row["parameters"] < 1e-5 and row["curve"] < 1e-5 for row in rows)
    assert all(row["dead"] > 0.1 for row in measured["rows"] if row["mesh"] == "reversed")


@pytest.mark.slow
def test_every_mesh_chooses_the_same_latents_in_the_first_step(measured):
    assert all(row["same_choice"] for row in measured["rows"] if row["mesh"] != "reversed")


@pytest.mark.slow
def test_a_run_stopped_on_a_mesh_goes_on_to_the_same_bits(measured):
    assert measured["resumed"] == {"4x1": True, "2x2": True, "1x4": True}


@pytest.mark.slow
def test_what_2x2_wrote_is_read_bit_for_bit_by_every_mesh(measured):
    assert measured["loaded"] == {"4x1": True, "2x2": True, "1x4": True, "1x1": True}


@pytest.mark.slow
def test_a_checkpoint_by_slices_is_an_autoencoder_like_any_other(measured):
    run = RunFolder(Path(measured["folder"]) / "topk-2-2")
    assert sorted(file.name for file in run.checkpoints()[-1].iterdir()) == [
        "manifest.json",
        "optim.0-of-2.safetensors",
        "optim.1-of-2.safetensors",
        "sae.0-of-2.safetensors",
        "sae.1-of-2.safetensors",
        "sae.json",
        "state.json",
    ]
    sae = serialization.load(run.path)
    assert sae.shape == Shape(D, N, K) and torch.allclose(sae.W_dec.norm(dim=1), torch.ones(N))


@pytest.mark.slow
def test_a_step_sends_what_the_formula_says(measured):
    sent = {
        row["mesh"]: row["sent"]
        for row in measured["rows"]
        if row["kind"] == "topk" and row["mesh"] != "reversed"
    }
    for data, latent in ((4, 1), (2, 2), (1, 4)):
        found, n, b = sent[f"{data}x{latent}"], N // latent, BATCH // data
        assert found.get("W_enc", 0) == found.get("W_dec", 0) == (4 * n * D if data > 1 else 0)
        assert found.get("b_enc", 0) == (4 * n if data > 1 else 0) and found.get("fired", 0) == (
            n if data > 1 else 0
        )
        assert found.get("recon", 0) == (2 * 4 * b * D if latent > 1 else 0)  # TopK's and AuxK's
        offered = first_offer(K, latent)[0] + first_offer(16, latent)[0]
        assert found.get("values", 0) == (4 * b * offered if latent > 1 else 0)
        assert found.get("values_again", 0) <= 0.4 * 4 * b * (K + 16)
        assert found.get("b_pre_encoder", 0) == (4 * D if latent > 1 else 0)


@pytest.mark.slow
def test_a_bounded_capacity_is_logged(measured):
    assert (
        measured["capacity"]["4x1"]["used_up"] is None
        and 0 < measured["capacity"]["2x2"]["used_up"] < 1
    )


# ---- in this process


def test_one_process_sends_nothing():
    alone, x = Mesh(), torch.ones(3)
    assert (
        alone.all_reduce_sum("a", x, "data") is x
        and alone.all_reduce_max("a", x, "latent") is x
        and alone.all_gather("a", x, "latent").shape == (1, 3)
    )
    assert (
        alone.all_reduce_max_ints("a", [3, 1]) == [3, 1]
        and alone.broadcast_str("a", "text") == "text"
        and not alone.sent
    )


@pytest.mark.parametrize(
    "changes, data, world, message",
    [
        (
            {"mesh": {"data": 2, "latent": 2}},
            2,
            1,
            r"mesh\.data x mesh\.latent is 2 x 2 = 4, but there is 1 process; start `torchrun --nproc-per-node 4",
        ),
        (
            {"mesh": {"data": 1, "latent": 2}},
            1,
            4,
            r"1 x 2 = 2, but there are 4 processes; .* or give keys whose product is 4",
        ),
        (
            {"mesh": {"latent": 3}},
            1,
            3,
            r"sae\.n_latents is 4096, which mesh\.latent = 3 does not divide; give a multiple of 3",
        ),
        (
            {"mesh": {"latent": 256}},
            1,
            256,
            r"sae\.k is 32, more than the 16 latents of a shard; give a smaller mesh\.latent",
        ),
        (
            {"batch": 1000, "mesh": {"data": 16}},
            16,
            16,
            r"batch is 1000, which mesh\.data = 16 does not divide",
        ),
        (
            {"sae": {"k": 8, "k_start": 128, "k_anneal": 0.5}, "mesh": {"latent": 64}},
            1,
            64,
            r"sae\.k_start is 128, more than the 64 latents of a shard",
        ),
        (
            {"run": {"kernels": "triton"}},
            2,
            2,
            r"run\.kernels is 'triton' .*several processes cannot use the Triton kernels yet",
        ),
        (
            {"optim": {"precision": "bfloat16"}},
            2,
            2,
            r"optim\.precision 'bfloat16'; several processes cannot use the Triton kernels yet: leave them at 'auto' and 'float32'",
        ),
        (
            {"run": {"ahead": "on"}},
            2,
            2,
            r"run\.ahead is 'on'; several processes compute a block of activations together",
        ),
    ],
    ids=str,
)
def test_a_mesh_that_cannot_be_is_refused(changes, data, world, message):
    with pytest.raises(InputError, match=message):
        meshes.check(from_dict(changes), data, world)


def test_a_mesh_without_torchrun_is_refused_before_anything_is_written(small_recipe, tmp_path):
    asked = dataclasses.replace(small_recipe(), mesh=dataclasses.replace(Recipe().mesh, latent=2))
    with pytest.raises(
        InputError, match="but there is 1 process; start `torchrun --nproc-per-node 2"
    ):
        train(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_goes_wrong_behind_the_steps_is_raised_by_the_next_call(monkeypatch):
    saver = checkpoint.Saver(behind=True)
    monkeypatch.setattr(checkpoint, "snapshot", lambda *args, **kw: None)
    monkeypatch.setattr(
        checkpoint, "commit", lambda *args: (_ for _ in ()).throw(InputError("no room"))
    )
    saver.save(None, None, None)
    with pytest.raises(InputError, match="no room"):
        saver.wait()
    saver.wait()  # raised once


def test_only_the_first_process_acts_and_the_others_fail_with_it():
    class Second(Mesh):
        is_rank0 = False

        def all_reduce_max_ints(self, name, numbers, over="all"):
            return [1]

    with pytest.raises(PeerError, match="process 0 of 1 could not go on; its own message says why"):
        Second().on_rank0("begin", lambda: pytest.fail("it acted"))


# ---- processes of their own

WAITING = """
import time
import torch
from ksparse.errors import PeerError
from ksparse.distributed import open_mesh
from ksparse.config import from_dict
try:
    with open_mesh(from_dict({"mesh": {"data": 2, "timeout": 2.0}}), "cpu") as mesh:
        if mesh.is_rank0:
            mesh.all_reduce_sum("W_enc", torch.ones(4), "data")
        else:
            time.sleep(4)
except PeerError as error:
    print(error.exit_code, error)
"""


def processes(command, folder, port, count=2):
    """Return (exit code, stdout, stderr) of processes that torchrun would start so."""
    common = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
    }
    started = [
        subprocess.Popen(
            [sys.executable, *command],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=folder,
        )
        for rank in range(count)
    ]
    said = [process.communicate(timeout=200) for process in started]
    return [(process.returncode, *words) for process, words in zip(started, said)]


@pytest.fixture
def port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_process_that_does_not_answer_is_a_named_error(tmp_path, port):
    code, out, err = processes(["-c", WAITING], tmp_path, port)[0]
    assert code == 0, err
    assert out.startswith(
        "6 process 0 of 2 waited for the others at 'W_enc': one of them is gone, or did not answer within 2 s (mesh.timeout)"
    )


def test_the_command_line_trains_on_a_mesh_what_one_process_trains(small_recipe, tmp_path, port):
    """The LM runs on two processes, each on half of every block; the text is dealt out in the same order; one process goes on with the run."""
    asked = small_recipe({"tokens": 8 * 64})
    (tmp_path / "recipe.toml").write_text(to_toml(asked))
    found = processes(
        [
            "-m",
            "ksparse",
            "train",
            "recipe.toml",
            "--mesh.data",
            "1",
            "--mesh.latent",
            "2",
            "--out",
            "shared",
        ],
        tmp_path,
        port,
    )
    assert [code for code, *_ in found] == [0, 0], found
    assert "run      shared" in found[0][1] and found[1][1] == ""
    alone, shared = train(asked, tmp_path / "alone"), RunFolder(tmp_path / "shared")
    for one, other in zip(alone.metrics(), shared.metrics(), strict=True):
        assert (
            one["nmse"] == pytest.approx(other["nmse"], rel=1e-4)
            and one["l0"] == other["l0"]
            and one["tokens"] == other["tokens"]
        )
    states = [
        json.loads((run.checkpoints()[-1] / "state.json").read_text()) for run in (alone, shared)
    ]
    assert (
        states[0]["cursor"] == states[1]["cursor"]
        and states[1]["mesh"] == [1, 2]
        and "mesh" not in states[0]
    )
    shutil.rmtree(shared.checkpoints()[-1])
    train(asked, shared.path)
    assert (
        shared.metrics()[-1]["nmse"] == pytest.approx(alone.metrics()[-1]["nmse"], rel=1e-4)
        and (shared.checkpoints()[-1] / "sae.safetensors").is_file()
    )
