"""The section on codes and latents: each evaluation is shown alone, and beside other SAEs."""

from __future__ import annotations

import copy
import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest

from ksparse import report
from ksparse.report.sections import codes, latent_statistics
from ksparse.report.sections.base import draw_all
from ksparse.report.source import RunSource

from .conftest import COMMON, estimate
from .html_page import Page
from .test_page import assert_inert

EDGES = np.linspace(-2, 2, 161).tolist()
COUNTS = np.random.default_rng(0).poisson(50 * np.exp(-(np.linspace(-5, 5, 160) ** 2))).tolist()
LOGS = {"edges": np.linspace(-4, 0, 41).tolist(), "counts": [0] * 10 + list(range(20)) + [0] * 10}
FIT = {
    "n": 190,
    "gaussian": {"mean": -2.0, "sd": 0.5, "log_likelihood": -0.7},
    "laplace": {"median": -2.0, "scale": 0.4, "log_likelihood": -0.8},
    "margin": {"value": 0.1, "se": 0.02},
    "better": "gaussian",
    "mode": 0.011,
}


def points(scale: float) -> list[dict]:
    return [
        {
            "k": k,
            "l0": estimate(float(k), 0.0),
            "nmse": estimate(scale / k),
            "ce_delta": estimate(scale / k**2),
        }
        for k in (1, 4, 16)
    ]


def refinement(mean: float) -> dict:
    return {
        "nmse_raw": estimate(0.12),
        "nmse_refined": estimate(0.1),
        "ce_delta_raw": estimate(0.2),
        "ce_delta_refined": estimate(0.15),
        "l0": estimate(4.0),
        "shift_mean": estimate(mean),
        "shift_median": estimate(mean / 2),
        "histogram": {"edges": EDGES, "counts": COUNTS},
    }


def progressive(scale: float) -> dict:
    return {
        "own": points(scale)[1],
        "topk": points(scale),
        "threshold": points(0.9 * scale),
        "all": points(scale)[2],
    }


RESULTS = {
    "refinement": {
        "name": "refinement",
        **COMMON,
        **refinement(0.01),
        "upward": estimate(0.51),
        "beside": {"relu <b>": refinement(0.4)},
    },
    "progressive": {
        "name": "progressive",
        **COMMON,
        "nmse": estimate(0.1),
        "ce_delta": estimate(0.1),
        **progressive(1.0),
        "beside": {"multi": progressive(0.8)},
    },
    "latents": {
        "name": "latents",
        **COMMON,
        "density_fit": FIT,
        "importance_fit": FIT,
        "density_histogram": LOGS,
        "importance_histogram": LOGS,
        "effective_histogram": {"edges": np.linspace(0, 3, 41).tolist(), "counts": LOGS["counts"]},
        "effective_tokens": [1, 2, 6.5, 9, 40],
        "densest_density": 0.05,
        "densest_over_l0": 0.01,
        "densest_share": 0.3,
        "n_opposite_pairs": 2,
        "n_opposite_among_densest": 1,
        "recurring": {
            "first": [{"latent": 5, "score": 0.9, "density": 0.02, "mean_act": 1.0, "found": True}],
            "late": [{"latent": 6, "score": 0.1, "density": 0.06, "mean_act": 1.0, "found": False}],
            "early": [],
            "repetition": [],
        },
    },
    "subspaces": {
        "name": "subspaces",
        **COMMON,
        "separation": 0.5,
        "separation_of_noise": 0.2,
        "latents_share": 0.25,
        "dims_share": 0.26,
        "cut": 0.25,
        "along_order": [0.9] * 25 + [0.2] * 75,
        "by_direction": {"first": [0.5, 0.3, 0.2], "second": [0.2, 0.3, 0.5]},
        "sides": {
            "first": {
                "n_latents": 16,
                "encoder_norm": [1, 1, 2.3, 3, 4],
                "effective_tokens": None,
                "density": [0, 0, 0.01, 0.1, 0.2],
            }
        },
    },
}


