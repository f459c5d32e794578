"""`probes`: what single latents know, over all tasks and task by task."""

from __future__ import annotations

from typing import Any

from ksparse.report import findings
from ksparse.report.claims import Claim, write_number
from ksparse.report.figures import (
    FIRST,
    INK,
    SECOND,
    Picture,
    add_legend,
    add_point_tooltips,
    canvas,
    name_rows,
    render,
)
from ksparse.report.findings import ProbeTask
from ksparse.report.sections import latents
from ksparse.report.sections.base import EvaluationPart, Section
from ksparse.report.source import Number, RunSource
from ksparse.report.tables import (
    NumberGroup,
    NumberRow,
    compare_with,
    format_brief,
    format_plain,
    format_with_se,
)
from ksparse.report.tokens import safe_text

TEMPLATE = """\
{% from "parts.html.jinja" import latent_link, tall_figure %}
{% if not facts.tasks %}
<p class="missing">The result of the probes has no tasks. <code>{{ facts.command }}</code> runs them
again.</p>
{% else %}
<p class="note">Each of the {{ facts.tasks | length }} tasks of the suite “{{ facts.suite }}” is a
yes-or-no question about a text. A probe on one number answers it; its loss is in nats per label,
and lower is better. On {{ facts.below }} of {{ facts.tasks | length }} tasks the best latent is
below
the best channel, the best latent of an untrained SAE, and the base rate alone. Single tasks are
noisy: look at the bars before you conclude anything from one.</p>
{% for picture in facts.pictures %}
{{ tall_figure(picture) }}
{% endfor %}
<details>
<summary>The numbers of all tasks</summary>
<div class="scroll" tabindex="0" role="region" aria-label="Table of the tasks">
<table class="tasks">
<thead>
<tr><th scope="col">Task</th>
{% for title in ("Latent", "Gain", "Latent’s loss", "Best channel", "Random latent", "All channels",
                 "Base rate", "In sample", "Rows", "Yes") %}
<th scope="col" class="num">{{ title }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for task in facts.tasks %}
<tr><th scope="row">{{ task.name }}</th>
<td class="num">{{ latent_link(task) }}</td>
<td class="num">{{ task.gain }}</td>
<td class="num">{{ task.loss }}</td>
{% for loss in task.losses %}
<td class="num">{{ loss }}</td>
{% endfor %}
<td class="num">{{ task.rows }}</td>
<td class="num">{{ "–" if task.positive is none else task.positive | percent }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="note after">Gain: the lowest of best channel, random latent and base rate, less the
latent’s loss. In sample: the latent’s loss on the half that it was chosen on, too low to compare
with the others. Rows: training half + test half. Latents that are links are shown above.</p>
</details>
{% endif %}
"""
TaskLosses = tuple[str, str, dict[str, Number | None]]
"""A task's name, the text at the end of its row, and its losses by the keys of MARKS."""
MARKS = (
    ("prior_loss", "base rate", "|", INK, INK),
    ("dense_probe_loss", "all channels together", "D", INK, "none"),
    ("random_sae_loss", "best random latent", "x", SECOND, SECOND),
    ("channel_loss", "best channel", "s", SECOND, "none"),
    ("loss", "best latent", "o", FIRST, FIRST),
)
"""Probes of a task: key of the loss, name, marker, its colour and fill. Later ones are drawn above
earlier ones."""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the figure of all tasks, and their numbers as a table."""
    result, tasks = source.result("probes") or {}, findings.tasks(source)
    cards = latents.latents_with_cards(source)
    picture = draw_tasks(
        [
            (task.name, "" if task.latent is None else str(task.latent), task.losses)
            for task in tasks
        ]
    )
    return {
        "pictures": [picture] if picture is not None else [],
        "tasks": [_make_row(task, cards) for task in tasks],
        "suite": format_plain(result.get("suite") or "unknown"),
        "below": sum((task.gain or 0) > 0 for task in tasks),
        "command": source.command("eval", "probes"),
    }


def _make_row(task: ProbeTask, cards: set[int]) -> dict[str, Any]:
    loss = task.losses["loss"]
    others = (task.losses[key] for key in findings.LOSSES[1:])
    return {
        "name": task.name,
        "latent": task.latent,
        "has_card": task.latent in cards,
        "rows": " + ".join("?" if rows is None else f"{rows:,}" for rows in task.rows),
        "gain": "–" if task.gain is None else f"{task.gain:+.3f}",
        "positive": task.positive,
        "loss": "–" if loss is None else format_with_se(loss),
        "losses": ["–" if other is None else f"{other.value:.3f}" for other in others],
    }


def draw_tasks(rows: list[TaskLosses]) -> Picture | None:
    """Draw the losses of each task's probes in a row of their own.

    Args:
        rows: the tasks, the first at the top.
    """
    if not any(losses.get("loss") for _, _, losses in rows):
        return None
    with canvas(size=(6.2, 1.4 + 0.185 * len(rows))) as (figure, axes):
        for mark in MARKS:
            _draw_probe(axes, rows, *mark)
        name_rows(axes, [name for name, _, _ in rows], fontsize=8)
        for row, text in [*enumerate(end for _, end, _ in rows), (-1, "latent")]:
            axes.annotate(
                text,
                (1, row),
                xycoords=("axes fraction", "data"),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                parse_math=False,
            )
        axes.tick_params(axis="x", labeltop=len(rows) > 20)
        axes.set_xlabel("loss on the test half, nats per label")
        add_legend(figure, 3)
        drawing = render(figure)
    return Picture(
        "probes-tasks",
        drawing,
        "The best latent of each task",
        "Sorted by how far the best latent is below the lowest of best channel, best random latent "
        "and base rate; at the top the SAE has something that they lack. Bars are two standard "
        "errors. A diamond far to the left of the others marks knowledge that the LM has, but no "
        "single latent.",
        f"{len(rows)} tasks, from {safe_text(rows[0][0], 40)} to {safe_text(rows[-1][0], 40)}.",
    )


def _draw_probe(
    axes: Any, rows: list[TaskLosses], key: str, name: str, marker: str, colour: str, fill: str
) -> None:
    """Draw the losses of one probe, with two standard errors if it is the best latent's."""
    points = [
        (loss, row)
        for row, (_, _, losses) in enumerate(rows)
        if (loss := losses.get(key)) is not None
    ]
    x, y = [loss.value for loss, _ in points], [row for _, row in points]
    axes.plot(
        x,
        y,
        linestyle="none",
        marker=marker,
        color=colour,
        markerfacecolor=fill,
        markersize=6 if key == "prior_loss" else 4.5,
        markeredgewidth=1.1,
        label=name,
        clip_on=False,
    )
    texts = [
        f"{safe_text(rows[row][0], 60)}: {name} {format_with_se(loss)}" for loss, row in points
    ]
    add_point_tooltips(axes, x, y, texts)
    if key == "loss":
        low = [loss.value - 2 * (loss.se or 0) for loss, _ in points]
        high = [loss.value + 2 * (loss.se or 0) for loss, _ in points]
        axes.hlines(y, low, high, colors=colour, linewidth=1.1)


