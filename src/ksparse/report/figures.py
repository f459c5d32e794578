"""Data -> SVG. Each function returns a Picture, or None where the run has nothing to draw.

matplotlib draws on its own Figure objects, without pyplot and with its default settings whatever
the user's are. Colours are drawn as fixed values; on the page they become the page's variables, so
that figures follow its light and dark.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from markupsafe import Markup

from ksparse.report.source import Number, is_number
from ksparse.report.tables import GAUSSIAN, amount, percent, significant, written
from ksparse.report.tokens import safe_text

INK, GRID, FIRST, SECOND = "#1c1d22", "#dfe1e7", "#3a55c8", "#b4530a"
_ON_PAGE = {
    INK: "currentColor",
    GRID: "var(--grid)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ksparse",
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "lines.solid_capstyle": "round",
}
_SPOT, _SPOTS = (
    "spot:",
    120,
)  # ids of places that say something on hover; so many on a curve at most
_FONT = "font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


@dataclass(frozen=True)
class Picture:
    """A figure: the file as it stands alone, and the words that go with it."""

    name: str
    svg: str
    title: str
    caption: str
    label: str
    """What a reader who cannot see it should know."""

    @property
    def inline(self) -> Markup:
        """Return the SVG for a page: ids of its own, colours of the page, no prologue and no
        namespaces."""
        text = self.svg[self.svg.index("<svg") :]
        root, rest = text.split(
            ">", 1
        )  # only the root's attributes: clip paths and bars have a width of their own
        text = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", root) + ">" + rest
        text = re.sub(r'((?:\sid="|href="#|url\(#))', rf"\g<1>{self.name}-", text)
        for colour, variable in _ON_PAGE.items():
            text = text.replace(colour, variable)
        label = Markup.escape(f"{self.title}. {self.label}")
        return Markup(
            text.replace("<svg", f'<svg role="img" aria-label="{label}" focusable="false"', 1)
        )


# ---- training ------------------------------------------------------------------------------------


def training(
    metrics: list[dict[str, Any]], k: int, held_out: float | None, text: str = "held-out text"
) -> list[Picture]:
    """Return the curves of a run against the tokens it has seen; held_out: the normalised MSE of
    the evaluation, text: of what."""
    drawn = (
        error_curve(metrics, held_out, text),
        dead_curve(metrics),
        step_curves(metrics),
        l0_curve(metrics, k),
    )
    return [picture for picture in drawn if picture is not None]


def error_curve(
    metrics: list[dict[str, Any]], held_out: float | None, text: str = "held-out text"
) -> Picture | None:
    tokens, values = column(metrics, "nmse")
    if not positive(values):
        return None
    with canvas() as (figure, axes):
        curve(axes, tokens, values, log=True)
        if held_out is not None and held_out > 0:
            reference(axes, held_out, f"{text}: {significant(held_out)}")
        axes.set_ylabel("normalised MSE")
        against_tokens(axes, tokens, log=True)
        svg = save(figure)
    return Picture(
        "training-nmse",
        svg,
        "Normalised MSE",
        "Of each step's batch, before the step, with the raw weights; 1 is predicting the mean. "
        "Both axes logarithmic.",
        went(values, tokens, significant),
    )


def dead_curve(metrics: list[dict[str, Any]]) -> Picture | None:
    tokens, values = column(metrics, "dead")
    if not known(values):
        return None
    with canvas() as (figure, axes):
        curve(axes, tokens, 100 * values, unit=" %")
        axes.set_ylim(0, max(1.0, 1.1 * 100 * float(np.nanmax(values))))
        axes.set_ylabel("dead latents, %")
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        against_tokens(axes, tokens)
        svg = save(figure)
    return Picture(
        "training-dead",
        svg,
        "Dead latents",
        "Share of latents that have not fired for the recipe's number of tokens; before that many, "
        "none can be dead.",
        went(values, tokens, percent),
    )


def step_curves(metrics: list[dict[str, Any]]) -> Picture | None:
    """Draw the learning rate and the norm of the gradient, one above the other."""
    tokens, rates = column(metrics, "lr")
    _, norms = column(metrics, "grad_norm")
    if not known(rates) or not positive(norms):
        return None
    with canvas(rows=2) as (figure, (above, below)):
        curve(above, tokens, rates)
        above.set_ylim(0, 1.2 * float(np.nanmax(rates)) or 1)
        above.set_ylabel("learning rate")
        above.yaxis.set_major_formatter(lambda value, _: short(value))
        above.tick_params(labelbottom=False)
        curve(below, tokens, norms, log=True, colour=SECOND)
        below.set_ylabel("gradient norm")
        against_tokens(below, tokens)
        above.sharex(below)
        svg = save(figure)
    return Picture(
        "training-steps",
        svg,
        "Learning rate and gradient",
        "The norm is taken before clipping, without the part along decoder rows; logarithmic.",
        f"Learning rate: {went(rates, tokens, short)} Gradient norm: {went(norms, tokens, short)}",
    )


def l0_curve(metrics: list[dict[str, Any]], k: int) -> Picture | None:
    tokens, values = column(metrics, "l0")
    if not known(values):
        return None
    with canvas() as (figure, axes):
        curve(axes, tokens, values)
        reference(axes, k, f"k = {k}")
        axes.set_ylim(0, 1.25 * max(k, float(np.nanmax(values))))
        axes.locator_params(axis="y", integer=True)
        axes.set_ylabel("values above zero")
        axes.yaxis.set_major_formatter(lambda value, _: short(value))
        against_tokens(axes, tokens)
        svg = save(figure)
    return Picture(
        "training-l0",
        svg,
        "L0",
        "Mean number of latents above zero per token. With TopK, below k where a chosen latent's "
        "value is not positive.",
        went(values, tokens, significant),
    )


# ---- latents -------------------------------------------------------------------------------------


def density(edges: list[float], counts: list[int], uniform: float) -> Picture | None:
    """Draw how many latents fire how often; uniform: the density of each if all fired alike."""
    if (
        len(edges) != len(counts) + 1
        or not all(map(is_number, [*edges, *counts]))
        or not sum(counts)
    ):
        return None
    first, last = _range(counts)
    low, high = math.floor(edges[first]), math.ceil(edges[last + 1])
    with canvas() as (figure, axes):
        axes.bar(
            edges[:-1], counts, np.diff(edges), align="edge", color=FIRST, alpha=0.75, linewidth=0
        )
        columns(
            axes,
            edges,
            [
                f"density {percent(10 ** edges[i])} to {percent(10 ** edges[i + 1])}: {count:,} "
                "latents"
                if count
                else ""
                for i, count in enumerate(counts)
            ],
        )
        axes.set_xlim(low, max(high, low + 1))
        axes.set_xticks(range(low, max(high, low + 1) + 1))
        axes.xaxis.set_major_formatter(lambda power, _: one_in(power))
        axes.set_xlabel("share of tokens on which it fires")
        axes.set_ylabel("latents")
        axes.grid(axis="x", visible=False)
        if low <= math.log10(uniform) <= max(high, low + 1):
            reference(axes, math.log10(uniform), "all alike", vertical=True)
        svg = save(figure)
    peak = int(np.argmax(counts))
    return Picture(
        "latents-density",
        svg,
        "How often latents fire",
        "Live latents by density, on a logarithmic axis. The line is k / n, where all would be if "
        "they fired alike. "
        "A hump at the far left is latents that hardly live; one near 1 is latents that say "
        "little.",
        f"{sum(counts):,} live latents; the commonest density is about "
        f"{percent(10 ** edges[peak])} of tokens.",
    )


def cosines(values: np.ndarray) -> Picture | None:
    """Draw the cosine between what latents read and what they write."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    with canvas() as (figure, axes):
        counts, edges, _ = axes.hist(
            values,
            bins=40,
            range=(min(0.0, float(values.min())), 1),
            color=FIRST,
            alpha=0.75,
            linewidth=0,
        )
        columns(
            axes,
            edges,
            [
                f"cosine {edges[i]:.2f} to {edges[i + 1]:.2f}: {count:,.0f} latents"
                if count
                else ""
                for i, count in enumerate(counts)
            ],
        )
        axes.set_xlim(min(0.0, float(values.min())), 1)
        axes.set_xlabel("cosine of encoder and decoder direction")
        axes.set_ylabel("latents")
        axes.grid(axis="x", visible=False)
        svg = save(figure)
    return Picture(
        "latents-cosine",
        svg,
        "What they read and what they write",
        "Cosine between each live latent's encoder and decoder direction. They start equal; "
        "those of correlated latents part, so that each reads what the others do not.",
        f"Median {np.median(values):.2f}, from {values.min():.2f} to {values.max():.2f}.",
    )