@pytest.fixture
def evaluated(make_run):
    """Return evaluated(names): a run with these results."""

    def make(*names: str, changes: dict | None = None):
        run = make_run()
        for name in names:
            run.eval_file(name).write_text(json.dumps({**RESULTS[name], **(changes or {})}))
        return run

    return make


def section(run) -> str:
    return (
        report.write(run)
        .read_text(encoding="utf-8")
        .partition("Codes and latents in detail</h2>")[2]
        .partition("<h2")[0]
    )


def test_all_evaluations_have_their_numbers_figures_and_tables(evaluated) -> None:
    run = evaluated(*RESULTS)
    page = Page(report.write(run).read_text(encoding="utf-8"))
    assert_inert(page)
    text = section(run)
    for words in (
        "Mean shift",
        "Other k, and a threshold",
        "Density of the densest",
        "Recurring latents",
        "The two sides of the cut",
        "2.3",
    ):
        assert words in text
    assert "Not run yet" not in text
    names = {picture.name for picture in draw_all(RunSource(run), codes.PARTS)}
    assert names == {
        "refinement-shift",
        "progressive",
        "latents-laws",
        "latents-tokens",
        "subspaces",
    }
    assert {f"{name}.svg" for name in names} <= {
        file.name for file in (run.path / "figures").iterdir()
    }


def test_other_saes_of_the_evaluation_are_in_the_figures_and_their_names_are_text(
    evaluated,
) -> None:
    text = section(evaluated(*RESULTS))
    assert (
        "multi, TopK" in text
        and "relu &lt;b&gt;" in text
        and "mean +40.0%" in text
        and "<b>" not in text
    )


@pytest.mark.parametrize("name", RESULTS)
def test_one_evaluation_alone_names_the_command_that_adds_the_others(evaluated, name) -> None:
    text = section(evaluated(name))
    assert "Not run yet" in text and codes.PARTS[0].group.title in text
    others = [other for other in RESULTS if other != name]
    assert f"ksparse eval demo {' '.join(others)}" in text


def test_a_run_without_these_evaluations_has_one_line_for_them(make_run) -> None:
    text = section(make_run())
    assert (
        "ksparse eval demo refinement progressive latents subspaces" in text
        and "<table" not in text
        and "<figure" not in text
    )


@pytest.mark.parametrize(
    "changes",
    [
        {
            "histogram": None,
            "topk": [],
            "density_histogram": None,
            "effective_histogram": {"edges": [], "counts": []},
            "along_order": None,
            "recurring": None,
            "sides": None,
        },
        {
            "beside": None,
            "own": None,
            "threshold": None,
            "density_fit": {},
            "importance_fit": {"margin": {"value": None, "se": None}},
            "by_direction": {},
            "effective_tokens": None,
        },
        {
            "histogram": {"edges": EDGES, "counts": [0] * 160},
            "topk": [{"k": 1}],
            "cut": None,
            "shift_mean": None,
        },
    ],
)
def test_results_with_missing_or_null_entries_still_make_a_page(evaluated, changes) -> None:
    run = evaluated(*RESULTS, changes=changes)
    assert_inert(Page(report.write(run).read_text(encoding="utf-8")))
    for picture in draw_all(RunSource(run), codes.PARTS):
        assert "".join(ElementTree.fromstring(picture.svg).itertext()).strip()


def test_the_commands_at_the_end_run_the_evaluations_again(evaluated) -> None:
    page = report.write(evaluated("refinement")).read_text(encoding="utf-8")
    assert re.search(r"ksparse eval runs/again [a-z0-9_ ]*refinement", page)


def test_the_better_fit_needs_two_standard_errors(evaluated) -> None:
    fit = copy.deepcopy(FIT)
    assert "the Gaussian fits better, by 0.100 ± 0.020" in latent_statistics.compare_fits(fit)
    fit["margin"] = {"value": -0.01, "se": 0.02}
    assert "the Laplace fits no worse than the other" in latent_statistics.compare_fits(fit)
