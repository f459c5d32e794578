"""Files of earlier versions are read: runs are resumed, shards and results opened, sweeps known as done.

`tests/golden/files` was written before the configuration, the activations and the losses were
rebuilt. What it took then is asserted here, up to the rounding of another processor.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ksparse
from ksparse import cli, report
from ksparse.data.shards import Shards
from ksparse.storage.run_folder import open_run
from ksparse.training.train import train

FILES = Path(__file__).resolve().parent / "golden" / "files"
KINDS = sorted(path.name for path in (FILES / "runs").iterdir())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files to work in; recipes name the text by a relative path."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.parametrize("name", KINDS)
def test_a_run_of_an_earlier_version_goes_on_to_the_same_weights(folder, name):
    run = open_run(folder / "runs" / name)
    train(run.recipe(), run.path)
    path, problems = run.newest_intact()
    assert path.name == "step-00000016" and problems == []
    expected = load_file(folder / "final" / f"{name}.safetensors")
    weights = load_file(path / "sae.safetensors")
    assert weights.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_an_autoencoder_of_an_earlier_version_is_loaded(name):
    sae = ksparse.load(FILES / "runs" / name)
    x = torch.randn(5, sae.shape.d_model, generator=torch.Generator().manual_seed(0))
    code = sae.encode(x)
    assert (code.values > 0).any() and torch.allclose(sae.decode(code), sae(x), atol=1e-5)


def test_shards_of_an_earlier_version_are_read():
    (path,) = (FILES / "shards").iterdir()
    shards = Shards(path)
    assert shards.rows >= 200 and shards.read(np.arange(shards.rows)).isfinite().all()


def test_results_of_an_earlier_version_are_shown(folder):
    run = open_run(folder / "evaluated")
    assert run.eval("stats")["nmse"]["value"] > 0
    page = report.write(run).read_text(encoding="utf-8")
    assert "damaged" not in page and "ablation" in page


def test_a_sweep_of_an_earlier_version_is_finished(folder, capsys):
    before = sorted(path.name for path in (folder / "sweep" / "runs").iterdir())
    cli.main(["sweep", "sweep.toml", "--out", "sweep"])
    assert "2 runs, 2 of them finished" in "".join(capsys.readouterr())
    assert sorted(path.name for path in (folder / "sweep" / "runs").iterdir()) == before
