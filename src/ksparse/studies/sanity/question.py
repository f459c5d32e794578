"""A question about a run, and its answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from ksparse.evals.statistics import Value
from ksparse.studies.study import Estimate, Figure


@dataclass(frozen=True)
class QuestionTable:
    """A table below an answer: its columns, and rows of cells."""

    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Question:
    """A question about the run, and its answer.

    Attributes:
        name: A short name.
        question: The question.
        answer: One sentence with numbers.
        reading: What the answer can and cannot mean.
        table: The numbers behind it.
        figures: Drawn beside it.
    """

    name: str
    question: str
    answer: str
    reading: str
    table: QuestionTable | None = None
    figures: list[Figure] = field(default_factory=list)


def estimate(value: Value) -> Estimate:
    """Return a value as studies write it."""
    return {"value": value["value"], "se": value["se"]}