# ---- evaluations ---------------------------------------------------------------------------------


def explained(losses: dict[str, Number | None], ours: str) -> Picture | None:
    """Draw the LM's losses on one axis, each on a line of its own; ours: the name of the one that
    the others are there for."""
    shown = sorted(
        ((name, loss) for name, loss in losses.items() if loss is not None),
        key=lambda pair: pair[1].value,
    )
    if ours not in dict(shown) or len(shown) < 2:
        return None
    with canvas(size=(5.2, 0.75 + 0.31 * len(shown))) as (figure, axes):
        for row, (name, loss) in enumerate(shown):
            colour, size = (FIRST, 8) if name == ours else (INK, 6)
            axes.plot(loss.value, row, marker="o", color=colour, markersize=size)
            if loss.se:
                axes.hlines(
                    row,
                    loss.value - 2 * loss.se,
                    loss.value + 2 * loss.se,
                    colors=colour,
                    linewidth=1.5,
                )
            axes.annotate(
                significant(loss.value),
                (loss.value + 2 * (loss.se or 0), row),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                color=colour,
            )
            dots(axes, [loss.value], [row], [f"{name}: {in_words(loss)} nats per token"])
        lines(axes, [name for name, _ in shown])
        low, high = shown[0][1].value, shown[-1][1].value
        axes.set_xlim(
            low - 0.04 * (high - low or 1), high + 0.14 * (high - low or 1)
        )  # room for the last number
        axes.set_xlabel("loss of the LM, nats per token")
        svg = save(figure)
    return Picture(
        "explained-loss",
        svg,
        "What explanations carry",
        "Loss with each of these in place of the activation; the n-grams use no activation at all. "
        "The nearer explanations are to the reconstruction, the more of the latents they catch. "
        "Bars are two standard errors.",
        "; ".join(f"{name} {significant(loss.value)}" for name, loss in shown) + " nats.",
    )


