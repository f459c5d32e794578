"""Results of several SAEs side by side: only if they are of the same text, positions and baselines.

check(results)    raises InputError, naming what differs
table(results)    the best first, each value with its standard error
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ksparse.errors import InputError
from ksparse.evals.statistics import Value

NAMES = ("downstream", "stats")
COLUMNS = {
    "ce_delta": ("downstream", 1),
    "kl": ("downstream", 1),
    "recovered": ("downstream", -1),
    "explained_variance": ("stats", -1),
    "nmse": ("stats", 1),
    "l0": ("stats", 0),
    "dead_fraction": ("stats", 0),
}
"""What is compared: the evaluation that measures it, and whether less (1) or more (-1) of it is
better; 0: it says what the others cost."""
_SAME = ("lm", "site", "text", "policy", "n_tokens", "n_documents")
_HARMLESS = (
    "device",
    "budget",
)  # of an evaluation's options; the budget's sizes are written out beside it

Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""{SAE's name: {evaluation's name: result}}."""


class ComparisonRow(NamedTuple):
    """One SAE: its values, by column."""

    name: str
    values: dict[str, Value]


def check(results: Results) -> None:
    """Raise InputError where results are not of the same evaluations, on the same text, at the same
    positions, against the same baselines."""
    (first, ours), *others = results.items()
    for other, theirs in others:
        if set(ours) != set(theirs):
            raise InputError(
                f"{first} and {other} cannot be ranked: of one there are results of "
                f"{', '.join(sorted(ours))}, of the other of "
                f"{', '.join(sorted(theirs))}"
            )
        for name in ours:
            mine, its = _facts(ours[name]), _facts(theirs[name])
            unlike = [
                key for key in sorted(mine.keys() | its.keys()) if mine.get(key) != its.get(key)
            ]
            if unlike:
                wrong = "; ".join(
                    f"{key} is {mine.get(key)!r} of one and {its.get(key)!r} of the other"
                    for key in unlike[:4]
                )
                raise InputError(
                    f"{first} and {other} cannot be ranked by {name}: {wrong}. Evaluate them anew "
                    "and together: leave out --results saved, "
                    "and name with --like whose text and positions are to be used for all"
                )


def table(results: Results, normalizations: Mapping[str, str], by: str = "") -> list[ComparisonRow]:
    """Return a row for each SAE, the best by column `by` first (the first column there is, if not
    given).

    normalizations: each SAE's. nmse is of normalised activations, so it is left out where these
    differ.
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
        ComparisonRow(label, {key: found[COLUMNS[key][0]][key] for key in columns})
        for label, found in results.items()
    ]

    def rank(row: ComparisonRow) -> float:
        value = row.values[by]["value"]
        return math.inf if value is None else COLUMNS[by][1] * value

    return sorted(rows, key=rank)


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result depends on besides the SAE."""
    options = {
        f"options.{key}": value
        for key, value in result.get("options", {}).items()
        if key not in _HARMLESS
    }
    policy = {f"policy.{key}": value for key, value in (result.get("policy") or {}).items()}
    return {**{key: result.get(key) for key in _SAME if key != "policy"}, **policy, **options}
