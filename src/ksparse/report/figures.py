"""Shared drawing tools: a matplotlib canvas, an SVG that is the same bytes each time, and Picture.

What a figure shows lives in the section that shows it (`report.sections`). matplotlib draws on its
own Figure objects, without pyplot and with its default settings, whatever the user's are. The files
have fixed colours; on a page these become the page's CSS variables, so that figures follow its
light and dark schemes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from markupsafe import Markup

from ksparse.errors import InputError, nearest_name
from ksparse.report.source import is_number
from ksparse.report.tokens import safe_text

INK, GRID, FIRST, SECOND = "#1c1d22", "#dfe1e7", "#3a55c8", "#b4530a"
"""Text, grid lines, the first series and the second."""
OTHERS = ((SECOND, "s", "-"), (INK, "^", "-"), (SECOND, "D", ":"), (INK, "v", ":"))
"""Colour, marker and line style of the SAEs that a figure compares the run's own with."""
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
_FONT = "font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"
_TOOLTIP = "tooltip:"
"""Prefix of the SVG ids that carry the text of a tooltip until `to_svg` writes it as a title."""


class Drawing(NamedTuple):
    """A drawn figure: its SVG file, and the matplotlib figure that it was made of."""

    svg: str
    figure: Any


@dataclass(frozen=True)
class Picture:
    """A figure: what is drawn, and the text that goes with it."""

    name: str
    drawing: Drawing
    title: str
    caption: str
    label: str
    """The main numbers, for readers who cannot see the figure."""

    @property
    def svg(self) -> str:
        """The SVG file as it stands alone."""
        return self.drawing.svg

    @property
    def inline(self) -> Markup:
        """The SVG for use inside a page: own ids, the page's colours, no prologue or namespaces."""
        text = self.svg[self.svg.index("<svg") :]
        # Only the root loses its size: clip paths and bars have a width of their own.
        root, content = text.split(">", 1)
        root = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", root)
        text = re.sub(r'((?:\sid="|href="#|url\(#))', rf"\g<1>{self.name}-", f"{root}>{content}")
        for colour, variable in _ON_PAGE.items():
            text = text.replace(colour, variable)
        label = Markup.escape(f"{self.title}. {self.label}")
        return Markup(
            text.replace("<svg", f'<svg role="img" aria-label="{label}" focusable="false"', 1)
        )


def choose_figure(drawn: Mapping[str, Any], name: str, place: Path, more: str) -> Any:
    """Return the figure of a name, or of the part of its name after the first hyphen.

    Args:
        drawn: {name: figure}.
        name: the name.
        place: the folder whose figures they are, for messages.
        more: what else would add figures, for messages.

    Raises:
        InputError: there is no such figure, or several; the others are named.
    """
    matching = [one for one in drawn if name in (one, one.partition("-")[2])]
    if len(matching) == 1:
        return drawn[matching[0]]
    nearest = nearest_name(name, drawn)
    hint = f"; did you mean {nearest!r}?" if nearest else ""
    raise InputError(
        f"{place} has {'several figures' if matching else 'no figure'} {name!r}{hint}; it has "
        f"{', '.join(drawn) or 'none'}. {more}"
    )


# ---- canvas and file


@contextmanager
def canvas(rows: int = 1, size: tuple[float, float] = (5.2, 2.9)) -> Iterator[tuple[Any, Any]]:
    """Yield a matplotlib figure and its axes; ksparse's settings hold until the context ends.

    Args:
        rows: axes, one above the other.
        size: width and height in inches.
    """
    import matplotlib

    from ksparse.report.inline_figure import InlineFigure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)  # type: ignore[arg-type]  # wants literal names
        figure = InlineFigure(figsize=size, layout="constrained", facecolor="none")
        yield figure, figure.subplots(rows, 1, subplot_kw={"facecolor": "none"})


def render(figure: Any) -> Drawing:
    """Return a figure with its SVG; where the figure itself is shown, its background is white."""
    svg = to_svg(figure)
    figure.set_facecolor("white")
    return Drawing(svg, figure)


