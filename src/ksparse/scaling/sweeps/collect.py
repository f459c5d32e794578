"""Collect the runs of a sweep into points.csv and curves.csv, which laws are fitted to.
docs/formats.md lists the columns."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path
from typing import Any

from ksparse import pylm
from ksparse.config import Recipe
from ksparse.lm.loading import find_model
from ksparse.planning.plan import read_lm_spec
from ksparse.scaling.sweeps.grid import SweepFolder, finished
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder

POINTS = (
    "run",
    "n",
    "k",
    "lr",
    "seed",
    "activation",
    "d_model",
    "lm",
    "site",
    "lm_parameters",
    "lm_flops",
    "batch",
    "tokens",
    "tokens_to_convergence",
    "converged",
    "flops",
    "flops_lm",
    "loss",
    "loss_raw",
    "loss_ema",
    "dead",
)
CURVES = (
    "run",
    "n",
    "k",
    "lr",
    "seed",
    "lm",
    "site",
    "tokens",
    "flops",
    "loss",
    "loss_raw",
    "loss_ema",
)


def collect(sweep: SweepFolder) -> int:
    """Write both files from all finished runs that have a curve.

    Returns:
        The number of these runs.
    """
    subjects: dict[tuple[str, str], dict[str, Any]] = {}
    points, curves = [], []
    for run in sweep.runs():
        curve = run.curve() if finished(run) else []
        if not curve:
            continue
        columns = _run_columns(run, subjects)
        last = curve[-1]
        converged = bool(jsonio.read_table(run.checkpoints()[-1] / "state.json").get("converged"))
        points.append(
            columns
            | last
            | {
                "tokens_to_convergence": last["tokens"] if converged else None,
                "converged": str(converged).lower(),
            }
        )
        curves += [columns | row for row in curve]
    atomic.write_text(sweep.points_file, _format_csv(POINTS, points))
    atomic.write_text(sweep.curves_file, _format_csv(CURVES, curves))
    return len(points)


def _run_columns(run: RunFolder, subjects: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
    """Return the columns that are the same in all rows of a run; `subjects` caches the LMs'."""
    recipe = run.recipe()
    checksums.verify(run.checkpoints()[-1], "sae.json")
    config = jsonio.read_table(run.checkpoints()[-1] / "sae.json", d_model=int)
    subject = (recipe.acts.lm, recipe.acts.shards)
    if subject not in subjects:
        subjects[subject] = _lm_columns(recipe)
    return {
        "run": run.name,
        "n": recipe.sae.n_latents,
        "k": recipe.sae.k,
        "lr": recipe.lr,
        "seed": recipe.seed,
        "activation": config.get("activation", "topk"),
        "d_model": config["d_model"],
        "lm": recipe.acts.lm,
        "site": recipe.acts.site,
        "batch": recipe.batch,
    } | subjects[subject]


def _lm_columns(recipe: Recipe) -> dict[str, Any]:
    """Return an LM's parameters without embeddings, and the FLOPs of its pre-training if its folder
    has them."""
    folder = Path(find_model(recipe.acts.lm))
    flops = [spent for spent, _ in pylm.loss_table(folder)] if folder.is_dir() else []
    without_shards = dataclasses.replace(recipe.acts, shards="")
    return {
        "lm_parameters": read_lm_spec(dataclasses.replace(recipe, acts=without_shards)).body,
        "lm_flops": max(flops, default=None),
    }


def _format_csv(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in sorted(
        rows,
        key=lambda row: (row["lm"], row["site"], row["k"], row["n"], row["run"], row["tokens"]),
    ):
        writer.writerow(["" if row.get(name) is None else row[name] for name in columns])
    return stream.getvalue()
