"""Figures: SVG that works as a file, and on a page beside others."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from ksparse.errors import InputError
from ksparse.report import figures
from ksparse.report.sections import ablation, explanations, latents, probes, training
from ksparse.report.source import Number

from .conftest import ABLATION, EDGES, STATS, K, metrics


def all_pictures() -> list[figures.Picture]:
    histogram = STATS["density_histogram"]
    return [
        *training.draw_curves(metrics(), K, 0.096),
        latents.draw_densities(histogram, 1 / 16),
        latents.draw_cosines(np.linspace(-0.1, 1, 50)),
        explanations.draw_losses(
            {"clean": Number(2, 0.1), "n2g": Number(4, 0.1), "zero": None}, "n2g"
        ),
        explanations.draw_precision_and_recall(
            np.linspace(0, 1, 9),
            np.linspace(1, 0, 9),
            {"mean": (Number(0.5), Number(0.5)), "wrong": (Number(0.01), None)},
        ),
        ablation.draw_sparsities(ABLATION["histogram"], ABLATION["channel_histogram"]),
        probes.draw_tasks(rows(5)),
    ]


def rows(count: int, loss: float | None = 0.3) -> list[tuple[str, str, dict[str, Number | None]]]:
    """Return tasks as the figure takes them."""
    return [
        (
            f"task {i}",
            str(i),
            {key: Number(0.6, 0.02) for key, *_ in probes.MARKS}
            | {"loss": None if loss is None else Number(loss, 0.01)},
        )
        for i in range(count)
    ]


def test_each_figure_is_xml_with_text_as_text_and_without_metadata() -> None:
    for picture in all_pictures():
        root = ElementTree.fromstring(picture.svg)
        assert root.tag.endswith("svg")
        assert "".join(root.itertext()).strip()
        assert (
            "metadata" not in picture.svg
            and "Matplotlib" not in picture.svg
            and "DejaVu" not in picture.svg
        )


def test_ids_are_unique_over_all_figures_of_a_page() -> None:
    inline = "".join(picture.inline for picture in all_pictures())
    ids = re.findall(r'\sid="([^"]+)"', inline)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', inline)) <= set(ids)


def test_colours_on_a_page_are_the_pages() -> None:
    for picture in all_pictures():
        assert "currentColor" in picture.inline and "var(--first)" in picture.inline
        assert not re.search("#[0-9a-f]{6}", picture.inline)
        assert (
            'role="img"' in picture.inline
            and "aria-label" in picture.inline
            and "xmlns" not in picture.inline
        )


def test_a_label_is_escaped() -> None:
    picture = figures.Picture(
        "x", figures.Drawing('<svg width="1"></svg>', None), '"><script>', "", "a & b"
    )
    assert (
        picture.inline
        == '<svg role="img" aria-label="&#34;&gt;&lt;script&gt;. a &amp; b" focusable="false"></svg>'
    )


def test_runs_without_anything_to_draw_have_no_figures() -> None:
    assert training.draw_curves([], K, None) == []
    assert latents.draw_densities({"edges": [], "counts": []}, 0.1) is None
    assert latents.draw_densities({"edges": [0, 1], "counts": [0]}, 0.1) is None
    assert latents.draw_cosines(np.array([])) is None
    assert (
        explanations.draw_losses({"clean": Number(2), "n2g": None}, "n2g") is None
        and explanations.draw_losses({"n2g": Number(2)}, "n2g") is None
    )
    assert (
        explanations.draw_precision_and_recall(np.array([]), np.array([]), {}) is None
        and explanations.draw_precision_and_recall(np.ones(2), np.full(2, np.nan), {}) is None
    )
    assert probes.draw_tasks([]) is None and probes.draw_tasks(rows(3, loss=None)) is None


def test_one_line_of_metrics_and_null_values_can_be_drawn() -> None:
    one = [{**metrics(1)[0], "nmse": None}]
    assert [picture.name for picture in training.draw_curves(one, K, 0.1)] == [
        "training-dead",
        "training-steps",
        "training-l0",
    ]
    assert len(training.draw_curves(metrics(2), K, None)) == 4


def test_labels_say_where_a_curve_begins_and_ends() -> None:
    error = training.draw_curves(metrics(), K, None)[0]
    assert error.label == "From 0.400 to 0.124 over 51,200 tokens."


def test_matplotlib_settings_and_pyplot_are_left_alone() -> None:
    code = (
        "import matplotlib, sys; matplotlib.rcParams['font.size'] = 33; before = matplotlib.rcParams.copy();"
        "from ksparse.report.sections import latents; latents.draw_cosines(__import__('numpy').ones(3));"
        "assert matplotlib.rcParams.copy() == before; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"edges": EDGES[1:]},
        {"counts": [0] * 40},
        {"counts": None},
        {"edges": [2 * edge for edge in EDGES]},
        {"counts": [*ABLATION["histogram"]["counts"][:-1], None]},
    ],
)
def test_histograms_that_cannot_be_compared_are_not_drawn(change) -> None:
    other = ABLATION["channel_histogram"] | change if change else {}
    assert (
        ablation.draw_sparsities(ABLATION["histogram"], other) is None
        and ablation.draw_sparsities(other, ABLATION["histogram"]) is None
    )


@pytest.mark.parametrize("count", [1, 2, 61])
def test_tasks_have_a_line_each_of_the_same_height(count) -> None:
    picture = probes.draw_tasks(rows(count))
    root = ElementTree.fromstring(picture.svg)
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [text for text in texts if text.startswith("task ")] == [
        f"task {i}" for i in range(count)
    ]
    assert all(texts.count(str(i)) >= 1 for i in range(count))
    height = float(root.attrib["viewBox"].split()[3])
    assert height == pytest.approx(72 * (1.4 + 0.185 * count))
    at = [
        float(match) for match in re.findall(r"translate\(\S+ ([\d.]+)\)[^>]*>task ", picture.svg)
    ] or [float(match) for match in re.findall(r'y="([\d.]+)"[^>]*>task ', picture.svg)]
    assert len(at) == count and all(
        after - before > 9 for before, after in zip(at, at[1:])
    )  # points; the text is 8 high


def test_names_of_tasks_are_neither_formulas_nor_markup_nor_endless() -> None:
    names = ["$\\frac{$", "<script>", "\u202eevil", "語" * 10, "x" * 10_000, "a & b"]
    picture = probes.draw_tasks(
        [(name, end, losses) for name, (_, end, losses) in zip(names, rows(len(names)))]
    )
    texts = [
        text.text
        for text in ElementTree.fromstring(picture.svg).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"$\\frac{$", "<script>", "⟨U+202E⟩evil", "語" * 10, "a & b"} <= set(texts)
    assert max(map(len, texts)) < 80 and "\u202e" not in picture.svg
    assert "<script" not in picture.inline


def test_explanations_are_drawn_among_the_losses_in_their_order() -> None:
    picture = explanations.draw_losses(
        {"zero": Number(9, 0.1), "n2g": Number(4.5, None), "clean": Number(2, 0)}, "n2g"
    )
    assert picture.label == "clean 2.00; n2g 4.50; zero 9.00 nats."
    assert (
        explanations.draw_losses({"clean": Number(2), "n2g": Number(2)}, "n2g") is not None
    )  # all the same


def test_latents_without_a_precision_are_counted_not_drawn() -> None:
    picture = explanations.draw_precision_and_recall(
        np.array([0.5, 0.25, 0.1]), np.array([1, np.nan, np.nan]), {}
    )
    assert (
        "2 latents whose patterns predicted nothing are left out" in picture.caption
        and picture.label.startswith("1 latents")
    )


# ---- tooltips


def tooltips(picture) -> list[tuple[str, dict[str, str]]]:
    """Return the text of each tooltip, and its shape's attributes."""
    space = "{http://www.w3.org/2000/svg}"
    groups = [
        group
        for group in ElementTree.fromstring(picture.svg).iter(f"{space}g")
        if group.get("class") == "spot"
    ]
    assert all(
        [child.tag.removeprefix(space) for child in group]
        in (["title", "path"], ["title", "circle"])
        for group in groups
    )
    return [(group[0].text, group[1].attrib) for group in groups]


