"""The figures of `refinement`, `progressive`, `latents` and `subspaces`: how codes and latents are,
beside those of other SAEs where several were evaluated at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ksparse.report.figures import (
    FIRST,
    INK,
    SECOND,
    Picture,
    canvas,
    legend,
    one_in,
    reference,
    save,
    short,
)
from ksparse.report.source import Number, RunSource, is_number, number
from ksparse.report.tables import brief, percent, significant
from ksparse.report.tokens import safe_text

OTHERS = ((SECOND, "s", "-"), (INK, "^", "-"), (SECOND, "D", ":"), (INK, "v", ":"))
"""Colour, marker and line of the other SAEs, as far as they go."""


def pictures(source: RunSource) -> list[Picture]:
    """Return the figures of the evaluations that have been run."""
    results = {
        name: source.result(name) or {}
        for name in ("refinement", "progressive", "latents", "subspaces")
    }
    name, n = source.run.name, source.recipe.sae.n_latents
    drawn = (
        shifts(name, results["refinement"]),
        progressive(name, results["progressive"]),
        laws(results["latents"], source.recipe.sae.k / n),
        effective_tokens(results["latents"]),
        subspaces(results["subspaces"]),
    )
    return [picture for picture in drawn if picture is not None]


def shifts(name: str, result: dict[str, Any]) -> Picture | None:
    """Draw the distribution of refined - encoded values, of this SAE and of those beside it."""
    shown = [
        (label, histogram, number(each.get("shift_mean")))
        for label, each in {name: result, **(result.get("beside") or {})}.items()
        if (histogram := _histogram(each.get("histogram"))) is not None
    ][: 1 + len(OTHERS)]
    if not shown or shown[0][0] != name:
        return None
    with canvas() as (figure, axes):
        for i, (label, (edges, counts), mean) in enumerate(shown):
            density = counts / counts.sum() / np.diff(edges)
            words = safe_text(label, 30) + ("" if mean is None else f", mean {mean.value:+.1%}")
            if i == 0:
                axes.bar(
                    edges[:-1],
                    density,
                    np.diff(edges),
                    align="edge",
                    color=FIRST,
                    alpha=0.75,
                    linewidth=0,
                    label=words,
                )
            else:
                axes.stairs(
                    density,
                    edges,
                    color=OTHERS[i - 1][0],
                    linestyle=OTHERS[i - 1][2],
                    linewidth=1.3,
                    label=words,
                )
        filled = np.flatnonzero(
            sum(counts for _, (_, counts), _ in shown)
            > 1e-4 * sum(counts.sum() for _, (_, counts), _ in shown)
        )
        edges = shown[0][1][0]
        axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        reference(axes, 0, "as encoded", vertical=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f} %" if value else "0")
        axes.set(xlabel="refined less encoded value, in mean active values", ylabel="density")
        axes.grid(axis="x", visible=False)
        legend(figure, 2)
        svg = save(figure)
    return Picture(
        "refinement-shift",
        svg,
        "Where the values would rather be",
        "How far each active value moves when the values, not the latents, are optimised. Around "
        "0: the encoder is right on average. "
        "To the right of it: the values have shrunk.",
        "; ".join(f"{label}: mean {mean.value:+.1%}" for label, _, mean in shown if mean) + ".",
    )


def progressive(name: str, result: dict[str, Any]) -> Picture | None:
    """Draw error and loss of the LM against L0 when the activation is replaced, of this SAE and of
    those beside it."""
    shown = [
        (label, each)
        for label, each in {name: result, **(result.get("beside") or {})}.items()
        if _points(each.get("topk"), "nmse")
    ][: 1 + len(OTHERS)]
    if not shown or shown[0][0] != name:
        return None
    with canvas(rows=2, size=(5.2, 5.2)) as (figure, (above, below)):
        for axes, key, words in (
            (above, "nmse", "normalised MSE"),
            (below, "ce_delta", "loss added, nats"),
        ):
            for (label, each), (colour, marker, _) in zip(shown, ((FIRST, "o", "-"), *OTHERS)):
                points, threshold = (
                    _points(each.get("topk"), key),
                    _points(each.get("threshold"), key),
                )
                axes.plot(
                    *zip(*points),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    label=f"{safe_text(label, 30)}, TopK",
                )
                if threshold:
                    axes.plot(
                        *zip(*threshold),
                        color=colour,
                        linestyle=(0, (2, 2)),
                        linewidth=1.2,
                        label=f"{safe_text(label, 30)}, threshold",
                    )
                own = _points([each.get("own")], key)
                if own:
                    axes.plot(
                        *own[0],
                        linestyle="none",
                        marker="o",
                        markersize=11,
                        markerfacecolor="none",
                        markeredgecolor=colour,
                        markeredgewidth=1.4,
                    )
            axes.set(xscale="log", yscale="log", ylabel=words)
            _log_ticks(axes.xaxis)
            _log_ticks(axes.yaxis)
        above.tick_params(labelbottom=False)
        below.set_xlabel("active latents per token")
        above.sharex(below)
        handles, labels = above.get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=2,
            frameon=False,
            fontsize=8.5,
            handlelength=2,
        )
        svg = save(figure)
    best = min(_points(result.get("topk"), "nmse"), key=lambda point: point[1])
    return Picture(
        "progressive",
        svg,
        "The code at another k",
        "The activation is replaced after training: by TopK with another k, or by one threshold "
        "for all latents, dashed. A ring is the SAE as it was trained. "
        "A code that gets worse with more latents than it was trained for is fitted to its k.",
        f"With TopK the least normalised MSE is {significant(best[1])}, at "
        f"{brief(best[0], 'number')} latents per token.",
    )


def laws(result: dict[str, Any], uniform: float) -> Picture | None:
    """Draw the densities and importances of latents with the two laws fitted to each."""
    shown = [
        (key, words, histogram, result.get(f"{key}_fit") or {})
        for key, words in (
            ("density", "share of tokens on which it fires"),
            ("importance", "mean square"),
        )
        if (histogram := _histogram(result.get(f"{key}_histogram"))) is not None
    ]
    if len(shown) != 2:
        return None
    with canvas(rows=2, size=(5.2, 4.8)) as (figure, panels):
        for axes, (key, words, (edges, counts), fit) in zip(panels, shown):
            axes.bar(
                edges[:-1],
                counts,
                np.diff(edges),
                align="edge",
                color=FIRST,
                alpha=0.75,
                linewidth=0,
            )
            across = np.linspace(edges[0], edges[-1], 400)
            for law, density, colour, line in (
                ("Gaussian", _gaussian, INK, "-"),
                ("Laplace", _laplace, SECOND, (0, (3, 2))),
            ):
                curve = density(fit.get(law.lower()), across)
                if curve is not None:
                    axes.plot(
                        across,
                        curve * fit["n"] * (edges[1] - edges[0]),
                        color=colour,
                        linestyle=line,
                        linewidth=1.2,
                        label=law if key == "density" else None,
                    )
            filled = np.flatnonzero(counts)
            axes.set_xlim(edges[filled[0]] - 0.2, edges[filled[-1] + 1] + 0.2)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.xaxis.set_major_formatter(
                lambda power, _, key=key: one_in(power) if key == "density" else short(10.0**power)
            )
            axes.set(xlabel=words, ylabel="latents")
            axes.grid(axis="x", visible=False)
        if panels[0].get_xlim()[0] < math.log10(uniform) < panels[0].get_xlim()[1]:
            reference(panels[0], math.log10(uniform), "k / n", vertical=True)
        legend(figure, 2)
        svg = save(figure)
    verdicts = [f"{key}: {_verdict(fit)}" for key, _, _, fit in shown]
    return Picture(
        "latents-laws",
        svg,
        "How often, and how much",
        "Logarithms of how often latents fire and of their mean squared activation, with the two "
        "laws that fit best. " + " ".join(f"{v[0].upper()}{v[1:]}." for v in verdicts),
        "; ".join(verdicts) + ".",
    )


def effective_tokens(result: dict[str, Any]) -> Picture | None:
    """Draw how many different tokens latents fire on."""
    histogram = _histogram(result.get("effective_histogram"))
    if histogram is None:
        return None
    edges, counts = histogram
    with canvas() as (figure, axes):
        axes.bar(
            edges[:-1], counts, np.diff(edges), align="edge", color=FIRST, alpha=0.75, linewidth=0
        )
        axes.set_xlim(edges[0], edges[np.flatnonzero(counts)[-1] + 1])
        ticks = [digit * 10**power for power in range(9) for digit in (1, 2, 5)]
        axes.set_xticks(
            [
                math.log10(tick)
                for tick in ticks
                if edges[0] <= math.log10(tick) <= axes.get_xlim()[1]
            ]
        )
        axes.xaxis.set_major_formatter(lambda power, _: f"{10**power:,.0f}")
        axes.set(xlabel="effective number of tokens", ylabel="latents")
        axes.grid(axis="x", visible=False)
        svg = save(figure)
    middle = (result.get("effective_tokens") or [None] * 5)[2]
    return Picture(
        "latents-tokens",
        svg,
        "How many tokens a latent speaks of",
        "exp of the entropy of a latent’s mean squared activation over the vocabulary: 1 for a "
        "latent of a single token.",
        f"Median {significant(middle)}." if is_number(middle) else "No median.",
    )


def subspaces(result: dict[str, Any]) -> Picture | None:
    """Draw how much latents along the order read the first side's directions, and what both sides
    read of each direction."""
    along, sides, cut = (
        result.get("along_order"),
        result.get("by_direction") or {},
        result.get("cut"),
    )
    if not (
        isinstance(along, list)
        and along
        and all(map(is_number, along))
        and is_number(cut)
        and all(all(map(is_number, shares)) for shares in sides.values())
    ):
        return None
    with canvas(rows=2, size=(5.2, 4.8)) as (figure, (above, below)):
        places = (np.arange(len(along)) + 0.5) / len(along)
        above.plot(places, along, color=FIRST)
        above.set(
            xlim=(0, 1),
            ylim=(0, 1),
            xlabel="latents, in the order of what they read",
            ylabel="on the first\nside’s directions",
        )
        reference(above, cut, "cut", vertical=True)
        for (side, shares), (colour, line) in zip(
            sides.items(), ((FIRST, "-"), (SECOND, (0, (3, 1))))
        ):
            below.plot(
                np.arange(1, len(shares) + 1),
                np.array(shares) * len(shares),
                color=colour,
                linestyle=line,
                linewidth=1.2,
                label=f"{side} side",
            )
        below.set(
            xlabel="principal direction of the encoder, the largest first",
            ylabel="share read,\n1 is even",
            ylim=(0, None),
        )
        for axis in (above.xaxis, above.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        legend(figure, 2)
        svg = save(figure)
    there = [
        number(result.get(key)) or Number(math.nan) for key in ("separation", "separation_of_noise")
    ]
    return Picture(
        "subspaces",
        svg,
        "What groups of latents read",
        "Above: latents put into an order by what they read, and how much of it is on the "
        "directions of those before the cut. A step means two groups; a slope, "
        "none. Below: what both sides read of each direction.",
        f"Separation {significant(there[0].value)}; of noise {significant(there[1].value)}."
        if all(math.isfinite(each.value) for each in there)
        else "",
    )


# ---- parts ---------------------------------------------------------------------------------------


def _histogram(found: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (edges, counts) of a histogram of a result; None if it is not one, or empty."""
    edges, counts = (
        (found.get("edges"), found.get("counts")) if isinstance(found, dict) else (None, None)
    )
    if not (
        isinstance(edges, list)
        and isinstance(counts, list)
        and len(edges) == len(counts) + 1
        and all(map(is_number, [*edges, *counts]))
        and sum(counts)
    ):
        return None
    return np.array(edges, float), np.array(counts, float)


