"""A sweep's page: what it says, that it is inert and whole whatever is missing, and its figures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ksparse.errors import CorruptError, InputError
from ksparse.report import laws as figures
from ksparse.report import sweep as pages
from ksparse.scaling.laws import published
from ksparse.scaling.laws.law import fit
from ksparse.scaling.laws.survey import fit_sweep
from ksparse.storage import jsonio

from .html_page import Page
from .test_page import assert_inert

K, SIZES = (8, 16, 32), (512, 1_024, 2_048, 4_096, 8_192)
PICTURES = {"law-compute", "law-size", "law-joint", "law-rates", "law-trends", "law-subject"}


def build(
    folder: Path,
    *,
    ks: tuple[int, ...] = K,
    lms: tuple[str, ...] = ("pylm/0.3m", "pylm/1.9m"),
    rates: tuple[float, ...] = (0.5, 1.0, 2.0),
) -> Path:
    """Write a small sweep and its laws."""
    points, curves = (
        ["run,n,k,lr,seed,lm,lm_parameters,tokens_to_convergence,loss"],
        ["run,n,k,lm,tokens,flops,loss"],
    )
    for lm in lms:
        for n in SIZES:
            for k in ks:
                for rate in rates:
                    run, lr, end = (
                        f"{lm[5:]}-{n}-{k}-{rate}",
                        rate * 0.1 / n**0.5,
                        2e4 * n**0.6 / rate**0.5,
                    )
                    loss = (
                        (2.5 * n**-0.25 * k**-0.1 + 0.1)
                        * (1 + 0.02 * np.log(rate) ** 2)
                        * (1.1 if lm == "pylm/1.9m" else 1)
                    )
                    points.append(
                        f"{run},{n},{k},{lr},0,{lm},{200_000 if lm == 'pylm/0.3m' else 1_500_000},{end},{loss}"
                    )
                    curves += [
                        f"{run},{n},{k},{lm},{t},{t * 320 * n},{loss * (1 + 0.05 * ((end / t) ** 0.6 - 1))}"
                        for t in np.geomspace(end / 300, end, 12)
                    ]
    folder.mkdir(parents=True)
    (folder / "points.csv").write_text("\n".join(points) + "\n")
    (folder / "curves.csv").write_text("\n".join(curves) + "\n")
    jsonio.write_json(folder / "law.json", fit_sweep(folder, draws=0).to_dict())
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = build(tmp_path_factory.mktemp("sweeps") / "demo")
    pages.write(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "sweep"))


def read(folder: Path) -> Page:
    return Page(pages.write(folder).read_text(encoding="utf-8"))


def test_a_whole_sweep_has_every_section_and_figure(whole):
    page = read(whole)
    assert_inert(page)
    assert [heading.text for heading in page.all("h2")] == [
        "In figures",
        "The laws",
        "Other forms",
        "The points",
        "How to reproduce it",
    ]
    assert {file.stem for file in (whole / "figures").iterdir()} == PICTURES and len(
        page.all("svg", role="img")
    ) == 6
    summary = page.all("p", **{"class": "summary"})[0].text
    assert (
        "45 runs on pylm/0.3m, n from 512 to 8,192, k from 8 to 32" in summary
        and "Tokens to convergence grow as n^0.60" in summary
    )
    assert "added or removed" not in page.text


def test_laws_of_a_newer_ksparse_say_so(tmp_path):
    (tmp_path / "law.json").write_text('{"format": 2, "laws": {}, "subject": {}}')
    with pytest.raises(InputError, match=r"law.json was written by a newer ksparse \(format 2\)"):
        pages.Sweep(tmp_path).law_file  # noqa: B018


def test_the_coefficients_on_the_page_are_those_of_the_file(whole):
    found = json.loads((whole / "law.json").read_text())
    expected = [
        each["value"] for law in found["laws"].values() for each in law["coefficients"].values()
    ]
    assert [float(element.attributes["value"]) for element in read(whole).all("data")] == expected


def test_the_points_of_every_law_are_on_the_page(whole):
    found = json.loads((whole / "law.json").read_text())
    rows = sum(len(law["points"]) for law in found["laws"].values())
    page = read(whole)
    assert (
        len([row for row in page.all("tr") if "details" in row.inside and "tbody" in row.inside])
        == rows
    )


def test_what_the_points_do_not_allow_is_a_sentence_with_the_runs_that_would_add_it(tmp_path):
    folder = build(tmp_path / "small", ks=(16,), lms=("pylm/0.3m",), rates=(1.0,))
    (folder / "curves.csv").unlink()
    jsonio.write_json(folder / "law.json", fit_sweep(folder, draws=0).to_dict())
    page = read(folder)
    assert_inert(page)
    assert {file.stem for file in (folder / "figures").iterdir()} == {"law-size", "law-trends"}
    for said in (
        "runs at another k would add it",
        "on another LM would add it",
        "runs with curves.csv would add it",
        "three rates at each n would add it",
        "at k = 16 no n has runs of two rates",
    ):
        assert said in page.text


def test_runs_added_since_the_fit_are_noticed(copy):
    with (copy / "points.csv").open("a") as stream:
        stream.write("new,512,64,0.01,0,pylm/0.3m,200000,1e6,0.5\n")
    page = read(copy)
    assert "Runs have been added or removed since the laws were fitted" in page.text and any(
        code.text == "ksparse fit sweep" for code in page.all("code")
    )


def test_commands_name_the_folder_as_it_was_given_and_tell_nothing_of_the_machine(copy):
    (copy / "sweep.toml").write_text("")
    page = read(copy)
    assert [pre.text for pre in page.all("pre")] == [
        "ksparse sweep sweep/sweep.toml",
        "ksparse fit sweep",
        "ksparse report sweep",
    ]
    assert str(copy.parent) not in (copy / "report.html").read_text()


@pytest.mark.parametrize("content", ["[]", '{"law": "nk"}'])
def test_a_law_file_of_another_kind_is_refused(copy, content):
    (copy / "law.json").write_text(content)
    with pytest.raises(
        CorruptError, match="is not that of a sweep; `ksparse fit .*` writes it again"
    ):
        pages.write(copy)


def test_names_from_data_stay_text(tmp_path):
    folder = build(tmp_path / "<script>alert(1)<")
    for name in ("points.csv", "curves.csv"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("pylm/1.9m", "<img src=x onerror=alert(1)>"))
    jsonio.write_json(folder / "law.json", fit_sweep(folder, draws=0).to_dict())
    assert_inert(read(folder))


def test_the_page_needs_no_torch(whole):
    code = f"import sys; from pathlib import Path; from ksparse.report import sweep; sweep.write(Path({str(whole)!r})); assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_figures_stand_alone_and_take_the_pages_colours(whole):
    inline = ""
    for picture in pages.draw_pictures(pages.Sweep(whole)):
        root = ElementTree.fromstring(picture.svg)
        assert root.tag.endswith("svg") and "metadata" not in picture.svg
        assert not re.search("#[0-9a-f]{6}", picture.inline) and "var(--first)" in picture.inline
        inline += picture.inline
    ids = re.findall(r'\sid="([^"]+)"', inline)
    assert len(ids) == len(set(ids)) > 20


def test_figures_without_their_law_are_not_drawn():
    assert (
        figures.draw_size_law(None)
        is figures.draw_joint_law(None)
        is figures.draw_subject_law(None, "", [])
        is None
    )
    assert (
        figures.draw_trends({}) is None
        and figures.draw_compute_law(None, [], {}, 8) is None
        and figures.draw_learning_rates({"k": np.ones(1)}, 1) is None
    )


def test_the_joint_figure_shows_every_point_and_the_worst_residual():
    law = fit(published.gpt4(), "nk", draws=0).to_dict()
    picture = figures.draw_joint_law(law)
    assert "log-RMS 0.0096" in picture.label and "exp(zeta + eta log k)" in picture.caption
    assert picture.svg.count("<use ") > 2 * 45  # each point above and below


def test_sites_of_a_sweep_are_side_by_side_and_laws_are_of_one(tmp_path):
    folder = build(tmp_path / "sites", lms=("pylm/1.9m",))
    for name in ("points.csv", "curves.csv"):
        head, *rows = (folder / name).read_text().splitlines()
        at = head.split(",").index("loss")
        lines = [f"{head},site"]
        for site, factor in (("resid_post.0", 1.0), ("resid_post.1", 2.0), ("resid_post.2", 3.0)):
            for row in rows:
                cells = row.split(",")
                cells[at] = repr(float(cells[at]) * factor)
                lines.append(",".join([f"{site}-{cells[0]}", *cells[1:], site]))
        (folder / name).write_text("\n".join(lines) + "\n")
    alone = build(tmp_path / "alone", lms=("pylm/1.9m",))
    found, expected = (fit_sweep(each, draws=0) for each in (folder, alone))
    assert found.subject["site"] == "resid_post.0"
    assert any("those at resid_post.1, resid_post.2 are left out" in note for note in found.notes)
    one, other = (each.laws["n"].coefficients for each in (found, expected))
    assert {name: c.value for name, c in one.items()} == pytest.approx(
        {name: c.value for name, c in other.items()}
    )
    jsonio.write_json(folder / "law.json", found.to_dict(), sealed=True)
    text = pages.write(folder).read_text()
    assert "Loss by layer" in text and "pylm/1.9m at resid_post.0, n from" in text
    picture = pages.draw_sites(pages.Sweep(folder).rows, found.subject)
    assert "resid_post, n = 512, k = 8: " in picture.label
