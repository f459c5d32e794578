"""Codes and latents in detail: `refinement`, `progressive`, `latents` and `subspaces`.

Each is shown if it has been run; their figures also show the other SAEs of the same evaluation.
"""

from __future__ import annotations

from typing import Any

from ksparse.report.sections import latent_statistics, progressive, refinement, subspaces
from ksparse.report.sections.base import Section, draw_all, read_details
from ksparse.report.source import RunSource
from ksparse.report.tables import build_table, describe_settings

PARTS = (refinement.PART, progressive.PART, latent_statistics.PART, subspaces.PART)
"""The evaluations in the order of the table."""
TEMPLATE = """\
{% from "parts.html.jinja" import figures, number_table, settings_lists %}
{% if facts.groups %}
{{ number_table(facts.groups, "Table of codes and latents") }}
{% endif %}
{{ figures(facts.pictures) }}
{% for template, part in facts.details %}
{% include template | template %}
{% endfor %}
{{ settings_lists(facts.settings) }}
{% if facts.missing %}
<p class="missing">Not run yet: {{ facts.missing | join(" · ") }}.
This command adds {{ "it" if facts.missing | length == 1 else "them" }}:
<code>{{ facts.command }}</code></p>
{% endif %}
"""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the numbers, figures and tables of the evaluations that have been run."""
    measured = [part for part in PARTS if source.result(part.name) is not None]
    missing = [part for part in PARTS if part not in measured]
    groups = [part.group for part in measured]
    return {
        "groups": build_table(source, groups, skip_missing=True),
        "pictures": draw_all(source, measured),
        "details": read_details(source, measured),
        "settings": describe_settings(source, groups),
        "missing": [part.group.title for part in missing],
        "command": source.command("eval", *(part.name for part in missing)),
    }


SECTION = Section("codes", "Codes and latents in detail", read_facts, TEMPLATE)
