"""The table of numbers, and how numbers are written."""

from __future__ import annotations

import json

import pytest

from ksparse.report import tables
from ksparse.report.sections import codes, quality
from ksparse.report.source import Number, RunSource, is_number

from .conftest import ABLATION, EXPLAINED_LOSS, N2G, OPTIONS, PROBES

GROUPS = [part.group for part in quality.PARTS]
ALL_GROUPS = [part.group for part in (*quality.PARTS, *codes.PARTS)]


@pytest.mark.parametrize(
    "value, se, kind, written",
    [
        (0.09613, 0.0009009, "number", ("0.0961", "± 0.0009")),
        (0.9053851, 0.00088, "percent", ("90.54 %", "± 0.09")),
        (1.972, 0.013, "number", ("1.972", "± 0.013")),
        (16.0, 0.0, "number", ("16.0", "± 0")),
        (0.8656, None, "number", ("0.866", "")),
        (0.0, 0.0, "percent", ("0 %", "± 0")),
        (-0.012, 0.004, "number", ("-0.012", "± 0.004")),
        (12_345.6, 20.0, "number", ("12,346", "± 20")),
        (400, None, "count", ("400", "")),
        (2536.7, 200.3, "count", ("2,537", "± 200")),
    ],
)
def test_a_value_has_the_digits_that_its_standard_error_leaves(value, se, kind, written) -> None:
    assert tables.format_estimate(Number(value, se), kind) == written


def test_every_row_has_a_key_of_its_own_and_says_how_to_read_it() -> None:
    rows = [(group.eval, row) for group in ALL_GROUPS for row in group.rows]
    assert len({(name, row.key) for name, row in rows}) == len(rows)
    assert all(row.reading.endswith(".") and row.label for _, row in rows)


def test_results_measured_on_the_same_are_described_once(make_run) -> None:
    found = tables.describe_settings(RunSource(make_run(evals=("stats", "downstream"))), GROUPS)
    assert len(found) == 1 and len(found[0]["titles"]) == 2
    assert found[0]["facts"]["Tokens"] == "29,289" and found[0]["notes"] == ["only 70 documents"]


@pytest.mark.parametrize(
    "count, words",
    [(999, "999"), (200_704, "200,704"), (1_500_000, "1.5 million"), (4e10, "40 billion")],
)
def test_amounts_are_words(count, words) -> None:
    assert tables.format_amount(count) == words


@pytest.mark.parametrize(
    "share, shown",
    [(1.0, "100 %"), (0.9134, "91 %"), (0.0371, "3.7 %"), (0.00012, "0.012 %"), (0, "0 %")],
)
def test_shares_are_per_cent(share, shown) -> None:
    assert tables.format_percent(share) == shown


def test_options_that_results_share_are_written_once_and_the_others_by_their_names(
    make_run,
) -> None:
    run = make_run()
    run.eval_file("n2g").write_text(
        json.dumps(N2G | {"options": OPTIONS | {"latents": 400, "n2g_pad": ""}})
    )
    found = tables.describe_settings(RunSource(run), GROUPS)
    assert len(found) == 2 and [entry["facts"].get("Suite of tasks") for entry in found] == [
        None,
        "demo",
    ]
    assert (
        found[0]["facts"]["Options of n2g alone"] == "latents 400"
        and "latents" not in found[0]["facts"]["Options"]
    )
    assert not any("of stats" in key for key in found[0]["facts"])


def test_baselines_stand_beside_what_they_are_for(make_run) -> None:
    cells = {
        cell.row.key: cell.compare
        for entry in tables.build_table(RunSource(make_run()), GROUPS)
        for cell in entry["cells"]
    }
    assert cells["probe_loss"] == (
        "0.500: the best channel; 0.520: the best latent of an untrained SAE; 0.100: all channels together; "
        "0.693: the base rate alone"
    )
    assert (
        cells["recall"].startswith("1.4 %: ")
        and cells["ablation_sparsity"] == "40 %: a channel set to zero; 64 %: noise"
    )
    assert cells["effective_tokens"].startswith("32,000: ")


def test_baselines_that_are_null_are_not_mentioned(make_run) -> None:
    run = make_run()
    for name, result in (
        ("probes", PROBES),
        ("ablation", ABLATION),
        ("n2g", N2G),
        ("explained_loss", EXPLAINED_LOSS),
    ):
        run.eval_file(name).write_text(
            json.dumps(
                {
                    key: {"value": None, "se": None}
                    if isinstance(value, dict) and "value" in value
                    else value
                    for key, value in result.items()
                }
            )
        )
    groups = {
        entry["group"].eval: entry["cells"] for entry in tables.build_table(RunSource(run), GROUPS)
    }
    assert [cell.compare for cell in groups["probes"]][0] == "" and groups["ablation"][
        0
    ].compare == "64 %: noise"
    assert all(
        cell.number is None
        for name in ("probes", "ablation", "explained_loss")
        for cell in groups[name]
    )


@pytest.mark.parametrize(
    "value, is_one",
    [
        (3, True),
        (0.5, True),
        (-1e308, True),
        (10**400, False),
        (-(10**400), False),
        (float("nan"), False),
        (float("inf"), False),
        (True, False),
        ("3", False),
        (None, False),
    ],
)
def test_only_what_a_float_can_be_is_a_number(value, is_one):
    assert is_number(value) is is_one
