"""A sweep's laws -> figures: 1, 3, 4, 11 and 26 of Gao et al. 2024 from one's own runs. Each
returns a Picture, or None where there is nothing to draw.

Series are ordered (by k, n or the LM's size): one colour, from faint to full, with a mark of their
own each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ksparse.report.figures import (
    FIRST,
    INK,
    SECOND,
    Picture,
    add_legend,
    canvas,
    format_thousands,
    format_tick,
    reference_line,
    to_svg,
)
from ksparse.report.tables import format_percent, format_significant
from ksparse.scaling.laws.forms import Columns
from ksparse.scaling.laws.law import evaluate

_MARKS = "osD^vPX<>hp*"
Law = dict[str, Any]


def draw_compute_law(
    law: Law | None, frontier: list[dict[str, Any]], curves: Columns, k: float
) -> Picture | None:
    """Draw the loss of all runs of one k against compute, their frontier, and the law through it:
    figure 1, left."""
    of = curves["k"] == k if curves else np.zeros(0, bool)
    best = [point for point in frontier if point["k"] == k]
    if not of.any() or not best:
        return None
    with canvas(size=(5.2, 3.7)) as (figure, axes):
        runs, sizes = curves["run"][of], curves["n"][of]
        for strength, _, n in _series(np.unique(sizes)):
            for i, run in enumerate(np.unique(runs[sizes == n])):
                chosen = of.nonzero()[0][runs == run]
                chosen = chosen[np.argsort(curves["c"][chosen])]
                axes.plot(
                    curves["c"][chosen],
                    curves["loss"][chosen],
                    color=FIRST,
                    alpha=strength,
                    linewidth=1,
                    label=f"n = {n:,.0f}" if i == 0 else None,
                )
        axes.plot(
            [point["c"] for point in best],
            [point["loss"] for point in best],
            linestyle="none",
            marker="o",
            markersize=2.6,
            color=INK,
            label="best",
        )
        if law is not None and any(point.get("k", k) == k for point in law["points"]):
            inside = [point["c"] for point in law["points"] if point.get("k", k) == k]
            _line(
                axes,
                law,
                "c",
                np.geomspace(min(inside), 3 * max(inside)),
                color=SECOND,
                label="law",
                k=k,
            )
        low = min(point["loss"] for point in best)
        axes.set_ylim(low * 0.9, min(1.2, 4 * low))
        _logs(axes, "training FLOPs", "normalised MSE")
        add_legend(figure)
        svg = to_svg(figure)
    return Picture(
        "law-compute",
        svg,
        "Loss and compute, L(C)",
        f"Held-out loss of every run at k = {k:g}. Dots: what no other run beats with as little "
        "compute; the law is fitted to them, without those of "
        "the smallest n. Both axes logarithmic.",
        _ends(best, "c", "loss", "FLOPs"),
    )


def draw_size_law(law: Law | None) -> Picture | None:
    """Draw the loss against n, a series for each k: figure 1, right."""
    if law is None:
        return None
    with canvas(size=(5.2, 3.7)) as (figure, axes):
        _points_and_lines(axes, law, "k", _k_of)
        _logs(axes, "latents n", "normalised MSE", ticks=_values(law, "n"))
        add_legend(figure)
        svg = to_svg(figure)
    return Picture(
        "law-size",
        svg,
        "Loss and size, L(N)",
        "Held-out loss at the best learning rate of each n, and the law of each k. Where the law "
        "has an irreducible term, lines bend up to it.",
        _ends(law["points"], "n", "loss", "latents"),
    )


def draw_subject_law(law: Law | None, k: str, lms: list[str]) -> Picture | None:
    """Draw the loss against n, a series for each of the LMs in the order given: figure 4."""
    if law is None:
        return None
    with canvas(size=(5.2, 3.7)) as (figure, axes):
        _points_and_lines(axes, law, "lm", str, lms)
        _logs(axes, "latents n", "normalised MSE", ticks=_values(law, "n"))
        add_legend(figure, 3)
        svg = to_svg(figure)
    return Picture(
        "law-subject",
        svg,
        "Loss and the subject's size, L_s(N)",
        f"The same at k = {k} for each language model. In the paper larger models need more "
        "latents for the same loss.",
        _ends(law["points"], "n", "loss", "latents"),
    )


def draw_learning_rates(rows: Columns, k: float) -> Picture | None:
    """Draw tokens to convergence and loss against the learning rate, a series for each n: figure
    3."""
    if "lr" not in rows or "tokens_to_convergence" not in rows:
        return None
    of = (rows["k"] == k) & (rows["lr"] > 0)
    shown = [
        n for n in np.unique(rows["n"][of]) if len(np.unique(rows["lr"][of & (rows["n"] == n)])) > 1
    ]
    if not shown:
        return None
    with canvas(rows=2, size=(5.2, 5.2)) as (figure, (above, below)):
        for strength, mark, n in _series(shown):
            here = of & (rows["n"] == n)
            for axes, name in ((above, "tokens_to_convergence"), (below, "loss")):
                x, y = _means(rows["lr"][here], rows[name][here])
                axes.plot(
                    x,
                    y,
                    color=FIRST,
                    alpha=strength,
                    marker=mark,
                    markersize=4.5,
                    label=f"n = {n:,.0f}" if axes is below else None,
                )
        _logs(above, "", "tokens to convergence")
        above.yaxis.set_major_formatter(lambda value, _: format_thousands(value))
        _logs(below, "learning rate", "normalised MSE")
        above.tick_params(labelbottom=False)
        above.sharex(below)
        add_legend(figure)
        svg = to_svg(figure)
    return Picture(
        "law-rates",
        svg,
        "Learning rate, tokens and loss",
        f"Runs at k = {k:g} that differ in learning rate. In the paper a higher rate takes fewer "
        "tokens, until it costs loss. Mean over seeds; all axes logarithmic.",
        f"{len(shown)} sizes.",
    )


def draw_trends(laws: dict[str, Law]) -> Picture | None:
    """Draw tokens, loss and the best learning rate against n, a series for each k, one above the
    other: figure 11."""
    shown = [
        (name, label)
        for name, label in (
            ("tokens", "tokens to convergence"),
            ("n", "normalised MSE"),
            ("lr", "best learning rate"),
        )
        if name in laws
    ]
    if len(shown) < 2:
        return None
    with canvas(rows=len(shown), size=(5.2, 0.4 + 2.4 * len(shown))) as (figure, panels):
        for (name, label), axes in zip(shown, panels):
            _points_and_lines(
                axes,
                laws[name],
                "k",
                _k_of if name == shown[0][0] else lambda k: None,
            )
            _logs(
                axes,
                "latents n" if name == shown[-1][0] else "",
                label,
                ticks=_values(laws[name], "n"),
            )
            if name == "tokens":
                axes.yaxis.set_major_formatter(lambda value, _: format_thousands(value))
            axes.annotate(
                f"n^{_slope(laws[name]):+.2f}",
                (0.5, 1),
                xycoords="axes fraction",
                xytext=(0, -2),
                textcoords="offset points",
                va="top",
                ha="center",
                parse_math=False,
            )
        add_legend(figure)
        svg = to_svg(figure)
    return Picture(
        "law-trends",
        svg,
        "How tokens, loss and learning rate go with n",
        "The exponent on each is of its points as plain powers of n with one slope for all k, as "
        "in the paper's titles; the table has that of the fitted law.",
        "; ".join(f"{label}: exponent {_slope(laws[name]):+.2f}" for name, label in shown) + ".",
    )


def draw_joint_law(law: Law | None) -> Picture | None:
    """Draw the joint law through its points, and below it what it leaves: figure 26."""
    if law is None:
        return None
    with canvas(rows=2, size=(5.2, 5.2)) as (figure, (above, below)):
        _points_and_lines(above, law, "k", _k_of)
        for strength, mark, k in _series(_values(law, "k")):
            here = [point for point in law["points"] if point["k"] == k]
            below.plot(
                [point["n"] for point in here],
                [100 * point["residual"] for point in here],
                color=FIRST,
                alpha=strength,
                marker=mark,
                markersize=4.5,
                linewidth=0.8,
            )
        reference_line(below, 0, "")
        _logs(above, "", "normalised MSE", ticks=_values(law, "n"))
        _logs(below, "latents n", "above the law, %", ticks=_values(law, "n"), y=False)
        above.tick_params(labelbottom=False)
        add_legend(figure)
        svg = to_svg(figure)
    return Picture(
        "law-joint",
        svg,
        "The joint law L(N, k)",
        f"{law['equation']}. Below: what the points differ by, in per cent. Where neighbours err "
        "alike the form is not exact.",
        f"log-RMS {law['log_rms']:.4f}; the worst point is {format_percent(law['log_max'])} off.",
    )


# ---- parts ---------------------------------------------------------------------------------------


def _series(values: Any) -> Iterator[tuple[float, str, Any]]:
    """Yield (opacity, mark, value) of each, the last in full colour."""
    values = list(values)
    for i, value in enumerate(values):
        yield 0.35 + 0.65 * (i + 1) / len(values), _MARKS[i % len(_MARKS)], value


def _values(law: Law, name: str) -> list[Any]:
    return sorted({point[name] for point in law["points"] if name in point})


def _k_of(k: float) -> str:
    return f"k = {k:g}"


def _points_and_lines(
    axes: Any,
    law: Law,
    group: str,
    called: Callable[[Any], str | None],
    order: list[Any] | None = None,
) -> None:
    for strength, mark, value in _series(order or _values(law, group) or [None]):
        here = [point for point in law["points"] if value is None or point[group] == value]
        axes.plot(
            [point["n"] for point in here],
            [point[law["target"]] for point in here],
            linestyle="none",
            marker=mark,
            markersize=4.5,
            color=FIRST,
            alpha=strength,
            label=called(value) if value is not None else None,
        )
        n = np.geomspace(
            min(point["n"] for point in here), 2 * max(point["n"] for point in here), 60
        )
        _line(
            axes,
            law,
            "n",
            n,
            color=FIRST,
            alpha=strength,
            **({} if value is None else {group: value}),
        )


def _line(
    axes: Any,
    law: Law,
    x: str,
    values: np.ndarray,
    *,
    color: str,
    alpha: float = 1.0,
    label: str | None = None,
    **others: Any,
) -> None:
    """Draw the law along one variable, the others being as given where it depends on them."""
    at = {
        x: values,
        **{
            name: np.full(len(values), value)
            for name, value in others.items()
            if name in law["points"][0]
        },
    }
    axes.plot(
        values,
        evaluate(law, at),
        color=color,
        alpha=alpha,
        linewidth=1.2,
        label=label,
        linestyle="-" if label is None else (0, (5, 2)),
    )


def _logs(
    axes: Any, across: str, up: str, *, ticks: list[float] | None = None, y: bool = True
) -> None:
    """Make the axes logarithmic, with few plain numbers on them; ticks: where the points are
    across."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: format_tick(value))
    if ticks:
        axes.set_xticks(ticks[:: -(-len(ticks) // 6)])
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if y:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(
            MaxNLocator(5, steps=[1, 2, 5, 10])
            if high < 10 * low
            else LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
        )
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _: format_tick(value))
        axes.set_ylim(low, high)
    axes.set_xlabel(across)
    axes.set_ylabel(up)


def _means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each x once with the geometric mean of its finite y."""
    good = np.isfinite(y) & (y > 0)
    values, place = np.unique(x[good], return_inverse=True)
    return values, np.exp(np.bincount(place, np.log(y[good])) / np.bincount(place)) if len(
        values
    ) else values


def _slope(law: Law) -> float:
    """Return the exponent of n with one slope and an own prefactor for each k, by plain least
    squares."""
    groups = _values(law, "k") or [None]
    columns = [
        [float(group is None or point["k"] == group) for group in groups] + [np.log(point["n"])]
        for point in law["points"]
    ]
    return float(
        np.linalg.lstsq(
            np.array(columns), np.log([point[law["target"]] for point in law["points"]]), rcond=None
        )[0][-1]
    )


def _ends(points: list[dict[str, Any]], x: str, y: str, unit: str) -> str:
    first, last = (
        min(points, key=lambda point: (point[x], point[y])),
        max(points, key=lambda point: (point[x], point[y])),
    )
    low, high = format_significant(first[y]), format_significant(last[y])
    return f"From {low} at {format_tick(first[x])} {unit} to {high} at {format_tick(last[x])}."