def patterns(
    recall: np.ndarray,
    precision: np.ndarray,
    means: dict[str, tuple[Number | None, Number | None]],
    latents: np.ndarray | None = None,
) -> Picture | None:
    """Draw precision against recall, a point for each latent; means: (recall, precision) by name,
    the first the latents' own;
    latents: the points' numbers."""
    there = np.isfinite(recall) & np.isfinite(precision)
    if not there.any():
        return None
    with canvas(size=(5.2, 3.9)) as (figure, axes):
        axes.plot(
            100 * recall[there],
            100 * precision[there],
            linestyle="none",
            marker="o",
            color=FIRST,
            alpha=0.3,
            markersize=4.5,
            markeredgewidth=0,
            label="a latent",
            clip_on=False,
        )
        if latents is not None:
            dots(
                axes,
                100 * recall[there],
                100 * precision[there],
                [
                    f"latent {number}: recall {percent(across)}, precision {percent(up)}"
                    for number, across, up in zip(latents[there], recall[there], precision[there])
                ],
            )
        for (name, (across, up)), (marker, colour) in zip(
            means.items(), (("D", INK), ("X", SECOND))
        ):
            if across is not None and up is not None:
                axes.plot(
                    100 * across.value,
                    100 * up.value,
                    linestyle="none",
                    marker=marker,
                    color=colour,
                    markersize=8,
                    label=name,
                    clip_on=False,
                )
                dots(
                    axes,
                    [100 * across.value],
                    [100 * up.value],
                    [f"{name}: recall {percent(across.value)}, precision {percent(up.value)}"],
                )
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="recall, %", ylabel="precision, %")
        legend(figure)
        svg = save(figure)
    return Picture(
        "n2g-latents",
        svg,
        "Precision and recall of explanations",
        "Each scored latent, by how much its patterns catch and how often they are right; darker "
        "where points lie on each other. "
        "Recall goes in steps, one for each activation it is counted on."
        + (
            f" {(~there).sum():,} latents whose patterns predicted nothing are left out."
            if not there.all()
            else ""
        ),
        f"{there.sum():,} latents; median recall {percent(float(np.median(recall[there])))}, "
        f"median precision {percent(float(np.median(precision[there])))}.",
    )


