"""A sweep: recipes from a grid over their keys, each with a run folder named by the recipe's hash.

    read(file)        sweep.toml -> Grid(recipes by folder name)
    SweepFolder       where a sweep's files are
    group_runs(…)     unfinished runs -> groups that train together: as large as the memory allows,
                      and at least one per worker

A sweep.toml is a recipe with `[grid]`, a table of lists, or with several `[[grid]]`, whose points
are combined. Where a grid varies `seed`, the order of the data is fixed (`order = 0`), so that
all seeds share a stream.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from csv import DictReader
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ksparse import config as recipes
from ksparse import display
from ksparse.config import Recipe
from ksparse.errors import InputError
from ksparse.lookup import function_of
from ksparse.planning.costs import PlanInput, SAEMemory, add_memory, sae_memory, site_memory
from ksparse.planning.sharing import stream_key
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder

MOST_POINTS = 100_000


@dataclass(frozen=True)
class Grid:
    """The recipes of a sweep, by the names of their folders, and the file they were read from."""

    file: Path
    recipes: dict[str, Recipe]

    def __len__(self) -> int:
        return len(self.recipes)


@dataclass(frozen=True, repr=False)
class SweepFolder:
    """The folder of a sweep."""

    path: Path

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()

    def points(self) -> list[dict[str, Any]]:
        """Return the last point of each finished run, a row of points.csv each (docs/formats.md);
        numbers are numbers, and what is empty is None."""
        if not self.points_file.is_file():
            return []
        with self.points_file.open(newline="", encoding="utf-8") as file:
            return [
                {key: _read_cell(text) for key, text in row.items()} for row in DictReader(file)
            ]

    def to_frame(self) -> Any:
        """Return `points()` as a pandas DataFrame.

        Raises:
            InputError: if pandas is not installed.
        """
        return display.to_frame(self.points())

    def table(self) -> display.Table:
        """Return the finished runs as a table."""
        formats = {"n": ",", "k": "", "tokens": ",", "loss": ".4f", "dead": ".1%"}
        runs = sorted(self.points(), key=lambda row: (row["n"], row["k"]))
        header: tuple[str, ...] = ("latents", "k", "tokens", "held-out nmse", "dead")
        if len({row.get("site") for row in runs}) > 1:
            formats, header = {"site": ""} | formats, ("site", *header)
        rows = [
            ["-" if row.get(key) is None else format(row[key], how) for key, how in formats.items()]
            for row in runs
        ]
        title = f"Sweep {self.path}: {len(rows)} finished runs"
        return display.Table(title, header, rows)

    def figures(self) -> dict[str, Any]:
        """Draw the figures of the sweep's report as matplotlib figures, by name
        (`ksparse.report.sweep`)."""
        found: dict[str, Any] = function_of("SweepFolder.figures")(self.path)
        return found

    def figure(self, name: str) -> Any:
        """Draw one figure of the sweep's report, such as "size", as a matplotlib figure."""
        return function_of("SweepFolder.figure")(self.path, name)

    @property
    def file(self) -> Path:
        """The sweep.toml that the sweep was last run with."""
        return atomic.inside(self.path, "sweep.toml")

    @property
    def plan_file(self) -> Path:
        """The plan of the last call, as JSON."""
        return atomic.inside(self.path, "plan.json")

    @property
    def points_file(self) -> Path:
        """The last point of each finished run."""
        return atomic.inside(self.path, "points.csv")

    @property
    def curves_file(self) -> Path:
        """All points of all finished runs."""
        return atomic.inside(self.path, "curves.csv")

    def run(self, name: str) -> RunFolder:
        """Return the folder of a run."""
        return RunFolder(atomic.inside(self.path, "runs", name))

    def error_file(self, name: str) -> Path:
        """Return the file that says why a run failed."""
        return self.run(name).file("error.json")

    def runs(self) -> list[RunFolder]:
        """Return all runs in the folder, also those of an earlier grid."""
        folders = sorted(atomic.inside(self.path, "runs").glob("*"))
        return [run for run in (self.run(folder.name) for folder in folders) if run.exists()]

    def locked(self):
        """Return a context manager that keeps other processes from running this sweep."""
        return RunFolder(self.path).locked()


