"""Is it good? Claims, numbers and figures of the main evaluations."""

from __future__ import annotations

from typing import Any

from ksparse.report.claims import count_verdicts, judge_claims
from ksparse.report.sections import ablation, explanations, probes, reconstruction
from ksparse.report.sections.base import Section, draw_all, read_details
from ksparse.report.source import RunSource
from ksparse.report.tables import build_table, describe_settings

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
{% from "parts.html.jinja" import figures, number_table, settings_lists %}
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
<h3>The numbers</h3>
{% endif %}
{{ number_table(facts.groups, "Table of results") }}
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
    groups = [part.group for part in PARTS]
    verdicts = judge_claims(source, [claim for part in PARTS for claim in part.claims])
    return {
        "claims": verdicts,
        "tally": count_verdicts(verdicts),
        "groups": build_table(source, groups),
        "pictures": draw_all(source, PARTS),
        "details": read_details(source, PARTS),
        "settings": describe_settings(source, groups),
    }


SECTION = Section("quality", "Is it good?", read_facts, TEMPLATE)
