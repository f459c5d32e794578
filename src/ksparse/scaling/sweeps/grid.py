"""What a sweep is: recipes from a grid over any of their keys, each in a folder named by a hash of
it.

    read(file)        sweep.toml -> Grid(recipes by folder name)
    SweepFolder       where a sweep's files are
    cohorts(…)        unfinished runs -> groups that train together, as large as the memory and as
                      many as the workers

A sweep.toml is a recipe with `[grid]`, a table of lists, or several `[[grid]]`, whose points are
put together. Where a grid varies `seed`, the order of the data is fixed (`order = 0`), so that
seeds share a stream.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksparse import config as recipes
from ksparse.config import Recipe
from ksparse.errors import InputError
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder

COPIES = (
    7  # of the weights: raw, two moments, average; averaged, low-precision and one being written
)
MOST_POINTS = 100_000
PRODUCT = 2**27  # numbers of a step's product that are in memory at once


@dataclass(frozen=True)
class Grid:
    """A sweep's recipes, by the names of their folders, and the file that they came from."""

    file: Path
    recipes: dict[str, Recipe]

    def __len__(self) -> int:
        return len(self.recipes)


@dataclass(frozen=True)
class SweepFolder:
    """One sweep on disk."""

    path: Path

    @property
    def file(self) -> Path:
        return atomic.inside(self.path, "sweep.toml")

    @property
    def plan_file(self) -> Path:
        return atomic.inside(self.path, "plan.json")

    @property
    def points_file(self) -> Path:
        return atomic.inside(self.path, "points.csv")

    @property
    def curves_file(self) -> Path:
        return atomic.inside(self.path, "curves.csv")

    def run(self, name: str) -> RunFolder:
        return RunFolder(atomic.inside(self.path, "runs", name))

    def error_file(self, name: str) -> Path:
        return self.run(name).file("error.json")

    def runs(self) -> list[RunFolder]:
        """Return every run that there is, also those of an earlier, other grid."""
        folders = sorted(atomic.inside(self.path, "runs").glob("*"))
        return [run for run in (self.run(folder.name) for folder in folders) if run.exists()]

    def locked(self):
        """Keep other processes from leading this sweep."""
        return RunFolder(self.path).locked()


def read(file: Path | str) -> Grid:
    """Read a sweep.toml; raise InputError where it is no grid, or a point of it no recipe."""
    file = Path(file)
    table = recipes.read_toml(
        file, "sweep", "; give a sweep.toml, such as recipes/sweeps/pylm.toml"
    )
    grids = table.pop("grid", None)
    grids = grids if isinstance(grids, list) else [grids]
    if not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError(
            f'sweep {file} has no grid; write [grid] and lists of values, such as "sae.k" = [16, '
            "32]"
        )
    found: dict[str, Recipe] = {}
    for grid in grids:
        for point in _points(grid, file):
            recipe = _recipe(table, point, file)
            found[jsonio.digest(recipe.fingerprint())] = recipe
    return Grid(file, found)


