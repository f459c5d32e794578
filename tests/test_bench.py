"""The benchmark compares like with like, leaves out what cannot run, and says what it measured. No test asserts a time."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import logging
import re
import runpy
import sys
from pathlib import Path

import numpy as np
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
    return bench.bench(
        TINY, {"broken": str(folder / "broken.py"), "other": str(folder / "other.py")}
    )


def test_every_contestant_is_timed_and_held_against_the_product(found):
    ours = {"torch", "exact", "screened"} if native.load() else {"torch"}
    assert set(found["contestants"]) == {"product", "selection", "dense", "other", *ours}
    assert found["contestants"]["product"]["ratio"] == 1
    for row in found["contestants"].values():
        assert (
            row["ratio"] > 0
            and row["best_seconds"] <= row["seconds"]
            and row["tokens_per_s"] == pytest.approx(64 / row["seconds"])
        )
    assert (found["exact_ratio"] is None) == (native.load() is None)
    assert found["torch_ratio"] == found["contestants"]["torch"]["ratio"]
    assert found["threads"] == 1 and (found["d"], found["n"], found["k"], found["batch"]) == (
        16,
        256,
        4,
        64,
    )


def test_a_contestant_that_cannot_run_is_named_with_its_reason(found):
    assert found["left_out"]["broken"] == "RuntimeError: no such library"


def test_a_contestant_that_is_no_python_file_is_refused_by_name(tmp_path):
    with pytest.raises(
        InputError, match=r"other\.txt is not a Python file; give one that has make"
    ):
        bench.steps._from_file(str(tmp_path / "other.txt"))


def test_the_picture_has_a_bar_for_each(found):
    svg = bench.picture(found)
    assert svg.lstrip().startswith("<?xml") and svg.count("<path") > len(found["contestants"])


@pytest.mark.skipif(native.load() is None, reason="no C++ compiler here")
@pytest.mark.parametrize("name", ["torch", "exact", "screened"])
def test_our_contestants_train_the_same_model_as_the_dense_step(name):
    """The benchmark must not time a step that skips work."""
    x = bench.activations(Setting(d=16, n=128, k=4, batch=256))
    cfg = bench.steps._config(Setting(d=16, n=128, k=4, batch=256), x)
    step = BUILT_IN[name](cfg)
    before = (step.recon(x) - x).square().mean()
    cfg.lr = 3e-3
    step = BUILT_IN[name](cfg)
    for _ in range(60):
        step(x)
    assert (step.recon(x) - x).square().mean() < 0.7 * before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n": 0}, "n of a benchmark is 0"),
        ({"k": 999, "n": 8}, "k of a benchmark is 999, more than the 8 latents"),
        ({"dead": 1.0}, "dead of a benchmark is 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Setting(**change)


def test_the_command_writes_json_and_picture(capsys, tmp_path):
    from ksparse import cli

    files = tmp_path / "bench.json", tmp_path / "bench.svg"
    cli.main(
        [
            "bench",
            "--d",
            "16",
            "--n",
            "256",
            "--k",
            "4",
            "--batch",
            "64",
            "--rounds",
            "1",
            "--threads",
            "1",
            "--json",
            str(files[0]),
            "--picture",
            str(files[1]),
        ]
    )
    out = capsys.readouterr().out
    assert "exact" in out and "tokens/s" in out
    assert {"exact_ratio", "screened_ratio"} <= set(json.loads(files[0].read_text())) and files[
        1
    ].read_text().startswith("<?xml")


def test_a_contestant_that_does_not_exist_is_refused():
    with pytest.raises(
        InputError, match="there is no contestant 'fast'; there are product, selection"
    ):
        bench.bench(TINY, only=("fast",))


def test_a_contestant_without_a_file_is_refused(capsys):
    from ksparse import cli

    with pytest.raises(SystemExit) as end:
        cli.main(["bench", "--contestant", "x=nowhere.py"])
    assert (
        end.value.code == 2
        and "is not NAME=FILE with a file that is there" in capsys.readouterr().err
    )


def test_synthetic_activations_are_unequal_and_not_of_low_rank():
    x = bench.activations(Setting(d=32, n=64, k=4, batch=512))
    spectrum = torch.linalg.svdvals(x - x.mean(0))
    assert x.shape == (512, 32) and torch.isfinite(x).all() and spectrum[0] > 3 * spectrum[-1] > 0


# ---- the scripts that the documents name

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "bench").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])


def named(file: Path) -> str:
    return str(file.relative_to(ROOT))


def names_of_ours(tree: ast.AST) -> dict[str, object]:
    """Return what a script's imports from ksparse are, by the names that it has for them; an AttributeError or ImportError where one is not there."""
    found: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "ksparse":
                    module = importlib.import_module(alias.name)
                    found[alias.asname or "ksparse"] = (
                        module if alias.asname else importlib.import_module("ksparse")
                    )
        elif (
            isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "ksparse"
        ):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found[alias.asname or alias.name] = (
                    getattr(module, alias.name)
                    if hasattr(module, alias.name)
                    else importlib.import_module(f"{node.module}.{alias.name}")
                )
    return found


