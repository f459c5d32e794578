"""The section on explanations in words: scores with both baselines, or the command that asks."""

from __future__ import annotations

import json

import pytest

from ksparse import report
from ksparse.report.sections.words import VERDICTS

from .conftest import COMMON, estimate
from .html_page import Page
from .test_page import assert_inert

RESULT = {
    "name": "explain",
    **COMMON,
    "options": {"model": "<i>judge</i>", "examples": 6, "test": 4},
    "detection": estimate(0.8, 0.02),
    "shuffled_detection": estimate(0.5, 0.02),
    "n2g_detection": estimate(0.7, 0.02),
    "fuzzing": estimate(0.61, 0.04),
    "shuffled_fuzzing": estimate(0.6, 0.04),
    "tells_apart": {"detection": True, "fuzzing": False},
    "latents": [
        {"latent": i, "explanation": f"<b>word {i}</b>", "detection": i / 30, "fuzzing": None}
        for i in range(25)
    ],
    "notes": ["2 answers end at the limit of tokens"],
}

WRITTEN_DETECTION = ("0.80 ± 0.02", "0.50 ± 0.02", "0.70 ± 0.02")
WRITTEN_FUZZING = ("0.61 ± 0.04", "0.60 ± 0.04", "not measured")


def section(make_run, result=RESULT) -> Page:
    run = make_run()
    if result:
        run.eval_file("explain").write_text(json.dumps(result))
    page = Page(report.write(run).read_text(encoding="utf-8"))
    assert_inert(page)
    return page


def test_scores_stand_beside_both_baselines_with_a_verdict(make_run):
    page = section(make_run)
    cells = [cell.text for cell in page.all("td")]
    first = cells.index("0.80 ± 0.02")
    assert cells[first : first + 4] == [*WRITTEN_DETECTION, VERDICTS[True]]
    assert cells[first + 4 : first + 8] == [*WRITTEN_FUZZING, VERDICTS[False]]
    assert "2 answers end at the limit of tokens" in page.text


def test_the_best_explanations_are_shown_as_text(make_run):
    page = section(make_run)
    cells = [cell.text for cell in page.all("td")]
    assert "<b>word 24</b>" in cells and "<b>word 4</b>" not in cells
    assert "The best 20 of 25" in " ".join(page.text.split())


@pytest.mark.parametrize("result", [None, {"name": "explain", **COMMON}])
def test_a_run_without_labels_says_how_to_get_them(make_run, result):
    text = " ".join(section(make_run, result).text.split())
    assert "No latent has a label yet." in text
    assert "--url URL --model NAME" in text
