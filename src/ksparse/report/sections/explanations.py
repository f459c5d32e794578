"""`n2g` and `explained_loss`: how well patterns of tokens explain latents."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ksparse.report import findings
from ksparse.report.claims import Claim, subtract, write_number
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
from ksparse.report.sections.base import EvaluationPart
from ksparse.report.source import Number, RunSource
from ksparse.report.tables import (
    NumberGroup,
    NumberRow,
    compare_with,
    format_percent,
    format_significant,
    format_with_se,
)

LOSSES = {
    "clean": "unchanged LM",
    "spliced": "reconstruction",
    "n2g": "explanations",
    "bigram": "bigrams",
    "unigram": "unigrams",
    "bias": "b_pre alone",
    "zero": "zeros",
}
"""What `explained_loss` puts in place of the activation."""
_BY_CHANCE = "with another latent’s patterns, that is by chance"


def draw_pictures(source: RunSource) -> Iterator[Picture | None]:
    """Yield the figures of both evaluations."""
    yield draw_losses(
        {name: source.number("explained_loss", f"ce_{key}") for key, name in LOSSES.items()},
        LOSSES["n2g"],
    )
    explained = findings.explanations(source)
    if explained is not None:
        means = {
            name: tuple(source.number("n2g", f"{prefix}{key}") for key in ("recall", "precision"))
            for name, prefix in (("mean", ""), ("mean with wrong patterns", "shuffled_"))
        }
        yield draw_precision_and_recall(
            explained.scores["recall"], explained.scores["precision"], means, explained.scored
        )


def draw_losses(losses: dict[str, Number | None], main: str) -> Picture | None:
    """Draw the LM's losses on one axis, one row each; `main` names the one that is compared."""
    rows = sorted(
        ((name, loss) for name, loss in losses.items() if loss is not None),
        key=lambda pair: pair[1].value,
    )
    if main not in dict(rows) or len(rows) < 2:
        return None
    with canvas(size=(5.2, 0.75 + 0.31 * len(rows))) as (figure, axes):
        for row, (name, loss) in enumerate(rows):
            colour, size = (FIRST, 8) if name == main else (INK, 6)
            axes.plot(loss.value, row, marker="o", color=colour, markersize=size)
            margin = 2 * (loss.se or 0)
            if margin:
                ends = loss.value - margin, loss.value + margin
                axes.hlines(row, *ends, colors=colour, linewidth=1.5)
            axes.annotate(
                format_significant(loss.value),
                (loss.value + margin, row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
            text = f"{name}: {format_with_se(loss)} nats per token"
            add_point_tooltips(axes, [loss.value], [row], [text])
        name_rows(axes, [name for name, _ in rows])
        low, high = rows[0][1].value, rows[-1][1].value
        width = high - low or 1
        axes.set_xlim(low - 0.04 * width, high + 0.14 * width)  # room for the last number
        axes.set_xlabel("loss of the LM, nats per token")
        drawing = render(figure)
    return Picture(
        "explained-loss",
        drawing,
        "What explanations carry",
        "Loss with each of these in place of the activation; n-grams use no activation at all. "
        "The nearer the explanations are to the reconstruction, the more of the latents they "
        "catch. Bars are two standard errors.",
        "; ".join(f"{name} {format_significant(loss.value)}" for name, loss in rows) + " nats.",
    )


def draw_precision_and_recall(
    recall: np.ndarray,
    precision: np.ndarray,
    means: dict[str, tuple[Number | None, ...]],
    latents: np.ndarray | None = None,
) -> Picture | None:
    """Draw precision against recall, a point for each latent.

    Args:
        recall: recall of each scored latent, [latents].
        precision: precision of each, [latents]; NaN where its patterns predict nothing.
        means: (recall, precision) means to mark, by name; the latents' own mean first.
        latents: numbers of the latents, for tooltips.
    """
    known = np.isfinite(recall) & np.isfinite(precision)
    if not known.any():
        return None
    with canvas(size=(5.2, 3.9)) as (figure, axes):
        style = {"linestyle": "none", "clip_on": False}
        axes.plot(
            100 * recall[known],
            100 * precision[known],
            marker="o",
            color=FIRST,
            alpha=0.55,
            markersize=4.5,
            markeredgewidth=0.7,
            fillstyle="full",
            label="a latent",
            **style,
        )
        if latents is not None:
            rows = zip(latents[known], recall[known], precision[known])
            texts = [f"latent {i}: {_describe_scores(r, p)}" for i, r, p in rows]
            add_point_tooltips(axes, 100 * recall[known], 100 * precision[known], texts)
        for (name, (r, p)), (marker, colour) in zip(means.items(), (("D", INK), ("X", SECOND))):
            if r is not None and p is not None:
                x, y = 100 * r.value, 100 * p.value
                axes.plot(x, y, marker=marker, color=colour, markersize=8, label=name, **style)
                text = f"{name}: {_describe_scores(r.value, p.value)}"
                add_point_tooltips(axes, [x], [y], [text])
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="recall, %", ylabel="precision, %")
        add_legend(figure)
        drawing = render(figure)
    caption = (
        "Each scored latent, by how many of its activations its patterns catch and how often they "
        "are right; colours are stronger where points overlap. Recall takes discrete values, since "
        "it is counted on few activations."
    )
    if not known.all():
        caption += f" {(~known).sum():,} latents whose patterns predicted nothing are left out."
    medians = [format_percent(float(np.median(values[known]))) for values in (recall, precision)]
    label = f"{known.sum():,} latents; median recall {medians[0]}, median precision {medians[1]}."
    title = "Precision and recall of explanations"
    return Picture("n2g-latents", drawing, title, caption, label)


def _describe_scores(recall: float, precision: float) -> str:
    return f"recall {format_percent(recall)}, precision {format_percent(precision)}"


def _above_chance(statement: str, key: str, if_not: str) -> Claim:
    """Return a claim that a score is above that with the patterns of another latent."""

    def margin(source: RunSource) -> Number | None:
        return subtract(source.number("n2g", key), source.number("n2g", f"shuffled_{key}"))

    def evidence(source: RunSource) -> str:
        score, chance = (
            write_number(source.number("n2g", name), "percent") for name in (key, f"shuffled_{key}")
        )
        return f"{score}; with another latent’s patterns {chance}."

    return Claim(statement, margin, evidence, if_not)


N2G = EvaluationPart(
    NumberGroup(
        "n2g",
        "How well patterns of tokens explain latents",
        (
            NumberRow(
                "Recall",
                "recall",
                "percent",
                compare_with("n2g", "percent", shuffled_recall=_BY_CHANCE),
                "Share of a latent’s activations that its patterns catch, mean over scored "
                "latents. Higher is better.",
            ),
            NumberRow(
                "Precision",
                "precision",
                "percent",
                compare_with("n2g", "percent", shuffled_precision=_BY_CHANCE),
                "Share of a latent’s predictions at which it is active, mean over scored latents "
                "that have any. Higher is better.",
            ),
            NumberRow(
                "F1",
                "f1",
                "percent",
                compare_with("n2g", "percent", shuffled_f1=_BY_CHANCE),
                "Harmonic mean of each latent’s recall and precision, then the mean over latents. "
                "High only where both are.",
                key_number=True,
            ),
            NumberRow(
                "Precision, pooled",
                "precision_pooled",
                "percent",
                compare_with("n2g", "percent", precision="each latent counts the same"),
                "Over all predictions at once. Most of them come from a few latents whose patterns "
                "match almost anywhere.",
            ),
            NumberRow(
                "Latents scored",
                "n_latents",
                "count",
                "Drawn at random from those that fire",
                "Latents that fire too rarely to be explained and scored are left out, so the "
                "numbers do not describe them.",
            ),
        ),
    ),
    claims=(
        _above_chance(
            "Patterns of tokens catch more of a latent’s activations than another latent’s "
            "patterns do (recall).",
            "recall",
            "The explanations catch no more than chance: they do not describe their latents.",
        ),
        _above_chance(
            "Where its patterns predict a latent, it is active more often than where another "
            "latent’s patterns do (precision).",
            "precision",
            "The explanations are right no more often than chance: they do not describe their "
            "latents.",
        ),
    ),
    draw=draw_pictures,
)

EXPLAINED_LOSS = EvaluationPart(
    NumberGroup(
        "explained_loss",
        "The LM’s loss on explanations",
        (
            NumberRow(
                "Loss, explanations spliced in",
                "ce_n2g",
                "number",
                compare_with(
                    "explained_loss",
                    "number",
                    **{f"ce_{key}": name for key, name in LOSSES.items() if key != "n2g"},
                ),
                "Nats per token when each latent’s value is what its patterns predict. "
                "The gap to the reconstruction is what the patterns miss. Lower is better.",
            ),
            NumberRow(
                "Loss above bigrams",
                "delta_to_bigram",
                "number",
                "0: the LM predicts as well as counts of token pairs",
                "On the same tokens. Below 0 the explanations carry more than the last token "
                "alone. Counts from little text are easy to beat.",
            ),
        ),
    )
)
