"""The table of numbers, what its results were measured on, and how numbers are written.

    NumberGroup, NumberRow   which numbers a page shows, beside what, how to read them
    build_table              groups and a run -> cells
    describe_settings        text, checkpoint and options of the results
    format_*                 numbers as text

The groups themselves live in the sections that show them (`report.sections`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ksparse.report.source import Number, RunSource

NumberFormat = Literal["number", "percent", "count"]


@dataclass(frozen=True)
class NumberRow:
    """One number of a result.

    Attributes:
        label: what the number is called.
        key: its key in the result.
        format: how to write it.
        compare: what to compare it with: a sentence, or a function that makes one of the run's
            other numbers.
        reading: how to read it, a sentence or two.
        absent: why a result has no value under this key.
        key_number: whether it is shown before the reader asks for all numbers.
    """

    label: str
    key: str
    format: NumberFormat
    compare: str | Callable[[RunSource], str]
    reading: str
    absent: str = "Not in this result."
    key_number: bool = False


@dataclass(frozen=True)
class NumberGroup:
    """The numbers of one evaluation, under a title."""

    eval: str
    title: str
    rows: tuple[NumberRow, ...]


@dataclass(frozen=True)
class Cell:
    """A row as the page shows it."""

    row: NumberRow
    number: Number | None
    value: str
    se: str
    compare: str


def compare_with(
    name: str, number_format: NumberFormat, **words: str
) -> Callable[[RunSource], str]:
    """Return a comparison with other numbers of a result, those that it has.

    Args:
        name: the evaluation.
        number_format: how to write the numbers.
        words: what each number is, by its key.
    """

    def compare(source: RunSource) -> str:
        numbers = ((source.number(name, key), text) for key, text in words.items())
        return "; ".join(
            f"{format_brief(number.value, number_format)}: {text}"
            for number, text in numbers
            if number is not None
        )

    return compare


def build_table(
    source: RunSource, groups: Iterable[NumberGroup], *, skip_missing: bool = False
) -> list[dict[str, Any]]:
    """Return the groups with their cells.

    Args:
        source: the run.
        groups: the groups to show.
        skip_missing: leave out rows that have no value, instead of saying so.
    """
    table = []
    for group in groups:
        cells = [make_cell(source, group, row) for row in group.rows]
        table.append(
            {
                "group": group,
                "cells": [cell for cell in cells if cell.number is not None or not skip_missing],
            }
        )
    return table


def make_cell(source: RunSource, group: NumberGroup, row: NumberRow) -> Cell:
    """Return a row's number in a run, as text, with what it is compared with."""
    number = source.number(group.eval, row.key)
    compare = row.compare if isinstance(row.compare, str) else row.compare(source)
    if number is None:
        return Cell(row, None, "", "", compare)
    value, se = format_estimate(number, row.format)
    return Cell(row, number, value, se, compare)


# ---- what results were measured on


def describe_settings(source: RunSource, groups: Iterable[NumberGroup]) -> list[dict[str, Any]]:
    """Return what the results were measured on, once for all results measured on the same."""
    entries: list[dict[str, Any]] = []
    for group in groups:
        result = source.result(group.eval)
        if result is None:
            continue
        facts = _setting_facts(source, result)
        entry = next((entry for entry in entries if entry["facts"] == facts), None)
        if entry is None:
            entry = {"titles": [], "facts": facts, "notes": [], "options": {}}
            entry["sentence"] = _describe_setting(source, result)
            entries.append(entry)
        entry["titles"].append(group.title)
        entry["options"][group.eval] = _set_options(result)
        entry["notes"] += [note for note in result.get("notes") or [] if note not in entry["notes"]]
    return [
        {
            "titles": entry["titles"],
            "sentence": entry["sentence"],
            "facts": entry["facts"] | _format_options(entry["options"]),
            "notes": entry["notes"],
        }
        for entry in entries
    ]