def _read_cell(text: str) -> Any:
    """Return a cell of points.csv as a number where it is one; None where it is empty."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text or None


def read(file: Path | str) -> Grid:
    """Read a sweep.toml.

    Raises:
        InputError: if the file has no grid, or a point of the grid is not a valid recipe.
    """
    file = Path(file)
    table = recipes.read_toml(
        file, "sweep", "; give a sweep.toml, such as recipes/sweeps/pylm.toml"
    )
    return grid_of(table, file)


def grid_of(table: dict[str, Any], file: Path) -> Grid:
    """Return the grid that the content of a sweep.toml describes; raise InputError as `read`."""
    table = dict(table)
    grids = table.pop("grid", None)
    grids = grids if isinstance(grids, list) else [grids]
    if not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError(
            f'sweep {file} has no grid; write [grid] and lists of values, such as "sae.k" = [16, '
            "32]"
        )
    by_name: dict[str, Recipe] = {}
    for grid in grids:
        for point in _points(grid, file):
            for recipe in _at_sites(_recipe(table, point, file)):
                by_name[jsonio.digest(recipe.fingerprint())] = recipe
    return Grid(file, by_name)


def _at_sites(recipe: Recipe) -> list[Recipe]:
    """Return a recipe at each of the sites that its list or pattern names."""
    if not recipe.acts.names_several_sites:
        return [recipe]
    from ksparse.training.sites import at_sites  # needs torch, to read the LM's config

    return list(at_sites(recipe).values())


def _points(grid: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Return every combination of a grid's values as {dotted key: value}."""
    lists = recipes.flat(grid)
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(
                f"'{key}' of the grid in {file} is {recipes.preview(values)}; it must be a list of "
                "at least one value"
            )
    _check_identity(list(lists), file)
    if (points := math.prod(map(len, lists.values()))) > MOST_POINTS:
        raise InputError(
            f"the grid in {file} has {points:,} points; at most {MOST_POINTS:,} make a sweep"
        )
    return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]


def _check_identity(keys: Sequence[str], file: Path) -> None:
    """Raise InputError for keys that a recipe's identity leaves out: runs that differ in nothing
    else would have one folder."""
    identity = Recipe().fingerprint()
    outside = [field.name for field in dataclasses.fields(Recipe) if field.name not in identity]
    keys = [key for key in keys if key.partition(".")[0] in outside]
    if keys:
        names = ", ".join(f'"{key}"' for key in keys)
        raise InputError(
            f"{names} in the grid in {file} {'does' if len(keys) == 1 else 'do'} not change the "
            "result of a run, so that its points would be the same run; give "
            f"{'it' if len(keys) == 1 else 'them'} in the recipe part of the file, outside [grid]"
        )


