"""A run's processes are started by torchrun on this machine, or as the tasks of a job."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ksparse import cli
from ksparse.config import load_recipe, to_toml
from ksparse.errors import InputError, KsparseError
from ksparse.scaling import processes
from ksparse.scaling.processes import Processes
from ksparse.scaling.sweeps import launch as launching
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training import train


@pytest.mark.parametrize(
    "given, message",
    [
        ({"nodes": 2}, "2 x 1, but nothing starts them; give --launch local or --launch slurm"),
        ({"processes_per_node": 4}, "1 x 4, but nothing starts them"),
        ({"launch": "local", "nodes": 2}, "--launch local starts processes of this machine"),
        ({"launch": "slurm", "nodes": 0}, "nodes of a launched run is 0"),
        ({"launch": "local", "retries": -1}, "retries of a launched run is -1"),
        ({"launch": "slurm", "slurm": ["gpu"]}, "'gpu' of --slurm is not name=value"),
        ({"launch": "ssh"}, "launch"),
    ],
)
def test_what_cannot_be_launched_is_named(given, message):
    with pytest.raises(InputError, match=message):
        Processes(**given)


def test_a_mesh_of_other_processes_is_refused_before_anything_starts(
    small_recipe, tmp_path, monkeypatch
):
    (tmp_path / "recipe.toml").write_text(to_toml(small_recipe({"mesh.latent": 2})))
    monkeypatch.setattr(os, "execve", lambda *words: pytest.fail("started"))
    flags = ["--launch", "local", "--processes-per-node", "4", "--out", str(tmp_path / "run")]
    with pytest.raises(InputError, match=r"1 x 2 = 2, but there are 4 processes"):
        cli.VERBS["train"]([str(tmp_path / "recipe.toml"), *flags])
    assert not (tmp_path / "run.launch").exists()


def test_the_command_of_this_machine_is_torchruns(small_recipe, tmp_path, monkeypatch):
    asked, run = small_recipe({"mesh.data": 0, "mesh.latent": 0}), RunFolder(tmp_path / "run")
    options = Processes(launch="local", processes_per_node=2, retries=5)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "cores", lambda: 6)
    command, environment = processes.local_command(asked, run, options)
    file = tmp_path / "run.launch" / "recipe.toml"
    assert command[:5] == [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    assert command[5:9] == ["--nproc-per-node", "2", "--max-restarts", "5"]
    assert command[9:] == ["-m", "ksparse", "train", str(file), "--out", str(run.path)]
    assert load_recipe(file) == asked
    assert environment["OMP_NUM_THREADS"] == "3" and environment["PYTHONSAFEPATH"] == "1"


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Put programs that stand for Slurm's first in the path; return the folder that gets each
    script that is submitted."""
    pytest.importorskip("submitit", reason="submitit is not installed (the extra slurm)")
    programs, scripts = tmp_path / "bin", tmp_path / "scripts"
    programs.mkdir()
    scripts.mkdir()
    sbatch = f'n=$(ls {scripts} | wc -l); cp "$1" {scripts}/$n; echo "Submitted batch job $n"'
    for name, text in (("sbatch", sbatch), ("srun", ""), ("sacct", ""), ("scancel", "")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(launching, "POLL", 0.01)
    monkeypatch.setattr(launching.Submitted, "done", lambda self: True)
    return scripts


def test_a_job_has_a_task_for_each_process_and_ends_with_the_run(
    small_recipe, tmp_path, slurm, monkeypatch
):
    run, seen, own = RunFolder(tmp_path / "run"), [], processes.Task
    monkeypatch.setattr(processes, "Task", lambda command: seen.append(command) or own(command))
    monkeypatch.setattr(processes, "finished", lambda run: len(seen) == 1)
    options = Processes(
        launch="slurm", nodes=2, processes_per_node=4, minutes=90, slurm=["slurm_partition=gpu"]
    )
    processes.in_jobs(small_recipe(), run, options)
    (script,) = [file.read_text() for file in slurm.iterdir()]
    for line in ("nodes=2", "ntasks-per-node=4", "time=90", "partition=gpu", "signal=TERM@120"):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1" in script and "export PYTHONSAFEPATH=1" in script
    file = tmp_path / "run.launch" / "recipe.toml"
    assert seen == [
        [sys.executable, "-P", "-m", "ksparse", "train", str(file), "--out", str(run.path)]
    ]


def test_jobs_follow_each_other_while_there_are_new_checkpoints(
    small_recipe, tmp_path, slurm, monkeypatch
):
    run, warned = RunFolder(tmp_path / "run"), []
    steps = iter([0, 1, 1, 2, 2, 2, 2, 2])  # before and after each job
    monkeypatch.setattr(RunFolder, "checkpoints", lambda self: [tmp_path / str(next(steps))])
    monkeypatch.setattr(processes, "finished", lambda run: False)
    options = Processes(launch="slurm", retries=1)
    with pytest.raises(KsparseError, match=r"2 jobs in a row ended without a new checkpoint"):
        processes.in_jobs(small_recipe(), run, options, warn=warned.append)
    assert len(list(slurm.iterdir())) == 4 and len(warned) == 3
    assert "submitting it again" in warned[0]


def apart(one, other):
    """Return the largest relative difference of two runs' weights."""
    from ksparse.sae import serialization

    pairs = [serialization.load(path).state_dict() for path in (one, other)]
    return max(
        ((pairs[0][key] - value).norm() / value.norm().clamp_min(1e-9)).item()
        for key, value in pairs[1].items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("where", ["torchrun", "a job's tasks"])
def test_launched_processes_train_what_one_process_trains(small_recipe, tmp_path, where):
    asked = small_recipe({"mesh.data": 0, "mesh.latent": 0, "threads": 1})
    alone = train.train(asked, tmp_path / "alone")
    run = RunFolder(tmp_path / "run")
    (tmp_path / "recipe.toml").write_text(to_toml(asked))
    if where == "torchrun":
        words = ["--launch", "local", "--processes-per-node", "2", "--out", str(run.path)]
        done = subprocess.run(
            [sys.executable, "-m", "ksparse", "train", str(tmp_path / "recipe.toml"), *words],
            capture_output=True,
            text=True,
            timeout=280,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"run      {run.path}" in done.stdout
    else:
        pytest.importorskip("submitit", reason="submitit is not installed (the extra slurm)")
        options = Processes(launch="slurm", processes_per_node=2, retries=0)
        processes.in_jobs(asked, run, options, cluster="local")
    state = jsonio.read_table(run.checkpoints()[-1] / "state.json")
    assert sorted(state["mesh"]) == [1, 2] and state["step"] == asked.steps
    assert apart(run.path, alone.path) < 1e-4
