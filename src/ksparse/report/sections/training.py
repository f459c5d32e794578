"""How it trained: the run's curves against the tokens it has seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ksparse.report.figures import (
    SECOND,
    Picture,
    canvas,
    draw_curve,
    format_thousands,
    format_tick,
    plain_log_ticks,
    reference_line,
    render,
)
from ksparse.report.sections.base import Section
from ksparse.report.source import RunSource, is_number
from ksparse.report.tables import format_amount, format_percent, format_significant

Metrics = list[dict[str, Any]]

TEMPLATE = """\
{% from "parts.html.jinja" import figures %}
{{ figures(facts.pictures) }}
{% if facts.unknown %}
<p class="note">Nothing is known of its training: it was not trained here, and its file holds
weights alone.</p>
{% elif not facts.pictures %}
<p class="missing">There are no metrics yet. <code>{{ facts.command }}</code> continues the run.</p>
{% endif %}
{% if facts.skipped %}
<p class="note">{{ facts.skipped }} batches were left out because their loss or gradient was not
finite.</p>
{% endif %}
"""


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the curves, and how many batches were skipped."""
    error = source.number("stats", "nmse")
    return {
        "unknown": source.recipe is None,
        "pictures": draw_curves(
            source.metrics,
            source.subject.k or 0,
            error.value if error else None,
            source.describe_text_briefly("stats"),
        ),
        "skipped": (source.metrics[-1].get("skipped") if source.metrics else 0) or 0,
        "command": source.command("resume"),
    }


def draw_curves(
    metrics: Metrics, k: int, evaluated: float | None, text: str = "held-out text"
) -> list[Picture]:
    """Return the curves that the metrics have values for.

    Args:
        metrics: the lines of metrics.jsonl.
        k: the recipe's k.
        evaluated: normalised MSE of the evaluation, drawn as a reference.
        text: the text that it was evaluated on.
    """
    pictures = (
        draw_error(metrics, evaluated, text),
        draw_dead_latents(metrics),
        draw_rate_and_gradient(metrics),
        draw_l0(metrics, k),
    )
    return [picture for picture in pictures if picture is not None]


def draw_error(
    metrics: Metrics, evaluated: float | None, text: str = "held-out text"
) -> Picture | None:
    """Draw the normalised MSE, with that of the evaluation as a reference."""
    tokens, values = read_series(metrics, "nmse")
    if not (values > 0).any():
        return None
    with canvas() as (figure, axes):
        draw_curve(axes, tokens, values, _describe_point, log=True)
        if evaluated is not None and evaluated > 0:
            reference_line(axes, evaluated, f"{text}: {format_significant(evaluated)}")
        axes.set_ylabel("normalised MSE")
        _use_token_axis(axes, tokens, log=True)
        drawing = render(figure)
    return Picture(
        "training-nmse",
        drawing,
        "Normalised MSE",
        "Of each step’s batch, before the step, with the raw weights; 1 is predicting the mean. "
        "Both axes are logarithmic.",
        _describe_change(values, tokens, format_significant),
    )


def draw_dead_latents(metrics: Metrics) -> Picture | None:
    """Draw the share of dead latents."""
    tokens, values = read_series(metrics, "dead")
    if not np.isfinite(values).any():
        return None
    with canvas() as (figure, axes):
        draw_curve(axes, tokens, 100 * values, lambda x, y: _describe_point(x, y) + " %")
        axes.set_ylim(0, max(1.0, 1.1 * 100 * float(np.nanmax(values))))
        axes.set_ylabel("dead latents, %")
        axes.yaxis.set_major_formatter(lambda value, _: format_tick(value))
        _use_token_axis(axes, tokens)
        drawing = render(figure)
    return Picture(
        "training-dead",
        drawing,
        "Dead latents",
        "Share of latents that have not fired for the recipe’s number of tokens; before that many "
        "tokens, none can be dead.",
        _describe_change(values, tokens, format_percent),
    )


def draw_rate_and_gradient(metrics: Metrics) -> Picture | None:
    """Draw the learning rate and the norm of the gradient, one above the other."""
    tokens, rates = read_series(metrics, "lr")
    _, norms = read_series(metrics, "grad_norm")
    if not np.isfinite(rates).any() or not (norms > 0).any():
        return None
    with canvas(rows=2) as (figure, (above, below)):
        draw_curve(above, tokens, rates, _describe_point)
        above.set_ylim(0, 1.2 * float(np.nanmax(rates)) or 1)
        above.set_ylabel("learning rate")
        above.yaxis.set_major_formatter(lambda value, _: format_tick(value))
        above.tick_params(labelbottom=False)
        draw_curve(below, tokens, norms, _describe_point, log=True, colour=SECOND)
        below.set_ylabel("gradient norm")
        _use_token_axis(below, tokens)
        above.sharex(below)
        drawing = render(figure)
    return Picture(
        "training-steps",
        drawing,
        "Learning rate and gradient",
        "The norm is taken before clipping, without the part along decoder rows; its axis is "
        "logarithmic.",
        f"Learning rate: {_describe_change(rates, tokens, format_tick)} Gradient norm: "
        f"{_describe_change(norms, tokens, format_tick)}",
    )


def draw_l0(metrics: Metrics, k: int) -> Picture | None:
    """Draw the mean number of active latents, with k as a reference."""
    tokens, values = read_series(metrics, "l0")
    if not np.isfinite(values).any():
        return None
    with canvas() as (figure, axes):
        draw_curve(axes, tokens, values, _describe_point)
        reference_line(axes, k, f"k = {k}")
        axes.set_ylim(0, 1.25 * max(k, float(np.nanmax(values))))
        axes.locator_params(axis="y", integer=True)
        axes.set_ylabel("values above zero")
        axes.yaxis.set_major_formatter(lambda value, _: format_tick(value))
        _use_token_axis(axes, tokens)
        drawing = render(figure)
    return Picture(
        "training-l0",
        drawing,
        "L0",
        "Mean number of latents above zero per token. With TopK, below k where a chosen latent’s "
        "value is not positive.",
        _describe_change(values, tokens, format_significant),
    )


def read_series(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and one value of each line of the metrics; NaN, a gap, where it is null."""
    rows = [row for row in metrics if is_number(row.get("tokens"))]
    values = [float(row[name]) if is_number(row.get(name)) else math.nan for row in rows]
    return np.array([row["tokens"] for row in rows], float), np.array(values, float)


def _use_token_axis(axes: Any, tokens: np.ndarray, *, log: bool = False) -> None:
    axes.set_xlabel("training tokens")
    if log and len(tokens) > 2 and tokens[0] > 0:
        axes.set_xscale("log")
        plain_log_ticks(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: format_thousands(value))


def _describe_point(tokens: float, value: float) -> str:
    return f"{format_amount(tokens)} tokens: {format_tick(value)}"


def _describe_change(values: np.ndarray, tokens: np.ndarray, write: Callable[[float], str]) -> str:
    """Say where a curve begins and where it ends."""
    finite = values[np.isfinite(values)]
    return (
        f"From {write(finite[0])} to {write(finite[-1])} over {format_amount(tokens[-1])} tokens."
    )


SECTION = Section("training", "How it trained", read_facts, TEMPLATE)
