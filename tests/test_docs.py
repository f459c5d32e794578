"""What the documents say exists, and their examples run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    name
    for file in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"def (test_\w+)", file.read_text())
}


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

    from ksparse.config import ACTIVATION_CONFIGS, Recipe, flat, to_dict

    keys = set(flat(to_dict(Recipe()))) | {
        f"sae.activation.{each.name}"
        for kind in ACTIVATION_CONFIGS.values()
        for each in fields(kind)
    }
    flags = {
        key
        for file in ("README.md", "docs/commands.md", "docs/paper.md", "docs/architecture.md")
        for key in re.findall(
            r"--((?:acts|sae|optim|run|mesh|curve)\.[a-z0-9_.-]*[a-z0-9])",
            (ROOT / file).read_text(),
        )
    }
    options = set(
        re.findall(
            r"`((?:acts|sae|optim|run|mesh|curve)\.[\w.]+)`",
            (ROOT / "docs" / "paper.md").read_text(),
        )
    )
    assert len(flags | options) > 12
    assert {key.replace("-", "_") for key in flags | options} <= keys


def test_the_readme_example_runs(tmp_path, monkeypatch):
    block = re.search(
        r"## In Python\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )[1]
    for whole, small in {
        "tokens=200_000": "tokens=2_048, batch=512, mix=1_024, progress=False",
        "n_latents=1024": "n_latents=256",
        "tokens=20_000": "tokens=300, progress=False",
    }.items():
        assert whole in block
        block = block.replace(whole, small)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(block, names)
    assert names["results"]["stats"]["nmse"]["value"] > 0
    assert (tmp_path / "runs" / "first" / "evals" / "downstream.json").is_file()
    assert names["ids"].shape[1] > names["lm"].tokenize("def area(").shape[1]


def blocks(file: str) -> str:
    """Return a document's Python, one block after another."""
    return "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), re.DOTALL))


def test_what_the_page_on_metrics_asserts_is_so():
    text = blocks("docs/metrics.md")
    assert text.count("\nassert ") >= 10
    exec(compile(text, "docs/metrics.md", "exec"), {})


def test_the_examples_with_other_libraries_run(tmp_path, monkeypatch, small_recipe):
    import ksparse

    ksparse.train(
        small_recipe({"acts.lm": "pylm/0.3m", "acts.site": "resid_post.2", "acts.text": "pylm"}),
        tmp_path / "runs" / "demo",
    )
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(
        blocks("docs/interop.md")
        .replace('"1.9m"', '"0.3m"')
        .replace("resid_post.3", "resid_post.2"),
        names,
    )
    clean, spliced, without, steered = (
        names[key] for key in ("clean", "spliced", "without", "steered")
    )
    assert clean.shape == spliced.shape and not any(
        (clean == other).all() for other in (spliced, without, steered)
    )
    assert names["copy"].shape.normalize == "layer_norm"


def test_the_example_with_activations_from_anywhere_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("docs/own-activations.md"), "docs/own-activations.md", "exec"), {})
    assert (tmp_path / "runs" / "mine" / "acts" / "00000.safetensors").is_file()


def test_the_example_with_planted_features_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks("docs/kinds.md"), "docs/kinds.md", "exec"), {})


def test_the_example_with_a_conversation_runs():
    text = blocks("docs/chat.md")
    assert "\nassert kept ==" in text
    exec(compile(text, "docs/chat.md", "exec"), {})


DOCUMENTS = [ROOT / "README.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"(?:^|`|-m )ksparse ([a-z]+)((?: [^`\n]*)?)", re.MULTILINE)


def joined_lines(file: Path) -> str:
    """Return a document with the lines of each command joined that end in a backslash."""
    return re.sub(r"\\\n\s*", "", file.read_text())


def commands() -> dict[str, set[str]]:
    """Return the flags that the documents give to each verb."""
    found: dict[str, set[str]] = {}
    for file in DOCUMENTS:
        for verb, rest in COMMAND.findall(joined_lines(file)):
            found.setdefault(verb, set()).update(
                re.findall(r"--([a-zA-Z][\w.-]*\w)", rest.partition(" #")[0])
            )
    return found


@pytest.mark.parametrize("verb, flags", sorted(commands().items()))
def test_commands_in_the_documents_have_verbs_and_flags_that_there_are(verb, flags, capsys):
    from dataclasses import fields

    from ksparse import cli
    from ksparse.config import ACTIVATION_CONFIGS

    assert verb in cli.VERBS
    other = {"bench": ["--lm", "pylm"], "shard": ["--from", "features"]}
    for more in [[], other[verb]] if verb in other else [[]]:
        with pytest.raises(SystemExit):
            cli.main([verb, *more, "--help"])
    known = set(re.findall(r"--([a-zA-Z][\w.-]*\w)", capsys.readouterr().out)) | {
        f"sae.activation.{each.name}"
        for kind in ACTIVATION_CONFIGS.values()
        for each in fields(kind)
    }
    assert flags <= {flag.replace("_", "-") for flag in known} | known