def effects(latents: dict[str, Any], channels: dict[str, Any]) -> Picture | None:
    """Draw how sparse the effects of single latents are against those of single channels, from
    histograms with one set of edges."""
    left, right = _histogram(latents), _histogram(channels)
    if left is None or right is None or left[0] != right[0]:
        return None
    (edges, ours), (_, theirs) = left, right
    last = max(_range(ours)[1], _range(theirs)[1])
    with canvas() as (figure, axes):
        axes.bar(
            edges[:-1],
            _shares(ours),
            np.diff(edges),
            align="edge",
            color=FIRST,
            alpha=0.75,
            linewidth=0,
            label="latents",
        )
        axes.stairs(_shares(theirs), edges, color=SECOND, linewidth=1.5, label="channels")
        columns(
            axes,
            edges[: last + 2],
            [
                f"{percent(edges[i])} to {percent(edges[i + 1])} of the logits: {ours[i]:,} "
                f"ablations of latents, {theirs[i]:,} of channels"
                for i in range(last + 1)
            ],
        )
        axes.set_xlim(0, max(edges[last + 1], 1.15 * GAUSSIAN))
        axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:g} %")
        axes.set_xlabel("share of logits that change")
        axes.set_ylabel("share of ablations")
        axes.grid(axis="x", visible=False)
        reference(axes, GAUSSIAN, "noise", vertical=True)
        legend(figure)
        svg = save(figure)
    return Picture(
        "ablation-sparsity",
        svg,
        "How far effects spread",
        "Ablations of one active latent, and of one channel at the same positions, by the share of "
        "the LM’s logits that change. "
        "Further left is sparser.",
        f"{sum(ours):,} ablations of latents, {sum(theirs):,} of channels.",
    )


def _histogram(found: dict[str, Any]) -> tuple[list[float], list[int]] | None:
    """Return the edges and counts of a histogram; None if it is not one, or empty."""
    edges, counts = found.get("edges"), found.get("counts")
    if (
        isinstance(edges, list)
        and isinstance(counts, list)
        and len(edges) == len(counts) + 1
        and all(map(is_number, [*edges, *counts]))
        and sum(counts)
    ):
        return edges, counts
    return None


PROBES = (
    ("prior_loss", "label’s share alone", "|", INK, INK),
    ("dense_probe_loss", "all channels together", "D", INK, "none"),
    ("random_sae_loss", "best random latent", "x", SECOND, SECOND),
    ("channel_loss", "best channel", "s", SECOND, "none"),
    ("loss", "best latent", "o", FIRST, FIRST),
)
"""Kinds of probe: key of the loss, name, marker, its colour and filling; the latest is drawn above
the others."""


