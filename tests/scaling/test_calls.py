"""Sweeps and laws in Python do what the verbs do, and show what they found."""

from __future__ import annotations

import csv
import sys

import pytest

import ksparse
from ksparse.errors import InputError, KsparseError
from ksparse.report import sweep as pages
from ksparse.scaling.laws.survey import fit_sweep
from ksparse.scaling.sweeps import grid as grids
from ksparse.scaling.sweeps.grid import SweepFolder
from ksparse.storage import jsonio


@pytest.fixture
def words(small_recipe):
    recipe = small_recipe()
    sections = {"acts": vars(recipe.acts), "optim": vars(recipe.optim), "run": vars(recipe.run)}
    return sections | {"tokens": 192, "batch": 64, "held_out": 64, "k_aux": 8, "progress": False}


def test_a_grid_of_keywords_trains_every_combination_and_goes_on(words, tmp_path):
    out = tmp_path / "small"
    sweep = ksparse.sweep(grid={"n_latents": [32, 64], "k": [2]}, out=out, **words)
    rows = sweep.points()
    assert {(row["n"], row["k"]) for row in rows} == {(32, 2), (64, 2)}
    with sweep.points_file.open() as file:
        kept = {row["run"]: row["loss"] for row in csv.DictReader(file)}
    assert {row["run"]: row["loss"] for row in rows} == {r: float(x) for r, x in kept.items()}
    assert all(row["tokens_to_convergence"] is None for row in rows)
    steps = {run.path: run.checkpoints() for run in sweep.runs()}
    longer = ksparse.sweep(grid={"n_latents": [32, 64], "k": [2, 4]}, out=out, **words)
    assert len(longer.points()) == 4 and "4 finished runs" in repr(longer)
    assert steps.items() <= {run.path: run.checkpoints() for run in longer.runs()}.items()
    assert ksparse.sweep(out, progress=False).points() == longer.points()


def test_a_grid_measures_a_held_out_loss_unless_told_otherwise(tmp_path, monkeypatch):
    from ksparse.scaling.sweeps import run as sweeping

    monkeypatch.setattr(sweeping, "sweep", lambda *args, **options: {})
    for keywords, held_out in (({}, 8192), ({"held_out": 64}, 64), ({"curve": {}}, 0)):
        folder = ksparse.sweep(grid={"sae.k": [2]}, out=tmp_path, progress=False, **keywords)
        (recipe,) = grids.read(folder.file).recipes.values()
        assert (recipe.curve.held_out, recipe.sae.k) == (held_out, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, r"needs a sweep.toml, its folder, or grid=\{…\}, and one of them alone"),
        ({"source": "a.toml", "grid": {"k": [2]}}, "one of them alone"),
        ({"source": "a.toml", "k": 2}, r"'k' can be given with grid"),
        ({"grid": {"k": 2}}, "it must be a dictionary of lists"),
        ({"grid": {"k": []}}, "it must be a dictionary of lists"),
        ({"grid": {"k": "24"}}, "it must be a dictionary of lists"),
        ({"grid": {"k": [2]}, "k": 2}, "'k' is in the grid and beside it"),
        ({"grid": {"kk": [2]}}, "a recipe has no key 'kk'"),
        ({"grid": {"k": ["a"]}}, "'sae.k'.* is 'a', of type str"),
    ],
)
def test_what_is_no_sweep_gets_one_sentence_and_leaves_nothing(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        ksparse.sweep(**arguments)
    assert not list(tmp_path.iterdir())


def test_runs_that_fail_are_named_when_the_others_have_finished(tmp_path, monkeypatch):
    from ksparse.scaling.sweeps import run as sweeping

    monkeypatch.setattr(sweeping, "sweep", lambda *args, **options: {"abc": "loss is NaN"})
    with pytest.raises(KsparseError, match="1 of 1 runs failed, the first .*abc: loss is NaN"):
        ksparse.sweep(grid={"k": [2]}, out=tmp_path, progress=False)


def test_the_laws_are_those_of_the_verb_and_are_shown_with_their_intervals(make_sweep):
    folder = make_sweep(ks=[16])
    found = ksparse.fit(SweepFolder(folder), draws=0, progress=False)
    assert found.to_dict() == fit_sweep(folder, draws=0).to_dict()
    assert jsonio.read_json(folder / "law.json")["laws"] == found.to_dict()["laws"]
    beta = found["n"].coefficients["beta"]
    assert f"{beta.value:.4g}  " in repr(found["n"])
    assert f"{beta.low:.4g} to {beta.high:.4g}" in found["n"]._repr_html_()
    assert repr(found["n"]) in repr(found) and "<table>" in found._repr_html_()
    with pytest.raises(InputError, match=r"No law L\(N, k\): all runs have one k"):
        found["nk"]
    with pytest.raises(InputError, match="there is no law 'm'"):
        found["m"]


def test_figures_of_a_sweep_are_those_of_its_page(make_sweep):
    sweep = SweepFolder(make_sweep(ks=[16]))
    with pytest.raises(InputError, match="no law.json.* fit its laws first: ksparse.fit"):
        sweep.figure("size")
    ksparse.fit(sweep, draws=0, progress=False)
    names = {picture.name for picture in pages.draw_pictures(pages.Sweep(sweep.path))}
    assert set(sweep.figures()) == names
    assert "<svg" in sweep.figure("size")._repr_svg_()
    with pytest.raises(
        InputError, match="no figure 'sise'.* it has law-compute, .*ksparse report .*made"
    ):
        sweep.figure("sise")


def test_fitting_needs_no_torch(make_sweep):
    import subprocess

    script = (
        "import sys, ksparse; ksparse.fit(sys.argv[1], draws=0, progress=False);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, make_sweep(ks=[16])], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
