"""Figures: SVG that stands alone, and that can live on a page with others."""

from __future__ import annotations

import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np

from ksparse.report import figures

from .conftest import K, STATS, metrics


def all_pictures() -> list[figures.Picture]:
    histogram = STATS["density_histogram"]
    return [*figures.training(metrics(), K, 0.096), figures.density(histogram["edges"], histogram["counts"], 1 / 16),
            figures.cosines(np.linspace(-0.1, 1, 50))]


def test_each_figure_is_xml_with_text_as_text_and_without_metadata() -> None:
    for picture in all_pictures():
        root = ElementTree.fromstring(picture.svg)
        assert root.tag.endswith("svg")
        assert "".join(root.itertext()).strip()
        assert "metadata" not in picture.svg and "Matplotlib" not in picture.svg and "DejaVu" not in picture.svg


def test_ids_are_unique_over_all_figures_of_a_page() -> None:
    inline = "".join(picture.inline for picture in all_pictures())
    ids = re.findall(r'\sid="([^"]+)"', inline)
    assert len(ids) == len(set(ids)) > 20
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', inline)) <= set(ids)


def test_colours_on_a_page_are_the_pages() -> None:
    for picture in all_pictures():
        assert "currentColor" in picture.inline and "var(--first)" in picture.inline
        assert not re.search("#[0-9a-f]{6}", picture.inline)
        assert 'role="img"' in picture.inline and "aria-label" in picture.inline and "xmlns" not in picture.inline


def test_a_label_is_escaped() -> None:
    picture = figures.Picture("x", '<svg width="1"></svg>', '"><script>', "", "a & b")
    assert picture.inline == '<svg role="img" aria-label="&#34;&gt;&lt;script&gt;. a &amp; b" focusable="false"></svg>'


def test_runs_without_anything_to_draw_have_no_figures() -> None:
    assert figures.training([], K, None) == []
    assert figures.density([], [], 0.1) is None and figures.density([0, 1], [0], 0.1) is None
    assert figures.cosines(np.array([])) is None


def test_one_line_of_metrics_and_null_values_can_be_drawn() -> None:
    one = [{**metrics(1)[0], "nmse": None}]
    assert [picture.name for picture in figures.training(one, K, 0.1)] == ["training-dead", "training-steps", "training-l0"]
    assert len(figures.training(metrics(2), K, None)) == 4


def test_labels_say_where_a_curve_began_and_ended() -> None:
    error = figures.training(metrics(), K, None)[0]
    assert error.label == "From 0.400 to 0.124 over 51,200 tokens."


def test_matplotlib_settings_and_pyplot_are_left_alone() -> None:
    code = ("import matplotlib, sys; matplotlib.rcParams['font.size'] = 33; before = matplotlib.rcParams.copy();"
            "from ksparse.report import figures; figures.cosines(__import__('numpy').ones(3));"
            "assert matplotlib.rcParams.copy() == before; assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
