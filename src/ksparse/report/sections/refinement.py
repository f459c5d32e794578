"""`refinement`: the best values for the latents that are active."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ksparse.report.figures import (
    FIRST,
    OTHERS,
    Picture,
    add_legend,
    canvas,
    filled_range,
    read_histogram,
    reference_line,
    render,
)
from ksparse.report.sections.base import EvaluationPart
from ksparse.report.source import RunSource, number
from ksparse.report.tables import NumberGroup, NumberRow, compare_with
from ksparse.report.tokens import safe_text


def draw_pictures(source: RunSource) -> Iterator[Picture | None]:
    """Yield the figure of the evaluation."""
    yield draw_shifts(source.run.name, source.result("refinement") or {})


def draw_shifts(name: str, result: dict[str, Any]) -> Picture | None:
    """Draw the distribution of refined - encoded values, of this SAE and those compared with it."""
    series = [
        (label, histogram, number(of_one.get("shift_mean")))
        for label, of_one in {name: result, **(result.get("beside") or {})}.items()
        if (histogram := read_histogram(of_one.get("histogram"))) is not None
    ][: 1 + len(OTHERS)]
    if not series or series[0][0] != name:
        return None
    with canvas() as (figure, axes):
        for i, (label, (edges, counts), mean) in enumerate(series):
            density = counts / counts.sum() / np.diff(edges)
            text = safe_text(label, 30) + ("" if mean is None else f", mean {mean.value:+.1%}")
            if i == 0:
                style: dict[str, Any] = {"color": FIRST, "alpha": 0.75, "linewidth": 0}
                widths = np.diff(edges)
                axes.bar(edges[:-1], density, widths, align="edge", label=text, **style)
            else:
                colour, _, line = OTHERS[i - 1]
                style = {"color": colour, "linestyle": line, "linewidth": 1.3}
                axes.stairs(density, edges, label=text, **style)
        total = np.sum([counts for _, (_, counts), _ in series], axis=0)
        first, last = filled_range(total > 1e-4 * total.sum())
        edges = series[0][1][0]
        axes.set_xlim(edges[first], edges[last + 1])
        reference_line(axes, 0, "as encoded", vertical=True)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:+.0f} %" if value else "0")
        axes.set(xlabel="refined less encoded value, in mean active values", ylabel="density")
        axes.grid(axis="x", visible=False)
        add_legend(figure, 2)
        drawing = render(figure)
    return Picture(
        "refinement-shift",
        drawing,
        "Where the values move",
        "How far each active value moves when the values are optimised and the active latents stay "
        "the same. Centred on 0: the encoder is right on average. To the right of 0: the encoded "
        "values have shrunk.",
        "; ".join(f"{label}: mean {mean.value:+.1%}" for label, _, mean in series if mean) + ".",
    )


PART = EvaluationPart(
    NumberGroup(
        "refinement",
        "The best values for the latents that are active",
        (
            NumberRow(
                "Normalised MSE, refined",
                "nmse_refined",
                "number",
                compare_with("refinement", "number", nmse_raw="as encoded"),
                "With the optimal values, at least 0, for each token’s active latents. What "
                "remains is due to the choice of latents and the decoder.",
            ),
            NumberRow(
                "Loss added, refined",
                "ce_delta_refined",
                "number",
                compare_with("refinement", "number", ce_delta_raw="as encoded"),
                "Nats per token by which the LM’s loss rises with the refined reconstruction.",
            ),
            NumberRow(
                "Mean shift",
                "shift_mean",
                "percent",
                "0 %: values are right on average; far above: they had shrunk",
                "Mean of refined less encoded values, in units of the mean active value. An L1 "
                "penalty makes it large.",
            ),
            NumberRow(
                "Median shift",
                "shift_median",
                "percent",
                "0 %: as many go up as down",
                "The median of the same, which a few large shifts do not move.",
            ),
            NumberRow(
                "Values that go up",
                "upward",
                "percent",
                "50 %: neither side is favoured",
                "Share of active values that refinement raises.",
            ),
        ),
    ),
    draw=draw_pictures,
)
