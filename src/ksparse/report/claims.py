"""Claims: what a good SAE shows, and whether a run's numbers say that this one does.

A Claim has a margin, which is above zero where the claim holds. It holds, or does not hold, where
the margin is more than two standard errors from zero. Claims live beside the evaluation whose
numbers decide them (`report.sections`); those of an evaluation that was not run are not shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ksparse.report.source import Number, RunSource
from ksparse.report.tables import NumberFormat, format_with_se

Verdict = Literal["holds", "does not hold", "unclear"]


@dataclass(frozen=True)
class Claim:
    """Something that a good SAE shows.

    Attributes:
        statement: the claim, a sentence.
        margin: a number above zero where the claim holds; None where the run cannot decide it.
        evidence: the numbers behind it, a sentence.
        if_not: what it means if the claim does not hold.
    """

    statement: str
    margin: Callable[[RunSource], Number | None]
    evidence: Callable[[RunSource], str]
    if_not: str | Callable[[RunSource], str]


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim as the page shows it."""

    statement: str
    verdict: Verdict
    evidence: str
    meaning: str


def judge_claims(source: RunSource, claims: Iterable[Claim]) -> list[ClaimVerdict]:
    """Return a verdict on each claim that the run's results can decide."""
    return [
        _judge(claim, margin, source)
        for claim in claims
        if (margin := claim.margin(source)) is not None
    ]


def count_verdicts(verdicts: list[ClaimVerdict]) -> str:
    """Return how many claims hold, as text: "3 of 5 hold, 1 does not, 1 is unclear"."""
    fail, unclear = (
        sum(entry.verdict == name for entry in verdicts) for name in ("does not hold", "unclear")
    )
    parts = [f"{len(verdicts) - fail - unclear} of {len(verdicts)} hold"]
    if fail:
        parts.append(f"{fail} {'does' if fail == 1 else 'do'} not")
    if unclear:
        parts.append(f"{unclear} {'is' if unclear == 1 else 'are'} unclear")
    return ", ".join(parts)


def decide(margin: Number) -> Verdict:
    """Return what a margin says at two standard errors; without a standard error, nothing."""
    if margin.se is None or abs(margin.value) <= 2 * margin.se:
        return "unclear"
    return "holds" if margin.value > 0 else "does not hold"


def _judge(claim: Claim, margin: Number, source: RunSource) -> ClaimVerdict:
    verdict, meaning = decide(margin), ""
    if verdict == "does not hold":
        meaning = claim.if_not if isinstance(claim.if_not, str) else claim.if_not(source)
    elif verdict == "unclear":
        meaning = (
            "It has no standard error to judge by."
            if margin.se is None
            else "The difference is within two standard errors; more text, rows or latents may "
            "decide it."
        )
    return ClaimVerdict(claim.statement, verdict, claim.evidence(source), meaning)


def subtract(one: Number | None, other: Number | None) -> Number | None:
    """Return one - other. Its standard error is the sum of theirs, however they are correlated."""
    if one is None or other is None:
        return None
    return Number(
        one.value - other.value, None if one.se is None or other.se is None else one.se + other.se
    )


def write_number(number: Number | None, number_format: NumberFormat = "number") -> str:
    """Return a number with its standard error, or "not measured"."""
    return "not measured" if number is None else format_with_se(number, number_format)