def _points(found: Any, key: str) -> list[tuple[float, float]]:
    """Return (L0, value) of points of a result, by L0, as far as a logarithmic axis can show
    them."""
    pairs = [
        (number(point.get("l0")), number(point.get(key)))
        for point in found or []
        if isinstance(point, dict)
    ]
    return sorted(
        {
            (l0.value, value.value)
            for l0, value in pairs
            if l0 is not None and value is not None and l0.value > 0 and value.value > 0
        }
    )


def _log_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: short(value))


def _gaussian(fit: Any, x: np.ndarray) -> np.ndarray | None:
    return (
        np.exp(-0.5 * ((x - fit["mean"]) / fit["sd"]) ** 2) / fit["sd"] / math.sqrt(2 * math.pi)
        if isinstance(fit, dict)
        else None
    )


def _laplace(fit: Any, x: np.ndarray) -> np.ndarray | None:
    return (
        np.exp(-np.abs(x - fit["median"]) / fit["scale"]) / 2 / fit["scale"]
        if isinstance(fit, dict)
        else None
    )


def _verdict(fit: dict[str, Any]) -> str:
    """Say which law fits better, and by how much."""
    margin, mode = number(fit.get("margin")), fit.get("mode")
    if margin is None or not is_number(mode):
        return "too few latents for a law"
    better, size = (
        ("Gaussian" if margin.value > 0 else "Laplace"),
        f"{abs(margin.value):.3f} ± {margin.se or 0:.3f} nats per latent",
    )
    likely = (
        "fits better"
        if margin.se and abs(margin.value) > 2 * margin.se
        else "fits no worse than the other"
    )
    return (
        f"the {better} law {likely}, by {size}; most are near "
        f"{percent(mode) if mode > 1e-3 else short(mode)}"
    )
