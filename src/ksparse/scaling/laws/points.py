"""Points of a law out of CSV files: read, checked, and the runs of a sweep put together cell by
cell.

read(file, needed)     columns of a CSV as arrays; what cannot be a point is refused with its line
cells(points, by)      rows that differ only by seed become one, with their geometric mean and their
                       count
best_lr(rows, by)      of the runs of each cell that differ in learning rate, those of the lowest
                       loss
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import InputError, unknown
from ksparse.scaling.laws.forms import Columns, LawKind

WORDS = ("run", "activation", "lm", "converged")
"""Columns that are words; all others are numbers."""


@dataclass(frozen=True)
class Cells:
    """Points to fit: their variables, the target's value, and how many rows each stands for.

    weight: how much each counts; they sum to the number of independent measurements. cluster: rows
    of one measurement have one number.
    seed_scatter: standard deviation of the logarithm among rows of one point.
    """

    columns: dict[str, np.ndarray]
    value: np.ndarray
    count: np.ndarray
    weight: np.ndarray
    cluster: np.ndarray
    seed_scatter: float | None = None

    def __len__(self) -> int:
        return len(self.value)


def read(
    file: Path | str, needed: Sequence[str], *, positive: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """Return the columns of a CSV, words as str and numbers as float64, an empty cell as NaN; raise
    InputError where a needed one is missing.

    positive: columns whose every number must be finite and above 0.
    """
    header, rows = _rows(Path(file))
    missing = [name for name in needed if name not in header]
    if missing:
        header_list = f"its columns are {', '.join(header)}"
        error = unknown(f"{file} has no column", missing[0], header, header_list)
        raise InputError(f"{error} The header must name {', '.join(needed)}")
    if not rows:
        raise InputError(
            f"{file} has a header and no rows; each row is one point with {', '.join(needed)}"
        )
    found = {}
    for at, name in enumerate(header):
        cells = [row[at].strip() for _, row in rows]
        found[name] = (
            np.array(cells)
            if name in WORDS
            else np.array(
                [
                    _number(file, line, name, cell, name in needed)
                    for (line, _), cell in zip(rows, cells)
                ]
            )
        )
    for name in positive:
        wrong = np.flatnonzero(~(np.isfinite(found[name]) & (found[name] > 0)))
        if len(wrong):
            line, row = rows[wrong[0]]
            raise InputError(
                f"{file} line {line}: {name} is {row[header.index(name)].strip() or 'empty'}; laws "
                "are fitted to logarithms, so it must be a "
                f"number above 0. Correct the row or take it out"
            )
    return found


def _rows(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header and (line, cells) of each row that is not empty."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; give a CSV with a header") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file} cannot be read as UTF-8 text: {error}; give a CSV with a header"
        ) from None
    reader = csv.reader(text.splitlines())
    lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    if not lines:
        raise InputError(f"{file} is empty; its first line must name the columns, such as n,k,loss")
    header = [cell.strip() for cell in lines[0][1]]
    if len(set(header)) < len(header):
        raise InputError(
            f"{file} names a column twice: {', '.join(header)}; give each a name of its own"
        )
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{file} line {line} has {len(row)} cells; the header names {len(header)} columns: "
                f"{', '.join(header)}"
            )
    return header, lines[1:]


def _number(file: Path | str, line: int, name: str, cell: str, needed: bool) -> float:
    try:
        return float(cell) if cell else math.nan
    except ValueError:
        if not needed:
            return math.nan  # a column that no law reads
        raise InputError(f"{file} line {line}: {name} is {cell!r}, which is not a number") from None


def cells(kind: LawKind, points: Columns) -> Cells:
    """Return one point for each value of the law's variables: the geometric mean of its rows, which
    then differ by seed alone.

    Of a law with clusters each row is a point, and the rows of a cluster weigh together as much as
    one.
    """
    by = [name for name in (*kind.variables, kind.group) if name is not None and name in points]
    logs = np.log(np.asarray(points[kind.target], float))
    if kind.cluster is not None and kind.cluster in points:
        _, cluster, sizes = np.unique(points[kind.cluster], return_inverse=True, return_counts=True)
        return Cells(
            {name: np.asarray(points[name]) for name in by},
            np.exp(logs),
            np.ones(len(logs)),
            1 / sizes[cluster],
            cluster,
        )
    key = np.array([_rank(points[name]) for name in by]).T
    _, first, place, count = np.unique(
        key, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    place = place.reshape(-1)
    mean = np.bincount(place, logs) / count
    spare = int((count - 1).sum())
    scatter = math.sqrt(float(((logs - mean[place]) ** 2).sum()) / spare) if spare else None
    return Cells(
        {name: np.asarray(points[name])[first] for name in by},
        np.exp(mean),
        count.astype(float),
        count / count.mean(),
        np.arange(len(count)),
        scatter,
    )


def best_lr(rows: Columns, by: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the rows of each group `by` with the learning rate that has the lowest loss (geometric
    mean over its rows)."""
    if "lr" not in rows:
        return dict(rows)
    group, rate = _number_of(rows, by), _number_of(rows, [*by, "lr"])
    mean = np.bincount(rate, np.log(rows["loss"])) / np.bincount(rate)
    least = np.full(group.max() + 1, np.inf)
    np.minimum.at(least, group, mean[rate])
    return take(rows, mean[rate] <= least[group])


def take(rows: Columns, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Return the chosen rows of every column."""
    return {name: column[chosen] for name, column in rows.items()}


def _number_of(rows: Columns, by: Sequence[str]) -> np.ndarray:
    """Return for each row the number of its group of equal values in the columns `by`."""
    return np.unique(np.array([_rank(rows[name]) for name in by]).T, axis=0, return_inverse=True)[
        1
    ].reshape(-1)


def _rank(column: Any) -> np.ndarray:
    """Return the rank of each value, so that words and numbers can be sorted together."""
    return np.unique(np.asarray(column), return_inverse=True)[1].reshape(-1)
