"""The site of the documents: its pages, the reference written from the code, and the check of its links."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

import ksparse
from ksparse import cli, config
from ksparse.cli.arguments import flags_of, flags_of_verb, options_of_verb
from ksparse.config import evaluation

ROOT = Path(__file__).resolve().parents[1]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "site" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, reference = load("build"), load("reference")
PAGES = [page for pages in build.NAV.values() for page in pages]


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return reference.pages()


# ---- what the site has


def test_every_page_of_the_documents_is_in_the_navigation_once():
    written = {
        file.relative_to(ROOT).as_posix()
        for file in (*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.ipynb"))
    }
    assert written - set(PAGES) == set()
    assert len(PAGES) == len(set(PAGES))


def test_a_page_that_the_navigation_does_not_name_comes_last_among_the_how_to_pages():
    nav = '["How to"]\npages = ["docs/b.md"]\n[More]\npages = ["docs/c.md"]'
    parts = build.navigation(nav, ["docs/c.md", "docs/a.md"])
    assert parts == {"How to": ["docs/b.md", "docs/a.md"], "More": ["docs/c.md"]}


def test_pages_of_the_navigation_are_there(pages):
    for page in PAGES:
        assert page in pages or (ROOT / page).is_file(), page
    assert set(pages) <= set(PAGES)
    assert len({build.place(page) for page in PAGES}) == len(PAGES)


def test_the_parts_of_the_site_are_those_of_a_manual():
    assert list(build.NAV) == [
        "Start here",
        "Tutorials",
        "How to",
        "Reference",
        "Explanation",
        "Results",
        "And more",
    ]


# ---- the reference


def test_the_reference_has_every_public_name(pages):
    for name in ksparse.__all__:
        assert f"\n### `ksparse.{name}`\n" in pages["reference/api.md"], name


def test_the_reference_has_every_method_of_the_classes_that_users_hold(pages):
    for name in ("SAE.encode", "SAE.lm", "LM.encode", "Code.dense", "TextCode.to_frame"):
        assert f"\n#### `{name}`\n" in pages["reference/api.md"], name


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_reference_has_every_option_of_a_verb(pages, verb):
    section = re.split(r"\n(?=##)", pages["reference/cli.md"])
    section = next(text for text in section if text.startswith(f"### `{verb}`\n"))
    flags = flags_of_verb(verb)
    for each in options_of_verb(verb, reference.OTHER_FORMS.get(verb, ())):
        flags += flags_of(each)
    missing = [
        flag.name
        for flag in flags
        if f"`--{flag.name}`" not in section
        and not (
            f"`--{flag.name.partition('.')[0]}.…`" in section
            and f"| `{flag.name.replace('-', '_')}` |" in pages["reference/recipe.md"]
        )
    ]
    assert missing == []


def test_the_reference_has_every_key_of_a_recipe_with_what_it_is_for(pages):
    keys = {
        *config.flat(config.to_dict(config.Recipe())),
        *(
            f"sae.activation.{name}"
            for kind in config.ACTIVATION_CONFIGS.values()
            for name in config.options.field_types(kind)
            if name != "kind"
        ),
    }
    rows = dict(
        re.findall(r"^\| `([\w.]+)` \| [^|]*\| (.+) \|$", pages["reference/recipe.md"], re.M)
    )
    assert keys - set(rows) == set()
    assert all(re.search(r"[a-z]{3,}", rows[key]) for key in keys)
    kinds = set(re.findall(r'`kind = "(\w+)"`', pages["reference/recipe.md"]))
    assert kinds == set(config.ACTIVATION_CONFIGS)


def test_the_reference_has_every_evaluation_and_its_options(pages):
    text = pages["reference/evaluations.md"]
    formats = (ROOT / "docs" / "formats.md").read_text()
    for name in evaluation.EVALUATIONS:
        assert f"\n## `{name}`\n" in text
        assert f"\n### `{name}.json`\n" in formats
    for name in config.options.field_types(evaluation.EvalConfig):
        assert f"| `{name}` |" in text, name


def test_the_reference_has_every_exit_code(pages):
    codes = set(re.findall(r"(\d+) [a-zA-Z]", cli.EXIT_CODES))
    assert len(codes) > 8
    assert codes <= set(
        re.findall(r"\d+", pages["reference/exit-codes.md"].split("In one line")[0])
    )


def test_a_docstring_becomes_lists_and_code():
    text = reference.docstring(
        "Do it.\n\nMore:\n\n    a b\n\nArgs:\n    x: what\n        it is.\n    y: other.\n\nReturns:\n"
        "    A thing.\n\nExample:\n    >>> 1 + 1\n    2"
    )
    assert text == (
        "Do it.\n\nMore:\n\n```\na b\n```\n\n**Arguments**\n\n* `x`: what it is.\n* `y`: other.\n\n"
        "**Returns** A thing.\n\n```pycon\n>>> 1 + 1\n2\n```"
    )


# ---- links


def test_links_are_rewritten_to_where_pages_are_in_the_site():
    text = "[a](../CONTRIBUTING.md#x) `[b](c.md)` [`e`](../AGENTS.md) `f` ![d](figures/e.svg)\n```\n[f](g.md)\n```\n[h](https://x.y)"
    moved = build.with_links(text, "docs/paper.md", build.place)
    assert moved == text.replace("../CONTRIBUTING", "contributing").replace("../AGENTS", "agents")
    moved = build.with_links(
        "[a](docs/paper.md) [b](docs/results/gemma-3-270m)", "README.md", build.place
    )
    assert moved == "[a](paper.md) [b](results/gemma-3-270m/README.md)"
    moved = build.with_links("[a](../../recipes/llama-16m.toml)", "docs/how-to/gpu.md", build.place)
    assert moved == "[a](../files/recipes/llama-16m.toml)"


def test_a_link_to_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match=r"docs/none\.md: a page links to it, and it is not there"):
        build.bring("docs/none.md", tmp_path)


def test_faults_of_a_built_site_are_found(tmp_path):
    (tmp_path / "b.html").write_text('<h1 id="top">b</h1>')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#top">fine</a><a href="https://x.y">fine</a><a href="b.html#no">x</a>'
        '<a href="c.html">x</a><img src="b.html"><img src="b.html" alt="x/b.svg">'
        '<img src="b.html" alt="b, in words"><script src="https://cdn.x/y.js"></script>'
    )
    assert [fault.partition(": ")[2] for fault in build.faults(tmp_path)] == [
        "<a> leads to b.html#no, which has no such place",
        "<a> leads to c.html, which is not there",
        "<img> b.html has no description",
        "<img> b.html has no description",
        "<script> would load https://cdn.x/y.js",
    ]


def test_a_figure_of_a_notebook_is_described_by_the_text_above_it():
    notebook = {
        "cells": [
            {"cell_type": "markdown", "source": ["# Curve\n", "The `nmse` falls."], "metadata": {}},
            {"cell_type": "code", "source": ["run.figure('nmse')"], "metadata": {}, "outputs": []},
        ]
    }
    cells = json.loads(build.with_descriptions(json.dumps(notebook)))["cells"]
    assert cells[1]["metadata"]["mystnb"]["image"]["alt"] == (
        "Curve The nmse falls. (run.figure('nmse'))"
    )


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path, monkeypatch):
    for package in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(package, reason="the site needs the packages of [docs]")
    monkeypatch.setattr(sys, "argv", ["build.py", "--out", str(tmp_path / "site")])
    monkeypatch.setitem(sys.modules, "reference", reference)
    build.main()
    assert len(list((tmp_path / "site").rglob("*.html"))) > len(PAGES)


# ---- the README


def test_the_readme_is_a_screen_and_a_half_with_pictures_that_are_small():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130 and "exit code" not in text.lower()
    assert len(re.findall(r"^ksparse \w+", text, re.MULTILINE)) <= 7
    python = re.search(r"## In Python\n\n```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in python.splitlines() if line.strip()]) <= 12
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)
    assert len(pictures) >= 2 and all(len(words) > 20 for words, _ in pictures)
    for file in (ROOT / "docs" / "pictures").iterdir():
        assert file.stat().st_size <= 150_000, file
    lines = text.splitlines()
    assert any(line.startswith("![") for line in lines[:15]), "a picture comes first"


# ---- examples of the pages run


FEWER = {"100_000": "1_024, batch=256, mix=1_024", "20_000": "1_024, mix=1_024"}
"""What makes the examples of a page small enough for a test."""
EXAMPLES = [
    file
    for file in ("AGENTS.md", *PAGES)
    if file.endswith(".md")
    and (file == "AGENTS.md" or file.startswith(("docs/how-to/", "docs/tutorials/")))
    and "```python" in (ROOT / file).read_text()
]


@pytest.mark.parametrize("file", dict.fromkeys(EXAMPLES))
def test_the_python_of_a_page_runs_as_it_stands(file, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL))
    for old, new in FEWER.items():
        code = code.replace(old, new)
    code = code.replace("tokens=10_000", "tokens=500").replace("tokens=2_000,", "tokens=500,")
    exec(compile(code, file, "exec"), {})