def _gain_claim(statement: str, key: str, baseline: str, words: str, if_not: str) -> Claim:
    """Return a claim that the probe loss is below a baseline's."""

    def evidence(source: RunSource) -> str:
        losses = [
            f"{format_brief(loss.value, 'number')} {what}"
            for name, what in (("probe_loss", "with its latents"), (baseline, words))
            if (loss := source.number("probes", name)) is not None
        ]
        return (
            f"Probe loss {', '.join(losses) or 'not measured'}: a gain of "
            f"{write_number(source.number('probes', key))} nats."
        )

    return Claim(statement, lambda source: source.number("probes", key), evidence, if_not)


PART = EvaluationPart(
    NumberGroup(
        "probes",
        "What single latents know",
        (
            NumberRow(
                "Probe loss",
                "probe_loss",
                "number",
                compare_with(
                    "probes",
                    "number",
                    channel_loss="the best channel",
                    random_sae_loss="the best latent of an untrained SAE",
                    dense_probe_loss="all channels together",
                    prior_loss="the base rate alone",
                ),
                "Nats per label, mean over tasks: each task’s best latent, chosen on one half of "
                "the rows, judged on the other. Lower is better.",
            ),
            NumberRow(
                "Gain over channels",
                "gain_over_channels",
                "number",
                "0: the LM’s own channels do as well",
                "Loss of the best channel less that of the best latent, on the same rows. There "
                "are more latents than channels to choose from.",
                key_number=True,
            ),
            NumberRow(
                "Gain over random latents",
                "gain_over_random_sae",
                "number",
                "0: as many random directions do as well",
                "The same against an untrained SAE of the same size. This is what training added.",
            ),
            NumberRow(
                "Probe loss, in sample",
                "probe_loss_in_sample",
                "number",
                compare_with(
                    "probes", "number", probe_loss="on rows that the latents were not chosen on"
                ),
                "Loss on the same rows that the latents were chosen on, as in the paper. It falls "
                "with the number of latents, even of random ones, so do not compare it across "
                "sizes.",
            ),
        ),
    ),
    claims=(
        _gain_claim(
            "Its best latents predict the tasks’ labels better than the LM’s own channels do.",
            "gain_over_channels",
            "channel_loss",
            "with channels",
            "For these tasks, the SAE’s latents are worse to read than the activation itself.",
        ),
        _gain_claim(
            "They predict them better than the best latents of an untrained SAE do.",
            "gain_over_random_sae",
            "random_sae_loss",
            "with random latents",
            "As many random directions do better: what the probes find here comes from having many "
            "to choose from, not from training.",
        ),
    ),
)
SECTION = Section("probes", "What its latents know", read_facts, TEMPLATE, needs="probes")
