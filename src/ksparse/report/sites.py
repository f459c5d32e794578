"""A folder of runs of one recipe at several sites -> one page with the sites side by side. Needs no
torch.

write(folder)   report.html, from what the runs hold: metrics, and `stats` and `downstream` of those
                that have been evaluated
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ksparse.config import differences, flat
from ksparse.errors import InputError
from ksparse.evals import by_site
from ksparse.report import studies
from ksparse.report.source import is_number
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder, runs_in

EVALUATED = {"stats": ("nmse", "l0", "dead_fraction"), "downstream": ("ce_delta", "kl")}
"""The numbers of evaluations that are shown."""
_TRAINED = {"nmse": "nmse in training", "dead": "dead in training", "tokens": "tokens"}
_FIGURES = (
    ("training", "nmse", "Error in training by layer", "normalised MSE of the last step logged"),
    ("stats", "nmse", "Error by layer", "normalised MSE, held out"),
    ("stats", "dead_fraction", "Dead latents by layer", "share of the latents"),
    ("downstream", "ce_delta", "The LM's additional loss by layer", "delta CE, nats per token"),
)


def write(folder: Path | str, runs: Sequence[RunFolder] = ()) -> Path:
    """Write report.html of runs at several sites.

    Args:
        folder: the folder whose subfolders are the runs.
        runs: those to show; by default all.

    Returns:
        The page's path.

    Raises:
        InputError: the folder holds no runs, or runs that differ in more than their site.
        CorruptError: a file of a run is damaged.
    """
    folder = Path(folder)
    by_name = _by_site(folder, runs or runs_in(folder))
    results = {site: _results(run) for site, run in by_name.items()}
    recipe = next(iter(by_name.values())).recipe()
    page = {
        "name": folder.resolve().name,
        "kind": "sites",
        "question": f"{recipe.sae.n_latents:,} latents, {recipe.sae.activation.kind}, k = "
        f"{recipe.sae.k}, at {len(by_name)} sites, trained on one pass of the LM.",
        "lm": recipe.acts.lm,
        "site": "",
        "text": recipe.acts.text,
        "findings": by_site.findings(results) or [_how_to_evaluate(folder)],
        "members": {site: _row(found) for site, found in results.items()},
        "links": {site: f"{run.path.name}/report.html" for site, run in by_name.items()},
        "figures": _figures(results),
    }
    atomic.write_text(atomic.inside(folder, "report.html"), studies.render_page(page))
    return folder / "report.html"


def _by_site(folder: Path, runs: Sequence[RunFolder]) -> dict[str, RunFolder]:
    """Return runs by site; raise InputError unless they differ in nothing else."""
    found = [(run, run.recipe()) for run in runs]
    if not found:
        raise InputError(f"{folder} holds no runs; `ksparse train --out {folder}` makes some")
    first = found[0][1]
    tables = [_without_site(recipe.fingerprint()) for _, recipe in found]
    for (run, _), table in zip(found, tables):
        if changed := differences(tables[0], table):
            raise InputError(
                f"{folder} holds runs that differ in more than their site, {found[0][0].path.name} "
                f"and {run.path.name}: {'; '.join(changed[:3])}. A page is of one recipe at "
                "several sites; for one run give its folder"
            )
    by_name = {recipe.acts.site: run for run, recipe in found}
    if len(by_name) < len(found):
        raise InputError(
            f"{folder} holds {len(found)} runs at {len(by_name)} sites, of which a page of sites "
            f"shows one each ({first.acts.site} …); for one run give its folder"
        )
    places = {site: by_site.place_of(site) or (site, 0) for site in by_name}
    return {site: by_name[site] for site in sorted(by_name, key=places.__getitem__)}


def _without_site(fingerprint: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in flat(fingerprint).items() if key != "acts.site"}


def _results(run: RunFolder) -> dict[str, Any]:
    """Return the numbers that a run has: of its last logged step, and of its evaluations."""
    last = run.metrics()[-1:]
    row = last[0] if last else {}
    training = {
        key: {"value": row[key], "se": None} for key in ("nmse", "dead") if is_number(row.get(key))
    }
    results: dict[str, Any] = {"training": training, "tokens": row.get("tokens")}
    for name, keys in EVALUATED.items():
        if (found := run.eval(name)) is not None:
            results[name] = {key: found[key] for key in keys if key in found}
    return results


def _row(results: dict[str, Any]) -> dict[str, Any]:
    """Return the cells of the table."""
    row = {_TRAINED["tokens"]: results["tokens"]}
    row |= {_TRAINED[key]: number for key, number in results["training"].items()}
    for name in EVALUATED:
        row |= results.get(name, {})
    return row


def _figures(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the figures as data: of each number that two sites have, held out where it is."""
    evaluated = all("stats" in found for found in results.values())
    figures = []
    for evaluation, key, title, y in _FIGURES:
        curves = by_site.curves(results, evaluation, key)
        if sum(len(curve.x) for curve in curves) < 2 or (evaluation == "training" and evaluated):
            continue
        figures.append(
            {
                "name": f"{evaluation}-{key}",
                "title": title,
                "caption": "The same SAE at each site, trained on the same text.",
                "x": "layer",
                "y": y,
                "log": "",
                "curves": [curve._asdict() | {"reference": False} for curve in curves],
            }
        )
    return figures


def _how_to_evaluate(folder: Path) -> str:
    place = folder.resolve().name if folder.is_absolute() else folder.as_posix()
    return (
        "Not all sites have been evaluated. For held-out numbers: ksparse eval "
        f"{shlex.quote(place)}/*/ stats downstream; ksparse report {shlex.quote(place)}"
    )