WITH_COMMANDS = [
    file.relative_to(ROOT).as_posix()
    for folder in ("how-to", "tutorials")
    for file in sorted((ROOT / "docs" / folder).glob("*.md"))
    if re.search(r"^ksparse (?!doctor)", file.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize(
    "file, least",
    [("README.md", 5), ("docs/commands.md", 18), *((file, 1) for file in WITH_COMMANDS)],
)
def test_commands_of_a_page_are_read_as_they_stand(file, least, monkeypatch):
    """Values too: each is parsed, and nothing is run."""
    import shlex

    from ksparse import cli
    from ksparse.cli import arguments

    class Parsed(Exception):
        pass

    parse = arguments.parse

    def stop(*args, **options):
        parse(*args, **options)
        raise Parsed

    for module in (arguments, *cli.COMMAND_MODULES):
        if hasattr(module, "parse"):
            monkeypatch.setattr(module, "parse", stop)
    monkeypatch.chdir(ROOT)
    lines = [
        line.partition("#")[0].replace("torchrun", "\ntorchrun")
        for line in re.findall(
            r"^(?:ksparse|torchrun) .*$", joined_lines(ROOT / file), re.MULTILINE
        )
    ]
    seen = 0
    for line in lines:
        verb, *words = shlex.split(
            line.partition("ksparse ")[2]
            if "torchrun" not in line
            else line.partition("-m ksparse ")[2]
        )
        if verb in ("report", "doctor", "resume") or verb == "probes":
            continue  # without options, or of a run that is there
        with pytest.raises(Parsed):
            cli.VERBS[verb](words)
        seen += 1
    assert seen >= least


def python_blocks():
    return [
        (file.relative_to(ROOT).as_posix(), block)
        for file in DOCUMENTS
        for block in re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)
    ]


@pytest.mark.parametrize(
    "file, block", python_blocks(), ids=lambda value: value if value.endswith(".md") else ""
)
def test_python_in_the_documents_calls_what_there_is(file, block):
    from .test_bench import misused

    assert misused(block) == []


def test_formats_in_the_docs_are_those_there_are():
    from ksparse.interop import FORMATS

    table = (
        (ROOT / "docs" / "interop.md")
        .read_text()
        .split("## Formats")[1]
        .split("Each format's file")[0]
    )
    rows = {row.split("|")[1].strip(" `"): row for row in table.strip().splitlines()[2:]}
    assert list(rows) == list(FORMATS)
    for name, form in FORMATS.items():
        assert all(activation in rows[name] for activation in form.SUPPORTED), name
        assert all(kind in rows[name] for kinds in form.SUPPORTED.values() for kind in kinds), name


def test_formats_that_are_only_read_are_in_the_docs():
    from ksparse.interop import FORMATS, READERS

    section = (ROOT / "docs" / "interop.md").read_text().split("### Formats that are only read")[1]
    rows = [row.split("|")[1] for row in section.split("None of their")[0].splitlines()[4:] if row]
    names = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert names - {"gemma_scope"} == set(READERS) - set(FORMATS)


@pytest.mark.parametrize(
    "file",
    [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"],
    ids=lambda file: file.relative_to(ROOT).as_posix(),
)
def test_links_between_documents_lead_somewhere(file):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", file.read_text()):
        assert (file.parent / target).exists(), target


def test_the_tests_that_the_guide_to_extending_names_exist():
    text = (ROOT / "docs" / "extending.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 4 and named <= TESTS, named - TESTS
    files = set(re.findall(r"tests/[\w/]+\.py", text)) - {"tests/evals/test_NAME.py"}
    assert len(files) > 6
    for file in files:
        assert (ROOT / file).exists(), file


def test_every_entry_of_the_glossary_has_a_meaning():
    rows = [
        line.strip("|").split("|")
        for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| our word")
    ]
    assert len(rows) > 60
    assert all(len(row) == 4 and row[0].strip() and row[1].strip() for row in rows)


def test_the_built_in_tasks_are_in_the_docs():
    from ksparse.evals.probing.python_labels import TASKS

    table = (
        (ROOT / "docs" / "probes.md")
        .read_text()
        .split("<!-- python -->")[1]
        .split("<!-- end of python -->")[0]
    )
    rows = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in table.strip().splitlines()[2:]
    ]
    assert rows == [(task.name, task.family, task.among, task.positive) for task in TASKS]


def test_the_plans_for_16_million_latents_in_the_docs_are_what_plan_says():
    text = (ROOT / "docs" / "scaling-out.md").read_text()
    shown = re.search(r"<!-- tables -->\n```\n(.*?)```", text, re.DOTALL)[1]
    assert shown.splitlines() == plan_lines(2**24)
    table = text.split("<!-- sizes -->\n")[1].split("<!-- end of sizes -->")[0]
    assert table.splitlines() == sizes_table()


def planned(n_latents: int):
    """Return the plan of recipes/llama-16m.toml with so many latents on H100s."""
    from dataclasses import replace

    from ksparse import config
    from ksparse.planning import plan
    from ksparse.planning.costs import UnseenLM

    given = config.load_recipe(ROOT / "recipes" / "llama-16m.toml")
    return plan.plan(
        replace(given, sae=replace(given.sae, n_latents=n_latents)),
        devices=[1, 8, 64, 128, 512],
        card="h100",
        unseen=UnseenLM(d_model=4096, parameters=8_030_261_248, before_site=5_888_802_816),
    )


def plan_lines(n_latents: int) -> list[str]:
    from ksparse.planning import meshes

    return meshes.tables(planned(n_latents))


def sizes_table() -> list[str]:
    """Return the lines of the table of sizes; to write it anew, print them."""
    lines = ["| latents | 1 | 8 | 64 | 128 | 512 |", "|---|---|---|---|---|---|"]
    for n in (2**17, 2**20, 2**22, 2**24):
        cells = [
            f"{each.data} x {each.latent}, {each.bytes / 1e9:,.0f} GB, {each.tokens_per_s:,.0f}"
            for each in planned(n).meshes
        ]
        lines.append(
            f"| {n:,} | "
            + " | ".join(
                cell if each.fits else f"({cell})" for cell, each in zip(cells, planned(n).meshes)
            )
            + " |"
        )
    return lines
