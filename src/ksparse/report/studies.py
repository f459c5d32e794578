"""A study's study.json -> its page. The figures are data in that file. Needs no torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import InputError
from ksparse.report.claims import decide
from ksparse.report.figures import (
    INK,
    Picture,
    add_legend,
    canvas,
    format_thousands,
    format_tick,
    plain_log_ticks,
    render,
)
from ksparse.report.page import environment
from ksparse.report.source import Number, is_number
from ksparse.report.tables import format_significant
from ksparse.report.tokens import safe_text
from ksparse.storage import atomic, checksums, jsonio

FORMAT = 1
"""The version of study.json that this module reads."""
COLOURS = ("#3a55c8", "#b4530a", "#1b8a5a", "#a8328f", "#7a6a00", "#0b7f9c", "#c0392b", "#6b6f7a")
MARKS = "os^Dv<>P"
_ANCHOR = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-_")
MOST_POINTS = 200
"""Points of a curve that are drawn at most."""


def write(folder: Path | str) -> Path:
    """Write report.html and figures/*.svg of a study; of one with claims README.md as well, the
    same page for a repository.

    Args:
        folder: the study's folder, with study.json in it.

    Returns:
        The page's path.

    Raises:
        InputError: the folder holds no study.
    """
    folder = Path(folder)
    study = read(folder)
    facts = _facts(study)
    html = environment().get_template("study.html.jinja").render(facts)
    if facts["claims"]:
        page = environment().get_template("study.md.jinja").render(facts)
        atomic.write_text(atomic.inside(folder, "README.md"), page.replace("&#39;", "'"))
    for picture in facts["pictures"]:
        name = checksums.plain_name(picture.name, folder / "study.json")
        atomic.write_text(atomic.inside(folder, "figures", f"{name}.svg"), picture.svg)
    atomic.write_text(atomic.inside(folder, "report.html"), html)
    return folder / "report.html"


def render_page(content: dict[str, Any]) -> str:
    """Return the page of SAEs side by side that are no study.

    Args:
        content: the keys of study.json that a page needs (name, question, lm, text, findings,
            members, figures), `kind`, the word for what it is, and `links` {member: its page}.
    """
    return environment().get_template("study.html.jinja").render(_facts(content))


def _facts(study: dict[str, Any]) -> dict[str, Any]:
    """Return what the templates show of a study."""
    pictures = [picture for picture in map(draw, study.get("figures", [])) if picture is not None]
    members = study.get("members", {})
    columns = list(dict.fromkeys(name for row in members.values() for name in row))
    return {
        "study": study,
        "name": study["name"],
        "kind": study.get("kind", "study"),
        "links": study.get("links", {}),
        "pictures": pictures,
        "claims": [judge(claim, pictures) for claim in study.get("claims", [])],
        "questions": [
            {**one, "pictures": [picture for picture in pictures if picture.name in one["figures"]]}
            for one in study.get("questions", [])
        ],
        "setup": describe_setup(study),
        "command": str(study.get("command", "")),
        "columns": [column.replace("_", " ") for column in columns],
        "table": {
            member: [format_cell(row.get(name)) for name in columns]
            for member, row in members.items()
        },
    }


def describe_setup(study: dict[str, Any]) -> list[str]:
    """Return lines that say what a study trained, on how much, for how long and on what machine."""
    setup, machine = study.get("setup", {}), study.get("environment", {})
    lines = [
        f"{key.replace('_', ' ')}: "
        + (", ".join(f"{item:,}" for item in value) if isinstance(value, list) else f"{value:,}")
        for key, value in setup.items()
        if isinstance(value, list) or is_number(value)
    ]
    if is_number(study.get("seconds")):
        lines.append(f"hours: {study['seconds'] / 3600:.1f}")
    if isinstance(machine, dict) and machine.get("versions"):
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        gpus = ", ".join(machine.get("gpus", ())) or "no GPU"
        threads = machine.get("threads")
        lines.append(f"machine: {threads} thread{'s' * (threads != 1)}, {gpus}; {versions}")
    return lines


def judge(claim: dict[str, Any], pictures: list[Picture]) -> dict[str, Any]:
    """Return a claim of a study with its verdict and its pictures.

    Example:
        >>> claim = {"claim": "TopK wins", "margin": {"value": 0.3, "se": 0.1}, "figures": []}
        >>> judge(claim, [])["verdict"]
        'holds'
    """
    margin = claim["margin"]
    known = is_number(margin["value"])
    se = margin["se"] if is_number(margin["se"]) else None
    return {
        **claim,
        "verdict": decide(Number(margin["value"], se)) if known else "unclear",
        "anchor": "".join(
            letter for letter in claim["claim"].lower().replace(" ", "-") if letter in _ANCHOR
        ),
        "pictures": [picture for picture in pictures if picture.name in claim["figures"]],
    }


def read(folder: Path) -> dict[str, Any]:
    """Return the content of study.json; raise InputError if there is none."""
    if not atomic.inside(folder, "study.json").is_file():
        raise InputError(
            f"{folder} holds no study: it has no study.json. `ksparse study NAME --out {folder}` "
            "makes one"
        )
    study = jsonio.read_table(folder / "study.json", name=str, members=dict, figures=list)
    jsonio.check_format(folder / "study.json", study.get("format", 1), FORMAT)
    return study


def draw(figure: dict[str, Any]) -> Picture | None:
    """Return a figure drawn from its data; None if it has no point to draw."""
    curves = [(curve, *read_points(curve, figure["log"])) for curve in figure["curves"]]
    curves = [curve for curve in curves if len(curve[1])]
    if not curves:
        return None
    with canvas(size=(5.6, 3.6)) as (picture, axes):
        number = 0
        for curve, x, y, se in curves:
            name = safe_text(curve["label"])
            if curve["reference"]:
                axes.plot(x, y, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=name)
                continue
            few = len(x) < 16
            axes.errorbar(
                x,
                y,
                se if se is not None and few else None,
                label=name,
                color=COLOURS[number % len(COLOURS)],
                linewidth=1.3,
                elinewidth=0.8,
                marker=MARKS[number % len(MARKS)] if few else None,
                markersize=3.5,
            )
            number += 1
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in figure["log"]:
                _make_logarithmic(axes, name, axis)
            axis.set_major_formatter(
                lambda value, _: (
                    format_thousands(value) if abs(value) >= 1e4 else format_tick(value)
                )
            )
        if figure["x"] == "layer":
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(figure["x"])
        axes.set_ylabel(figure["y"])
        add_legend(picture, 3, handlelength=1.6, handletextpad=None)
        drawing = render(picture)
    label = "; ".join(
        f"{curve['label']}: {format_significant(float(y[0]))} to {format_significant(float(y[-1]))}"
        for curve, _, y, _ in curves
    )
    return Picture(figure["name"], drawing, figure["title"], figure["caption"], label)


def read_points(
    curve: dict[str, Any], log: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return x, y and standard errors of the points that can be drawn, MOST_POINTS at most.

    Args:
        curve: lists "x", "y" and, if it has standard errors, "se".
        log: the logarithmic axes, "x", "y" or "xy"; their numbers must be above 0.
    """
    x, y = (
        np.array([value if is_number(value) else math.nan for value in curve[name]], float)
        for name in ("x", "y")
    )
    se = (
        np.array([value if is_number(value) else 0.0 for value in curve["se"]], float)
        if curve.get("se")
        else None
    )
    drawable = np.isfinite(x) & np.isfinite(y)
    for name, values in (("x", x), ("y", y)):
        if name in log:
            drawable &= values > 0
    points = np.flatnonzero(drawable)
    if len(points) > MOST_POINTS:
        spread = np.linspace(0, len(points) - 1, MOST_POINTS).round().astype(int)
        points = points[np.unique(spread)]
    return x[points], y[points], None if se is None else se[points]


def _make_logarithmic(axes: Any, name: str, axis: Any) -> None:
    (axes.set_xscale if name == "x" else axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    plain_log_ticks(axis, (1, 2, 5) if high / low < 300 else (1,))


def format_cell(value: Any) -> str:
    """Return a value of the table, a number with its standard error."""
    if isinstance(value, dict):
        if not is_number(value.get("value")):
            return "–"
        se = f" ± {format_significant(value['se'], 2)}" if is_number(value.get("se")) else ""
        return format_significant(value["value"]) + se
    if value is None:
        return "–"
    return f"{value:,}" if is_number(value) else str(value)
