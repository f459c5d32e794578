"""`ksparse.train(data=…)`: arrays, iterators and folders are trained on, and what is none is refused."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import ksparse
from ksparse.data.tensors import Tensors
from ksparse.errors import InputError, NonFiniteError

OPTIONS = {"n_latents": 16, "k": 2, "tokens": 512, "batch": 128}


def rows(count=3000, seed=0, width=8):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def folder_of(x, tmp_path):
    (tmp_path / "theirs").mkdir()
    np.save(tmp_path / "theirs" / "a.npy", x.numpy())
    return tmp_path / "theirs"


KINDS = {
    "numpy": lambda x, tmp_path: x.numpy(),
    "big-endian": lambda x, tmp_path: x.numpy().astype(">f4"),
    "tensor": lambda x, tmp_path: x,
    "bfloat16": lambda x, tmp_path: x.bfloat16(),
    "generator": lambda x, tmp_path: (part for part in x.split(700)),
    "folder": folder_of,
    "file": lambda x, tmp_path: str(folder_of(x, tmp_path) / "a.npy"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_is_trained_on_each_kind_of_data(kind, tmp_path):
    x = rows()
    run = ksparse.train(data=KINDS[kind](x, tmp_path), out=tmp_path / "run", **OPTIONS)
    table = Tensors(run.path / "acts")
    tolerance = 1e-2 if kind == "bfloat16" else 0
    expected = x[torch.from_numpy(table.chosen)]
    assert torch.allclose(table.read(np.arange(table.rows)), expected, rtol=tolerance)
    assert ksparse.load(run).shape.d_model == 8
    assert not (tmp_path / "theirs" / "manifest.json").exists()


def test_the_same_call_goes_on_and_other_activations_are_refused(tmp_path):
    def train(seed, **more):
        parts = rows(seed=seed).split(1000)
        return ksparse.train(data=iter(parts), out=tmp_path / "run", **OPTIONS, **more)

    def stop(row):
        os.kill(os.getpid(), 2)

    with pytest.raises(ksparse.KsparseError, match="everything is saved"):
        train(0, observe=stop, log_every=1)
    with pytest.raises(InputError, match="begun on other activations"):
        train(1)
    resumed = ksparse.load(train(0))
    whole = ksparse.load(ksparse.train(data=rows(), out=tmp_path / "whole", **OPTIONS))
    assert torch.equal(resumed.W_dec, whole.W_dec)


def test_a_run_is_named_by_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, again, other = (
        ksparse.train(data=rows(seed=seed), **OPTIONS).path for seed in (0, 0, 1)
    )
    assert first == again != other and first.parent == Path("runs")


def test_what_is_indexed_already_is_read_where_it_is(tmp_path):
    from ksparse.data.tensors import write_index

    folder = folder_of(rows(), tmp_path)
    write_index(folder)
    run = ksparse.train(data=folder, out=tmp_path / "run", **OPTIONS)
    assert run.recipe().acts.shards == str(folder) and not (run.path / "acts").exists()


def test_a_folder_may_be_given_as_a_file_url(tmp_path):
    url = f"file://{folder_of(rows(), tmp_path)}"
    run = ksparse.train(data=url, out=tmp_path / "run", **OPTIONS)
    assert run.recipe().acts.shards == str(run.path / "acts")


def bad(row, value):
    x = rows(10)
    x[row, 3] = value
    return x


@pytest.mark.parametrize(
    "data, kind, message",
    [
        (5, InputError, "data is of type int"),
        ([], InputError, "data is empty"),
        (["x"], InputError, "item 0 is of type str"),
        (rows()[0], InputError, r"data is torch.float32 of shape \[8\]"),
        (np.zeros((4, 4), int), InputError, "data is int64 of shape"),
        ([rows(5), rows(5, width=9)], InputError, "item 1 has the width 9, those before it 8"),
        ([rows(5), bad(7, torch.inf)], NonFiniteError, "item 1, row 7"),
        (bad(3, torch.nan), NonFiniteError, "data, row 3"),
        ("nowhere", InputError, "nowhere does not exist"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused_and_leaves_nothing(
    data, kind, message, tmp_path
):
    with pytest.raises(kind, match=message):
        ksparse.train(data=data, out=tmp_path / "run", **OPTIONS)
    assert not list(tmp_path.glob("run/*"))


def test_data_beside_shards_an_iterator_without_a_folder_and_several_processes_are_refused(
    tmp_path, monkeypatch
):
    with pytest.raises(InputError, match="both say where activations come from"):
        ksparse.train(data=rows(), shards="x", out=tmp_path / "run")
    with pytest.raises(InputError, match="give out"):
        ksparse.train(data=iter([rows()]))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="data is for one process"):
        ksparse.train(data=rows(), out=tmp_path / "run")
