"""What latents mean in words: the explanations of `ksparse explain`, and how far they can be
trusted."""

from __future__ import annotations

from typing import Any

from ksparse.report.claims import write_number
from ksparse.report.sections.base import Section
from ksparse.report.source import RunSource, number

SCORES = {"detection": "Detection", "fuzzing": "Fuzzing"}
SHOWN = 20
"""Explanations on the page; the viewer has all."""
TEMPLATE = """\
{% if facts.missing %}
<p class="missing">No latent has a label yet. A language model behind an OpenAI-compatible server
writes and scores them: <code>{{ facts.command }}</code></p>
{% else %}
<p class="note">{{ facts.asked }}</p>
<div class="scroll" tabindex="0" role="region" aria-label="Scores of explanations">
<table class="tasks">
<thead><tr><th scope="col">Balanced accuracy</th>
<th scope="col" class="num">Its own explanation</th>
<th scope="col" class="num">Another latent’s</th><th scope="col" class="num">N2G’s patterns</th>
<th scope="col">Does the explanation matter?</th></tr></thead>
<tbody>
{% for one in facts.scores %}
<tr><th scope="row">{{ one.name }}</th><td class="num">{{ one.own }}</td>
<td class="num">{{ one.shuffled }}</td><td class="num">{{ one.patterns }}</td>
<td>{{ one.verdict }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<div class="scroll" tabindex="0" role="region" aria-label="Explanations">
<table class="tasks">
<thead><tr><th scope="col" class="num">Latent</th><th scope="col">Explanation</th>
<th scope="col" class="num">Detection</th><th scope="col" class="num">Fuzzing</th></tr></thead>
<tbody>
{% for one in facts.latents %}
<tr><th scope="row" class="num">{{ one.latent }}</th><td class="words">{{ one.text }}</td>
<td class="num">{{ one.detection }}</td><td class="num">{{ one.fuzzing }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
{% if facts.more %}<p class="note">The best {{ facts.latents | length }} of {{ facts.count }}, by
detection.</p>{% endif %}
{% for note in facts.notes %}
<p class="note">{{ note }}</p>
{% endfor %}
{% endif %}
"""
VERDICTS = {
    True: "Yes: it scores better than another latent’s.",
    False: "Not shown: another latent’s does as well, so these scores rank nothing.",
    None: "Cannot be told from this sample.",
}
"""Whether a latent's own explanation scores better than another one's, in words."""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the scores with both baselines, the best explanations, and notes."""
    result = source.result("explain")
    rows = [row for row in (result or {}).get("latents", []) if isinstance(row, dict)]
    if not result or not rows:
        command = source.command("explain", "--url", "URL", "--model", "NAME")
        return {"missing": True, "command": command}
    apart = result.get("tells_apart") or {}
    scores = [
        {
            "name": title,
            **{
                column: write_number(source.number("explain", prefix + name), "number")
                for column, prefix in (("own", ""), ("shuffled", "shuffled_"), ("patterns", "n2g_"))
            },
            "verdict": VERDICTS.get(apart.get(name), VERDICTS[None]),
        }
        for name, title in SCORES.items()
    ]
    best = sorted(rows, key=_detection, reverse=True)
    options = result.get("options") or {}
    return {
        "missing": False,
        "asked": f"{len(rows):,} latents, explained and judged by "
        f"{options.get('model', 'a model')} from {options.get('examples', 'some')} examples each. "
        f"Detection: which of {options.get('test', 'some')} active and as many other texts does "
        "the explanation fit? Fuzzing: in which are the right tokens marked? 0.5 is guessing. ± "
        "is the standard error over latents.",
        "scores": scores,
        "latents": [_row(row) for row in best[:SHOWN]],
        "more": len(best) > SHOWN,
        "count": len(best),
        "notes": [str(note) for note in result.get("notes", [])],
    }


def _detection(row: dict[str, Any]) -> float:
    score = number(row.get("detection"))
    return score.value if score else -1.0


def _row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "latent": str(row.get("latent", "")),
        "text": str(row.get("explanation") or "–"),
        **{name: write_number(number(row.get(name)), "number") for name in SCORES},
    }


SECTION = Section("words", "What latents mean, in words", read_facts, TEMPLATE)
