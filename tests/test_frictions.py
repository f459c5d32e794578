"""tests/frictions.md names tests that exist; and tests of frictions that have no other place."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import ksparse
from ksparse.config import Recipe
from ksparse.config.evaluation import EvalConfig

from .test_docs import ROOT, TESTS

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (Path(__file__).parent / "frictions.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| |")
]


def test_every_grave_friction_has_a_row():
    numbers = [int(name) for name, *_ in ROWS if name.isdecimal()]
    assert numbers == [*range(1, 10), *range(11, 22), 24, 25]
    assert all(grade in ("S1", "S2") for name, grade, *_ in ROWS if name.isdecimal())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_friction_is_mended_by_a_test_that_exists_or_says_why_not(row):
    name, grade, friction, mended = row
    named = set(re.findall(r"`(test_\w+)`", mended))
    assert friction and named <= TESTS, named - TESTS
    assert named or re.search(r"issue \d+", mended), name


def test_the_first_screen_says_how_to_install_and_activate():
    lines = (ROOT / "README.md").read_text().splitlines()[:40]
    for words in (
        "make demo",
        "source .venv/bin/activate",
        "ksparse view runs/demo",
        "pip install torch --index-url https://download.pytorch.org/whl/cpu",
        "pip install '.[serve]'",
    ):
        assert any(line.startswith(words) for line in lines), words
    sizes = [line for line in lines if re.match(r"# with.* GPU.*, about [\d.]+ GB", line)]
    assert len(sizes) == 2
    assert not re.search(r"[A-Z]+-[A-Z]+-[A-Z]+", "\n".join(lines)), "a placeholder"


def test_the_device_is_chosen_everywhere_unless_it_is_named(monkeypatch):
    for function in (ksparse.load, ksparse.LM):
        assert inspect.signature(function).parameters["device"].default == "auto"
    assert Recipe().run.device == EvalConfig().device == "auto"
    asked = []
    for module in ("ksparse.lm.model", "ksparse.interop"):
        monkeypatch.setattr(f"{module}.resolve_device", lambda name: asked.append(name) or "cpu")
    ksparse.LM("pylm/0.3m", site="resid_post.1")
    with pytest.raises(ksparse.KsparseError):
        ksparse.load("runs/none")
    assert asked == ["auto", "auto"]


@pytest.mark.parametrize(
    "name", ["CITATION.cff", "CONTRIBUTING.md", "SECURITY.md", "LICENSE", "src/ksparse/py.typed"]
)
def test_what_a_project_has_beside_its_code_is_there(name):
    assert (ROOT / name).is_file()
