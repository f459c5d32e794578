"""The page of runs at several sites: side by side, from what the runs hold."""

import json
import subprocess
import sys

import pytest

from ksparse.config import to_toml
from ksparse.errors import InputError
from ksparse.evals import by_site
from ksparse.report import sites
from ksparse.storage.run_folder import RunFolder

from .html_page import Page

SITES = ("resid_post.0", "resid_post.1", "mlp_out.1", "transformer.ln_f")


@pytest.fixture
def folder(small_recipe, tmp_path):
    """Return the folder of four runs that have logged a step."""
    for number, site in enumerate(SITES):
        run = tmp_path / "all" / site
        run.mkdir(parents=True)
        (run / "recipe.toml").write_text(to_toml(small_recipe({"acts.site": site})))
        row = {"step": 12, "tokens": 768, "nmse": 0.5 + number / 10, "dead": 0.25}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / "all"


def add_results(folder, names=("stats", "downstream")):
    from ksparse.storage import jsonio

    for number, site in enumerate(SITES):
        run = RunFolder(folder / site)
        common = {
            "name": "",
            "options": {},
            "lm": "x",
            "site": site,
            "checkpoint": 12,
            "policy": {},
            "text": "x",
            "n_tokens": 10,
            "n_documents": 2,
            "notes": [],
        }
        found = {
            "stats": {key: {"value": 0.1 + number, "se": 0.01} for key in sites.EVALUATED["stats"]},
            "downstream": {
                key: {"value": 0.2 + number, "se": 0.02} for key in sites.EVALUATED["downstream"]
            },
        }
        for name in names:
            jsonio.write_json(run.eval_file(name), common | {"name": name} | found[name])


def test_a_page_of_runs_that_were_not_judged_shows_training_and_says_what_is_missing(folder):
    text = sites.write(folder).read_text()
    page = Page(text)
    assert page.unbalanced == [] and "script" not in {element.name for element in page.elements}
    for site, nmse in zip(SITES, ("0.500", "0.600", "0.700", "0.800")):
        assert f'<a href="{site}/report.html">{site}</a></th><td>768</td><td>{nmse}</td>' in text
    assert "Error in training by layer" in text and "Error by layer" not in text
    assert "ksparse eval all/*/ stats downstream; ksparse report all" in text


def test_held_out_numbers_take_the_place_of_training_in_figures(folder):
    add_results(folder)
    text = sites.write(folder).read_text()
    assert "Error by layer" in text and "additional loss by layer" in text
    assert "Error in training by layer" not in text
    assert "resid_post: error from 0.1000 ± 0.0100 at resid_post.0 to 1.1000" in text
    assert "delta CE 0.2000 ± 0.0200, 1.2000 ± 0.0200 by layer." in text
    assert "<td>3.20 ± 0.020</td>" in text


def test_sites_are_in_the_order_of_location_and_layer_and_curves_by_location(folder):
    add_results(folder)
    results = {site: sites._results(RunFolder(folder / site)) for site in SITES}
    curves = by_site.curves(results, "stats", "nmse")
    assert [(curve.label, curve.x, curve.y) for curve in curves] == [
        ("resid_post", [0, 1], [0.1, 1.1]),
        ("mlp_out", [1], [2.1]),
    ]


def test_other_runs_are_no_page_of_sites(folder, small_recipe, tmp_path):
    with pytest.raises(InputError, match="holds no runs; `ksparse train --out"):
        sites.write(tmp_path / "none")
    other = folder / "other"
    other.mkdir()
    (other / "recipe.toml").write_text(to_toml(small_recipe({"acts.site": "a.1", "sae.k": 5})))
    with pytest.raises(
        InputError, match=r"differ in more than their site, mlp_out\.1 and other: sa"
    ):
        sites.write(folder)
    (other / "recipe.toml").write_text(to_toml(small_recipe({"acts.site": SITES[0]})))
    with pytest.raises(InputError, match="holds 5 runs at 4 sites"):
        sites.write(folder)


def test_the_verb_writes_it_without_torch(folder):
    code = (
        "import sys; from ksparse import cli; cli.main(['report', sys.argv[1]]); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("report   file://"), done.stderr
    assert (folder / "report.html").is_file()
