"""How to reproduce it: the commands that make this run and its page again."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from ksparse.report.sections import codes, quality
from ksparse.report.sections.base import Section
from ksparse.report.source import RunSource, is_number

RUN_AGAIN = "runs/again"
"""Where the commands put the reproduced run."""
TEMPLATE = """\
<p class="note">Run these in the folder that the commands’ paths start from
{%- if facts.version %}, with ksparse {{ facts.version }}{% endif %}. {{ facts.fixes }} every seed;
on another machine, or with other versions, rounding differs, and so do the numbers, a little.</p>
<dl class="commands">
{% if facts.train %}
<div><dt>Train it again</dt><dd><pre class="code wrapped">{{ facts.train }}</pre></dd></div>
{% endif %}
<div><dt>Evaluate it</dt><dd>
{%- for command in facts.evaluate %}
<pre class="code wrapped">{{ command }}</pre>
{%- endfor -%}
</dd></div>
<div><dt>Write this page</dt><dd><pre class="code wrapped">{{ facts.report }}</pre></dd></div>
</dl>
"""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the commands, and the version of ksparse that trained the run."""
    if source.recipe is None:
        return {
            "train": "",
            "evaluate": list_eval_commands(source, *_judge_again(source)),
            "report": source.command("report"),
            "version": None,
            "fixes": "The options fix",
        }
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
        "fixes": "The recipe fixes",
    }


def _judge_again(source: RunSource) -> tuple[str, list[str]]:
    """Return what `ksparse eval` is called with to judge the same SAE again: the SAE, and flags."""
    subject = source.subject
    judged, acts = subject.judged, subject.acts
    if judged is None:
        return source.place, []
    where = {
        "--subfolder": judged.subfolder,
        "--revision": judged.revision,
        "--lm": acts.lm,
        "--site": acts.site,
        "--text": acts.text,
        "--context": str(acts.context),
        "--bos": acts.bos,
        "--out": RUN_AGAIN,
        "--force": "True" if judged.forced else "",
    }
    sae = judged.source.rstrip("/").rpartition("/")[2] if judged.local else judged.source
    return sae, [word for flag, value in where.items() if value for word in (flag, value)]


def list_eval_commands(
    source: RunSource, sae: str = RUN_AGAIN, flags: Sequence[str] = ()
) -> list[str]:
    """Return the commands that make the run's results, one for all whose options agree.

    Args:
        source: the run.
        sae: what they evaluate.
        flags: flags that all of them have.
    """
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
        shlex.join(["ksparse", "eval", sae, *names, *flags, *_flags(options)])
        for names, options in calls
    ]
    return commands or [shlex.join(["ksparse", "eval", sae, *flags])]


def _flags(options: dict[str, Any]) -> list[str]:
    return [
        word
        for key, value in options.items()
        if value not in (None, "")
        for word in (f"--{key.replace('_', '-')}", str(value))
    ]


SECTION = Section("again", "How to reproduce it", read_facts, TEMPLATE)
