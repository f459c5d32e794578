"""Is the SAE better than an artefact? The answers of `ksparse sanity`, one sentence each."""

from __future__ import annotations

from typing import Any

from ksparse.report.sections.base import Section
from ksparse.report.source import RunSource

TEMPLATE = """\
{% if facts.questions %}
<ul>
{% for one in facts.questions %}
<li>{{ one.question }} <strong>{{ one.answer }}</strong></li>
{% endfor %}
</ul>
<p>The numbers behind each, and what it cannot show: <code>{{ facts.page }}</code>.</p>
{% elif not facts.command %}
<p class="missing">Controls are trained only of a run with its recipe.</p>
{% else %}
<p class="missing">Not asked yet. <code>{{ facts.command }}</code> trains controls on the run’s own
stream and compares.</p>
{% endif %}
"""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the questions and answers, if they were asked, and the command that asks."""
    result = source.result("sanity") or {}
    return {
        "questions": [
            {"question": str(one["question"]), "answer": str(one["answer"])}
            for one in result.get("questions", [])
        ],
        "page": str(result.get("page", "")),
        "command": source.command("sanity") if source.recipe else "",
    }


SECTION = Section("sanity", "Better than an artefact?", read_facts, TEMPLATE)
