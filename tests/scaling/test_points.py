"""CSV files: what cannot be a point is refused with its line."""

from __future__ import annotations

import numpy as np
import pytest

from ksparse.errors import InputError
from ksparse.scaling.laws.law import read_points
from ksparse.scaling.laws.points import best_lr


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty; its first line must name the columns"),
        ("\n\n", "is empty"),
        ("n,k,loss\n", "has a header and no rows"),
        (
            "n,kk,loss\n1,2,3\n",
            "has no column 'k'; did you mean 'kk'\\?.*The header must name n, k, loss",
        ),
        ("1,2,3\n4,5,6\n", "has no column 'n'; its columns are 1, 2, 3"),
        ("n,k,n,loss\n1,2,3,4\n", "names a column twice"),
        ("n,k,loss\n1,2\n", "line 2 has 2 cells; the header names 3 columns"),
        ("n,k,loss\n1,2,0.5\n1,2,many\n", "line 3: loss is 'many', which is not a number"),
        ("n,k,loss\n1,2,0.5\n2,2,nan\n", "line 3: loss is nan; laws are fitted to logarithms"),
        ("n,k,loss\n1,2,0.5\n2,2,inf\n", "line 3: loss is inf"),
        ("n,k,loss\n1,2,-0.5\n", "line 2: loss is -0.5"),
        ("n,k,loss\n1,2,\n", "line 2: loss is empty"),
        ("n,k,loss\n0,2,1\n", "line 2: n is 0"),
    ],
)
def test_a_file_that_has_no_points_says_what_is_wrong_and_where(tmp_path, text, message):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_points(tmp_path / "points.csv", "nk")


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="no.csv does not exist"):
        read_points(tmp_path / "no.csv", "nk")
    (tmp_path / "points.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        read_points(tmp_path / "points.csv", "nk")


def test_columns_are_read_by_name_in_any_order_and_others_passed_over(tmp_path):
    (tmp_path / "points.csv").write_text(
        "﻿ loss , note, n,k\n0.5,first,2048,8\n\n0.4,,4096,8\n", encoding="utf-8"
    )
    found = read_points(tmp_path / "points.csv", "nk")
    assert {name: column.tolist() for name, column in found.items()} == {
        "n": [2048, 4096],
        "k": [8, 8],
        "loss": [0.5, 0.4],
    }


def test_the_column_that_splits_a_law_is_read_where_there_is_one(tmp_path):
    (tmp_path / "points.csv").write_text("n,k,loss\n1,8,0.5\n")
    assert set(read_points(tmp_path / "points.csv", "n")) == {"n", "k", "loss"}
    (tmp_path / "points.csv").write_text("n,k,loss\n1,,0.5\n")
    with pytest.raises(InputError, match="line 2: k is empty"):
        read_points(tmp_path / "points.csv", "n")


def test_the_best_learning_rate_is_that_of_the_lowest_mean_over_seeds():
    rows = {
        "n": np.ones(6),
        "k": np.ones(6),
        "lr": np.array([1, 1, 2, 2, 3, 3.0]),
        "loss": np.array([0.5, 0.5, 0.3, 0.9, 0.4, 0.45]),
    }
    assert best_lr(rows, ("n", "k"))["loss"].tolist() == [0.4, 0.45]