def _points(grid: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """Return every combination of a grid's values, {dotted key: value}."""
    lists = recipes.flat(grid)
    for key, values in lists.items():
        if not isinstance(values, list) or not values:
            raise InputError(
                f"'{key}' of the grid in {file} is {recipes.preview(values)}; it must be a list of "
                "at least one value"
            )
    if (points := math.prod(map(len, lists.values()))) > MOST_POINTS:
        raise InputError(
            f"the grid in {file} has {points:,} points; at most {MOST_POINTS:,} make a sweep"
        )
    return [dict(zip(lists, values)) for values in itertools.product(*lists.values())]


def _shown(point: dict[str, Any]) -> str:
    return ", ".join(f"{key} = {recipes.preview(value)}" for key, value in point.items())


def _recipe(table: dict[str, Any], point: dict[str, Any], file: Path) -> Recipe:
    """Return the recipe of one point: the file's own keys, and the point's over them."""
    merged = table
    for key, value in point.items():
        merged = _over(merged, _nested(key, value))
    if "seed" in point and "order" not in merged:
        merged = merged | {"order": 0}
    try:
        return recipes.from_dict(merged, where=f" in {file}")
    except InputError as error:
        raise InputError(f"{error} (at the point {_shown(point)} of the grid)") from None


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return `above` laid over `below`, tables merged."""
    both = below.keys() & above.keys()
    return (
        below
        | above
        | {
            key: _over(below[key], above[key])
            for key in both
            if isinstance(below[key], dict) and isinstance(above[key], dict)
        }
    )


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# ---- what is left to do, and together with what --------------------------------------------------


def finished(run: RunFolder) -> bool:
    """Return whether a run has taken its last step, without reading its weights."""
    there = run.checkpoints()
    if not run.exists() or not there:
        return False
    try:
        checksums.verify(there[-1], "state.json")
        state = jsonio.read_table(there[-1] / "state.json", step=int)
    except InputError:
        return False  # training will find what is wrong with it
    return bool(state.get("converged")) or state["step"] >= run.recipe().steps


def memory_bytes(recipe: Recipe, d_model: int) -> int:
    """Return what a member adds to a cohort: weights and their copies, without the product that all
    share."""
    n = recipe.sae.n_latents
    return 4 * COPIES * (2 * n * d_model + n + d_model)


def shared_bytes(members: Sequence[Recipe]) -> int:
    """Return what a cohort needs once: the largest member's product."""
    return 4 * max(min(PRODUCT, recipe.batch * recipe.sae.n_latents) for recipe in members)


def cohorts(
    todo: dict[str, Recipe], d_model: dict[str, int], *, memory: float, workers: int = 1
) -> list[list[str]]:
    """Return names of runs in groups that share a stream, each within `memory` bytes; at least one
    group a worker where there are runs enough.

    d_model: the width at each run's site. Costly members first, each into the group that has least
    to do.
    """
    streams: dict[str, list[str]] = {}
    for name, recipe in todo.items():
        streams.setdefault(stream_key(recipe), []).append(name)
    found = []
    wanted = {key: 1 for key in streams}
    while sum(wanted.values()) < workers and any(
        wanted[key] < len(names) for key, names in streams.items()
    ):
        divisible = [key for key, names in streams.items() if wanted[key] < len(names)]
        wanted[
            max(
                divisible,
                key=lambda key: (
                    sum(todo[name].sae.n_latents for name in streams[key]) / wanted[key]
                ),
            )
        ] += 1
    for key, names in streams.items():
        found += _packed({name: todo[name] for name in names}, d_model, memory, wanted[key])
    return found


def _packed(
    todo: dict[str, Recipe], d_model: dict[str, int], memory: float, groups: int
) -> list[list[str]]:
    order = sorted(todo, key=lambda name: -todo[name].sae.n_latents)
    while True:
        packed: list[list[str]] = [[] for _ in range(groups)]
        work = [0] * groups
        for name in order:
            least = min(range(groups), key=work.__getitem__)
            packed[least].append(name)
            work[least] += todo[name].sae.n_latents
        needed = [
            sum(memory_bytes(todo[name], d_model[name]) for name in names)
            + shared_bytes([todo[name] for name in names])
            for names in packed
            if names
        ]
        if max(needed) <= memory or groups >= len(todo):
            return [names for names in packed if names]
        groups += 1


def stream_key(recipe: Recipe) -> str:
    """Return what runs must have in common to train as one cohort."""
    fingerprint = recipe.fingerprint()
    return json.dumps(
        [
            fingerprint["acts"],
            recipe.batch,
            recipe.data_seed,
            recipe.threads,
            recipe.curve.held_out,
            recipe.run.device,
        ],
        sort_keys=True,
    )


def half_of_memory() -> float:
    """Return half of the machine's memory, the default for a cohort: the LM and the text need some
    too."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
