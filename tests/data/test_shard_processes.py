"""Real processes write one set of shards, are killed, and the set is that of an undisturbed one."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from contextlib import suppress

import pytest
import torch

import ksparse
from ksparse.data.contexts import Corpus
from ksparse.data.shard_sets import ProcessPart
from ksparse.data.shards import write
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.storage import cache, stores
from ksparse.storage.stores import open_store

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),  # of the client's libraries
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def s3():
    """Return the environment in which s3:// is a server on this machine, with the bucket `bucket`."""
    pytest.importorskip("moto", reason="needs the package moto[server]")
    pytest.importorskip("s3fs", reason="needs the package s3fs")
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    for attempt in range(600):
        with suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT"))
            break
        time.sleep(0.1)
    else:
        server.kill()
        pytest.fail("the server did not start")
    yield {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.kill()
    server.wait()


@pytest.fixture(params=["here", "s3"])
def place(request, tmp_path, monkeypatch):
    """Return a folder to write to, of this machine or in an object store."""
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    if request.param == "here":
        return str(tmp_path / "acts")
    for name, value in request.getfixturevalue("s3").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}"


@pytest.fixture
def begin(small_acts):
    """Return begin(out, rank, size): a forked process that writes its part of a set, a pass each 20 ms or more."""
    lm = LM(acts=small_acts(lm_batch=3))
    started = []

    def fork(out, rank=0, size=1):
        pid = os.fork()
        if pid:
            started.append(pid)
            return pid
        try:
            write(
                lm,
                Corpus(lm.options, lm.tokenizer, "train"),
                out,
                rows=6000,
                shard_rows=150,
                part=ProcessPart(rank, size),
                progress=lambda done: time.sleep(0.02),
            )
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    yield fork
    for pid in started:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def ended(pid):
    """Wait for a process to end; return its exit code, negative if a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def the_set(out):
    (name,) = open_store(out).names()
    return stores.join(out, name)


def content(folder):
    store, found = open_store(folder), {}
    for name in store.names():
        with store.reading(name) as file:
            found[name] = file.read_bytes()
    return found


def entries(out):
    """Return how many shards of an unfinished set there are."""
    store = open_store(out)
    return sum(
        sum(
            name[0].isdigit() and name.endswith(".json")
            for name in open_store(f"{out}/{folder}").names()
        )
        for folder in store.names()
    )


def kill(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert [ended(pid) for pid in pids] == [-signal.SIGKILL] * len(pids)


def test_four_processes_killed_and_resumed_write_the_bytes_of_an_undisturbed_one(
    begin, place, tmp_path
):
    assert ended(begin(tmp_path / "whole")) == 0
    whole = content(the_set(tmp_path / "whole"))
    count = len(whole) - 2  # without names and manifest
    assert count > 30
    written = [0]
    for victim in (None, 2, 0):
        pids = [begin(place, rank, 4) for rank in range(4)]
        while entries(place) < min(written[-1] + 4, count):
            time.sleep(0.01)
        if victim is None:
            kill(pids)
        else:  # the others go on with their own parts; process 0 waits
            kill([pids.pop(victim)])
            assert {ended(pid) for pid in pids[victim > 0 :]} == {0}
            kill(pids[: victim > 0])
        written.append(entries(place))
        assert written[-2] <= written[-1] <= count
    assert 0 < written[1] < count, "killed amid the work"
    last = [begin(place, rank, 3) for rank in range(3)]
    assert [ended(pid) for pid in last] == [0, 0, 0]
    assert content(the_set(place)) == whole


def run(arguments, **environment):
    process = subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.returncode == 0, process.stdout
    return next(
        line.split()[1] for line in process.stdout.splitlines() if line.startswith("shards ")
    )


def test_torchrun_writes_the_set_of_one_process(small_recipe, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(ksparse.config.to_toml(small_recipe()))
    words = [
        "-m",
        "ksparse",
        "shard",
        str(file),
        "--tokens",
        "2000",
        "--shard-rows",
        "300",
        "--out",
    ]
    one = run([*words, str(tmp_path / "one")])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    several = run([*launcher, "--master-port", str(free_port()), *words, str(tmp_path / "several")])
    assert content(several) == content(one) and len(content(one)) > 7


def test_an_sae_is_trained_and_judged_from_an_object_store(
    small_recipe, small_acts, tmp_path, monkeypatch, s3
):
    for name, value in {**s3, cache.FOLDER: str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    weights, lm = [], LM(acts=small_acts())
    for out in (f"s3://bucket/{tmp_path.name}", tmp_path / "acts"):
        text = Corpus(lm.options, lm.tokenizer, "train")
        folder = write(lm, text, out, rows=2000, shard_rows=500)
        recipe = small_recipe({"acts.shards": str(folder)})
        trained = ksparse.train(recipe, out=tmp_path / f"run{len(weights)}")
        weights.append(ksparse.load(trained).state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    result = ksparse.evaluate(tmp_path / "run0", names=["stats", "downstream"])
    assert 0 < result["stats"]["nmse"]["value"] < 2


def test_what_an_object_store_refuses_is_said_in_words(s3, monkeypatch, tmp_path):
    monkeypatch.setattr(stores, "PAUSES", ())
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="s3://nowhere/acts.*: there is no such bucket"):
        with open_store("s3://nowhere/acts").writing("a.bin") as file:
            file.write_bytes(b"content")
    with pytest.raises(InputError, match="s3://nowhere/acts.*: there is no such bucket"):
        open_store("s3://nowhere/acts").names()
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(InputError, match="s3://bucket/acts.*: no credentials were found"):
        open_store("s3://bucket/acts").names()
