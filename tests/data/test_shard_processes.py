"""Real processes write one set of shards, are killed, and the set is that of an undisturbed one."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest
import torch

import ksparse
from ksparse.errors import InputError
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
def arguments(small_recipe, tmp_path):
    file = tmp_path / "recipe.toml"
    file.write_text(ksparse.config.to_toml(small_recipe({"acts.lm_batch": 1})))
    return ["shard", str(file), "--tokens", "30000", "--dtype", "float32", "--shard-rows", "500"]


def start(arguments, out, rank=0, size=1):
    """Start one of several processes, as a launcher does."""
    return subprocess.Popen(
        [sys.executable, "-m", "ksparse", *arguments, "--out", str(out)],
        env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(size)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_torchrun(arguments, out, size):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--master-port", str(free_port()), "-m", "ksparse", *arguments, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return next(line.split()[1] for line in output.splitlines() if line.startswith("shards "))


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


def kill(processes):
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def test_four_processes_killed_and_resumed_write_the_bytes_of_an_undisturbed_one(
    arguments, place, tmp_path
):
    whole = content(finish(start(arguments, tmp_path / "whole")))
    assert len(whole) > 30
    written = [0]
    for victim in (None, 2, 0):
        processes = [start(arguments, place, rank, 4) for rank in range(4)]
        while entries(place) < written[-1] + 3:
            assert processes[0].poll() is None, processes[0].stdout.read()
            time.sleep(0.01)
        if victim is None:
            kill(processes)
        else:  # the others go on with their own parts; process 0 waits
            kill([processes.pop(victim)])
            for process in processes[victim > 0 :]:
                assert process.wait(timeout=600) == 0
            kill(processes)
        written.append(entries(place))
        assert written[-2] < written[-1] < len(whole) - 2
    folder = finish(start_torchrun(arguments, place, 3))
    assert content(folder) == whole


def test_an_sae_is_trained_and_judged_from_an_object_store(
    small_recipe, arguments, tmp_path, monkeypatch, s3
):
    for name, value in {**s3, cache.FOLDER: str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    weights = []
    for out in (f"s3://bucket/{tmp_path.name}", tmp_path / "acts"):
        folder = finish(start(arguments, out))
        run = ksparse.train(
            small_recipe({"acts.lm_batch": 1, "acts.shards": folder}),
            out=tmp_path / f"run{len(weights)}",
        )
        weights.append(ksparse.load(run).state_dict())
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
