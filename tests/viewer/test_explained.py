"""Explanations in words are on the pages, served and static: as labels, in search, with their scores."""

from __future__ import annotations

import pytest
import torch

from ksparse import viewer
from ksparse.evals.runner import write_results
from ksparse.evals.statistics import Result
from ksparse.storage.run_folder import RunFolder
from ksparse.viewer.resources import Resources

from .conftest import Browser

WORDS = {7: "names of rivers", 40: "<b>tags</b>", 90: ""}


def explain(run: RunFolder, told: dict[str, bool | None]) -> None:
    """Write a result of `explain` into a run."""
    rows = [
        {"latent": latent, "explanation": text, "detection": 0.8, "fuzzing": 0.6}
        for latent, text in WORDS.items()
    ]
    arrays = {
        "latent": torch.tensor(list(WORDS)),
        "detection": torch.full((len(WORDS),), 0.8),
        "fuzzing": torch.full((len(WORDS),), 0.6),
    }
    values = {"name": "explain", "latents": rows, "tells_apart": told}
    write_results(run, {"explain": Result(values, arrays)})


def test_explained_latents_have_their_words_and_scores(run: RunFolder):
    explain(run, {"detection": True, "fuzzing": None})
    resources = Resources(run, 16)
    assert resources.get("explained")["latents"] == {
        "7": {"text": "names of rivers", "detection": 0.8, "fuzzing": 0.6},
        "40": {"text": "<b>tags</b>", "detection": 0.8, "fuzzing": 0.6},
    }
    assert "detection" in {column["key"] for column in resources.get("overview")["columns"]}


@pytest.mark.parametrize("told", [{"detection": False, "fuzzing": True}])
def test_a_score_by_which_the_judge_cannot_tell_is_neither_shown_nor_a_column(
    run: RunFolder, told: dict[str, bool | None]
):
    explain(run, told)
    resources = Resources(run, 16)
    found = resources.get("explained")["latents"]["7"]
    assert found == {"text": "names of rivers", "fuzzing": 0.6}
    assert "detection" not in {column["key"] for column in resources.get("overview")["columns"]}
    assert "columns/detection" not in set(resources.names())


def test_static_pages_show_explanations_as_labels_and_find_them(
    browser: Browser, run: RunFolder, tmp_path
):
    explain(run, {"detection": True, "fuzzing": True})
    page = viewer.export(run, tmp_path / "told").as_uri()
    browser.open(f"{page}#/latents?sort=detection")
    browser.find("td.words .explained")
    labels = "return [...document.querySelectorAll('td.words .explained')].map((e) => e.innerText)"
    assert {*browser.js(labels)} == {"names of rivers", "<b>tags</b>"}
    explain(run, {"detection": False, "fuzzing": True})
    page = viewer.export(run, tmp_path / "site").as_uri()
    browser.open(f"{page}#/search?q=RIVERS")
    browser.until("return document.querySelector('#hits-labels a.to')?.innerText === '7'")
    hit = "return document.querySelector('#hits-labels .explained').innerText"
    assert browser.js(hit) == "names of rivers"
    says = "return document.querySelector('#explanation')?.innerText.includes(arguments[0])"
    browser.open(f"{page}#/latent/7")
    browser.until(says, "names of rivers")
    assert browser.js(says, "detection – the judge cannot tell")
    assert browser.js(says, "fuzzing 60")
    browser.open(f"{page}#/latent/40")
    browser.until(says, "<b>tags</b>")
    browser.open(f"{page}#/latent/90")
    browser.until("return document.querySelector('h1').innerText === 'Latent 90'")
    assert browser.js("return document.querySelector('#explanation')") is None
