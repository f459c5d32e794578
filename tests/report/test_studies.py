"""A study's page from its study.json alone."""

import json

import pytest

from ksparse.errors import CorruptError, InputError
from ksparse.report import studies


def figure(**changes):
    curve = {
        "label": "TopK",
        "x": [8.0, 16.0, 32.0],
        "y": [0.3, 0.2, 0.1],
        "se": [0.01, None, 0.01],
        "reference": False,
    }
    return {
        "name": "f",
        "title": "A",
        "caption": "B",
        "x": "L0",
        "y": "error",
        "log": "xy",
        "curves": [curve | changes],
    }


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "study.json").write_text(
        json.dumps(
            {
                "format": 1,
                "name": "baselines",
                "question": "Which?",
                "lm": "pylm",
                "site": "resid_post.3",
                "text": "pylm",
                "findings": ["TopK <b>wins</b>"],
                "members": {
                    "TopK k8": {
                        "l0": {"value": 8.0, "se": 0.25},
                        "nmse": {"value": None, "se": None},
                    },
                    "other": {"l0": {"value": 7.0, "se": None}},
                },
                "figures": [figure(), figure(y=[0.0, -1.0, None]) | {"name": "empty"}],
            }
        )
    )
    return tmp_path


def test_a_study_of_a_newer_ksparse_says_so(folder):
    file = folder / "study.json"
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(InputError, match=r"study.json was written by a newer ksparse \(format 2\)"):
        studies.write(folder)


def test_the_page_shows_findings_members_and_figures_and_needs_no_network(folder):
    html = studies.write(folder).read_text()
    assert (
        "TopK &lt;b&gt;wins" in html
        and "8.00 ± 0.25" in html
        and "7.00</td>" in html
        and "–</td>" in html
    )
    assert (folder / "figures" / "f.svg").read_text().startswith("<?xml") and "<svg" in html
    assert "http://" not in html.replace("http://www.w3.org", "") and "<script" not in html


def test_a_figure_without_a_point_on_its_axes_is_left_out(folder):
    studies.write(folder)
    assert not (folder / "figures" / "empty.svg").exists()
    assert studies.draw(figure(y=[0.0, 1.0, None])).label == "TopK: 1.00 to 1.00"


def test_many_points_are_thinned_and_keep_their_ends():
    x, y, _ = studies.read_points({"x": list(range(1, 5001)), "y": list(range(1, 5001))}, "xy")
    assert len(x) <= studies.MOST_POINTS and (x[0], x[-1]) == (1, 5000)


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "..", 7])
def test_a_figure_cannot_be_written_outside_the_folder(folder, name):
    study = json.loads((folder / "study.json").read_text())
    (folder / "study.json").write_text(json.dumps(study | {"figures": [figure() | {"name": name}]}))
    with pytest.raises(
        CorruptError, match="study.json names .* which is not a file of its own folder"
    ):
        studies.write(folder)


def test_a_folder_without_a_study_is_named(tmp_path):
    with pytest.raises(
        InputError, match="holds no study: it has no study.json. `ksparse study NAME --out"
    ):
        studies.write(tmp_path)
