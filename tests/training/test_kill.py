"""kill -9 at any moment, and a disk that fills up, in processes of their own: the same command goes on to the same bits."""

import json
import os
import signal
import subprocess
import sys

import pytest

from ksparse.config import to_toml
from ksparse.training.train import train

# One process imports everything once, and forks for each attempt, since importing takes longer than training.
ATTEMPTS = """
import contextlib, io, json, os, resource, signal, sys, time
from pathlib import Path
from ksparse import cli, errors
from ksparse.config import load_recipe
from ksparse.storage import checksums
from ksparse.storage.run_folder import RunFolder
from ksparse.training.train import train
from transformers import AutoModelForCausalLM, AutoTokenizer

base, asked = Path(sys.argv[1]), load_recipe(sys.argv[2])

def attempt(folder, way, number, ready):
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)
    own, calls = os.fsync, []
    def fsync(handle):
        calls.append(1)
        if way == "fsync" and len(calls) == number:
            die()
        own(handle)
    os.fsync = fsync
    def observe(row):
        if row["step"] == number and way == "step":
            die()
        if row["step"] == number and way == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        if row["step"] == number and way == "terminate":
            os.write(ready, b"!")
            time.sleep(0.5)  # long enough for the signal to come
    if way == "command":
        append = RunFolder.append_metrics
        def slow(run, row):
            append(run, row)
            if row["step"] == number:
                os.write(ready, b"!")
                time.sleep(0.5)
        RunFolder.append_metrics = slow
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            try:
                cli.main(["train", sys.argv[2], "--out", str(folder)])
            except SystemExit as ended:
                return ended.code, said.getvalue()
    try:
        train(asked, folder, observe=observe)
    except errors.KsparseError as error:
        return error.exit_code, str(error)
    return 0, ""

found = {}
for item in sys.argv[3:]:
    name, way, number = item.split(":")
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        code, message = attempt(base / name, way, int(number), write)
        (base / "message").write_text(message)
        os._exit(code)
    os.close(write)
    if os.read(read, 1):
        os.kill(pid, signal.SIGTERM)
    (base / "message").touch()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    steps = [checksums.verify(path)["step"] for path in RunFolder(base / name).checkpoints()]  # each is whole, or this raises
    found.setdefault(name, []).append([code, (base / "message").read_text(), steps])
print(json.dumps(found))
"""
KILLS = [("fsync", 2), ("fsync", 12), ("step", 6), ("fsync", 27), ("step", 12)]


@pytest.fixture
def attempts(small_recipe, tmp_path):
    """Return what came of all attempts: {folder: [[exit code, message, steps of the checkpoints], ...]}."""
    (tmp_path / "recipe.toml").write_text(to_toml(small_recipe()))
    asked = [
        *(f"killed:{way}:{number}" for way, number in KILLS),
        "full:full:6",
        "terminated:terminate:6",
        "commanded:command:7",
    ]
    done = subprocess.run(
        [sys.executable, "-c", ATTEMPTS, str(tmp_path), str(tmp_path / "recipe.toml"), *asked],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def final(run):
    last = run.checkpoints()[-1]
    rows = [
        {
            key: value
            for key, value in row.items()
            if key not in ("seconds", "tokens_per_s", "waiting")
        }
        for row in run.metrics()
    ]
    return (
        last.name,
        (last / "sae.safetensors").read_bytes(),
        (last / "optim.safetensors").read_bytes(),
        rows,
    )


def test_a_killed_run_ends_bitwise_like_an_undisturbed_one(small_recipe, tmp_path, attempts):
    """Killed in the first lines, within a step, within a save before a file is synced and before the folder is renamed;
    a disk that fills up; SIGTERM from outside, to `train` in Python and to the command."""
    assert [(code, steps) for code, _, steps in attempts["killed"]] == [
        (-signal.SIGKILL, steps) for steps in ([], [], [4], [4, 8], [4, 8])
    ]

    code, message, steps = attempts["full"][0]
    assert (
        code == 5
        and steps == [4]
        and "disk full while writing" in message
        and "what was saved before is intact" in message
    )

    code, message, steps = attempts["terminated"][0]
    assert (
        code == 143
        and steps == [4, 6]
        and "stopped at step 6 of 12; everything is saved. Go on with: ksparse resume" in message
    )

    code, message, steps = attempts["commanded"][0]
    assert (
        code == 143
        and steps == [4, 7]
        and "ksparse train: stopped at step 7 of 12; everything is saved. Go on with: ksparse resume"
        in message
    )

    expected = final(train(small_recipe(), tmp_path / "whole"))
    for name in attempts:
        run = train(small_recipe(), tmp_path / name)
        assert final(run) == expected, f"the run that was {name} is another"
        assert not list(run.path.rglob(".tmp-*")), "leftovers of the killed processes"
