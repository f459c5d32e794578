"""Read the points of laws from CSV files, merge seeds, and keep the best learning rates.

read(file, needed)           columns of a CSV as arrays; a bad row is reported with its line
to_cells(law_kind, points)   rows that differ only by seed become one: geometric mean and count
best_lr(rows, by)            in each group, the rows of the learning rate with the lowest loss
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

WORDS = ("run", "activation", "lm", "site", "converged")
"""Columns that hold text; all others hold numbers."""


@dataclass(frozen=True)
class Cells:
    """The m points to fit.

    Attributes:
        columns: The variables by name, [m] each.
        value: The target [m].
        count: How many rows each point stands for, [m].
        weight: How much each point counts, [m]; the sum is the number of independent measurements.
        cluster: The number of the measurement that each point belongs to, [m].
        seed_scatter: The standard deviation of the target's logarithm among rows of one point.
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
    """Read the columns of a CSV: text as str, numbers as float64, an empty cell as NaN.

    Args:
        file: The CSV file, with a header.
        needed: Columns that must be there.
        positive: Columns whose every number must be finite and above 0.

    Raises:
        InputError: The file cannot be read, a column is missing, or a cell is not a usable number.
    """
    header, rows = _read_rows(Path(file))
    missing = [name for name in needed if name not in header]
    if missing:
        header_list = f"its columns are {', '.join(header)}"
        error = unknown(f"{file} has no column", missing[0], header, header_list)
        raise InputError(f"{error} The header must name {', '.join(needed)}")
    if not rows:
        raise InputError(
            f"{file} has a header and no rows; each row is one point with {', '.join(needed)}"
        )
    columns = {}
    for index, name in enumerate(header):
        texts = [row[index].strip() for _, row in rows]
        if name in WORDS:
            columns[name] = np.array(texts)
        else:
            lines = [line for line, _ in rows]
            columns[name] = np.array(
                [
                    _parse_number(file, line, name, text, name in needed)
                    for line, text in zip(lines, texts)
                ]
            )
    for name in positive:
        unusable = np.flatnonzero(~(np.isfinite(columns[name]) & (columns[name] > 0)))
        if len(unusable):
            line, row = rows[unusable[0]]
            raise InputError(
                f"{file} line {line}: {name} is {row[header.index(name)].strip() or 'empty'}; laws "
                "are fitted to logarithms, so it must be a number above 0. Correct the row or "
                "remove it"
            )
    return columns


def _read_rows(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the header, and (line number, cells) of each row that is not empty."""
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
            f"{file} names a column twice: {', '.join(header)}; give each its own name"
        )
    for line, row in lines[1:]:
        if len(row) != len(header):
            raise InputError(
                f"{file} line {line} has {len(row)} cells; the header names {len(header)} columns: "
                f"{', '.join(header)}"
            )
    return header, lines[1:]


def _parse_number(file: Path | str, line: int, name: str, text: str, needed: bool) -> float:
    try:
        return float(text) if text else math.nan
    except ValueError:
        if not needed:
            return math.nan  # no law reads this column
        raise InputError(f"{file} line {line}: {name} is {text!r}, which is not a number") from None


def to_cells(law_kind: LawKind, points: Columns) -> Cells:
    """Merge rows that agree in a law's variables, and so differ by seed alone.

    A point's value is the geometric mean of its rows. For a law with clusters each row is a point,
    and the rows of one cluster together weigh as much as one point.
    """
    by = [
        name
        for name in (*law_kind.variables, law_kind.group)
        if name is not None and name in points
    ]
    logs = np.log(np.asarray(points[law_kind.target], float))
    if law_kind.cluster is not None and law_kind.cluster in points:
        _, cluster, sizes = np.unique(
            points[law_kind.cluster], return_inverse=True, return_counts=True
        )
        return Cells(
            {name: np.asarray(points[name]) for name in by},
            np.exp(logs),
            np.ones(len(logs)),
            1 / sizes[cluster],
            cluster,
        )
    keys = np.array([_ranks(points[name]) for name in by]).T
    _, first, cell, count = np.unique(
        keys, axis=0, return_index=True, return_inverse=True, return_counts=True
    )
    cell = cell.reshape(-1)
    mean = np.bincount(cell, logs) / count
    freedom = int((count - 1).sum())
    scatter = math.sqrt(float(((logs - mean[cell]) ** 2).sum()) / freedom) if freedom else None
    return Cells(
        {name: np.asarray(points[name])[first] for name in by},
        np.exp(mean),
        count.astype(float),
        count / count.mean(),
        np.arange(len(count)),
        scatter,
    )


def best_lr(rows: Columns, by: Sequence[str]) -> dict[str, np.ndarray]:
    """Keep, in each group of equal `by`, the rows of the best learning rate.

    Best is the lowest geometric mean of the loss over a rate's rows.
    """
    if "lr" not in rows:
        return dict(rows)
    group, rate = _group_numbers(rows, by), _group_numbers(rows, [*by, "lr"])
    mean = np.bincount(rate, np.log(rows["loss"])) / np.bincount(rate)
    lowest = np.full(group.max() + 1, np.inf)
    np.minimum.at(lowest, group, mean[rate])
    return take(rows, mean[rate] <= lowest[group])


def take(rows: Columns, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Return the chosen rows (a mask or indices) of every column."""
    return {name: column[chosen] for name, column in rows.items()}


def _group_numbers(rows: Columns, by: Sequence[str]) -> np.ndarray:
    """Number the groups of rows that agree in the columns `by`; return each row's number."""
    keys = np.array([_ranks(rows[name]) for name in by]).T
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def _ranks(column: Any) -> np.ndarray:
    """Return the rank of each value, so that text and numbers can be sorted together."""
    return np.unique(np.asarray(column), return_inverse=True)[1].reshape(-1)
