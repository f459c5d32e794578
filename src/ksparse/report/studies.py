"""A study's study.json -> its page and figures, which are data there. Needs no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import InputError
from ksparse.report.figures import INK, Picture, canvas, save, short, thousands
from ksparse.report.page import environment
from ksparse.report.source import is_number
from ksparse.report.tables import significant
from ksparse.report.tokens import safe_text
from ksparse.storage import atomic, checksums, jsonio

COLOURS = ("#3a55c8", "#b4530a", "#1b8a5a", "#a8328f", "#7a6a00", "#0b7f9c", "#c0392b", "#6b6f7a")
MARKS = "os^Dv<>P"
MOST = 200  # points of a curve that are drawn


def write(folder: Path | str) -> Path:
    """Write report.html and figures/*.svg of a study; return the page's path."""
    folder = Path(folder)
    study = read(folder)
    pictures = [picture for picture in map(draw, study.get("figures", [])) if picture is not None]
    columns = list(dict.fromkeys(name for row in study.get("members", {}).values() for name in row))
    table = {
        member: [_cell(row.get(name)) for name in columns]
        for member, row in study.get("members", {}).items()
    }
    html = (
        environment()
        .get_template("study.html.jinja")
        .render(
            study=study,
            name=study["name"],
            pictures=pictures,
            columns=[column.replace("_", " ") for column in columns],
            table=table,
        )
    )
    for picture in pictures:
        name = checksums.plain_name(picture.name, folder / "study.json")
        atomic.write_text(atomic.inside(folder, "figures", f"{name}.svg"), picture.svg)
    atomic.write_text(atomic.inside(folder, "report.html"), html)
    return folder / "report.html"


def read(folder: Path) -> dict[str, Any]:
    """Return a study's answer; raise InputError where there is none."""
    if not atomic.inside(folder, "study.json").is_file():
        raise InputError(
            f"{folder} holds no study: it has no study.json. `ksparse study NAME --out {folder}` "
            "makes one"
        )
    found = jsonio.read_table(folder / "study.json", name=str, members=dict, figures=list)
    jsonio.check_format(folder / "study.json", found.get("format", 1), 1)
    return found


def draw(figure: dict[str, Any]) -> Picture | None:
    """Return a figure drawn from its data; None if it has no point."""
    curves = [(curve, *_points(curve, figure["log"])) for curve in figure["curves"]]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    with canvas(size=(5.6, 3.6)) as (picture, axes):
        number = 0
        for curve, x, y, se in curves:
            if curve["reference"]:
                axes.plot(
                    x,
                    y,
                    color=INK,
                    linewidth=0.9,
                    linestyle=(0, (4, 3)),
                    label=safe_text(curve["label"]),
                )
                continue
            few = len(x) < 16
            axes.errorbar(
                x,
                y,
                se if se is not None and few else None,
                label=safe_text(curve["label"]),
                color=COLOURS[number % len(COLOURS)],
                linewidth=1.3,
                elinewidth=0.8,
                marker=MARKS[number % len(MARKS)] if few else None,
                markersize=3.5,
            )
            number += 1
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in figure["log"]:
                _logarithmic(axes, name, axis)
            axis.set_major_formatter(
                lambda value, _: thousands(value) if abs(value) >= 1e4 else short(value)
            )
        axes.set_xlabel(figure["x"])
        axes.set_ylabel(figure["y"])
        picture.legend(
            loc="outside upper left",
            ncols=3,
            frameon=False,
            fontsize=8.5,
            handlelength=1.6,
            columnspacing=1.2,
        )
        svg = save(picture)
    label = "; ".join(
        f"{curve['label']}: {significant(float(y[0]))} to {significant(float(y[-1]))}"
        for curve, _, y, _ in curves
    )
    return Picture(figure["name"], svg, figure["title"], figure["caption"], label)


def _points(curve: dict[str, Any], log: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the points that can be drawn, not too many: both numbers known, and above 0 where the
    axis is logarithmic."""
    x, y = (
        np.array([value if is_number(value) else math.nan for value in curve[name]], float)
        for name in ("x", "y")
    )
    se = (
        np.array([value if is_number(value) else 0.0 for value in curve["se"]], float)
        if curve.get("se")
        else None
    )
    good = (
        np.isfinite(x)
        & np.isfinite(y)
        & ((x > 0) | ("x" not in log))
        & ((y > 0) | ("y" not in log))
    )
    chosen = np.flatnonzero(good)
    if len(chosen) > MOST:
        chosen = chosen[np.unique(np.linspace(0, len(chosen) - 1, MOST).round().astype(int))]
    return x[chosen], y[chosen], None if se is None else se[chosen]


def _logarithmic(axes: Any, name: str, axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axis.set_minor_locator(NullLocator())


def _cell(value: Any) -> str:
    """Return a number with its standard error as a table shows it."""
    if isinstance(value, dict):
        if not is_number(value.get("value")):
            return "–"
        return significant(value["value"]) + (
            f" ± {significant(value['se'], 2)}" if is_number(value.get("se")) else ""
        )
    return "–" if value is None else f"{value:,}" if is_number(value) else str(value)
