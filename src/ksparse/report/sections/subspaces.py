"""`subspaces`: groups of latents that read directions of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ksparse.report.figures import (
    FIRST,
    SECOND,
    Picture,
    add_legend,
    canvas,
    reference_line,
    render,
    use_percent_ticks,
)
from ksparse.report.sections.base import EvaluationPart
from ksparse.report.source import RunSource, is_number, number
from ksparse.report.tables import (
    NumberGroup,
    NumberRow,
    format_brief,
    format_percent,
    format_significant,
)

TEMPLATE = """\
<h3>The two sides of the cut</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Table of the two sides">
<table class="tasks">
<thead>
<tr><th scope="col">Side</th>
{% for title in ("Latents", "Encoder norm", "Effective tokens", "Fires on") %}
<th scope="col" class="num">{{ title }}</th>
{% endfor %}
</tr>
</thead>
<tbody>
{% for side in part.sides %}
<tr><th scope="row">{{ side.name }}</th><td class="num">{{ side.latents }}</td>
<td class="num">{{ side.norm }}</td><td class="num">{{ side.tokens }}</td>
<td class="num">{{ side.density }}</td></tr>
{% endfor %}
</tbody>
</table>
</div>
<p class="note after">Medians over the latents of each side.</p>
"""


def draw_pictures(source: RunSource) -> Iterator[Picture | None]:
    """Yield the figure of the evaluation."""
    yield draw_reading(source.result("subspaces") or {})


def draw_reading(result: dict[str, Any]) -> Picture | None:
    """Draw how much latents read the first side's directions, and what both sides read of each."""
    order, sides, cut = (
        result.get("along_order"),
        result.get("by_direction") or {},
        result.get("cut"),
    )
    if not (
        isinstance(order, list)
        and order
        and all(map(is_number, order))
        and is_number(cut)
        and all(all(map(is_number, shares)) for shares in sides.values())
    ):
        return None
    with canvas(rows=2, size=(5.2, 4.8)) as (figure, (above, below)):
        above.plot((np.arange(len(order)) + 0.5) / len(order), order, color=FIRST)
        above.set(
            xlim=(0, 1),
            ylim=(0, 1),
            xlabel="latents, in the order of what they read",
            ylabel="on the first\nside’s directions",
        )
        reference_line(above, cut, "cut", vertical=True)
        styles = ((FIRST, "-"), (SECOND, (0, (3, 1))))
        for (side, shares), (colour, line) in zip(sides.items(), styles):
            x, y = np.arange(1, len(shares) + 1), np.array(shares) * len(shares)
            style = {"color": colour, "linestyle": line, "linewidth": 1.2}
            below.plot(x, y, label=f"{side} side", **style)
        below.set(
            xlabel="principal direction of the encoder, the largest first",
            ylabel="share read,\n1 is even",
            ylim=(0, None),
        )
        use_percent_ticks(above.xaxis)
        use_percent_ticks(above.yaxis)
        add_legend(figure, 2)
        drawing = render(figure)
    separation, noise = (number(result.get(key)) for key in ("separation", "separation_of_noise"))
    return Picture(
        "subspaces",
        drawing,
        "What groups of latents read",
        "Above: latents ordered by what they read, and how much of it is on the directions of "
        "those before the cut. A step means two groups; a slope, none. Below: what both sides read "
        "of each direction.",
        ""
        if separation is None or noise is None
        else f"Separation {format_significant(separation.value)}; of noise "
        f"{format_significant(noise.value)}.",
    )


def read_facts(source: RunSource) -> dict[str, Any]:
    """Return the medians that describe the latents of both sides; {} without any."""
    sides = (source.result("subspaces") or {}).get("sides") or {}
    rows = [
        {
            "name": name,
            "latents": f"{side.get('n_latents', 0):,}",
            "norm": _format_median(side, "encoder_norm"),
            "tokens": _format_median(side, "effective_tokens"),
            "density": _format_median(side, "density"),
        }
        for name, side in sides.items()
    ]
    return {"sides": rows} if rows else {}


def _format_median(side: dict[str, Any], key: str) -> str:
    """Return the third of five quantiles."""
    quantiles = side.get(key)
    if not isinstance(quantiles, list) or len(quantiles) != 5 or not is_number(quantiles[2]):
        return "–"
    if key == "density":
        return format_percent(quantiles[2])
    return format_brief(quantiles[2], "number")


def _separation_of_noise(source: RunSource) -> str:
    noise = source.number("subspaces", "separation_of_noise")
    if noise is None:
        return "1: two subspaces"
    value = format_brief(noise.value, "number")
    return f"1: two subspaces; {value}: as many rows of noise, cut in the same way"


PART = EvaluationPart(
    NumberGroup(
        "subspaces",
        "Groups of latents with directions of their own",
        (
            NumberRow(
                "Separation",
                "separation",
                "number",
                _separation_of_noise,
                "How much each side of the best cut reads directions of its own. 0 if both read "
                "alike; since the cut is chosen, it is above 0 even for noise.",
            ),
            NumberRow(
                "Latents on the first side",
                "latents_share",
                "percent",
                "25 % in the paper",
                "Share of the latents that fire.",
            ),
            NumberRow(
                "Directions of the first side",
                "dims_share",
                "percent",
                "25 % in the paper",
                "Share of the principal directions of the encoder that this side reads more of.",
            ),
        ),
    ),
    draw=draw_pictures,
    facts=read_facts,
    template=TEMPLATE,
)
