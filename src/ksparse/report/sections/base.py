"""What a section of the run report, and an evaluation's part of one, consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ksparse.report.claims import Claim
from ksparse.report.figures import Picture
from ksparse.report.source import RunSource
from ksparse.report.tables import NumberGroup


@dataclass(frozen=True)
class Section:
    """One question that the page answers.

    Attributes:
        anchor: the section's id on the page.
        title: its heading.
        facts: read a run and return the template's variable `facts`. Pictures under the key
            "pictures" are also written as files.
        template: Jinja source of the section's HTML. Every string that it shows is made safe to
            look at, then escaped.
        needs: the evaluation without which the section is left out, since the first section says
            in one place what was not run; "" for none.
    """

    anchor: str
    title: str
    facts: Callable[[RunSource], dict[str, Any]]
    template: str
    needs: str = ""


@dataclass(frozen=True)
class EvaluationPart:
    """What one evaluation adds to the section that it is shown in.

    Attributes:
        group: the rows of its table.
        claims: what a good SAE shows by its numbers.
        draw: return its figures; None stands for one that the run has no data for.
        facts: read a run and return the template's variable `part`; {} leaves the template out.
        template: Jinja source of HTML that comes after the figures.
    """

    group: NumberGroup
    claims: tuple[Claim, ...] = ()
    draw: Callable[[RunSource], Iterable[Picture | None]] = lambda source: ()
    facts: Callable[[RunSource], dict[str, Any]] = lambda source: {}
    template: str = ""

    @property
    def name(self) -> str:
        """The evaluation's name."""
        return self.group.eval


def draw_all(source: RunSource, parts: Iterable[EvaluationPart]) -> list[Picture]:
    """Return the figures of several evaluations that the run has data for."""
    return [picture for part in parts for picture in part.draw(source) if picture is not None]


def read_details(
    source: RunSource, parts: Iterable[EvaluationPart]
) -> list[tuple[str, dict[str, Any]]]:
    """Return (template, facts) of the evaluations that have something of their own to show."""
    details = [(part.template, part.facts(source)) for part in parts]
    return [(template, facts) for template, facts in details if facts]
