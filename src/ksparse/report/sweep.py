"""A sweep folder's files -> one page on its laws, that needs no network, no script and no torch.

    write(folder)   folder/report.html and folder/figures/*.svg, from law.json, points.csv and
                    curves.csv

A part that the points do not allow is a sentence that says which runs would add it.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import CorruptError
from ksparse.report import laws as figures
from ksparse.report.figures import Picture, format_tick
from ksparse.report.page import environment
from ksparse.report.tables import format_percent
from ksparse.scaling.laws.forms import LAWS, Columns
from ksparse.scaling.laws.points import read
from ksparse.storage import atomic, jsonio


@dataclass(frozen=True)
class Sweep:
    """What the page reads, each file once."""

    folder: Path

    @cached_property
    def found(self) -> dict[str, Any]:
        """Return law.json."""
        found = jsonio.read_json(atomic.inside(self.folder, "law.json"))
        if isinstance(found, dict):
            jsonio.check_format(self.folder / "law.json", found.get("format", 1), 1)
        if (
            not isinstance(found, dict)
            or not isinstance(found.get("laws"), dict)
            or not isinstance(found.get("subject"), dict)
        ):
            raise CorruptError(
                f"{self.folder / 'law.json'} is not that of a sweep; `ksparse fit {self.folder}` "
                "writes it again"
            )
        return found

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """Return points.csv."""
        return read(atomic.inside(self.folder, "points.csv"), ("n", "k", "loss"))

    @cached_property
    def curves(self) -> dict[str, np.ndarray]:
        """Return the subject's curves.csv with compute as c; empty without one."""
        file = atomic.inside(self.folder, "curves.csv")
        if not file.is_file():
            return {}
        rows = read(file, ("run", "n", "k", "flops", "loss"))
        rows["c"] = rows.pop("flops")
        lm = self.found["subject"].get("lm")
        good = (
            (rows["c"] > 0)
            & (rows["loss"] > 0)
            & (rows["lm"] == lm if "lm" in rows and lm else True)
        )
        return {name: column[good] for name, column in rows.items()}

    @property
    def mine(self) -> Columns:
        """Return the runs that most laws are of."""
        good = np.ones(len(self.rows["n"]), bool)
        for name in ("lm", "activation"):
            if name in self.rows and name in self.found["subject"]:
                good &= self.rows[name] == self.found["subject"][name]
        return {name: column[good] for name, column in self.rows.items()}

    @property
    def k(self) -> float:
        """Return the k of figures that show one: that of L_s(N), or the middle one of those with
        the most runs."""
        if (named := self.found["subject"].get("k of L_s(N)")) is not None:
            return float(named)
        values, counts = np.unique(self.mine["k"], return_counts=True)
        most = values[counts == counts.max()]
        return float(most[len(most) // 2])

    @property
    def lms(self) -> list[str]:
        """Return the LMs of L_s(N), the smallest first where their sizes are known."""
        there = {point["lm"] for point in self.found["laws"].get("s", {}).get("points", ())}
        size = self.rows.get("lm_parameters", np.zeros(len(self.rows["n"])))
        return sorted(
            there,
            key=lambda lm: (float(np.nan_to_num(size[self.rows["lm"] == lm]).max(initial=0)), lm),
        )

    @property
    def place(self) -> str:
        """Return the folder as a command would name it: relative, so that a page tells nothing of a
        machine."""
        return self.folder.resolve().name if self.folder.is_absolute() else str(self.folder)


def write(folder: Path) -> Path:
    """Write report.html and its figures from a sweep's files; return the page's path."""
    sweep = Sweep(folder)
    pictures = drawn(sweep)
    html = (
        environment()
        .get_template("sweep.html.jinja")
        .render(
            name=folder.resolve().name,
            summary=summary(sweep),
            found=sweep.found,
            laws=tables(sweep),
            pictures=pictures,
            absent=absent(sweep, {picture.name for picture in pictures}),
            forms=compared(sweep),
            points=point_tables(sweep),
            commands=commands(sweep),
            stale=sweep.found.get("runs") != len(sweep.rows["n"]),
            fit=shlex.join(["ksparse", "fit", sweep.place]),
        )
    )
    for picture in pictures:
        atomic.write_text(atomic.inside(folder, "figures", f"{picture.name}.svg"), picture.svg)
    atomic.write_text(atomic.inside(folder, "report.html"), html)
    return folder / "report.html"


# ---- in words ------------------------------------------------------------------------------------


def summary(sweep: Sweep) -> str:
    """Return the laws in a few sentences."""
    rows, found = sweep.mine, sweep.found["laws"]
    lm = sweep.found["subject"].get("lm")
    said = [
        f"{len(rows['n'])} runs{f' on {lm}' if lm else ''}, n {_range(rows['n'])}, k "
        f"{_range(rows['k'])}."
    ]
    laws = [found[name] for name in ("nk", "n") if name in found]
    if laws:
        law = min(
            laws,
            key=lambda law: (
                math.inf if law["extrapolation_error"] is None else law["extrapolation_error"]
            ),
        )
        said.append(
            f"Loss follows {law['title']}, {law['equation']}, to {format_percent(law['log_rms'])} "
            "(log-RMS)"
            + (
                f" and foretells the largest n to {format_percent(law['extrapolation_error'])}"
                if law["extrapolation_error"] is not None
                else ""
            )
            + "."
        )
    for name, words in (
        ("tokens", "Tokens to convergence grow as"),
        ("lr", "The best learning rate goes as"),
        ("optimal", "The best n for a budget grows as"),
    ):
        if name in found and "beta" in found[name]["coefficients"]:
            beta = found[name]["coefficients"]["beta"]
            low, high = (
                "−∞" if beta["low"] is None else f"{beta['low']:.2f}",
                "∞" if beta["high"] is None else f"{beta['high']:.2f}",
            )
            said.append(
                f"{words} {'C' if name == 'optimal' else 'n'}^{beta['value']:.2f} (95 %: {low} to "
                f"{high})."
            )
    return " ".join(said)


def _range(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"= {low:,.0f}" if low == high else f"from {low:,.0f} to {high:,.0f}"


def absent(sweep: Sweep, there: set[str]) -> list[str]:
    """Say for each picture and law that is not there which runs would add it."""
    said = dict(sweep.found.get("absent") or {})
    lines = list(said.values())
    if "law-compute" not in there and "c" not in said:
        lines.append(
            f"No picture of L(C): there are no curves of runs at k = {sweep.k:g}; runs that record "
            "theirs would add it."
        )
    if "law-rates" not in there:
        lines.append(
            f"No picture of learning rates: at k = {sweep.k:g} no n has runs of two rates with "
            "their tokens to convergence; such runs would add it."
        )
    if "law-trends" not in there:
        lines.append(
            "No picture of tokens, loss and learning rate together: it takes two of those laws."
        )
    return lines


# ---- figures and tables --------------------------------------------------------------------------


def drawn(sweep: Sweep) -> list[Picture]:
    """Return the pictures that the points allow."""
    found = sweep.found["laws"]
    pictures = (
        figures.draw_compute_law(
            found.get("c"), sweep.found.get("frontier") or [], sweep.curves, sweep.k
        ),
        figures.draw_size_law(found.get("n")),
        figures.draw_joint_law(found.get("nk")),
        figures.draw_learning_rates(sweep.mine, sweep.k),
        figures.draw_trends(found),
        figures.draw_subject_law(
            found.get("s"), sweep.found["subject"].get("k of L_s(N)", ""), sweep.lms
        ),
    )
    return [picture for picture in pictures if picture is not None]


def tables(sweep: Sweep) -> list[dict[str, Any]]:
    """Return each law with its coefficients as they are written."""
    return [
        {
            "law": law,
            "rows": [
                {"name": name, **{key: _written(each[key]) for key in each}, "raw": each["value"]}
                for name, each in law["coefficients"].items()
            ],
        }
        for law in sweep.found["laws"].values()
    ]


def compared(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the forms that were tried of each law that has several."""
    return [
        {
            "law": law,
            "rows": [
                {
                    **form,
                    "log_rms": "" if form["log_rms"] is None else f"{form['log_rms']:.4f}",
                    "above_best": "" if form["above_best"] is None else f"{form['above_best']:.1f}",
                }
                for form in law["forms"]
            ],
        }
        for law in sweep.found["laws"].values()
        if len(law["forms"]) > 1
    ]


def point_tables(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the points of each law as rows of strings."""
    made = []
    for name, law in sweep.found["laws"].items():
        columns = [column for column in law["points"][0] if column != "residual"]
        made.append(
            {
                "title": law["title"],
                "columns": [
                    LAWS[name].target if column == law["target"] else column for column in columns
                ]
                + ["off by"],
                "rows": [
                    [_written(point[column]) for column in columns]
                    + [format_percent(point["residual"])]
                    for point in law["points"]
                ],
            }
        )
    return made


def commands(sweep: Sweep) -> list[tuple[str, str]]:
    """Return what makes the sweep, its laws and this page again."""
    recipe = (
        [("Train the runs again", shlex.join(["ksparse", "sweep", f"{sweep.place}/sweep.toml"]))]
        if (sweep.folder / "sweep.toml").is_file()
        else []
    )
    return [
        *recipe,
        ("Fit the laws", shlex.join(["ksparse", "fit", sweep.place])),
        ("Write this page", shlex.join(["ksparse", "report", sweep.place])),
    ]


def _written(value: Any) -> str:
    """Return a number as a table shows it; what has no end as a dash."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    return (
        f"{value:,.0f}"
        if isinstance(value, int) or abs(value) >= 1000
        else format_tick(value)
        if abs(value) < 1e-3
        else f"{value:.4g}"
    )