def tasks(rows: list[tuple[str, str, dict[str, Number | None]]]) -> Picture | None:
    """Draw the losses of each task's probes on a line: (its name, what stands at its end, losses by
    the keys of PROBES)."""
    if not any(losses.get("loss") for _, _, losses in rows):
        return None
    with canvas(size=(6.2, 1.4 + 0.185 * len(rows))) as (figure, axes):
        for key, name, marker, colour, filling in PROBES:
            found = [
                (loss, row)
                for row, (_, _, losses) in enumerate(rows)
                if (loss := losses.get(key)) is not None
            ]
            axes.plot(
                [number.value for number, _ in found],
                [row for _, row in found],
                linestyle="none",
                marker=marker,
                color=colour,
                markerfacecolor=filling,
                markersize=6 if key == "prior_loss" else 4.5,
                markeredgewidth=1.1,
                label=name,
                clip_on=False,
            )
            dots(
                axes,
                [number.value for number, _ in found],
                [row for _, row in found],
                [
                    f"{safe_text(rows[row][0], 60)}: {name} {in_words(number)}"
                    for number, row in found
                ],
            )
            if key == "loss":
                axes.hlines(
                    [row for _, row in found],
                    [number.value - 2 * (number.se or 0) for number, _ in found],
                    [number.value + 2 * (number.se or 0) for number, _ in found],
                    colors=colour,
                    linewidth=1.1,
                )
        lines(axes, [name for name, _, _ in rows], fontsize=8)
        for row, (_, end, _) in enumerate(rows):
            axes.annotate(
                end,
                (1, row),
                xycoords=("axes fraction", "data"),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                parse_math=False,
            )
        axes.annotate(
            "latent",
            (1, -1),
            xycoords=("axes fraction", "data"),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
        axes.tick_params(axis="x", labeltop=len(rows) > 20)
        axes.set_xlabel("loss on the test half, nats per label")
        legend(figure, 3)
        svg = save(figure)
    return Picture(
        "probes-tasks",
        svg,
        "The best latent of each task",
        "Sorted by how far the best latent is below the next of best channel, best random latent "
        "and the label’s share alone; "
        "at the top the SAE has something that they have not. Bars are two standard errors. "
        "A diamond far to the left of the rest is knowledge that the LM has, but no single latent.",
        f"{len(rows)} tasks, from {safe_text(rows[0][0], 40)} to {safe_text(rows[-1][0], 40)}.",
    )


# ---- parts of a figure ---------------------------------------------------------------------------


@contextmanager
def canvas(rows: int = 1, size: tuple[float, float] = (5.2, 2.9)) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure of so many inches and its axes, with our settings until it is
    saved."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)  # type: ignore[arg-type]  # wants literal names
        figure = Figure(figsize=size, layout="constrained", facecolor="none")
        yield figure, figure.subplots(rows, 1, subplot_kw={"facecolor": "none"})


def save(figure: Any) -> str:
    """Return a figure as SVG, the same bytes each time: no date, no name of a program, a fixed salt
    for ids."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing"
        )  # text is drawn by the reader's fonts, which may well have it
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    text = _say(text)
    text = re.sub(
        r"<style[^>]*>[^<]*</style>\s*", "", text
    )  # it styles everything on a page; the roots below inherit instead
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    return text.replace(
        "<svg ", f'<svg style="stroke-linejoin: round; stroke-linecap: butt; {_FONT}" ', 1
    )


def curve(
    axes: Any,
    tokens: np.ndarray,
    values: np.ndarray,
    *,
    log: bool = False,
    colour: str = FIRST,
    unit: str = "",
) -> None:
    """Draw one curve that says its values; a few points are dots too, since a line needs two."""
    if log:
        values = np.where(values > 0, values, np.nan)
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    axes.plot(tokens, values, color=colour, marker="o" if len(tokens) < 12 else None, markersize=3)
    shown = np.flatnonzero(np.isfinite(values))
    shown = (
        shown[np.unique(np.linspace(0, len(shown) - 1, min(len(shown), _SPOTS)).astype(int))]
        if len(shown)
        else shown
    )
    if len(shown) > 1:
        between = (tokens[shown][1:] + tokens[shown][:-1]) / 2
        columns(
            axes,
            [tokens[shown[0]], *between, tokens[shown[-1]]],
            [f"{amount(tokens[i])} tokens: {short(values[i])}{unit}" for i in shown],
        )


def columns(axes: Any, edges: Any, words: list[str]) -> None:
    """Let each stretch of the horizontal axis between two edges say something on hover, whatever is
    drawn there; "" says nothing."""
    from matplotlib.patches import Rectangle

    for left, right, said in zip(edges, edges[1:], words):
        if said and right > left:
            axes.add_artist(
                Rectangle(
                    (left, 0),
                    right - left,
                    1,
                    transform=axes.get_xaxis_transform(),
                    facecolor="none",
                    edgecolor="none",
                    gid=_SPOT + quote(said),
                )
            )


def dots(axes: Any, across: Any, up: Any, words: list[str]) -> None:
    """Let points that are drawn already say something on hover."""
    for x, y, said in zip(across, up, words):
        axes.plot(
            x,
            y,
            linestyle="none",
            color=INK,
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor="none",
            clip_on=False,
            gid=_SPOT + quote(said),
        )


def _say(svg: str) -> str:
    """Put each place's words into it as its title, and make its shape as short as can be."""
    group, number = rf'<g id="{_SPOT}([^"]*)">\s*', r'"([\d.]+)"'

    def titled(shape: str) -> Callable[[re.Match[str]], str]:
        return lambda found: (
            f'<g class="spot"><title>{escape(unquote(found[1]), quote=False)}</title>'
            f'<{shape.format(*found.groups())} fill="none" pointer-events="all"/></g>'
        )

    svg = re.sub(
        rf"{group}(?:<defs>.*?</defs>\s*)?<g[^>]*>\s*"
        rf"<use [^>]*?x={number} y={number}[^>]*/>\s*</g>\s*</g>",
        titled('circle cx="{1}" cy="{2}" r="4.5"'),
        svg,
        flags=re.DOTALL,
    )
    return re.sub(rf'{group}<path d="([^"]*)"[^>]*/>\s*</g>', titled('path d="{1}"'), svg)


def in_words(number: Number) -> str:
    """Return a value and its standard error."""
    return " ".join(part for part in written(number, "number") if part)


def reference(axes: Any, at: float, text: str, *, vertical: bool = False) -> None:
    """Draw a dashed line with its name on it."""
    line = {"linewidth": 1.0, "linestyle": (0, (4, 3))}
    if vertical:
        axes.axvline(at, color=INK, **line)  # over bars, where the second colour would drown
        axes.annotate(
            text,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
        )
    else:
        axes.axhline(at, color=SECOND, **line)
        axes.annotate(
            text,
            (0, at),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            color=SECOND,
        )


def lines(axes: Any, names: list[str], **how: Any) -> None:
    """Give each of some rows its name at the left, the first at the top, with no more room around
    them than they need."""
    axes.set_yticks(
        range(len(names)), [safe_text(name, 34) for name in names], parse_math=False, **how
    )  # names are no formulas
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def legend(figure: Any, columns: int = 4) -> None:
    """Name the marks above the axes, where they hide nothing."""
    if not any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        return
    figure.legend(
        loc="outside upper left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        handletextpad=0.2,
        columnspacing=1.2,
        handlelength=1.4,
    )


def against_tokens(axes: Any, tokens: np.ndarray, *, log: bool = False) -> None:
    axes.set_xlabel("training tokens")
    if log and len(tokens) > 2 and tokens[0] > 0:
        axes.set_xscale("log")
        _plain_log(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: thousands(value))


def _plain_log(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if axis.axis_name == "y" else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: short(value))


def column(metrics: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens and one value of each line of the metrics; NaN, a gap, where it is null."""
    rows = [row for row in metrics if is_number(row.get("tokens"))]
    values = [float(row[name]) if is_number(row.get(name)) else math.nan for row in rows]
    return np.array([row["tokens"] for row in rows], float), np.array(values, float)


def known(values: np.ndarray) -> bool:
    return bool(np.isfinite(values).any())


def positive(values: np.ndarray) -> bool:
    return bool((values > 0).any())


def went(values: np.ndarray, tokens: np.ndarray, say: Callable[[float], str]) -> str:
    """Say in words where a curve began and where it ended."""
    finite = values[np.isfinite(values)]
    return f"From {say(finite[0])} to {say(finite[-1])} over {amount(tokens[-1])} tokens."


def thousands(value: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def short(value: float) -> str:
    """Return a number for an axis: 0.02, and 2e-5 once there would be many zeros."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, power = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def one_in(power: float) -> str:
    """Return 10 ** power as a share."""
    return {0: "all", -1: "10 %", -2: "1 %"}.get(
        round(power), f"1 in {thousands(10 ** -round(power))}"
    )


def _shares(counts: list[int]) -> np.ndarray:
    return 100 * np.array(counts, float) / sum(counts)


def _range(counts: list[int]) -> tuple[int, int]:
    filled = [i for i, count in enumerate(counts) if count]
    return filled[0], filled[-1]
