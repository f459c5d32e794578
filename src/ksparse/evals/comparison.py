"""Compare the results of several SAEs, if they are of the same text, positions and baselines.

check(results)          raise InputError, naming what differs
table(results)          one row for each SAE, the best first
differences(results)    what each SAE has more than one of them, paired by document
SAEComparison           both, as a person reads them and as a DataFrame

In one pass all SAEs read the same documents, and a new number knows what each document adds to its
error (`evals.statistics.Estimate`). A difference is therefore far more certain than the two numbers
look side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ksparse import display
from ksparse.errors import InputError
from ksparse.evals import statistics
from ksparse.evals.statistics import Value

COLUMNS: dict[str, dict[str, int]] = {
    "downstream": {"ce_delta": 1, "kl": 1, "recovered": -1},
    "own_loss": {"loss_delta": 1, "recovered": -1},
    "stats": {"explained_variance": -1, "nmse": 1, "l0": 0, "dead_fraction": 0},
    "probes": {"probe_loss": 1, "gain_over_channels": -1},
    "n2g": {"precision": -1, "recall": -1, "f1": -1},
    "explained_loss": {"ce_n2g": 1, "delta_to_bigram": 1},
    "ablation": {"ablation_sparsity": 1, "kl": 0},
}
"""{evaluation: {column: order}}: 1 if less is better, -1 if more is, 0 for what is not ranked but
says what the others cost. Of other evaluations all numbers are columns, none of them ranked. Of
ablation sparsity less is sparser: it is the share of logits that change."""
_COMMON_FIELDS = ("lm", "lm_weights", "site", "text", "policy", "n_tokens", "n_documents")
_IGNORED_OPTIONS = ("device", "budget")  # the sizes that a budget stands for are compared

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{SAE's name: {evaluation's name: result}}."""


class ComparisonRow(NamedTuple):
    """One SAE: its name and its values by column."""

    name: str
    values: dict[str, Value]


def check(results: Results) -> None:
    """Check that results can be compared.

    Args:
        results: results of at least one SAE, new or read from a run.

    Raises:
        InputError: if they are not of the same evaluations, on the same text, at the same
            positions, with the same options.
    """
    (first, reference), *others = results.items()
    for other, by_name in others:
        if set(reference) != set(by_name):
            raise InputError(
                f"{first} and {other} cannot be ranked: of one there are results of "
                f"{', '.join(sorted(reference))}, of the other of {', '.join(sorted(by_name))}"
            )
        for name in reference:
            a, b = _conditions(reference[name]), _conditions(by_name[name])
            unequal = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
            if unequal:
                differences = "; ".join(
                    f"{key} is {a.get(key)!r} of one and {b.get(key)!r} of the other"
                    for key in unequal[:4]
                )
                raise InputError(
                    f"{first} and {other} cannot be ranked by {name}: {differences}. Evaluate them "
                    "again and together: leave out --results saved, "
                    "and name with --like whose text and positions are to be used for all"
                )


class ComparedNumber(NamedTuple):
    """A number that is compared: its evaluation, its key there, its order, and how it is called."""

    evaluation: str
    key: str
    order: int
    name: str


def columns(results: Results, normalizations: Mapping[str, str]) -> list[ComparedNumber]:
    """Return the numbers that all SAEs have.

    Two evaluations may have numbers of one name; the later is called EVALUATION.KEY.

    Args:
        results: results of the SAEs.
        normalizations: the input normalization of each SAE. `nmse` is of normalized activations, so
            it is left out where these differ.
    """
    found: list[ComparedNumber] = []
    alike = len(set(normalizations.values())) <= 1
    for evaluation, first in next(iter(results.values())).items():
        for key, order in COLUMNS.get(evaluation, _all_numbers(first)).items():
            if not all(_is_number(by_name[evaluation].get(key)) for by_name in results.values()):
                continue
            if key == "nmse" and not alike:
                continue
            taken = any(column.name == key for column in found)
            name = f"{evaluation}.{key}" if taken else key
            found.append(ComparedNumber(evaluation, key, order, name))
    return found


def table(results: Results, normalizations: Mapping[str, str], by: str = "") -> list[ComparisonRow]:
    """Return a row for each SAE, the best first.

    Args:
        results: results of the SAEs.
        normalizations: as in `columns`.
        by: the column to rank by; by default the first that is ranked. Without any, SAEs stay in
            their order.

    Raises:
        InputError: if the results cannot be compared, or `by` is not a column that is ranked.
    """
    check(results)
    found = columns(results, normalizations)
    ranked = {column.name: column for column in found if column.order}
    if by and by not in ranked:
        raise InputError(
            f"SAEs are not ranked by {by!r}; there are {', '.join(ranked) or 'no columns'}"
        )
    rows = [
        ComparisonRow(
            label, {column.name: by_name[column.evaluation][column.key] for column in found}
        )
        for label, by_name in results.items()
    ]
    if not ranked:
        return rows
    best = ranked[by] if by else next(iter(ranked.values()))

    def rank(row: ComparisonRow) -> float:
        value = row.values[best.name]["value"]
        return math.inf if value is None else best.order * value

    return sorted(rows, key=rank)


Differences = dict[str, dict[str, float | bool | None]]
"""{column: {"value", "se", "paired"}}."""