def called(node: ast.expr, ours: dict[str, object]) -> object | None:
    """Return the object of ours that an expression such as `feed.open_stream` names."""
    if isinstance(node, ast.Name):
        return ours.get(node.id)
    base = called(node.value, ours) if isinstance(node, ast.Attribute) else None
    return (
        getattr(base, node.attr)
        if inspect.ismodule(base) or inspect.isclass(base) and hasattr(base, node.attr)
        else None
    )


def misused(source: str) -> list[str]:
    """Return the calls of ours that their signatures refuse, and functions put in the place of ours that take other arguments."""
    tree = ast.parse(source)
    ours, wrong = names_of_ours(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and callable(function := called(node.func, ours)):
            plain = not any(isinstance(arg, ast.Starred) for arg in node.args) and all(
                word.arg for word in node.keywords
            )
            try:
                signature = inspect.signature(function)
                (signature.bind if plain else signature.bind_partial)(
                    *[None for arg in node.args if not isinstance(arg, ast.Starred)],
                    **{word.arg: None for word in node.keywords if word.arg},
                )
            except TypeError as error:
                wrong.append(f"{ast.unparse(node)}: {error}")
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Lambda)
            and inspect.isfunction(function := called(node.targets[0], ours))
        ):
            theirs = inspect.signature(function).parameters
            if not node.value.args.vararg and len(node.value.args.args) != len(theirs):
                wrong.append(f"{ast.unparse(node)}: in the place of {list(theirs)}")
    return wrong


@pytest.mark.parametrize(
    "source",
    [
        "from ksparse.training import source\nsource.open_stream = lambda recipe, device: 0",
        "import ksparse\nksparse.load()",
        "from ksparse.lm.model import LM\nLM(names='x')",
        "from ksparse.lm.model import resolve\nresolve(1)",
    ],
)
def test_the_check_sees_a_call_that_cannot_be(source):
    assert len(misused(source)) == 1


@pytest.mark.parametrize("file", SCRIPTS, ids=named)
def test_what_a_script_takes_of_ours_is_there_and_called_as_it_is(file):
    assert misused(file.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "file",
    [
        file
        for file in SCRIPTS
        if file.parent.name in ("bench", "scripts") and "argparse" in file.read_text()
    ],
    ids=named,
)
def test_every_script_has_help(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    monkeypatch.syspath_prepend(str(file.parent))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(file), run_name="__main__")
    assert not end.value.code and "usage" in capsys.readouterr().out


def test_scripts_that_the_documents_name_are_there():
    text = "".join(
        file.read_text()
        for file in (*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "Makefile")
    )
    names = set(re.findall(r"\b((?:bench|scripts)/[\w/]+\.(?:py|sh))", text))
    assert len(names) > 12
    assert [name for name in names if not (ROOT / name).is_file()] == []


@pytest.fixture
def run_script(monkeypatch):
    """Return run("bench/peers/ours.py", "--n", 8): runs it in this process, with what it replaces put back."""
    from ksparse.training import source

    def run(name: str, *arguments: object) -> None:
        monkeypatch.setattr(source, "open_stream", source.open_stream)
        monkeypatch.setattr(logging, "disable", lambda level: None)
        monkeypatch.delitem(sys.modules, "common", raising=False)
        monkeypatch.syspath_prepend(str((ROOT / name).parent))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / name), run_name="__main__")
        sys.modules.pop("common", None)

    return run


def test_our_side_of_the_comparison_with_other_libraries_runs(run_script, tmp_path):
    generator = np.random.default_rng(0)
    for name, rows in (("train", 512), ("held_out", 100)):
        np.save(tmp_path / f"{name}.npy", generator.standard_normal((rows, 8), np.float32))
    run_script(
        "bench/peers/ours.py",
        "--data",
        tmp_path,
        "--out",
        tmp_path / "out",
        "--n",
        32,
        "--k",
        4,
        "--tokens",
        512,
        "--batch",
        64,
        "--seed",
        0,
        "--threads",
        1,
    )
    held_out = np.load(tmp_path / "out" / "held_out.npz")
    assert (
        held_out["recon"].shape == (100, 8)
        and held_out["active"].max() <= 4
        and held_out["raw_recon"].shape == (100, 8)
    )
    assert (
        json.loads((tmp_path / "out" / "facts.json").read_text())["defaults"]["sae"]["n_latents"]
        == 32
    )


def test_our_side_of_the_comparison_of_whole_pipelines_runs(
    run_script, small_acts, tmp_path, capsys
):
    text = tmp_path / "text.jsonl"
    text.write_text(
        "".join(
            json.dumps({"text": line * 20}) + "\n"
            for line in Path(small_acts().text).read_text().splitlines()
        )
    )
    run_script(
        "bench/pipelines/ours.py",
        "--lm",
        small_acts().lm,
        "--text",
        text,
        "--out",
        tmp_path,
        "--d",
        16,
        "--layer",
        1,
        "--context",
        16,
        "--lm-batch",
        4,
        "--mix",
        256,
        "--n",
        32,
        "--k",
        4,
        "--batch",
        64,
        "--tokens",
        128,
        "--seed",
        0,
        "--threads",
        1,
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 128
