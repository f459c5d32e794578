"""Run a sweep: what is not finished is planned into cohorts, trained, and collected. The same call
again goes on, or widens it.

plan(grid, folder, launch)    which runs train together; FLOPs, time, memory and disk before
                              anything starts
sweep(grid, folder, launch)   do it
train_here(grid, …)           train some runs as one cohort in this process
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ksparse.config import Recipe, k_aux
from ksparse.device import resolve_device
from ksparse.errors import InputError, Interrupted, KsparseError
from ksparse.planning import flops
from ksparse.planning.costs import LMSpec
from ksparse.planning.plan import measure_flops, read_lm_spec
from ksparse.scaling.sweeps import launch as launching
from ksparse.scaling.sweeps.collect import collect
from ksparse.scaling.sweeps.grid import (
    Grid,
    SweepFolder,
    cohorts,
    finished,
    half_of_memory,
    memory_bytes,
    shared_bytes,
)
from ksparse.scaling.sweeps.launch import Launch
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training.train import train_many

log = logging.getLogger("ksparse")

SweepProgress = Callable[[int, int, str], None]
"""Called with the tokens trained on, how many there will be at most, and a word on where it
stands."""


@dataclass(frozen=True)
class Cohort:
    """Runs that train together, and what that costs at most: runs that converge cost less."""

    runs: list[str]
    latents: int
    tokens: int
    flops: float
    flops_lm: float
    seconds: float
    memory: int


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before it starts."""

    total: int
    done: list[str]
    cohorts: list[Cohort]
    disk: int
    free: int
    device: str
    workers: int = 1
    subjects: dict[str, LMSpec] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it takes if workers do not slow one another."""
        return max(
            sum(cohort.seconds for cohort in self.cohorts) / self.workers,
            max((cohort.seconds for cohort in self.cohorts), default=0.0),
        )

    @property
    def flops(self) -> float:
        return sum(cohort.flops for cohort in self.cohorts)


def plan(grid: Grid, folder: SweepFolder, options: Launch) -> SweepPlan:
    """Return which runs are left to do, together with what, and at what cost."""
    todo = {name: recipe for name, recipe in grid.recipes.items() if not finished(folder.run(name))}
    subjects = _subjects(todo)
    widths = {name: subjects[_subject_key(recipe)].d_model for name, recipe in todo.items()}
    here = options.launcher in ("here", "processes", "local")
    memory = options.memory_gb * 1e9 or half_of_memory() / (options.workers if here else 1)
    device = resolve_device(next(iter(grid.recipes.values())).run.device)
    rate = measure_flops(device)
    groups = [
        _cohort(names, todo, widths, subjects, rate)
        for names in cohorts(todo, widths, memory=memory, workers=options.workers)
    ]
    weights = sum(
        4 * (2 * recipe.sae.n_latents * widths[name]) * 5 * (recipe.run.keep + 1)
        for name, recipe in todo.items()
    )
    where = next(path for path in [folder.path, *folder.path.resolve().parents] if path.exists())
    return SweepPlan(
        len(grid),
        [name for name in grid.recipes if name not in todo],
        groups,
        weights,
        shutil.disk_usage(where).free,
        device,
        options.workers,
        subjects,
    )


def _cohort(
    names: list[str],
    todo: dict[str, Recipe],
    widths: dict[str, int],
    subjects: dict[str, LMSpec],
    rate: float,
) -> Cohort:
    members = [todo[name] for name in names]
    d = widths[names[0]]
    tokens = max(recipe.steps * recipe.batch for recipe in members)
    own = [
        (
            recipe.steps * recipe.batch,
            flops.encoder(recipe, d),
            flops.decoder(recipe, d),
            flops.auxk(k_aux(recipe.sae, d), d),
        )
        for recipe in members
    ]
    spent_lm = (
        0
        if members[0].acts.shards
        else tokens * flops.lm(subjects[_subject_key(members[0])].before_site)
    )
    # The sparse parts read memory rather than multiply; they run at about a tenth of the product's
    # rate.
    seconds = (
        2 * spent_lm + sum(count * (encoder + 10 * decoder) for count, encoder, decoder, _ in own)
    ) / rate
    return Cohort(
        names,
        sum(recipe.sae.n_latents for recipe in members),
        sum(count for count, *_ in own),
        float(sum(count * (encoder + decoder + aux) for count, encoder, decoder, aux in own)),
        float(spent_lm),
        seconds,
        sum(memory_bytes(todo[name], widths[name]) for name in names) + shared_bytes(members),
    )


def _subjects(recipes: dict[str, Recipe]) -> dict[str, LMSpec]:
    found: dict[str, LMSpec] = {}
    for recipe in recipes.values():
        key = _subject_key(recipe)
        if key not in found:
            found[key] = read_lm_spec(recipe)
    return found


def _subject_key(recipe: Recipe) -> str:
    return json.dumps([recipe.acts.lm, recipe.acts.site, recipe.acts.shards])


def sweep(
    grid: Grid,
    folder: SweepFolder,
    options: Launch = Launch(),
    *,
    observe: SweepProgress = lambda done, total, note: None,
    planned: Callable[[SweepPlan], None] = lambda plan: None,
) -> dict[str, str]:
    """Train what is not finished, and collect; return {run: why} of the runs that failed."""
    with folder.locked():
        made = plan(grid, folder, options)
        planned(made)
        if made.disk > made.free:
            raise InputError(
                f"the disk is too small: {made.disk / 1e9:,.1f} GB for checkpoints, "
                f"{made.free / 1e9:,.1f} GB free at {folder.path}; "
                "lower run.keep, or give another --out"
            )
        if grid.file.resolve() != folder.file.resolve():
            atomic.write_text(folder.file, grid.file.read_text(encoding="utf-8"))
        jsonio.write_json(
            folder.plan_file,
            {
                key: value
                for key, value in dataclasses.asdict(made).items()
                if key not in ("subjects", "free")
            },
        )
        failed = _launched(grid, folder, options, made, observe) if made.cohorts else {}
        for name in grid.recipes:
            with suppress(FileNotFoundError):
                folder.error_file(name).unlink()
        for name, why in failed.items():
            jsonio.write_json(folder.error_file(name), {"error": why})
        collect(folder)
    return failed


def _launched(
    grid: Grid, folder: SweepFolder, options: Launch, made: SweepPlan, observe: SweepProgress
) -> dict[str, str]:
    progress = _Progress(folder, made, observe)
    jobs = [cohort.runs for cohort in made.cohorts]
    if options.launcher == "here":
        failed: dict[str, str] = {}
        for names in jobs:
            try:
                train_here(grid, folder, names, observe=progress.row)
            except (InputError, Interrupted):
                raise
            except KsparseError as error:
                log.warning("%s", error)
                failed |= {name: str(error) for name in names if not finished(folder.run(name))}
        return failed
    start = (
        launching.processes(folder.path, options.workers)
        if options.launcher == "processes"
        else launching.submitted(folder.path, options)
    )
    return launching.run(
        jobs,
        start,
        lambda names: [name for name in names if not finished(folder.run(name))],
        workers=options.workers,
        retries=options.retries,
        observe=progress.read,
        warn=log.warning,
    )


def train_here(
    grid: Grid,
    folder: SweepFolder,
    names: Sequence[str],
    *,
    observe: Callable[[RunFolder, dict[str, Any]], None] = lambda run, row: None,
) -> None:
    """Train some runs of a sweep as one cohort in this process."""
    unknown = [name for name in names if name not in grid.recipes]
    if unknown:
        raise InputError(
            f"sweep {folder.path} has no run {unknown[0]!r}; its runs are {', '.join(grid.recipes)}"
        )
    train_many(
        [grid.recipes[name] for name in names],
        [folder.run(name).path for name in names],
        observe=observe,
    )


class _Progress:
    """Adds up what the runs' metrics say."""

    def __init__(self, folder: SweepFolder, made: SweepPlan, observe: SweepProgress):
        self.folder, self.observe = folder, observe
        self.names = [name for cohort in made.cohorts for name in cohort.runs]
        self.total = sum(cohort.tokens for cohort in made.cohorts)
        self.tokens: dict[str, int] = {}

    def row(self, run: RunFolder, row: dict[str, Any]) -> None:
        self.tokens[run.name] = row["tokens"]
        self._say()

    def read(self) -> None:
        for name in self.names:
            self.tokens[name] = _last_tokens(self.folder.run(name).metrics_file)
        self._say()

    def _say(self) -> None:
        ended = (
            sum(finished(self.folder.run(name)) for name in self.names)
            if sum(self.tokens.values()) >= self.total
            else None
        )
        self.observe(
            min(sum(self.tokens.values()), self.total),
            self.total,
            f"{len(self.tokens)} SAEs" + (f", {ended} finished" if ended else ""),
        )


def _last_tokens(file: Path) -> int:
    """Return the tokens of the last whole line of a metrics file, without reading the others."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - 4096))
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return 0
    for line in reversed(lines):
        with suppress(ValueError, KeyError, TypeError):
            return int(json.loads(line)["tokens"])
    return 0
