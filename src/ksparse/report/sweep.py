"""A sweep folder's files -> one page on its laws that needs no network, no script and no torch.

write(folder)   report.html and figures/*.svg, from law.json, points.csv and curves.csv

Where the points are not enough for a law or a figure, a sentence says which runs would add it.
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ksparse.errors import CorruptError, InputError
from ksparse.evals import by_site
from ksparse.report import laws as figures
from ksparse.report import studies
from ksparse.report.figures import Picture, choose_figure, format_tick
from ksparse.report.page import environment
from ksparse.report.tables import format_percent
from ksparse.scaling.laws.forms import LAWS, Columns
from ksparse.scaling.laws.points import best_lr, read, take
from ksparse.storage import atomic, jsonio

FORMAT = 1
"""The version of law.json that this module reads."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's files, each read once."""

    folder: Path

    @cached_property
    def law_file(self) -> dict[str, Any]:
        """The content of law.json."""
        content = jsonio.read_json(atomic.inside(self.folder, "law.json"))
        if isinstance(content, dict):
            jsonio.check_format(self.folder / "law.json", content.get("format", 1), FORMAT)
        if (
            not isinstance(content, dict)
            or not isinstance(content.get("laws"), dict)
            or not isinstance(content.get("subject"), dict)
        ):
            raise CorruptError(
                f"{self.folder / 'law.json'} is not that of a sweep; `ksparse fit {self.folder}` "
                "writes it again"
            )
        return content

    @cached_property
    def rows(self) -> dict[str, np.ndarray]:
        """The columns of points.csv."""
        return read(atomic.inside(self.folder, "points.csv"), ("n", "k", "loss"))

    @cached_property
    def curves(self) -> dict[str, np.ndarray]:
        """The columns of curves.csv for the laws' LM, with training FLOPs as c; {} without it."""
        file = atomic.inside(self.folder, "curves.csv")
        if not file.is_file():
            return {}
        rows = read(file, ("run", "n", "k", "flops", "loss"))
        rows["c"] = rows.pop("flops")
        good = (rows["c"] > 0) & (rows["loss"] > 0)
        for name in ("lm", "site"):
            if name in rows and self.law_file["subject"].get(name):
                good &= rows[name] == self.law_file["subject"][name]
        return {name: column[good] for name, column in rows.items()}

    @property
    def mine(self) -> Columns:
        """The rows of points.csv of the LM, activation and site that most laws are fitted to."""
        good = np.ones(len(self.rows["n"]), bool)
        for name in ("lm", "activation", "site"):
            if name in self.rows and name in self.law_file["subject"]:
                good &= self.rows[name] == self.law_file["subject"][name]
        return {name: column[good] for name, column in self.rows.items()}

    @property
    def k(self) -> float:
        """The k of figures that show one: that of L_s(N), or the middle one of the commonest."""
        if (named := self.law_file["subject"].get("k of L_s(N)")) is not None:
            return float(named)
        values, counts = np.unique(self.mine["k"], return_counts=True)
        most = values[counts == counts.max()]
        return float(most[len(most) // 2])

    @property
    def lms(self) -> list[str]:
        """The LMs of L_s(N), the smallest first where their sizes are known."""
        names = {point["lm"] for point in self.law_file["laws"].get("s", {}).get("points", ())}
        size = self.rows.get("lm_parameters", np.zeros(len(self.rows["n"])))
        return sorted(
            names,
            key=lambda lm: (float(np.nan_to_num(size[self.rows["lm"] == lm]).max(initial=0)), lm),
        )

    @property
    def place(self) -> str:
        """The folder as a command names it: relative, so that a page reveals no machine."""
        return self.folder.resolve().name if self.folder.is_absolute() else str(self.folder)


def write(folder: Path) -> Path:
    """Write report.html and its figures from a sweep's files.

    Args:
        folder: the sweep's folder, with law.json and points.csv in it.

    Returns:
        The page's path.

    Raises:
        CorruptError: law.json is not that of a sweep.
    """
    sweep = Sweep(folder)
    pictures = draw_pictures(sweep)
    html = (
        environment()
        .get_template("sweep.html.jinja")
        .render(
            name=folder.resolve().name,
            summary=summarize(sweep),
            law=sweep.law_file,
            laws=law_tables(sweep),
            pictures=pictures,
            absent=list_missing(sweep, {picture.name for picture in pictures}),
            forms=form_tables(sweep),
            points=point_tables(sweep),
            commands=list_commands(sweep),
            stale=sweep.law_file.get("runs") != len(sweep.rows["n"]),
            fit=shlex.join(["ksparse", "fit", sweep.place]),
        )
    )
    for picture in pictures:
        atomic.write_text(atomic.inside(folder, "figures", f"{picture.name}.svg"), picture.svg)
    atomic.write_text(atomic.inside(folder, "report.html"), html)
    return folder / "report.html"


# ---- in words ------------------------------------------------------------------------------------


def summarize(sweep: Sweep) -> str:
    """Return the laws in a few sentences."""
    rows, laws = sweep.mine, sweep.law_file["laws"]
    lm, site = (sweep.law_file["subject"].get(name) for name in ("lm", "site"))
    place = (f" on {lm}" if lm else "") + (f" at {site}" if site else "")
    sentences = [f"{len(rows['n'])} runs{place}, n {_range(rows['n'])}, k {_range(rows['k'])}."]
    of_size = [laws[name] for name in ("nk", "n") if name in laws]
    if of_size:
        law = min(
            of_size,
            key=lambda law: (
                math.inf if law["extrapolation_error"] is None else law["extrapolation_error"]
            ),
        )
        sentences.append(
            f"Loss follows {law['title']}, {law['equation']}, to {format_percent(law['log_rms'])} "
            "(log-RMS)"
            + (
                f" and predicts the largest n to {format_percent(law['extrapolation_error'])}"
                if law["extrapolation_error"] is not None
                else ""
            )
            + "."
        )
    for name, words in (
        ("tokens", "Tokens to convergence grow as"),
        ("lr", "The best learning rate scales as"),
        ("optimal", "The best n for a budget grows as"),
    ):
        if name in laws and "beta" in laws[name]["coefficients"]:
            beta = laws[name]["coefficients"]["beta"]
            low, high = (
                "−∞" if beta["low"] is None else f"{beta['low']:.2f}",
                "∞" if beta["high"] is None else f"{beta['high']:.2f}",
            )
            sentences.append(
                f"{words} {'C' if name == 'optimal' else 'n'}^{beta['value']:.2f} (95 %: {low} to "
                f"{high})."
            )
    return " ".join(sentences)


def _range(values: np.ndarray) -> str:
    low, high = values.min(), values.max()
    return f"= {low:,.0f}" if low == high else f"from {low:,.0f} to {high:,.0f}"


def list_missing(sweep: Sweep, pictures: set[str]) -> list[str]:
    """Say for each missing law and picture which runs would add it."""
    missing_laws = dict(sweep.law_file.get("absent") or {})
    lines = list(missing_laws.values())
    if "law-compute" not in pictures and "c" not in missing_laws:
        lines.append(
            f"No picture of L(C): no run at k = {sweep.k:g} has a curve; runs that record theirs "
            "would add it."
        )
    if "law-rates" not in pictures:
        lines.append(
            f"No picture of learning rates: at k = {sweep.k:g} no n has runs of two rates with "
            "known tokens to convergence; such runs would add it."
        )
    if "law-trends" not in pictures:
        lines.append(
            "No picture of tokens, loss and learning rate together: it needs two of those laws."
        )
    return lines


# ---- figures and tables --------------------------------------------------------------------------


def draw_figures(folder: Path) -> dict[str, Any]:
    """Draw the figures of a sweep's report as matplotlib figures, by name; nothing is written.

    Raises:
        InputError: no law has been fitted yet.
    """
    if not atomic.inside(folder, "law.json").is_file():
        raise InputError(
            f"{folder} has no law.json, which its figures are drawn from; fit its laws first: "
            f"ksparse.fit({str(folder)!r}) or `ksparse fit {folder}`"
        )
    return {picture.name: picture.drawing.figure for picture in draw_pictures(Sweep(folder))}


def draw_figure(folder: Path, name: str) -> Any:
    """Draw one of `draw_figures`, by its name or the end of it: "size" for "law-size".

    Raises:
        InputError: there is no such figure; the others are named.
    """
    drawn = draw_figures(folder)
    more = f"`ksparse report {folder}` says which runs would add others"
    return choose_figure(drawn, name, folder, more)


def draw_pictures(sweep: Sweep) -> list[Picture]:
    """Return the pictures that the points are enough for."""
    laws = sweep.law_file["laws"]
    pictures = (
        draw_sites(sweep.rows, sweep.law_file["subject"]),
        figures.draw_compute_law(
            laws.get("c"), sweep.law_file.get("frontier") or [], sweep.curves, sweep.k
        ),
        figures.draw_size_law(laws.get("n")),
        figures.draw_joint_law(laws.get("nk")),
        figures.draw_learning_rates(sweep.mine, sweep.k),
        figures.draw_trends(laws),
        figures.draw_subject_law(
            laws.get("s"), sweep.law_file["subject"].get("k of L_s(N)", ""), sweep.lms
        ),
    )
    return [picture for picture in pictures if picture is not None]


def draw_sites(rows: Columns, subject: dict[str, Any]) -> Picture | None:
    """Draw the loss by layer, a curve for each location, n and k; None for fewer than two sites of
    the laws' LM and activation.

    Where there are several learning rates the best one counts, and of several seeds the geometric
    mean.
    """
    if "site" not in rows:
        return None
    good = np.isfinite(rows["loss"]) & (rows["loss"] > 0)
    for name in ("lm", "activation"):
        if name in rows and subject.get(name):
            good &= rows[name] == subject[name]
    rows = take(rows, good)
    if len(np.unique(rows["site"])) < 2:
        return None
    best = best_lr(rows, ("site", "n", "k"))
    sizes = sorted(set(zip(best["n"].tolist(), best["k"].tolist())))
    curves = []
    for n, k in sizes:
        here = take(best, (best["n"] == n) & (best["k"] == k))
        losses = {
            site: {"value": float(np.exp(np.log(here["loss"][here["site"] == site]).mean()))}
            for site in dict.fromkeys(here["site"].tolist())
        }
        results = {site: {"points": {"loss": loss | {"se": None}}} for site, loss in losses.items()}
        for curve in by_site.curves(results, "points", "loss"):
            label = f"{curve.label}, n = {n:,.0f}, k = {k:g}" if len(sizes) > 1 else curve.label
            curves.append(curve._replace(label=label)._asdict() | {"reference": False})
    return studies.draw(
        {
            "name": "sites",
            "title": "Loss by layer",
            "caption": "Held-out normalised MSE of the same SAE at each site; laws are of one "
            "site.",
            "x": "layer",
            "y": "held-out loss",
            "log": "",
            "curves": curves,
        }
    )


def law_tables(sweep: Sweep) -> list[dict[str, Any]]:
    """Return each law with its coefficients as text."""
    return [
        {
            "law": law,
            "rows": [
                {
                    "name": name,
                    **{key: _format_cell(value) for key, value in coefficient.items()},
                    "raw": coefficient["value"],
                }
                for name, coefficient in law["coefficients"].items()
            ],
        }
        for law in sweep.law_file["laws"].values()
    ]


def form_tables(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the forms that were tried for each law that has several."""
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
        for law in sweep.law_file["laws"].values()
        if len(law["forms"]) > 1
    ]


def point_tables(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the points of each law as rows of text."""
    tables = []
    for name, law in sweep.law_file["laws"].items():
        columns = [column for column in law["points"][0] if column != "residual"]
        tables.append(
            {
                "title": law["title"],
                "columns": [
                    LAWS[name].target if column == law["target"] else column for column in columns
                ]
                + ["off by"],
                "rows": [
                    [_format_cell(point[column]) for column in columns]
                    + [format_percent(point["residual"])]
                    for point in law["points"]
                ],
            }
        )
    return tables


def list_commands(sweep: Sweep) -> list[tuple[str, str]]:
    """Return (title, command) of what makes the sweep, its laws and this page again."""
    train = (
        [("Train the runs again", shlex.join(["ksparse", "sweep", f"{sweep.place}/sweep.toml"]))]
        if (sweep.folder / "sweep.toml").is_file()
        else []
    )
    return [
        *train,
        ("Fit the laws", shlex.join(["ksparse", "fit", sweep.place])),
        ("Write this page", shlex.join(["ksparse", "report", sweep.place])),
    ]


def _format_cell(value: Any) -> str:
    """Return a number as a table shows it; None, an open end, as a dash."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    if abs(value) >= 1e7:
        return f"{value:.3g}"
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return format_tick(value) if abs(value) < 1e-3 else f"{value:.4g}"
