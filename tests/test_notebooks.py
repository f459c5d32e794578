"""The notebooks of examples/ are well formed, use what the documents say, and run."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import ksparse
from ksparse import cli

from .test_bench import misused

ROOT = Path(__file__).resolve().parents[1]
nbformat = pytest.importorskip("nbformat", reason="the notebooks need the packages of [test]")
pytest.importorskip("nbclient", reason="the notebooks need the packages of [test]")
_spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts/run_notebooks.py")
run_notebooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_notebooks)

FILES = run_notebooks.NOTEBOOKS
DOCUMENTS = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = {"pylm": {"folder"}, "steering": {"attribute_choice", "compare"}}
"""What notebooks use beside the names of ksparse itself: the documents have them."""
every_notebook = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def read(file: Path):
    return nbformat.read(file, as_version=4)


def code(file: Path) -> str:
    return "\n".join(cell.source for cell in read(file).cells if cell.cell_type == "code")


def prose(file: Path) -> str:
    return "\n".join(cell.source for cell in read(file).cells if cell.cell_type == "markdown")


def test_there_are_five_small_notebooks_and_the_readme_names_each():
    assert [file.name[:2] for file in FILES] == ["01", "02", "03", "04", "05"]
    assert sum(file.stat().st_size for file in FILES) < 1_500_000
    assert all(f"(examples/{file.name})" in (ROOT / "README.md").read_text() for file in FILES)


@every_notebook
def test_a_notebook_is_well_formed_and_its_outputs_are_of_one_whole_run(file):
    notebook = read(file)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs and not any(output.output_type == "error" for output in outputs)
    assert notebook == run_notebooks.cleaned(read(file))
    assert any(
        "image/svg+xml" in o.get("data", {}) or "hsl(" in str(o.get("data")) for o in outputs
    )


@every_notebook
def test_a_notebook_names_no_place_on_a_machine(file):
    assert run_notebooks.places(read(file)) == []


def test_a_place_on_a_machine_is_seen():
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [nbformat.v4.new_output("stream", text="in /home/me/lib/site-packages")]
    assert len(run_notebooks.places(nbformat.v4.new_notebook(cells=[cell]))) == 2
    fine = nbformat.v4.new_markdown_cell("runs/first at https://example.org/usr/x")
    assert run_notebooks.places(nbformat.v4.new_notebook(cells=[fine])) == []


@every_notebook
def test_a_notebook_uses_public_names_and_calls_them_as_they_are(file):
    tree = ast.parse(code(file))
    used, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "ksparse":
                used.add(node.attr)
            elif node.value.id in MODULES:
                assert node.attr in MODULES[node.value.id]
        elif isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ksparse":
            assert node.module == "ksparse"
            imported |= {alias.name for alias in node.names}
    assert used and used <= set(ksparse.__all__) and imported <= set(MODULES)
    assert misused(code(file)) == []
    assert not re.search(r"\._[a-zA-Z]", code(file))


def test_what_notebooks_use_of_modules_is_in_the_documents():
    text = "\n".join(file.read_text() for file in DOCUMENTS)
    for module, names in MODULES.items():
        for name in names:
            assert f"{module}.{name}(" in text, f"{module}.{name}"


@every_notebook
def test_commands_and_links_of_a_notebook_lead_somewhere(file):
    for verb in re.findall(r"`ksparse ([a-z]+)", prose(file)):
        assert verb in cli.VERBS
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose(file))
    assert all((file.parent / link).exists() for link in links)
    for recipe in re.findall(r"recipes/[\w/.-]+\.toml", prose(file)):
        assert (ROOT / recipe).exists()


@pytest.mark.slow
@pytest.mark.timeout(1_800)
@every_notebook
def test_a_notebook_runs_and_shows_what_it_showed(file):
    """Kinds of outputs, not numbers: those depend on the processor."""
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    ran = run_notebooks.execute(file)
    assert run_notebooks.places(ran) == []
    assert [kinds(cell) for cell in ran.cells] == [kinds(cell) for cell in read(file).cells]


def kinds(cell) -> list[list[str]]:
    """Return the kinds of what a cell shows; warnings may come and go with the numbers."""
    return [
        sorted(output.get("data", ["text"]))
        for output in cell.get("outputs", ())
        if output.get("name") != "stderr"
    ]
