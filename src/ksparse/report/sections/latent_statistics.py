"""`latents`: how often and how strongly latents fire, on how many tokens, and which recur."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from ksparse.report.figures import (
    INK,
    SECOND,
    Picture,
    add_legend,
    canvas,
    draw_histogram,
    filled_range,
    format_one_in,
    format_tick,
    read_histogram,
    reference_line,
    render,
)
from ksparse.report.sections import latents
from ksparse.report.sections.base import EvaluationPart
from ksparse.report.source import RunSource, is_number, number
from ksparse.report.tables import (
    NumberGroup,
    NumberRow,
    compare_with,
    format_percent,
    format_significant,
)

RULES = {
    "first": "fires at the beginning of a context",
    "late": "fires late in a context",
    "early": "fires early in a context, after the first position",
    "repetition": "fires where a token occurred in the context before",
}
"""What a recurring latent does, by the name of its rule."""
TEMPLATE = """\
{% from "parts.html.jinja" import latent_link %}
<h3>Recurring latents</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Table of recurring latents">
<table class="tasks">
<thead>
<tr><th scope="col">Rule</th>
<th scope="col" class="num">Latent</th><th scope="col" class="num">Score</th>
<th scope="col" class="num">Fires on</th><th scope="col">Found</th></tr>
</thead>
<tbody>
{% for row in part.recurring %}
<tr><th scope="row">{{ row.rule }}</th>
<td class="num">{{ latent_link(row) }}</td>
<td class="num">{{ row.score }}</td><td class="num">{{ row.density }}</td>
<td>{{ "yes" if row.found else "no" }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="note after">The three latents that come nearest to each rule. Score: Somers’ D, 1 if the
latent fires exactly where the rule says, and 0 if it does not depend on the rule; from 0.5 on, the
rule has found a latent. All rules but the first look only at latents that fire on 5 % of tokens or
more.</p>
"""


def draw_pictures(source: RunSource) -> Iterator[Picture | None]:
    """Yield the figures of the evaluation."""
    result = source.result("latents") or {}
    yield draw_distributions(result, source.uniform_density)
    yield draw_effective_tokens(result)


def draw_distributions(result: dict[str, Any], uniform: float) -> Picture | None:
    """Draw the densities and importances of latents, with the two distributions fitted to each.

    Args:
        result: the evaluation's result.
        uniform: the density of each latent if all fired equally often, k / n.
    """
    panels_of = [
        (key, words, histogram, result.get(f"{key}_fit") or {})
        for key, words in (
            ("density", "share of tokens on which it fires"),
            ("importance", "mean square"),
        )
        if (histogram := read_histogram(result.get(f"{key}_histogram"))) is not None
    ]
    if len(panels_of) != 2:
        return None
    with canvas(rows=2, size=(5.2, 4.8)) as (figure, panels):
        for axes, (key, words, (edges, counts), fit) in zip(panels, panels_of):
            draw_histogram(axes, edges, counts)
            _draw_fits(axes, edges, fit, named=key == "density")
            first, last = filled_range(counts)
            axes.set_xlim(edges[first] - 0.2, edges[last + 1] + 0.2)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.xaxis.set_major_formatter(
                lambda power, _, key=key: (
                    format_one_in(power) if key == "density" else format_tick(10.0**power)
                )
            )
            axes.set(xlabel=words, ylabel="latents")
            axes.grid(axis="x", visible=False)
        low, high = panels[0].get_xlim()
        if low < math.log10(uniform) < high:
            reference_line(panels[0], math.log10(uniform), "k / n", vertical=True)
        add_legend(figure, 2)
        drawing = render(figure)
    verdicts = [f"{key}: {compare_fits(fit)}" for key, _, _, fit in panels_of]
    sentences = " ".join(f"{verdict[0].upper()}{verdict[1:]}." for verdict in verdicts)
    return Picture(
        "latents-laws",
        drawing,
        "How often, and how strongly",
        "Logarithms of how often latents fire and of their mean squared activation, with the "
        f"best-fitting Gaussian and Laplace distributions. {sentences}",
        "; ".join(verdicts) + ".",
    )


def _draw_fits(axes: Any, edges: np.ndarray, fit: dict[str, Any], *, named: bool) -> None:
    """Draw both fitted densities, scaled to the counts of the bins."""
    x = np.linspace(edges[0], edges[-1], 400)
    for name, density, colour, line in (
        ("Gaussian", _gaussian_density, INK, "-"),
        ("Laplace", _laplace_density, SECOND, (0, (3, 2))),
    ):
        parameters = fit.get(name.lower())
        if isinstance(parameters, dict):
            y = density(parameters, x) * fit["n"] * (edges[1] - edges[0])
            label = name if named else None
            axes.plot(x, y, color=colour, linestyle=line, linewidth=1.2, label=label)


def _gaussian_density(fit: dict[str, float], x: np.ndarray) -> np.ndarray:
    z = (x - fit["mean"]) / fit["sd"]
    return np.exp(-0.5 * z**2) / fit["sd"] / math.sqrt(2 * math.pi)


def _laplace_density(fit: dict[str, float], x: np.ndarray) -> np.ndarray:
    return np.exp(-np.abs(x - fit["median"]) / fit["scale"]) / 2 / fit["scale"]


def compare_fits(fit: dict[str, Any]) -> str:
    """Say which distribution fits better, and by how much."""
    margin, mode = number(fit.get("margin")), fit.get("mode")
    if margin is None or not is_number(mode):
        return "too few latents for a fit"
    better = "Gaussian" if margin.value > 0 else "Laplace"
    clear = margin.se and abs(margin.value) > 2 * margin.se
    near = format_percent(mode) if mode > 1e-3 else format_tick(mode)
    return (
        f"the {better} fits {'better' if clear else 'no worse than the other'}, by "
        f"{abs(margin.value):.3f} ± {margin.se or 0:.3f} nats per latent; most are near {near}"
    )


def draw_effective_tokens(result: dict[str, Any]) -> Picture | None:
    """Draw how many different tokens latents fire on."""
    histogram = read_histogram(result.get("effective_histogram"))
    if histogram is None:
        return None
    edges, counts = histogram
    with canvas() as (figure, axes):
        draw_histogram(axes, edges, counts)
        axes.set_xlim(edges[0], edges[filled_range(counts)[1] + 1])
        ticks = [math.log10(digit * 10**power) for power in range(9) for digit in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if edges[0] <= tick <= axes.get_xlim()[1]])
        axes.xaxis.set_major_formatter(lambda power, _: f"{10**power:,.0f}")
        axes.set(xlabel="effective number of tokens", ylabel="latents")
        axes.grid(axis="x", visible=False)
        drawing = render(figure)
    median = (result.get("effective_tokens") or [None] * 5)[2]
    return Picture(
        "latents-tokens",
        drawing,
        "How many tokens a latent responds to",
        "exp of the entropy of a latent’s mean squared activation over the vocabulary: 1 for a "
        "latent of a single token.",
        f"Median {format_significant(median)}." if is_number(median) else "No median.",
    )


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the latents that come nearest to each rule; {} without any."""
    rules = (source.result("latents") or {}).get("recurring") or {}
    cards = latents.latents_with_cards(source)
    rows = [
        {
            "rule": words,
            "latent": entry["latent"],
            "has_card": entry["latent"] in cards,
            "score": f"{entry['score']:+.2f}",
            "density": format_percent(entry["density"]),
            "found": bool(entry.get("found")),
        }
        for rule, words in RULES.items()
        for entry in (rules.get(rule) or [])[:3]
        if all(is_number(entry.get(key)) for key in ("latent", "score", "density"))
    ]
    return {"recurring": rows} if rows else {}


PART = EvaluationPart(
    NumberGroup(
        "latents",
        "How often and how strongly latents fire",
        (
            NumberRow(
                "Density of the densest",
                "densest_density",
                "percent",
                compare_with("latents", "number", densest_over_l0="over L0"),
                "Mean density of the d_model densest latents. Near 40 % at k = 512 in the paper, "
                "where codes are dense solutions; a few per cent where they are sparse.",
            ),
            NumberRow(
                "Their share of all activations",
                "densest_share",
                "percent",
                "100 %: the others are never used",
                "Of all activations, those of the d_model densest latents.",
            ),
            NumberRow(
                "Opposite pairs",
                "n_opposite_pairs",
                "count",
                compare_with("latents", "count", n_opposite_among_densest="among the ten densest"),
                "Pairs with a decoder cosine below -0.9. They cancel each other, a failure of "
                "optimisation.",
            ),
        ),
    ),
    draw=draw_pictures,
    facts=read_facts,
    template=TEMPLATE,
)