def _describe_setting(source: RunSource, result: dict[str, Any]) -> str:
    """Return the amount of text or of tasks that a result is of, and the checkpoint."""
    tokens, documents, tasks = (
        result.get(f"n_{name}") for name in ("tokens", "documents", "tasks")
    )
    parts = []
    if tokens is not None:
        of = f" from {format_plain(documents)} documents" if documents is not None else ""
        parts.append(f"{format_plain(tokens)} tokens{of}")
    if tasks is not None:
        suite = result.get("suite")
        parts.append(
            f"{format_plain(tasks)} tasks"
            + (f" of the suite {format_plain(suite)}" if suite else "")
        )
    step = _describe_step(source, result.get("checkpoint"))
    if step:
        parts.append(f"the checkpoint of {step}")
    return "; ".join(parts)


def _format_options(options: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Return the options that all evaluations share, then those of each evaluation alone."""
    shared = {
        key: value
        for key, value in next(iter(options.values())).items()
        if all(of_one.get(key) == value for of_one in options.values())
    }
    alone = {
        f"Options of {name} alone": {k: v for k, v in of_one.items() if k not in shared}
        for name, of_one in options.items()
    }
    return {
        label: format_plain(table)
        for label, table in ({"Options": shared} | alone).items()
        if table
    }


def _set_options(result: dict[str, Any]) -> dict[str, Any]:
    options = result.get("options") or {}
    return {key: value for key, value in options.items() if value not in (None, "")}


def _setting_facts(source: RunSource, result: dict[str, Any]) -> dict[str, str]:
    facts = {
        "Text": result.get("text"),
        "Tokens": result.get("n_tokens"),
        "Documents": result.get("n_documents"),
        "Suite of tasks": result.get("suite"),
        "Tasks": result.get("n_tasks"),
        "Checkpoint": _describe_step(source, result.get("checkpoint")),
        "Positions": result.get("policy"),
    }
    return {
        key: format_plain(value) for key, value in facts.items() if value not in (None, "", {}, [])
    }


def _describe_step(source: RunSource, step: Any) -> str | None:
    if step is None:
        return None
    last = source.metrics[-1]["step"] if source.metrics else step
    if step == last:
        return f"step {format_plain(step)}"
    return f"step {format_plain(step)}, though training continued to step {format_plain(last)}"


# ---- how numbers are written


def format_estimate(number: Number, number_format: NumberFormat) -> tuple[str, str]:
    """Return a value and its standard error ("" without one).

    The value has the digits that its standard error leaves meaningful.
    """
    scale, unit = (100, " %") if number_format == "percent" else (1, "")
    value, se = number.value * scale, (number.se or 0) * scale
    if number_format == "count":
        return f"{value:,.0f}", "" if number.se is None else f"± {se:,.0f}"
    if not se:
        return f"{format_significant(value)}{unit}", "" if number.se is None else "± 0"
    digits = decimal_places(se, 2 if f"{se:e}".startswith("1") else 1)
    return f"{value:,.{digits}f}{unit}", f"± {se:.{digits}f}"


def format_with_se(number: Number, number_format: NumberFormat = "number") -> str:
    """Return a value and its standard error as one text."""
    return " ".join(part for part in format_estimate(number, number_format) if part)


def format_brief(value: float, number_format: NumberFormat) -> str:
    """Return a value with at most three significant digits."""
    if number_format == "percent":
        return format_percent(value)
    return f"{value:,.0f}" if number_format == "count" else format_significant(value)


def format_percent(share: float) -> str:
    """Return a share in per cent with two or three significant digits."""
    return f"{100 * share:.{min(4, decimal_places(100 * share, 2))}f} %"


def format_significant(value: float, digits: int = 3) -> str:
    """Return a value with so many significant digits, never in exponent form."""
    return f"{value:,.{decimal_places(value, digits)}f}"


def format_amount(count: float) -> str:
    """Return a count, with "million" or "billion" where it is large."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if count >= size:
            return f"{count / size:.3g}{word}"
    return f"{count:,.0f}"


def format_duration(seconds: float) -> str:
    """Return seconds as seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def format_plain(value: Any) -> str:
    """Return any JSON value as one line of text."""
    if isinstance(value, dict):
        return " · ".join(
            f"{key} {format_plain(item)}" for key, item in value.items() if item not in (None, "")
        )
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_plain, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def decimal_places(value: float, digits: int) -> int:
    """Return the decimal places that show `digits` significant digits, at most eight."""
    return 0 if value == 0 else min(8, max(0, digits - 1 - math.floor(math.log10(abs(value)))))