def to_svg(figure: Any) -> str:
    """Return a figure as SVG, the same bytes each time: no date, no program name, a fixed salt."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The reader's fonts draw the text, and may well have a glyph that matplotlib's lack.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", buffer.getvalue(), flags=re.DOTALL)
    text = _write_tooltips(text)
    # A style element would apply to the whole page; the root's attribute is inherited instead.
    text = re.sub(r"<style[^>]*>[^<]*</style>\s*", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]+;? ?", "", text)
    return text.replace(
        "<svg ", f'<svg style="stroke-linejoin: round; stroke-linecap: butt; {_FONT}" ', 1
    )


# ---- parts of a figure


def draw_curve(
    axes: Any,
    x: np.ndarray,
    y: np.ndarray,
    describe: Callable[[float, float], str],
    *,
    log: bool = False,
    colour: str = FIRST,
    most_tooltips: int = 120,
) -> None:
    """Draw one curve with tooltips. Curves of few points get markers: a line needs two points.

    Args:
        axes: matplotlib axes.
        x: places on the horizontal axis, [points].
        y: values, [points]; NaN leaves a gap.
        describe: make a tooltip's text of x and y.
        log: use a logarithmic vertical axis, and leave out values that are not positive.
        colour: the curve's colour.
        most_tooltips: tooltips at most; they are spread evenly over the points.
    """
    if log:
        y = np.where(y > 0, y, np.nan)
        axes.set_yscale("log")
        plain_log_ticks(axes.yaxis)
    axes.plot(x, y, color=colour, marker="o" if len(x) < 12 else None, markersize=3)
    points = np.flatnonzero(np.isfinite(y))
    if len(points) > most_tooltips:
        points = points[np.unique(np.linspace(0, len(points) - 1, most_tooltips).astype(int))]
    if len(points) > 1:
        between = (x[points][1:] + x[points][:-1]) / 2
        add_column_tooltips(
            axes,
            [x[points[0]], *between, x[points[-1]]],
            [describe(x[i], y[i]) for i in points],
        )


def draw_histogram(axes: Any, edges: Any, heights: Any, label: str | None = None) -> None:
    """Draw filled bars between edges."""
    axes.bar(
        edges[:-1],
        heights,
        np.diff(edges),
        align="edge",
        color=FIRST,
        alpha=0.75,
        linewidth=0,
        label=label,
    )


def add_column_tooltips(axes: Any, edges: Any, texts: list[str]) -> None:
    """Give each stretch of the horizontal axis between two edges a tooltip; "" gives it none."""
    from matplotlib.patches import Rectangle

    for left, right, text in zip(edges, edges[1:], texts):
        if text and right > left:
            axes.add_artist(
                Rectangle(
                    (left, 0),
                    right - left,
                    1,
                    transform=axes.get_xaxis_transform(),
                    facecolor="none",
                    edgecolor="none",
                    gid=_TOOLTIP + quote(text),
                )
            )


def add_point_tooltips(axes: Any, x: Any, y: Any, texts: list[str]) -> None:
    """Give points that are already drawn a tooltip each."""
    for across, up, text in zip(x, y, texts):
        axes.plot(
            across,
            up,
            linestyle="none",
            color=INK,
            marker="o",
            markersize=9,
            markerfacecolor="none",
            markeredgecolor="none",
            clip_on=False,
            gid=_TOOLTIP + quote(text),
        )


def _write_tooltips(svg: str) -> str:
    """Turn the ids that carry tooltips into titles, each in the smallest shape that serves it."""
    group, number = rf'<g id="{_TOOLTIP}([^"]*)">\s*', r'"([\d.]+)"'

    def titled(shape: str) -> Callable[[re.Match[str]], str]:
        return lambda match: (
            f'<g class="spot"><title>{escape(unquote(match[1]), quote=False)}</title>'
            f'<{shape.format(*match.groups())} fill="none" pointer-events="all"/></g>'
        )

    svg = re.sub(
        rf"{group}(?:<defs>.*?</defs>\s*)?<g[^>]*>\s*"
        rf"<use [^>]*?x={number} y={number}[^>]*/>\s*</g>\s*</g>",
        titled('circle cx="{1}" cy="{2}" r="4.5"'),
        svg,
        flags=re.DOTALL,
    )
    return re.sub(rf'{group}<path d="([^"]*)"[^>]*/>\s*</g>', titled('path d="{1}"'), svg)


def reference_line(axes: Any, at: float, name: str, *, vertical: bool = False) -> None:
    """Draw a dashed line with its name on it."""
    style = {"linewidth": 1.0, "linestyle": (0, (4, 3))}
    if vertical:
        axes.axvline(at, color=INK, **style)  # over bars, where the second colour would drown
        axes.annotate(
            name,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
        )
    else:
        axes.axhline(at, color=SECOND, **style)
        axes.annotate(
            name,
            (0, at),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            color=SECOND,
        )


def name_rows(axes: Any, names: list[str], **text_style: Any) -> None:
    """Write each row's name at the left, the first at the top, and fit the axes to the rows."""
    axes.set_yticks(
        range(len(names)),
        [safe_text(name, 34) for name in names],
        parse_math=False,  # a name is no formula
        **text_style,
    )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)


def add_legend(figure: Any, columns: int = 4, **changes: Any) -> None:
    """Draw the legend above the axes, where it hides nothing; none if no series has a name."""
    if not any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        return
    style = {"handletextpad": 0.2, "columnspacing": 1.2, "handlelength": 1.4} | changes
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5, **style)


def plain_log_ticks(axis: Any, subs: Sequence[float] | None = None) -> None:
    """Label a logarithmic axis with a few plain numbers, `subs` in each decade."""
    from matplotlib.ticker import LogLocator, NullLocator

    if subs is None:
        subs = (1, 2, 3, 5) if axis.axis_name == "y" else (1,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: format_tick(value))


def use_percent_ticks(axis: Any) -> None:
    """Label an axis of shares in per cent."""
    axis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")


# ---- data of figures


def read_histogram(value: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (edges, counts) of a result's histogram; None if it is missing, empty or ragged."""
    histogram = value or {}
    edges, counts = histogram.get("edges"), histogram.get("counts")
    if not (
        isinstance(edges, list)
        and isinstance(counts, list)
        and len(edges) == len(counts) + 1
        and all(map(is_number, [*edges, *counts]))
        and sum(counts)
    ):
        return None
    return np.array(edges, float), np.array(counts, float)


def filled_range(counts: Any) -> tuple[int, int]:
    """Return the first and the last bin that are not empty."""
    filled = np.flatnonzero(counts)
    return int(filled[0]), int(filled[-1])


# ---- numbers on axes


def format_thousands(value: float) -> str:
    """Return a number with k, M or B for thousands, millions and billions: 2.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def format_tick(value: float) -> str:
    """Return a number for an axis: 0.02, but 2e-5 instead of many zeros."""
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.3g}"
    mantissa, power = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def format_one_in(power: float) -> str:
    """Return 10 ** power as a share: "all", "10 %", "1 in 1k"."""
    return {0: "all", -1: "10 %", -2: "1 %"}.get(
        round(power), f"1 in {format_thousands(10 ** -round(power))}"
    )