def _format_point(point: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {recipes.preview(value)}" for key, value in point.items())


def _recipe(table: dict[str, Any], point: dict[str, Any], file: Path) -> Recipe:
    """Return the recipe of a point: the file's own keys, overridden by the point's."""
    merged = table
    for key, value in point.items():
        merged = _merge(merged, _nested(key, value))
    if "seed" in point and "order" not in merged:
        merged = merged | {"order": 0}
    try:
        return recipes.from_dict(merged, where=f" in {file}")
    except InputError as error:
        raise InputError(f"{error} (at the point {_format_point(point)} of the grid)") from None


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return `base` overridden by `overrides`; tables in both are merged."""
    merged = {
        key: _merge(base[key], overrides[key])
        for key in base.keys() & overrides.keys()
        if isinstance(base[key], dict) and isinstance(overrides[key], dict)
    }
    return base | overrides | merged


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# ---- which runs train together -------------------------------------------------------------------


def finished(run: RunFolder) -> bool:
    """Return whether a run has taken its last step, without reading its weights."""
    checkpoints = run.checkpoints()
    if not run.exists() or not checkpoints:
        return False
    try:
        checksums.verify(checkpoints[-1], "state.json")
        state = jsonio.read_table(checkpoints[-1] / "state.json", step=int)
    except InputError:
        return False  # training will report the damage
    return bool(state.get("converged")) or state["step"] >= run.recipe().steps


def group_runs(inputs: dict[str, PlanInput], *, memory: float, workers: int = 1) -> list[list[str]]:
    """Divide runs into groups that share a stream and fit into memory.

    Costly runs are assigned first, each to the group with the least work. Runs at one site stay
    together where there are no more groups than sites: each group has a shuffle buffer for each of
    its sites.

    Args:
        inputs: the runs by name, with what planning knows of them.
        memory: most bytes of a group; a run that is larger is a group of its own.
        workers: how many groups there should be at least, as far as there are runs.

    Returns:
        The names of the runs of each group.
    """
    streams: dict[str, list[str]] = {}
    for name, case in inputs.items():
        key = json.dumps(stream_key(case.recipe), sort_keys=True)
        streams.setdefault(key, []).append(name)
    work = {name: case.recipe.sae.n_latents for name, case in inputs.items()}
    sites = {name: case.recipe.acts.site for name, case in inputs.items()}
    works = [[work[name] for name in names] for names in streams.values()]
    groups = []
    for names, count in zip(streams.values(), _spread_workers(works, workers)):
        saes = {name: sae_memory(inputs[name]) for name in names}
        of_site = {
            sites[name]: sum(site_memory(inputs[name]).values())
            for name in {sites[name]: name for name in names}.values()
        }
        groups += _pack(_Stream(names, work, sites, saes, of_site), memory, count)
    return groups


def _spread_workers(works: Sequence[Sequence[int]], workers: int) -> list[int]:
    """Return how many groups to make of the runs of each stream: one, and more for those with the
    most work until there is a group for each worker."""
    counts = [1] * len(works)
    while sum(counts) < workers:
        divisible = [i for i, work in enumerate(works) if counts[i] < len(work)]
        if not divisible:
            break
        counts[max(divisible, key=lambda i: sum(works[i]) / counts[i])] += 1
    return counts


class _Stream(NamedTuple):
    """The runs of a stream, with what each takes."""

    names: Sequence[str]
    work: dict[str, int]
    sites: dict[str, str]
    saes: dict[str, SAEMemory]
    of_site: dict[str, float]
    """Bytes that each site takes beside the first of a group."""

    def memory(self, group: Sequence[str]) -> float:
        """Return the bytes of some runs that train together."""
        sizes = [self.of_site[site] for site in {self.sites[name] for name in group}]
        return add_memory(self.saes[name] for name in group) + sum(sizes) - max(sizes)

    def units(self, count: int) -> list[list[str]]:
        """Return what is divided into `count` groups, the costliest first: the runs of each site,
        or single runs where there are fewer sites."""
        by_site: dict[str, list[str]] = {}
        for name in self.names:
            by_site.setdefault(self.sites[name], []).append(name)
        whole = list(by_site.values()) if 1 < count <= len(by_site) else [[n] for n in self.names]
        return sorted(whole, key=lambda unit: -sum(self.work[name] for name in unit))


def _pack(stream: _Stream, limit: float, count: int) -> list[list[str]]:
    """Divide the runs of a stream into at least `count` groups, as many as it takes to fit."""
    while True:
        groups: list[list[str]] = [[] for _ in range(count)]
        totals = [0] * count
        for unit in stream.units(count):
            least = min(range(count), key=totals.__getitem__)
            groups[least] += unit
            totals[least] += sum(stream.work[name] for name in unit)
        groups = [group for group in groups if group]
        if max(map(stream.memory, groups)) <= limit or count >= len(stream.names):
            return groups
        count += 1


def half_of_memory() -> float:
    """Return half of the machine's memory, the default for a group: the LM and the text need memory
    too."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
