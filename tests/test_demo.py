"""The demo: what it does first, what it leaves, what it says; and what make would run."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ksparse import config
from ksparse.cli import train
from ksparse.progress import format_elapsed
from ksparse.storage.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def small_demo(monkeypatch):
    """Make the demo tiny, and record its steps."""
    steps = []
    tiny = config.from_dict(
        {
            "acts": {"lm": "pylm/0.3m", "site": "resid_post.2", "mix": 2048, "context": 32},
            "sae": {"n_latents": 64, "k": 4},
            "tokens": 2048,
            "batch": 256,
            "threads": 1,
        }
    )
    few = replace(
        train.DEMO_EVALS, tokens=600, probe_rows=200, latents=4, n2g_examples=2,
        ablation_positions=2, ablation_latents=4, per_document=64, device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(train, "DEMO_RECIPE", tiny)
    monkeypatch.setattr(train, "DEMO_EVALS", few)
    evaluate, write = train.evaluate_saes, train.write_report

    def evaluate_saes(sources, names, options):
        steps.append(tuple(names))
        return evaluate(sources, names, options)

    def write_report(run):
        on_disk = {name for name in train.FIRST_EVALS + train.MORE_EVALS if run.eval(name)}
        steps.append(("report", on_disk))
        write(run)

    monkeypatch.setattr(train, "evaluate_saes", evaluate_saes)
    monkeypatch.setattr(train, "write_report", write_report)
    return steps


def test_the_demo_reports_on_the_first_results_before_the_slower_ones(verb, small_demo, tmp_path):
    code, out, _ = verb("demo", "--out", tmp_path / "demo")
    assert code == 0
    first, more = train.FIRST_EVALS, train.MORE_EVALS
    assert small_demo == [first, ("report", set(first)), more, ("report", {*first, *more})]
    assert RunFolder(tmp_path / "demo").report_file.is_file()
    assert (
        out.index("normalised MSE") < out.index("probe loss") < out.index("look     ksparse view")
    )
    places = [out.index(f"\n{word} ") for word in ("look", "more", "next", "bigger")]
    assert places == sorted(places)
    assert f"ksparse eval {tmp_path / 'demo'} {train.LATER_EVAL}" in out and "about " in out


def test_the_demo_names_the_environment_to_activate_only_off_the_path(tmp_path, monkeypatch):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert train._activate_line().startswith("first    source .venv/bin/activate\n")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/ksparse")
    assert train._activate_line() == ""


def test_measured_times_are_given_to_the_second():
    assert [format_elapsed(seconds) for seconds in (9.6, 59.7, 157, 3725)] == [
        "10 s",
        "1 min 0 s",
        "2 min 37 s",
        "1 h 2 min",
    ]


def planned(target: str, folder: Path) -> str:
    """Return what make would run for a target in an empty environment."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    return subprocess.run(
        ["make", "-n", target, f"VENV={folder / 'env'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.mark.parametrize("target", ["setup", "demo", "check"])
def test_make_sets_up_without_the_packages_of_the_tests(target, tmp_path):
    plan = planned(target, tmp_path)
    assert "'.[serve]'" in plan and ".[test]" not in plan
    assert plan.index("setup 1/3") < plan.index("setup 2/3") < plan.index("setup 3/3")


@pytest.mark.parametrize("target", ["test", "lint"])
def test_make_sets_up_the_packages_of_the_tests_for_what_needs_them(target, tmp_path):
    plan = planned(target, tmp_path)
    assert plan.index(" torch\n") < plan.index("'.[serve]'") < plan.index("'.[test]'")


def test_make_keeps_a_torch_that_is_there(tmp_path):
    line = next(line for line in planned("setup", tmp_path).splitlines() if line.endswith(" torch"))
    assert "-c 'import torch' 2>/dev/null || " in line
