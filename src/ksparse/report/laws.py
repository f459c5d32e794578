"""A sweep's laws -> figures 1, 3, 4, 11 and 26 of Gao et al. 2024, for the sweep's own runs.

Each function returns a Picture, or None where there is nothing to draw. Series are ordered by k, n
or the LM's size: all have one colour, from faint to full, and each its own marker.
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
    render,
)
from ksparse.report.tables import format_percent, format_significant
from ksparse.scaling.laws.forms import Columns
from ksparse.scaling.laws.law import evaluate

_MARKERS = "osD^vPX<>hp*"
Law = dict[str, Any]


def draw_compute_law(
    law: Law | None, frontier: list[dict[str, Any]], curves: Columns, k: float
) -> Picture | None:
    """Draw loss against compute, L(C): figure 1, left.

    Args:
        law: the law L(C) as law.json has it; None leaves its line out.
        frontier: the points that no run of the same k beats with less compute.
        curves: run, n, k, c (training FLOPs) and loss of every point of every curve.
        k: the k whose runs are drawn.
    """
    of_k = curves["k"] == k if curves else np.zeros(0, bool)
    best = [point for point in frontier if point["k"] == k]
    if not of_k.any() or not best:
        return None
    with canvas(size=(5.2, 3.7)) as (figure, axes):
        _draw_curves(axes, {name: column[of_k] for name, column in curves.items()})
        axes.plot(
            [point["c"] for point in best],
            [point["loss"] for point in best],
            linestyle="none",
            marker="o",
            markersize=2.6,
            color=INK,
            label="best",
        )
        fitted = [point["c"] for point in law["points"] if point.get("k", k) == k] if law else []
        if law is not None and fitted:
            _line(
                axes,
                law,
                "c",
                np.geomspace(min(fitted), 3 * max(fitted)),
                color=SECOND,
                label="law",
                k=k,
            )
        low = min(point["loss"] for point in best)
        axes.set_ylim(low * 0.9, min(1.2, 4 * low))
        _use_log_axes(axes, "training FLOPs", "normalised MSE")
        add_legend(figure)
        drawing = render(figure)
    return Picture(
        "law-compute",
        drawing,
        "Loss and compute, L(C)",
        f"Held-out loss of every run at k = {k:g}. Dots: points that no run beats with as "
        "little compute; the law is fitted to them, without those of the smallest n. Both axes are "
        "logarithmic.",
        _describe_ends(best, "c", "loss", "FLOPs"),
    )


def draw_size_law(law: Law | None) -> Picture | None:
    """Draw loss against n, a series for each k, L(N): figure 1, right."""
    if law is None:
        return None
    with canvas(size=(5.2, 3.7)) as (figure, axes):
        _points_and_lines(axes, law, "k", _k_of)
        _use_log_axes(axes, "latents n", "normalised MSE", ticks=_values(law, "n"))
        add_legend(figure)
        drawing = render(figure)
    return Picture(
        "law-size",
        drawing,
        "Loss and size, L(N)",
        "Held-out loss at the best learning rate of each n, and the law of each k. Lines flatten "
        "where the law has an irreducible term.",
        _describe_ends(law["points"], "n", "loss", "latents"),
    )


def draw_subject_law(law: Law | None, k: str, lms: list[str]) -> Picture | None:
    """Draw loss against n, a series for each LM, L_s(N): figure 4.

    Args:
        law: the law L_s(N) as law.json has it.
        k: the k of its points, for the caption.
        lms: the LMs in the order of their sizes.
    """
    if law is None:
        return None
    with canvas(size=(5.2, 3.7)) as (figure, axes):
        _points_and_lines(axes, law, "lm", str, lms)
        _use_log_axes(axes, "latents n", "normalised MSE", ticks=_values(law, "n"))
        add_legend(figure, 3)
        drawing = render(figure)
    return Picture(
        "law-subject",
        drawing,
        "Loss and the LM’s size, L_s(N)",
        f"The same at k = {k} for each language model. In the paper larger models need more "
        "latents for the same loss.",
        _describe_ends(law["points"], "n", "loss", "latents"),
    )


def draw_learning_rates(rows: Columns, k: float) -> Picture | None:
    """Draw tokens to convergence and loss against the learning rate: figure 3.

    Args:
        rows: the columns of points.csv.
        k: the k whose runs are drawn, a series for each n.
    """
    if "lr" not in rows or "tokens_to_convergence" not in rows:
        return None
    of_k = (rows["k"] == k) & (rows["lr"] > 0)
    sizes = [
        n
        for n in np.unique(rows["n"][of_k])
        if len(np.unique(rows["lr"][of_k & (rows["n"] == n)])) > 1
    ]
    if not sizes:
        return None
    with canvas(rows=2, size=(5.2, 5.2)) as (figure, (above, below)):
        for strength, marker, n in _series(sizes):
            of_n = of_k & (rows["n"] == n)
            for axes, name in ((above, "tokens_to_convergence"), (below, "loss")):
                x, y = _geometric_means(rows["lr"][of_n], rows[name][of_n])
                axes.plot(
                    x,
                    y,
                    color=FIRST,
                    alpha=strength,
                    marker=marker,
                    markersize=4.5,
                    label=f"n = {n:,.0f}" if axes is below else None,
                )
        _use_log_axes(above, "", "tokens to convergence")
        above.yaxis.set_major_formatter(lambda value, _: format_thousands(value))
        _use_log_axes(below, "learning rate", "normalised MSE")
        above.tick_params(labelbottom=False)
        above.sharex(below)
        add_legend(figure)
        drawing = render(figure)
    return Picture(
        "law-rates",
        drawing,
        "Learning rate, tokens and loss",
        f"Runs at k = {k:g} that differ in learning rate. In the paper a higher rate takes fewer "
        "tokens, until it costs loss. Means over seeds; all axes are logarithmic.",
        f"{len(sizes)} sizes.",
    )


def draw_trends(laws: dict[str, Law]) -> Picture | None:
    """Draw tokens to convergence, loss and the best learning rate against n: figure 11.

    Args:
        laws: the sweep's laws by name; those named "tokens", "n" and "lr" are drawn.
    """
    panels_of = [
        (name, label)
        for name, label in (
            ("tokens", "tokens to convergence"),
            ("n", "normalised MSE"),
            ("lr", "best learning rate"),
        )
        if name in laws
    ]
    if len(panels_of) < 2:
        return None
    with canvas(rows=len(panels_of), size=(5.2, 0.4 + 2.4 * len(panels_of))) as (figure, panels):
        for (name, label), axes in zip(panels_of, panels):
            _points_and_lines(
                axes,
                laws[name],
                "k",
                _k_of if name == panels_of[0][0] else lambda k: None,
            )
            _use_log_axes(
                axes,
                "latents n" if name == panels_of[-1][0] else "",
                label,
                ticks=_values(laws[name], "n"),
            )
            if name == "tokens":
                axes.yaxis.set_major_formatter(lambda value, _: format_thousands(value))
            axes.annotate(
                f"n^{_exponent_of_n(laws[name]):+.2f}",
                (0.5, 1),
                xycoords="axes fraction",
                xytext=(0, -2),
                textcoords="offset points",
                va="top",
                ha="center",
                parse_math=False,
            )
        add_legend(figure)
        drawing = render(figure)
    return Picture(
        "law-trends",
        drawing,
        "Tokens, loss and learning rate against n",
        "Each panel’s exponent is that of a plain power of n fitted to its points, with one slope "
        "for all k, as in the paper’s titles; the table has that of the fitted law.",
        "; ".join(
            f"{label}: exponent {_exponent_of_n(laws[name]):+.2f}" for name, label in panels_of
        )
        + ".",
    )


def draw_joint_law(law: Law | None) -> Picture | None:
    """Draw the joint law L(N, k) through its points, and its residuals below: figure 26."""
    if law is None:
        return None
    with canvas(rows=2, size=(5.2, 5.2)) as (figure, (above, below)):
        _points_and_lines(above, law, "k", _k_of)
        for strength, marker, k in _series(_values(law, "k")):
            of_series = [point for point in law["points"] if point["k"] == k]
            below.plot(
                [point["n"] for point in of_series],
                [100 * point["residual"] for point in of_series],
                color=FIRST,
                alpha=strength,
                marker=marker,
                markersize=4.5,
                linewidth=0.8,
            )
        reference_line(below, 0, "")
        _use_log_axes(above, "", "normalised MSE", ticks=_values(law, "n"))
        _use_log_axes(below, "latents n", "above the law, %", ticks=_values(law, "n"), y=False)
        above.tick_params(labelbottom=False)
        add_legend(figure)
        drawing = render(figure)
    return Picture(
        "law-joint",
        drawing,
        "The joint law L(N, k)",
        f"{law['equation']}. Below: how far the points are above the law, in per cent. Where "
        "neighbouring points err alike, the form is not exact.",
        f"log-RMS {law['log_rms']:.4f}; the worst point is {format_percent(law['log_max'])} off.",
    )


# ---- parts ---------------------------------------------------------------------------------------


def _series(values: Any) -> Iterator[tuple[float, str, Any]]:
    """Yield (opacity, marker, value) of each series, the last in full colour."""
    values = list(values)
    for i, value in enumerate(values):
        yield 0.35 + 0.65 * (i + 1) / len(values), _MARKERS[i % len(_MARKERS)], value


def _values(law: Law, name: str) -> list[Any]:
    return sorted({point[name] for point in law["points"] if name in point})


def _k_of(k: float) -> str:
    return f"k = {k:g}"


def _draw_curves(axes: Any, curves: Columns) -> None:
    """Draw the loss of each run against compute, the runs of one n alike."""
    for strength, _, n in _series(np.unique(curves["n"])):
        for i, run in enumerate(np.unique(curves["run"][curves["n"] == n])):
            points = np.flatnonzero(curves["run"] == run)
            points = points[np.argsort(curves["c"][points])]
            axes.plot(
                curves["c"][points],
                curves["loss"][points],
                color=FIRST,
                alpha=strength,
                linewidth=1,
                label=f"n = {n:,.0f}" if i == 0 else None,
            )


def _points_and_lines(
    axes: Any,
    law: Law,
    group: str,
    name: Callable[[Any], str | None],
    order: list[Any] | None = None,
) -> None:
    """Draw a law of n through its points, a series for each value of `group`."""
    for strength, marker, value in _series(order or _values(law, group) or [None]):
        of_series = [point for point in law["points"] if value is None or point[group] == value]
        axes.plot(
            [point["n"] for point in of_series],
            [point[law["target"]] for point in of_series],
            linestyle="none",
            marker=marker,
            markersize=4.5,
            color=FIRST,
            alpha=strength,
            label=name(value) if value is not None else None,
        )
        n = np.geomspace(
            min(point["n"] for point in of_series), 2 * max(point["n"] for point in of_series), 60
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
    """Draw a law along one variable, at fixed values of the others that it depends on."""
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


def _use_log_axes(
    axes: Any, across: str, up: str, *, ticks: list[float] | None = None, y: bool = True
) -> None:
    """Make the axes logarithmic, with a few plain numbers.

    Args:
        axes: matplotlib axes.
        across: the label of the horizontal axis.
        up: the label of the vertical axis.
        ticks: places of the points on the horizontal axis, of which up to six are labelled.
        y: make the vertical axis logarithmic too.
    """
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


def _geometric_means(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each x once, with the geometric mean of its values of y that are positive."""
    usable = np.isfinite(y) & (y > 0)
    values, place = np.unique(x[usable], return_inverse=True)
    if not len(values):
        return values, values
    return values, np.exp(np.bincount(place, np.log(y[usable])) / np.bincount(place))


def _exponent_of_n(law: Law) -> float:
    """Return the exponent of n by least squares, with one slope and a prefactor for each k."""
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


def _describe_ends(points: list[dict[str, Any]], x: str, y: str, unit: str) -> str:
    first, last = (
        min(points, key=lambda point: (point[x], point[y])),
        max(points, key=lambda point: (point[x], point[y])),
    )
    low, high = format_significant(first[y]), format_significant(last[y])
    return f"From {low} at {format_tick(first[x])} {unit} to {high} at {format_tick(last[x])}."
