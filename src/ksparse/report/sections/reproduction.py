"""How to reproduce it: the commands that make this run and its page again."""

from __future__ import annotations

import shlex
from typing import Any

from ksparse.report.sections import codes, quality
from ksparse.report.sections.base import Section
from ksparse.report.source import RunSource, is_number

RUN_AGAIN = "runs/again"
"""Where the commands put the reproduced run."""
TEMPLATE = """\
<p class="note">Run these in the folder that the commands’ paths start from
{%- if facts.version %}, with ksparse {{ facts.version }}{% endif %}. The recipe fixes every seed;
on another machine, or with other versions, rounding differs, and so do the numbers, a little.</p>
<dl class="commands">
<div><dt>Train it again</dt><dd><pre class="code" tabindex="0">{{ facts.train }}</pre></dd></div>
<div><dt>Evaluate it</dt><dd>
{%- for command in facts.evaluate %}
<pre class="code" tabindex="0">{{ command }}</pre>
{%- endfor -%}
</dd></div>
<div><dt>Write this page</dt><dd><pre class="code" tabindex="0">{{ facts.report }}</pre></dd></div>
</dl>
"""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the commands, and the version of ksparse that trained the run."""
    train = ["ksparse", "train", f"{source.place}/recipe.toml", "--out", RUN_AGAIN]
    if not source.recipe.threads and is_number(source.environment.get("threads")):
        # The recipe left the number of threads to the machine.
        train += ["--threads", str(source.environment["threads"])]
    versions = source.environment.get("versions")
    return {
        "train": shlex.join(train),
        "evaluate": list_eval_commands(source),
        "report": source.command("report"),
        "version": versions.get("ksparse") if isinstance(versions, dict) else None,
    }


def list_eval_commands(source: RunSource) -> list[str]:
    """Return the commands that make the run's results, one for all whose options agree."""
    calls: list[tuple[list[str], dict[str, Any]]] = []
    for part in (*quality.PARTS, *codes.PARTS):
        result = source.result(part.name)
        if result is None:
            continue
        options = result.get("options") or {}
        for names, shared in calls:
            if all(shared.get(key, value) == value for key, value in options.items()):
                names.append(part.name)
                shared.update(options)
                break
        else:
            calls.append(([part.name], {**options}))
    commands = [
        shlex.join(["ksparse", "eval", RUN_AGAIN, *names, *_flags(options)])
        for names, options in calls
    ]
    return commands or [f"ksparse eval {RUN_AGAIN}"]


def _flags(options: dict[str, Any]) -> list[str]:
    return [
        word
        for key, value in options.items()
        if value not in (None, "")
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]


SECTION = Section("again", "How to reproduce it", read_facts, TEMPLATE)
