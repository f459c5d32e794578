"""`ablation`: how many of the LM's predictions a latent matters to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ksparse.report.claims import Claim, decide, write_number
from ksparse.report.figures import (
    SECOND,
    Picture,
    add_column_tooltips,
    add_legend,
    canvas,
    draw_histogram,
    filled_range,
    read_histogram,
    reference_line,
    render,
)
from ksparse.report.sections.base import EvaluationPart
from ksparse.report.source import RunSource
from ksparse.report.tables import NumberGroup, NumberRow, compare_with, format_percent

NOISE = 2 / math.pi
"""Ablation sparsity of an effect whose sizes are Gaussian: noise, with nothing sparse in it."""


def draw_pictures(source: RunSource) -> Iterator[Picture | None]:
    """Yield the figure of the evaluation."""
    result = source.result("ablation") or {}
    yield draw_sparsities(result.get("histogram"), result.get("channel_histogram"))


def draw_sparsities(latents: Any, channels: Any) -> Picture | None:
    """Draw how sparse the effects of latents and of channels are; histograms of the same edges."""
    of_latents, of_channels = read_histogram(latents), read_histogram(channels)
    if of_latents is None or of_channels is None:
        return None
    (edges, counts), (other_edges, other_counts) = of_latents, of_channels
    if not np.array_equal(edges, other_edges):
        return None
    last = max(filled_range(counts)[1], filled_range(other_counts)[1])
    with canvas() as (figure, axes):
        draw_histogram(axes, edges, 100 * counts / counts.sum(), "latents")
        other_shares = 100 * other_counts / other_counts.sum()
        axes.stairs(other_shares, edges, color=SECOND, linewidth=1.5, label="channels")
        texts = [
            f"{format_percent(edges[i])} to {format_percent(edges[i + 1])} of the logits: "
            f"{counts[i]:,.0f} ablations of latents, {other_counts[i]:,.0f} of channels"
            for i in range(last + 1)
        ]
        add_column_tooltips(axes, edges[: last + 2], texts)
        axes.set_xlim(0, max(edges[last + 1], 1.15 * NOISE))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:g} %")
        axes.set_xlabel("share of logits that change")
        axes.set_ylabel("share of ablations")
        axes.grid(axis="x", visible=False)
        reference_line(axes, NOISE, "noise", vertical=True)
        add_legend(figure)
        drawing = render(figure)
    return Picture(
        "ablation-sparsity",
        drawing,
        "How far effects spread",
        "Ablations of one active latent, and of one channel at the same positions, by the share of "
        "the LM’s logits that change. Further left is sparser.",
        f"{counts.sum():,.0f} ablations of latents, {other_counts.sum():,.0f} of channels.",
    )


# ---- comparisons and the claim


def _sparsity_of_others(source: RunSource) -> str:
    channel = compare_with("ablation", "percent", channel_sparsity="a channel set to zero")(source)
    return "; ".join(part for part in (channel, f"{format_percent(NOISE)}: noise") if part)


def _all_logits(source: RunSource) -> str:
    """Return how many logits an ablation can change: the vocabulary, at every position."""
    effective = source.number("ablation", "effective_tokens")
    share = source.number("ablation", "ablation_sparsity")
    if effective is None or share is None or not share.value:
        return "The whole vocabulary at each position"
    return f"{effective.value / share.value:,.0f}: the whole vocabulary at each position"


def _evidence(source: RunSource) -> str:
    latent, channel, difference = (
        write_number(source.number("ablation", name), "percent")
        for name in ("ablation_sparsity", "channel_sparsity", "difference")
    )
    return (
        f"{latent} of the logits for a latent, {channel} for a channel; the paired difference is "
        f"{difference}."
    )


def _explain_spread(source: RunSource) -> str:
    """Say whether an effect is on more of the vocabulary, or reaches further into the text."""
    here, later, channel_later = (
        source.number("ablation", name) for name in ("difference_here", "later", "channel_later")
    )
    if here is None or later is None or channel_later is None:
        return "By this measure a latent’s effect is spread over more predictions than a channel’s."
    reach = (
        f"{format_percent(later.value)} of a latent’s squared effect falls on later predictions, "
        f"{format_percent(channel_later.value)} of a channel’s, and the measure counts such reach "
        "as lack of sparsity"
    )
    if decide(here) == "holds":
        return (
            "On the next prediction alone, a latent does matter to less of the vocabulary, by "
            f"{write_number(here, 'percent')}; but {reach}."
        )
    return (
        "On the next prediction alone, a latent matters to no less of the vocabulary than a "
        f"channel; and {reach}."
    )


PART = EvaluationPart(
    NumberGroup(
        "ablation",
        "How many predictions a latent matters to",
        (
            NumberRow(
                "Ablation sparsity",
                "ablation_sparsity",
                "percent",
                _sparsity_of_others,
                "Effective share of the LM’s logits, at this position and later ones, that change "
                "when one active latent is ablated. Lower is sparser.",
                key_number=True,
            ),
            NumberRow(
                "Sparser than channels by",
                "difference",
                "percent",
                "0 %: latents and channels are alike",
                "Channels’ sparsity less latents’, at the same positions. Above 0, latents are the "
                "more specific of the two.",
            ),
            NumberRow(
                "Of the next prediction alone",
                "sparsity_here",
                "percent",
                compare_with("ablation", "percent", channel_sparsity_here="a channel set to zero"),
                "The same for the prediction at the position itself: the share of the vocabulary "
                "that the latent matters to. Lower is sparser.",
            ),
            NumberRow(
                "Reach",
                "later",
                "percent",
                compare_with("ablation", "percent", channel_later="a channel set to zero"),
                "Share of the squared effect that falls on later predictions. Ablation sparsity "
                "mixes this with the row above: an effect that reaches further counts as less "
                "sparse.",
            ),
            NumberRow(
                "Effective logits",
                "effective_tokens",
                "count",
                _all_logits,
                "Ablation sparsity as a count of logits. Fewer is sparser.",
            ),
            NumberRow(
                "Ablation sparsity, weighted",
                "ablation_sparsity_weighted",
                "percent",
                compare_with(
                    "ablation", "percent", ablation_sparsity="each ablation counts the same"
                ),
                "Each ablation weighted by the size of its effect, so that the many with hardly "
                "any effect count little.",
            ),
            NumberRow(
                "KL of an ablation",
                "kl",
                "number",
                compare_with("ablation", "number", channel_kl="a channel set to zero"),
                "Nats per position by which ablating one latent changes the predictions. Where "
                "this is tiny, sparsity means little.",
            ),
        ),
    ),
    claims=(
        Claim(
            "Ablating a latent changes fewer predictions than ablating a channel.",
            lambda source: source.number("ablation", "difference"),
            _evidence,
            _explain_spread,
        ),
    ),
    draw=draw_pictures,
)
