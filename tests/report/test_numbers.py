"""The table of numbers, and how numbers are written."""

from __future__ import annotations

import pytest

from ksparse.report import numbers
from ksparse.report.source import Number, Source


@pytest.mark.parametrize("value, se, kind, written", [
    (0.09613, 0.0009009, "number", ("0.0961", "± 0.0009")),
    (0.9053851, 0.00088, "percent", ("90.54 %", "± 0.09")),
    (1.972, 0.013, "number", ("1.972", "± 0.013")),
    (16.0, 0.0, "number", ("16.0", "± 0")),
    (0.8656, None, "number", ("0.866", "")),
    (0.0, 0.0, "percent", ("0 %", "± 0")),
    (-0.012, 0.004, "number", ("-0.012", "± 0.004")),
    (12_345.6, 20.0, "number", ("12,346", "± 20")),
])
def test_a_value_has_the_digits_that_its_standard_error_leaves(value, se, kind, written) -> None:
    assert numbers.written(Number(value, se), kind) == written


def test_every_row_has_a_key_of_its_own_and_says_how_to_read_it() -> None:
    rows = [(group.eval, row) for group in numbers.GROUPS for row in group.rows]
    assert len({(name, row.key) for name, row in rows}) == len(rows)
    assert all(row.reading.endswith(".") and row.label for _, row in rows)


def test_results_measured_on_the_same_are_described_once(make_run) -> None:
    found = numbers.settings(Source(make_run()))
    assert len(found) == 1 and len(found[0]["titles"]) == 2
    assert found[0]["facts"]["Tokens"] == "29,289" and found[0]["notes"] == ["only 70 documents"]


@pytest.mark.parametrize("count, words", [(999, "999"), (200_704, "200,704"), (1_500_000, "1.5 million"), (4e10, "40 billion")])
def test_amounts_are_words(count, words) -> None:
    assert numbers.amount(count) == words


@pytest.mark.parametrize("share, shown", [(1.0, "100 %"), (0.9134, "91 %"), (0.0371, "3.7 %"), (0.00012, "0.012 %"), (0, "0 %")])
def test_shares_are_per_cent(share, shown) -> None:
    assert numbers.percent(share) == shown
