"""Sections: one file each, and an evaluation is shown by adding its part to one tuple."""

from __future__ import annotations

import importlib
import json
import pkgutil

from ksparse import report
from ksparse.report import sections
from ksparse.report.claims import Claim
from ksparse.report.figures import Drawing, Picture
from ksparse.report.sections import codes, quality
from ksparse.report.sections.base import EvaluationPart, Section
from ksparse.report.tables import NumberGroup, NumberRow

from .conftest import COMMON, estimate
from .html_page import Page
from .test_page import assert_inert

NEW = EvaluationPart(
    NumberGroup(
        "feelings",
        "How latents feel",
        (NumberRow("Mood", "mood", "percent", "0 %: indifferent", "Higher is better."),),
    ),
    claims=(
        Claim(
            "Latents are happy.",
            lambda source: source.number("feelings", "mood"),
            lambda source: "They smile.",
            "They are sad.",
        ),
    ),
    draw=lambda source: [
        None,
        Picture("mood", Drawing("<svg></svg>", None), "Moods", "Over time.", "Good."),
    ],
    facts=lambda source: {"words": ["<b>joy</b>"]},
    template="<ul>{% for word in part.words %}<li>{{ word }}</li>{% endfor %}</ul>\n",
)


def written(make_run, monkeypatch, section, result=True) -> Page:
    monkeypatch.setattr(section, "PARTS", (*section.PARTS, NEW))
    run = make_run()
    if result:
        mood = {"name": "feelings", **COMMON, "mood": estimate(0.625)}
        run.eval_file("feelings").write_text(json.dumps(mood))
    page = Page(report.write(run).read_text(encoding="utf-8"))
    assert_inert(page)
    return page


def test_a_part_adds_its_rows_claims_figures_table_and_command(make_run, monkeypatch) -> None:
    page = written(make_run, monkeypatch, quality)
    for words in ("How latents feel", "Mood", "62.5 % ± 1.0", "Latents are happy. They smile."):
        assert words in " ".join(page.text.split())
    assert "Moods. Good." in [svg.attributes["aria-label"] for svg in page.all("svg")]
    assert "<b>joy</b>" in [item.text for item in page.all("li")]
    assert any("ablation feelings --" in pre.text for pre in page.all("pre"))


def test_a_part_that_was_not_run_is_named_with_its_command(make_run, monkeypatch) -> None:
    page = written(make_run, monkeypatch, codes, result=False)
    assert "Not run yet" in page.text and "How latents feel" in page.text
    assert any(code.text.endswith("subspaces feelings") for code in page.all("code"))
    assert "joy" not in page.text


def test_every_section_and_part_is_shown() -> None:
    modules = [
        importlib.import_module(f"{sections.__name__}.{module.name}")
        for module in pkgutil.iter_modules(sections.__path__)
    ]
    values = [value for module in modules for value in vars(module).values()]
    shown = [*quality.PARTS, *codes.PARTS]
    assert all(value in sections.SECTIONS for value in values if isinstance(value, Section))
    assert all(value in shown for value in values if isinstance(value, EvaluationPart))
    assert len({part.name for part in shown}) == len(shown)
