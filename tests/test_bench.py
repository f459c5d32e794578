"""The benchmark compares like with like, leaves out what cannot run, and says what it measured. No test asserts a time."""

from __future__ import annotations

import json

import pytest
import torch

from ksparse import bench
from ksparse.bench import BUILT_IN, Setting
from ksparse.errors import InputError
from ksparse.kernels import native

TINY = Setting(d=16, n=256, k=4, batch=64, rounds=2, threads=1)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    (folder / "broken.py").write_text("def make(cfg):\n    raise RuntimeError('no such library')\n")
    (folder / "other.py").write_text("def make(cfg):\n    return lambda x: x @ x.T\n")
    return bench.bench(TINY, {"broken": str(folder / "broken.py"), "other": str(folder / "other.py")})


def test_every_contestant_is_timed_and_held_against_the_product(found):
    ours = {"torch", "exact", "screened"} if native.load() else {"torch"}
    assert set(found["contestants"]) == {"product", "selection", "dense", "other", *ours}
    assert found["contestants"]["product"]["ratio"] == 1
    for row in found["contestants"].values():
        assert row["ratio"] > 0 and row["best_seconds"] <= row["seconds"] and row["tokens_per_s"] == pytest.approx(64 / row["seconds"])
    assert (found["exact_ratio"] is None) == (native.load() is None)
    assert found["torch_ratio"] == found["contestants"]["torch"]["ratio"]
    assert found["threads"] == 1 and (found["d"], found["n"], found["k"], found["batch"]) == (16, 256, 4, 64)


def test_a_contestant_that_cannot_run_is_named_with_its_reason(found):
    assert found["left_out"]["broken"] == "RuntimeError: no such library"


def test_the_picture_has_a_bar_for_each(found):
    svg = bench.picture(found)
    assert svg.lstrip().startswith("<?xml") and svg.count("<path") > len(found["contestants"])


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("name", ["torch", "exact", "screened"])
def test_our_contestants_train_the_same_model_as_the_dense_step(name):
    """The benchmark must not time a step that skips work."""
    x = bench.activations(Setting(d=16, n=128, k=4, batch=256))
    cfg = bench._config(Setting(d=16, n=128, k=4, batch=256), x)
    step = BUILT_IN[name](cfg)
    before = (step.recon(x) - x).square().mean()
    cfg.lr = 3e-3
    step = BUILT_IN[name](cfg)
    for _ in range(60):
        step(x)
    assert (step.recon(x) - x).square().mean() < 0.7 * before


@pytest.mark.parametrize("change, message", [({"n": 0}, "n of a benchmark is 0"), ({"k": 999, "n": 8}, "k of a benchmark is 999, more than the 8 latents"),
                                             ({"dead": 1.0}, "dead of a benchmark is 1.0")])
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Setting(**change)


def test_the_command_writes_json_and_picture(capsys, tmp_path):
    from ksparse import cli

    files = tmp_path / "bench.json", tmp_path / "bench.svg"
    cli.main(["bench", "--d", "16", "--n", "256", "--k", "4", "--batch", "64", "--rounds", "1", "--threads", "1", "--json", str(files[0]), "--picture", str(files[1])])
    out = capsys.readouterr().out
    assert "exact" in out and "tokens/s" in out
    assert {"exact_ratio", "screened_ratio"} <= set(json.loads(files[0].read_text())) and files[1].read_text().startswith("<?xml")


def test_a_contestant_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="there is no contestant 'fast'; there are product, selection"):
        bench.bench(TINY, only=("fast",))


def test_a_contestant_without_a_file_is_refused(capsys):
    from ksparse import cli

    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--contestant", "x=nowhere.py"])
    assert end.value.code == 2 and "is not NAME=FILE with a file that is there" in capsys.readouterr().err


def test_synthetic_activations_are_unequal_and_not_of_low_rank():
    x = bench.activations(Setting(d=32, n=64, k=4, batch=512))
    spectrum = torch.linalg.svdvals(x - x.mean(0))
    assert x.shape == (512, 32) and torch.isfinite(x).all() and spectrum[0] > 3 * spectrum[-1] > 0