def test_every_figure_has_tooltips() -> None:
    for picture in all_pictures():
        found = tooltips(picture)
        assert found and all(
            shape["fill"] == "none" and shape["pointer-events"] == "all" for _, shape in found
        ), picture.name
        assert 'id="tooltip' not in picture.svg


def test_a_bar_shows_its_range_and_count_and_an_empty_one_nothing() -> None:
    picture = latents.draw_densities({"edges": [-3.0, -2.0, -1.0, 0.0], "counts": [5, 0, 7]}, 0.1)
    assert [words for words, _ in tooltips(picture)] == [
        "density 0.10 % to 1.0 %: 5 latents",
        "density 10 % to 100 %: 7 latents",
    ]


def test_a_long_curve_shows_some_values_and_its_last() -> None:
    picture = training.draw_error(
        [{"tokens": 10 * i, "nmse": 1 / i} for i in range(1, 2_001)], None
    )
    words = [words for words, _ in tooltips(picture)]
    assert len(words) == 120 and words[0] == "10 tokens: 1" and words[-1] == "20,000 tokens: 0.0005"


def test_the_tooltip_of_a_latents_point_names_the_latent() -> None:
    picture = explanations.draw_precision_and_recall(
        np.array([0.5, 0.25]), np.array([1, np.nan]), {}, np.array([17, 4])
    )
    assert [words for words, _ in tooltips(picture)] == ["latent 17: recall 50 %, precision 100 %"]


def test_hostile_names_are_text_in_tooltips() -> None:
    name = '"><script>alert(1)</script>\u202e&'
    picture = probes.draw_tasks([(name, "1", {"loss": Number(0.5, 0.1)})])
    assert (
        tooltips(picture)[0][0] == '"><script>alert(1)</script>⟨U+202E⟩&: best latent 0.50 ± 0.10'
    )
    assert "<script" not in picture.inline and "\u202e" not in picture.inline


def test_every_figure_of_the_page_is_a_matplotlib_figure_that_a_notebook_shows(make_run):
    from matplotlib.figure import Figure

    from ksparse import report

    run = make_run()
    drawn = run.figures()
    report.write(run)
    assert {f"{name}.svg" for name in drawn} == {
        file.name for file in (run.path / "figures").iterdir()
    }
    for figure in drawn.values():
        assert isinstance(figure, Figure) and figure.axes
    assert "<svg" in drawn["training-nmse"]._repr_svg_()
    assert run.figure("nmse").axes[0].get_ylabel() == "normalised MSE"


def test_a_figure_that_there_is_not_names_those_that_there_are(make_run):
    with pytest.raises(InputError, match="no figure 'training-nmsi'; did you mean 'training-nmse'"):
        make_run().figure("training-nmsi")
