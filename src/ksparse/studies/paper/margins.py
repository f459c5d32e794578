"""A claim of the paper, and the arithmetic of margins."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ksparse.studies.study import Estimate, Figure, StudyCurve, power_law


@dataclass(frozen=True)
class PaperClaim:
    """A claim of the paper, and what is seen of it here.

    Attributes:
        name: A short name.
        claim: The claim, a sentence.
        paper: What the paper saw, with its numbers and where they are.
        here: What is seen here.
        margin: Above zero where the claim holds, with its standard error.
        figures: Drawn beside it.
    """

    name: str
    claim: str
    paper: str
    here: str
    margin: Estimate
    figures: list[Figure] = field(default_factory=list)


def unknown() -> Estimate:
    """Return a number that is not known."""
    return {"value": None, "se": None}


def mean(values: Sequence[float]) -> Estimate:
    """Return a mean with its standard error; none of fewer than two values."""
    if not values:
        return unknown()
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": statistics.fmean(values), "se": se}


def difference(one: Estimate, other: Estimate) -> Estimate:
    """Return one - other; its standard error takes them as independent."""
    if one["value"] is None or other["value"] is None:
        return unknown()
    known = one["se"] is not None and other["se"] is not None
    return {
        "value": one["value"] - other["value"],
        "se": math.hypot(one["se"] or 0.0, other["se"] or 0.0) if known else None,
    }


def slope(x: Sequence[float], curve: StudyCurve) -> Estimate:
    """Return the exponent of a power law through a curve; unknown if it has values at or below
    0."""
    values = [value for value in curve.y if value is not None and value > 0]
    if len(values) < len(x) or len(values) < 2:
        return unknown()
    exponent = power_law(x, values)["exponent"]
    return {"value": exponent["value"], "se": exponent["se"]}