def differences(
    results: Results, normalizations: Mapping[str, str], against: str
) -> dict[str, Differences]:
    """Return what each other SAE has more than one of them.

    Where both numbers are of the same documents, the standard error is that of the paired
    difference; where each is of its own latents, or read from a file, that of independent numbers.

    Args:
        results: results of the SAEs, which `check` has passed.
        normalizations: as in `columns`.
        against: the SAE that the others are compared with.

    Returns:
        {SAE: {column: {"value", "se", "paired"}}}, without `against`. Probe losses of single tasks
        are columns too, "TASK.loss".
    """
    found, reference = columns(results, normalizations), results[against]
    return {
        label: {
            column.name: statistics.difference(
                by_name[column.evaluation][column.key], reference[column.evaluation][column.key]
            )
            for column in found
        }
        | _task_differences(by_name.get("probes", {}), reference.get("probes", {}))
        for label, by_name in results.items()
        if label != against
    }


def _task_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Differences:
    """Return the differences of the loss of each probe task that both have."""
    tasks, others = one.get("tasks"), other.get("tasks")
    if not isinstance(tasks, Mapping) or not isinstance(others, Mapping):
        return {}
    return {
        f"{name}.loss": statistics.difference(task["loss"], others[name]["loss"])
        for name, task in tasks.items()
        if name in others
    }


@dataclass(frozen=True, repr=False)
class SAEComparison:
    """SAEs side by side on the same text, and their differences to one of them.

    Attributes:
        rows: the numbers of each SAE, the best first.
        differences: {SAE: {number: {"value", "se", "paired"}}}, without the reference.
        against: the SAE that the others are compared with.
        results: {SAE: {evaluation: result}}.

    Example:
        >>> def numbers(kl):
        ...     return {"downstream": {"kl": {"value": kl, "se": 0.1}}}
        >>> results = {"a": numbers(2.0), "b": numbers(1.0)}
        >>> found = SAEComparison.of(results, {"a": "", "b": ""}, "a")
        >>> found.differences["b"]["kl"]["value"]
        -1.0
        >>> [row.name for row in found.rows]
        ['b', 'a']
    """

    rows: list[ComparisonRow]
    differences: dict[str, Differences]
    against: str
    results: Results

    @staticmethod
    def of(
        results: Results, normalizations: Mapping[str, str], against: str, by: str = ""
    ) -> SAEComparison:
        """Compare results; the arguments are those of `table` and `differences`."""
        rows = table(results, normalizations, by)
        return SAEComparison(rows, differences(results, normalizations, against), against, results)

    def to_frame(self) -> Any:
        """Return a pandas DataFrame: sae, number, value, se; difference, difference_se, paired.

        Raises:
            InputError: if pandas is not installed.
        """
        empty = {"value": None, "se": None, "paired": None}
        lines = []
        for row in self.rows:
            for key, value in row.values.items():
                more = self.differences.get(row.name, {}).get(key, empty)
                line = {"sae": row.name, "number": key, **value, "difference": more["value"]}
                lines.append(line | {"difference_se": more["se"], "paired": more["paired"]})
        return display.to_frame(lines)

    def tables(self) -> list[display.Table]:
        """Return the table of values and, if there are several SAEs, that of differences."""
        keys = list(self.rows[0].values)
        values = [
            [row.name, *map(display.format_estimate, row.values.values())] for row in self.rows
        ]
        notes = ["± one standard error over documents (of n2g, over latents)."]
        found = [display.Table("", ["", *keys], values, notes)]
        if self.differences:
            more = [row.name for row in self.rows if row.name in self.differences]
            entries = {name: [self.differences[name][key] for key in keys] for name in more}
            unpaired = any(not one["paired"] for cells in entries.values() for one in cells)
            note = "± one standard error of the difference on the same documents." + (
                " *: of independent numbers, which is more." if unpaired else ""
            )
            cells = [[name, *map(_signed, entries[name])] for name in more]
            title = f"more than {self.against}"
            found.append(display.Table(title, ["", *keys], cells, [note]))
        return found

    def notes(self) -> list[str]:
        """Return the notes of the results, each with its SAE's name unless it is of all."""
        by_name = {
            name: list(dict.fromkeys(n for one in results.values() for n in one.get("notes", ())))
            for name, results in self.results.items()
        }
        shared = set.intersection(*map(set, by_name.values()))
        first = next(iter(by_name.values()))
        return [f"note: {note}" for note in first if note in shared] + [
            f"note: {name}: {note}"
            for name, notes in by_name.items()
            for note in notes
            if note not in shared
        ]

    def __repr__(self) -> str:
        return "\n".join(["\n\n".join(map(str, self.tables())), *self.notes()])

    def _repr_html_(self) -> str:
        notes = display.Table("", (), (), self.notes()).html()
        return "".join(one.html() for one in self.tables()) + notes


def _signed(difference: Mapping[str, float | bool | None]) -> str:
    value = difference["value"]
    if value is None:
        return "-"
    number = display.format_estimate({"value": value, "se": difference["se"]})
    text = number if number.startswith("-") else f"+{number}"
    return text if difference["paired"] else f"{text} *"


def _all_numbers(result: Mapping[str, Any]) -> dict[str, int]:
    return {key: 0 for key, value in result.items() if _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, dict) and set(value) == {"value", "se"}


def _conditions(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result depends on besides the SAE."""
    options = {
        f"options.{key}": value
        for key, value in result.get("options", {}).items()
        if key not in _IGNORED_OPTIONS
    }
    policy = {f"policy.{key}": value for key, value in (result.get("policy") or {}).items()}
    common = {key: result.get(key) for key in _COMMON_FIELDS if key != "policy"}
    return {**common, **policy, **options}
