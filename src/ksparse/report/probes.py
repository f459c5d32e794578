"""Tasks of `probes` -> what the section on them shows."""

from __future__ import annotations

from typing import Any

from ksparse.report import figures, findings, latents
from ksparse.report.findings import ProbeTask
from ksparse.report.source import Number, RunSource
from ksparse.report.tables import plain, written


def facts(source: RunSource) -> dict[str, Any]:
    """Return the figure of all tasks, and their numbers as a table."""
    result, found, cards = (
        source.result("probes") or {},
        findings.tasks(source),
        latents.shown(source),
    )
    picture = figures.tasks(
        [
            (task.name, "" if task.latent is None else str(task.latent), task.losses)
            for task in found
        ]
    )
    return {
        "pictures": [picture] if picture is not None else [],
        "has_result": source.result("probes") is not None,
        "tasks": [_row(task, cards) for task in found],
        "suite": plain(result.get("suite") or "unknown"),
        "below": sum((task.gain or 0) > 0 for task in found),
        "command": source.command("eval", "probes"),
    }


def _row(task: ProbeTask, cards: set[int]) -> dict[str, Any]:
    """Return a task as the table has it."""
    halves = " + ".join("?" if rows is None else f"{rows:,}" for rows in task.rows)
    return {
        "name": task.name,
        "latent": task.latent,
        "has_card": task.latent in cards,
        "rows": halves,
        "gain": _signed(task.gain),
        "positive": task.positive,
        "loss": _with_se(task.losses["loss"]),
        "losses": [_loss(task.losses[key]) for key in findings.LOSSES[1:]],
    }


def _loss(loss: Number | None) -> str:
    return "–" if loss is None else f"{loss.value:.3f}"


def _with_se(loss: Number | None) -> str:
    return "–" if loss is None else " ".join(part for part in written(loss, "number") if part)


def _signed(gain: float | None) -> str:
    return "–" if gain is None else f"{gain:+.3f}"
