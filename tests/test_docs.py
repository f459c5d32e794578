"""What the documents say exists, and their examples run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}


def test_everything_that_the_map_of_the_paper_names_exists():
    text = (ROOT / "docs" / "paper.md").read_text()
    names = set(re.findall(r"`(ksparse\.[\w.]+)`", text))
    assert len(names) > 15
    for name in names:
        assert resolve(name) is not None, name
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 20
    assert named <= TESTS, named - TESTS


def resolve(name: str):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            found = getattr(found, part)
        return found
    return None


def test_options_named_in_the_documents_exist():
    from dataclasses import fields

    from ksparse.recipe import ACTIVATIONS, Recipe, flat, to_dict

    keys = set(flat(to_dict(Recipe()))) | {f"sae.activation.{each.name}" for kind in ACTIVATIONS.values() for each in fields(kind)}
    flags = {key for file in ("README.md", "docs/paper.md", "docs/architecture.md")
             for key in re.findall(r"--((?:acts|sae|optim|run|mesh|curve)\.[a-z0-9_.-]*[a-z0-9])", (ROOT / file).read_text())}
    options = set(re.findall(r"`((?:acts|sae|optim|run|mesh|curve)\.[\w.]+)`", (ROOT / "docs" / "paper.md").read_text()))
    assert len(flags | options) > 12
    assert {key.replace("-", "_") for key in flags | options} <= keys


def test_the_readme_example_runs(tmp_path, monkeypatch, small_recipe):
    import ksparse

    run = ksparse.train(small_recipe({"acts.lm": "pylm/0.3m", "acts.site": "resid_post.2", "acts.text": "pylm"}), tmp_path / "runs" / "demo")
    assert run.report_file.parent == tmp_path / "runs" / "demo"
    block = re.search(r"## In Python\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    block = block.replace('"pylm/1.9m", site="resid_post.3"', '"pylm/0.3m", site="resid_post.2"')
    monkeypatch.chdir(tmp_path)
    from ksparse.options import EvalOptions

    whole = ksparse.evaluate
    monkeypatch.setattr(ksparse, "evaluate", lambda sae, lm, names: whole(sae, lm, names, EvalOptions(tokens=300, device="cpu")), raising=False)
    names: dict = {}
    exec(block, names)
    assert names["code"].values.shape == names["code"].indices.shape
    assert names["code"].values.shape[1] == 4
    assert names["results"]["stats"]["nmse"]["value"] > 0


def blocks(file: str) -> str:
    """Return a document's Python, one block after another."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL))


def test_what_the_page_on_metrics_asserts_is_so():
    text = blocks("docs/metrics.md")
    assert text.count("\nassert ") >= 10
    exec(compile(text, "docs/metrics.md", "exec"), {})


def test_the_examples_with_other_libraries_run(tmp_path, monkeypatch, small_recipe):
    import ksparse

    ksparse.train(small_recipe({"acts.lm": "pylm/0.3m", "acts.site": "resid_post.2", "acts.text": "pylm"}), tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(blocks("docs/interop.md").replace('"1.9m"', '"0.3m"').replace("resid_post.3", "resid_post.2"), names)
    clean, spliced, without, steered = (names[key] for key in ("clean", "spliced", "without", "steered"))
    assert clean.shape == spliced.shape and not any((clean == other).all() for other in (spliced, without, steered))
    assert names["copy"].shape.normalize == "layer_norm"


def test_formats_in_the_docs_are_those_there_are():
    from ksparse.interop import FORMATS

    table = (ROOT / "docs" / "interop.md").read_text().split("## Formats")[1].split("Each format's file")[0]
    rows = {row.split("|")[1].strip(" `"): row for row in table.strip().splitlines()[2:]}
    assert list(rows) == list(FORMATS)
    for name, form in FORMATS.items():
        assert all(activation in rows[name] for activation in form.HOLDS), name
        assert all(kind in rows[name] for kinds in form.HOLDS.values() for kind in kinds), name


@pytest.mark.parametrize("file", ["README.md", "docs/architecture.md", "docs/formats.md", "docs/interop.md", "docs/metrics.md", "docs/paper.md"])
def test_links_between_documents_lead_somewhere(file):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / file).read_text()):
        assert ((ROOT / file).parent / target).exists(), target


def test_the_built_in_tasks_are_in_the_docs():
    from ksparse.pylm.labels import TASKS

    table = (ROOT / "docs" / "probes.md").read_text().split("<!-- python -->")[1].split("<!-- end of python -->")[0]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.strip().splitlines()[2:]]
    assert rows == [(task.name, task.family, task.among, task.positive) for task in TASKS]
