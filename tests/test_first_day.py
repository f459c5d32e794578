"""The scripts of docs/first-day.md run as they stand there, on fewer tokens, and are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import ksparse

PAGE = Path(__file__).resolve().parents[1] / "docs" / "first-day.md"
SCRIPTS = dict(re.findall(r"^## (.+?)\n+```python\n(.*?)```", PAGE.read_text(), re.M | re.S))
TRAIN, READ, COMPARE, STEER, FRAME = SCRIPTS
FEWER = {
    "tokens=200_000": "tokens=2_048, batch=512, mix=1_024, progress=False",
    "tokens=20_000": "tokens=500, per_document=64, progress=False",
    "n_latents=1024": "n_latents=256",
}
MOST = 8
"""Lines of a script, without empty ones."""


def run(title: str, **changes: str) -> dict:
    """Run a script of the page on fewer tokens; return its names."""
    script = SCRIPTS[title]
    for old, new in (FEWER | changes).items():
        script = script.replace(old, new)
    names: dict = {}
    exec(compile(script, f"{PAGE.name}: {title}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the first script has run, with texts of one's own."""
    folder = tmp_path_factory.mktemp("first-day")
    (folder / "my-texts").mkdir()
    for name, text in {
        "a": "import os\nimport sys\n",
        "b": "def area(w, h):\n    return w\n",
    }.items():
        (folder / "my-texts" / f"{name}.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(TRAIN)
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


@pytest.mark.parametrize("title", SCRIPTS)
def test_each_script_has_at_most_eight_lines_of_at_most_a_hundred_characters(title):
    lines = [line for line in SCRIPTS[title].splitlines() if line.strip()]
    assert 0 < len(lines) <= MOST and max(map(len, lines)) <= 100


def test_there_are_five_scripts_and_what_the_test_makes_smaller_is_in_them():
    assert len(SCRIPTS) == PAGE.read_text().count("```python\n") == 5
    assert all(sum(old in script for script in SCRIPTS.values()) == 2 for old in FEWER)


def test_training_leaves_a_run_with_its_results(capsys):
    names = run(TRAIN)  # the second time: the run is finished and returned
    results, trained = names["results"], ksparse.open_run("runs/k16")
    assert trained.recipe().sae.k == 16 and trained.metrics()[-1]["tokens"] == 2048
    assert trained.eval("downstream")["ce_delta"] == results["downstream"]["ce_delta"]
    assert f"'value': {results['downstream']['ce_delta']['value']}" in capsys.readouterr().out


def test_each_token_has_its_latents_and_the_last_ones_examples_are_shown(capsys):
    names = run(READ)
    sae, code = names["sae"], names["code"]
    assert "".join(code.tokens) == "def area(width, height):"
    printed = capsys.readouterr().out.splitlines()
    for line, token, row in zip(printed, code.tokens, code.dense()):
        best = row.topk(3)
        found = [(int(i), round(float(v), 2)) for v, i in zip(*best)]
        assert line == f"{token!r} {found}"
    examples = sae.latent(names["peaks"][0].latent).examples(5)
    assert printed[len(code.tokens) :] == [str(example) for example in examples]
    assert examples and examples[0].value == max(example.value for example in examples)


def test_the_difference_of_two_saes_is_paired(capsys):
    found = run(COMPARE)["found"]
    values = {row.name: row.values["ce_delta"]["value"] for row in found.rows}
    difference = found.differences["runs/k32"]["ce_delta"]
    assert difference["paired"] and difference["value"] == pytest.approx(
        values["runs/k32"] - values["runs/k16"]
    )
    assert repr(found) in capsys.readouterr().out


def test_steering_sets_the_latent_to_twice_its_largest_activation(capsys):
    names = run(STEER)
    sae, lm, latent = (names[name] for name in ("sae", "lm", "latent"))
    printed = capsys.readouterr().out
    assert printed.startswith("def area(") and len(printed) > len("def area(\n")
    ids = lm.tokenize("def area(")
    with ksparse.steer(lm.model, sae, {latent: 2.0}):
        steered = lm.acts(ids, torch.ones_like(ids, dtype=torch.bool))[0, 1:]
    plain = lm("def area(")
    code = sae.encode(plain)
    wanted = 2 * sae.latent(latent).max - code.dense()[:, latent]
    change = wanted[:, None] * sae.W_dec[latent] * code.inputs.scale
    torch.testing.assert_close(steered, plain + change, rtol=1e-3, atol=1e-4)


def test_a_latent_over_texts_is_a_frame_with_a_row_where_it_is_active():
    pytest.importorskip("pandas")
    sae = ksparse.load("runs/k16")
    texts = [file.read_text() for file in sorted(Path("my-texts").glob("*.txt"))]
    code = sae.lm().encode(texts, sae)
    latent = code.top(1)[0].latent
    frame = run(FRAME, **{"== 12": f"== {latent}"})["frame"]
    active = code.of_latent(latent).nonzero()[:, 0].tolist()
    assert active and frame.row.tolist() == active
    assert frame.value.tolist() == code.of_latent(latent)[active].tolist()
    assert frame.document.tolist() == code.documents[active].tolist()
    assert frame.token.tolist() == [code.tokens[row] for row in active]
