"""`progressive`: the code at another k, and with a threshold in place of k."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ksparse.report.figures import (
    FIRST,
    OTHERS,
    Picture,
    canvas,
    plain_log_ticks,
    render,
)
from ksparse.report.sections.base import EvaluationPart
from ksparse.report.source import RunSource, number
from ksparse.report.tables import NumberGroup, NumberRow, format_brief, format_significant
from ksparse.report.tokens import safe_text


def draw_pictures(source: RunSource) -> Iterator[Picture | None]:
    """Yield the figure of the evaluation."""
    yield draw_other_k(source.run.name, source.result("progressive") or {})


def draw_other_k(name: str, result: dict[str, Any]) -> Picture | None:
    """Draw error and loss added against L0, of this SAE and those compared with it."""
    series = [
        (label, of_one)
        for label, of_one in {name: result, **(result.get("beside") or {})}.items()
        if read_points(of_one.get("topk"), "nmse")
    ][: 1 + len(OTHERS)]
    if not series or series[0][0] != name:
        return None
    with canvas(rows=2, size=(5.2, 5.2)) as (figure, (above, below)):
        for axes, key, words in (
            (above, "nmse", "normalised MSE"),
            (below, "ce_delta", "loss added, nats"),
        ):
            for (label, of_one), style in zip(series, ((FIRST, "o", "-"), *OTHERS)):
                _draw_one(axes, safe_text(label, 30), of_one, key, style)
            axes.set(xscale="log", yscale="log", ylabel=words)
            plain_log_ticks(axes.xaxis, (1, 2, 5))
            plain_log_ticks(axes.yaxis, (1, 2, 5))
        above.tick_params(labelbottom=False)
        below.set_xlabel("active latents per token")
        above.sharex(below)
        figure.legend(
            *above.get_legend_handles_labels(),
            loc="outside upper left",
            ncols=2,
            frameon=False,
            fontsize=8.5,
            handlelength=2,
        )
        drawing = render(figure)
    l0, error = min(read_points(result.get("topk"), "nmse"), key=lambda point: point[1])
    return Picture(
        "progressive",
        drawing,
        "The code at another k",
        "The activation is replaced after training: by TopK with another k, or by one threshold "
        "for all latents (dashed). A ring marks the SAE as it was trained. "
        "A code that gets worse with more latents than it was trained for is fitted to its k.",
        f"With TopK the lowest normalised MSE is {format_significant(error)}, at "
        f"{format_brief(l0, 'number')} latents per token.",
    )


def _draw_one(
    axes: Any, label: str, result: dict[str, Any], key: str, style: tuple[str, str, str]
) -> None:
    """Draw one SAE's curves with TopK and with a threshold, and a ring around its own point."""
    colour, marker, _ = style
    points = zip(*read_points(result.get("topk"), key))
    axes.plot(*points, color=colour, marker=marker, markersize=4, label=f"{label}, TopK")
    threshold = read_points(result.get("threshold"), key)
    if threshold:
        dashed = {"color": colour, "linestyle": (0, (2, 2)), "linewidth": 1.2}
        axes.plot(*zip(*threshold), label=f"{label}, threshold", **dashed)
    for point in read_points([result.get("own")], key):
        axes.plot(
            *point,
            linestyle="none",
            marker="o",
            markersize=11,
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=1.4,
        )


def read_points(points: Any, key: str) -> list[tuple[float, float]]:
    """Return (L0, value) of a result's points by L0, those that a logarithmic axis can show."""
    pairs = [
        (number(point.get("l0")), number(point.get(key)))
        for point in points or []
        if isinstance(point, dict)
    ]
    return sorted(
        {
            (l0.value, value.value)
            for l0, value in pairs
            if l0 is not None and value is not None and l0.value > 0 and value.value > 0
        }
    )


PART = EvaluationPart(
    NumberGroup(
        "progressive",
        "Other k, and a threshold in place of k",
        (
            NumberRow(
                "Normalised MSE",
                "nmse",
                "number",
                "The reference for other k, on the same tokens",
                "With the SAE’s own activation.",
            ),
            NumberRow(
                "Loss added (ΔCE)",
                "ce_delta",
                "number",
                "The same",
                "With the SAE’s own activation, nats per token.",
            ),
        ),
    ),
    draw=draw_pictures,
)
