"""Compare the results of several SAEs, if they are of the same text, positions and baselines.

check(results)    raise InputError, naming what differs
table(results)    one row for each SAE, the best first
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ksparse.errors import InputError
from ksparse.evals.statistics import Value

NAMES = ("downstream", "stats")
"""The evaluations that a comparison is made of."""
COLUMNS = {
    "ce_delta": ("downstream", 1),
    "kl": ("downstream", 1),
    "recovered": ("downstream", -1),
    "explained_variance": ("stats", -1),
    "nmse": ("stats", 1),
    "l0": ("stats", 0),
    "dead_fraction": ("stats", 0),
}
"""{column: (its evaluation, order)}: 1 if less is better, -1 if more is, 0 for what is not ranked
but says what the others cost."""
_COMMON_FIELDS = ("lm", "site", "text", "policy", "n_tokens", "n_documents")
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


def table(results: Results, normalizations: Mapping[str, str], by: str = "") -> list[ComparisonRow]:
    """Return a row for each SAE, the best first.

    Args:
        results: results of the SAEs.
        normalizations: the input normalization of each SAE. `nmse` is of normalized activations, so
            it is left out where these differ.
        by: the column to rank by; by default the first column.

    Raises:
        InputError: if the results cannot be compared, or `by` is not a column that is ranked.
    """
    check(results)
    first = next(iter(results.values()))
    columns = [
        key
        for key, (name, _) in COLUMNS.items()
        if name in first and not (key == "nmse" and len(set(normalizations.values())) > 1)
    ]
    by = by or columns[0]
    if by not in columns or not COLUMNS[by][1]:
        raise InputError(
            f"SAEs are not ranked by {by!r}; there are "
            f"{', '.join(key for key in columns if COLUMNS[key][1])}"
        )
    rows = [
        ComparisonRow(label, {key: by_name[COLUMNS[key][0]][key] for key in columns})
        for label, by_name in results.items()
    ]

    def rank(row: ComparisonRow) -> float:
        value = row.values[by]["value"]
        return math.inf if value is None else COLUMNS[by][1] * value

    return sorted(rows, key=rank)


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
