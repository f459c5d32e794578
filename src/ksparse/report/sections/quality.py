"""Is it good? Claims, numbers and figures of the main evaluations."""

from __future__ import annotations

from typing import Any

from ksparse.report.claims import count_verdicts, judge_claims
from ksparse.report.sections import ablation, explanations, probes, reconstruction
from ksparse.report.sections.base import EvaluationPart, Section, draw_all, read_details
from ksparse.report.source import RunSource
from ksparse.report.tables import NumberGroup, build_table, describe_settings

PARTS = (
    reconstruction.STATS,
    reconstruction.DOWNSTREAM,
    probes.PART,
    explanations.N2G,
    explanations.EXPLAINED_LOSS,
    ablation.PART,
)
"""The evaluations in the order of the table."""
TEMPLATE = """\
{% from "parts.html.jinja" import figures, key_table, number_table, settings_lists %}
{% if facts.claims %}
<h3 class="first">What a good autoencoder shows <span class="aside">{{ facts.tally }}</span></h3>
<ul class="claims">
{% for claim in facts.claims %}
<li><strong class="{{ claim.verdict | replace(" ", "-") }}">{{ claim.verdict }}</strong>
<div><p>{{ claim.statement }}</p>
<p class="why">{{ claim.evidence }} {{ claim.meaning }}</p></div></li>
{% endfor %}
</ul>
<p class="note">A claim holds, or does not hold, where its numbers are more than two standard errors
apart; among several claims, one may still be so by chance.</p>
{% endif %}
{% if facts.missing %}
<p class="missing">{{ "Not measured yet: %s." | format(facts.missing | join("; ")) if facts.groups
else "This run has not been evaluated yet." }}
This command does it: <code>{{ facts.command }}</code></p>
{% endif %}
{% if facts.groups %}
{% if facts.key_cells %}
<h3>The numbers</h3>
{{ key_table(facts.key_cells) }}
{% endif %}
<details class="all-numbers">
<summary>Show all {{ facts.count }} numbers, and how to read them</summary>
{{ number_table(facts.groups, "Table of results") }}
</details>
{% endif %}
{% if facts.pictures %}
<h3>In figures</h3>
{{ figures(facts.pictures) }}
{% endif %}
{% for template, part in facts.details %}
{% include template | template %}
{% endfor %}
{{ settings_lists(facts.settings) }}
"""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the claims, the numbers behind them, and the figures."""
    measured = [part for part in PARTS if source.result(part.name) is not None]
    groups = [part.group for part in measured]
    verdicts = judge_claims(source, [claim for part in PARTS for claim in part.claims])
    return {
        "claims": verdicts,
        "tally": count_verdicts(verdicts),
        **read_numbers(source, groups),
        **describe_missing(source, measured),
        "pictures": draw_all(source, PARTS),
        "details": read_details(source, PARTS),
        "settings": describe_settings(source, groups),
    }


def read_numbers(source: RunSource, groups: list[NumberGroup]) -> dict[str, Any]:
    """Return the groups with their cells, the cells shown first, and how many were measured."""
    table = build_table(source, groups)
    cells = [cell for entry in table for cell in entry["cells"] if cell.number is not None]
    return {
        "groups": table,
        "key_cells": [cell for cell in cells if cell.row.key_number],
        "count": len(cells),
    }


def describe_missing(source: RunSource, measured: list[EvaluationPart]) -> dict[str, Any]:
    """Return the titles of the evaluations that were not run, and one command that runs them."""
    missing = [part for part in PARTS if part not in measured and part.name not in source.left_out]
    names = [part.name for part in missing] if measured else []
    return {
        "missing": [part.group.title for part in missing],
        "command": source.command("eval", *names),
    }


SECTION = Section("quality", "Is it good?", read_facts, TEMPLATE)
