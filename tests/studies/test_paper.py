"""The study of the paper's claims: what it trains, that it resumes, and what its margins say."""

import html

import pytest

from ksparse import studies
from ksparse.config import to_toml
from ksparse.config.evaluation import StudyConfig
from ksparse.errors import InputError
from ksparse.report import studies as pages
from ksparse.storage import jsonio
from ksparse.studies.paper import claims, margins, members
from ksparse.studies.paper.members import Sizes
from ksparse.studies.study import Study

EVERY_CLAIM = {
    "topk-error",
    "topk-loss",
    "dead-latents",
    "law-nk",
    "downstream",
    "probes-activation",
    "probes-size",
    "n2g",
    "ablation",
    "shrinkage",
    "dense-latents",
    "subspaces",
    "gaussian",
    "progressive",
}


@pytest.fixture
def options(small_recipe, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(to_toml(small_recipe({"tokens": 512, "batch": 64, "run.log_every": 1})))
    return StudyConfig(
        recipe=str(recipe),
        out=str(tmp_path / "paper"),
        n_latents=128,
        k=4,
        eval_tokens=300,
        probe_rows=100,
        seeds=2,
        threads=1,
        device="cpu",
    )


@pytest.mark.slow
def test_every_claim_gets_its_numbers_and_a_figure_and_the_study_resumes(
    options, monkeypatch, tmp_path
):
    monkeypatch.setattr(members, "MOST_PENALTIES", 2)
    path = studies.run("paper", options)
    study = jsonio.read_json(path / "study.json")
    assert {claim["name"] for claim in study["claims"]} == EVERY_CLAIM
    drawn = {figure["name"] for figure in study["figures"]}
    assert all(claim["figures"] and set(claim["figures"]) <= drawn for claim in study["claims"])
    assert study["setup"]["latents"] == [16, 32, 64, 128] and study["setup"]["k"] == [2, 4, 8]
    page = pages.write(path).read_text()
    assert all(
        html.escape(claim["claim"], quote=True).replace("&#x27;", "&#39;") in page
        for claim in study["claims"]
    )

    trained = {file: file.stat().st_mtime_ns for file in path.glob("runs/*/checkpoints/*")}
    results = {file: file.stat().st_mtime_ns for file in path.glob("runs/*/evals/*.json")}
    assert trained and results
    again = jsonio.read_json(studies.run("paper", options) / "study.json")
    assert all(file.stat().st_mtime_ns == time for file, time in (trained | results).items())
    assert again["claims"] == study["claims"]


def test_a_claim_without_its_numbers_is_not_on_the_page(options):
    study = Study("paper", options)
    evidence = claims.Evidence(study, Sizes(128, 4, 16, 1), [0.02])
    assert claims.summarize(evidence)["claims"] == []


@pytest.mark.parametrize("n, k", [(128, 2), (64, 4)])
def test_sizes_that_leave_nothing_to_vary_are_refused(n, k):
    with pytest.raises(InputError, match=f"with k = {k} and n = {n} that is not possible"):
        Sizes(n, k, 16, 1).check()


def test_values_of_k_stay_within_latents_and_dimensions():
    assert Sizes(16_384, 32, 640, 3).all_k == [8, 16, 32, 64, 128, 512]
    assert Sizes(16_384, 32, 100, 3).all_k == [8, 16, 32, 64]


@pytest.mark.parametrize(
    "l0, nearest",
    [
        ({0.02: 90.0, 0.04: 50.0, 0.08: 20.0}, [0.08, 0.04]),
        ({0.02: 33.0, 0.04: 20.0}, [0.02]),
        ({0.02: 90.0}, [0.02]),
        ({0.02: 0.0, 0.01: 31.0}, [0.01]),
    ],
)
def test_weights_are_chosen_around_k_and_clear_of_it(l0, nearest):
    assert members.nearest_weights(l0, 32) == nearest


def test_the_search_for_weights_ends_where_the_middle_is_too_near_to_k():
    l0 = {0.32: 120.0, 0.64: 16.9, 0.45: 31.9}
    assert members.nearest_weights(l0, 32) == [0.64, 0.32]
    assert members.next_weight(l0, 32) is None


def test_a_difference_over_seeds_has_the_standard_error_of_a_mean():
    assert margins.mean([1.0, 2.0, 3.0]) == {"value": 2.0, "se": pytest.approx(1 / 3**0.5)}
    assert margins.mean([1.0]) == {"value": 1.0, "se": None}


def test_a_run_and_a_recipe_are_not_both_a_start(options, tmp_path):
    both = StudyConfig(run="runs/demo", recipe="recipe.toml")
    with pytest.raises(InputError, match="a run or from a recipe: give --run or --recipe"):
        Study("paper", both)
