"""Run a sweep: group the unfinished runs, train them, collect the results. Calling it again
continues the sweep; with a larger grid it trains the new points.

    plan(grid, folder, launch)    which runs train together; FLOPs, time, memory and disk
    sweep(grid, folder, launch)   plan, train and collect
    train_here(grid, …)           train some runs as one group in this process
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
from ksparse.planning.costs import (
    LMSpec,
    PlanInput,
    add_memory,
    disk_bytes,
    further_sites,
    sae_memory,
)
from ksparse.planning.plan import measure_flops, plan_input, read_lm_spec
from ksparse.scaling.sweeps import launch as launching
from ksparse.scaling.sweeps.collect import collect
from ksparse.scaling.sweeps.grid import (
    Grid,
    SweepFolder,
    finished,
    group_runs,
    half_of_memory,
)
from ksparse.scaling.sweeps.launch import Launch
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training.train import train_many

log = logging.getLogger("ksparse")

SweepProgress = Callable[[int, int, str], None]
"""Called with the tokens trained on so far, the most that there will be, and a short note."""


@dataclass(frozen=True)
class RunGroup:
    """Runs that train together, and what that costs at most; runs that converge cost less."""

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
    cohorts: list[RunGroup]
    disk: int
    free: int
    device: str
    workers: int = 1
    subjects: dict[str, LMSpec] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long the sweep takes if workers do not slow each other down."""
        return max(
            sum(group.seconds for group in self.cohorts) / self.workers,
            max((group.seconds for group in self.cohorts), default=0.0),
        )

    @property
    def flops(self) -> float:
        """FLOPs of all runs, without the LM's."""
        return sum(group.flops for group in self.cohorts)


def plan(grid: Grid, folder: SweepFolder, options: Launch) -> SweepPlan:
    """Plan the unfinished runs of a sweep: which train together, and what that costs.

    Raises:
        InputError: if an LM cannot be read, or a recipe cannot run on its device.
    """
    todo = {name: recipe for name, recipe in grid.recipes.items() if not finished(folder.run(name))}
    subjects = _read_subjects(todo)
    device = resolve_device(next(iter(grid.recipes.values())).run.device)
    inputs = {
        name: _plan_input(recipe, subjects[_subject_key(recipe)], device, options)
        for name, recipe in todo.items()
    }
    here = options.launcher in ("here", "processes", "local")
    memory = options.memory_gb * 1e9 or half_of_memory() / (options.workers if here else 1)
    rate = measure_flops(device)
    groups = [
        _run_group(names, [inputs[name] for name in names], rate)
        for names in group_runs(inputs, memory=memory, workers=options.workers)
    ]
    existing = next(path for path in [folder.path, *folder.path.resolve().parents] if path.exists())
    return SweepPlan(
        len(grid),
        [name for name in grid.recipes if name not in todo],
        groups,
        sum(disk_bytes(case.recipe, case.parameters) for case in inputs.values()),
        shutil.disk_usage(existing).free,
        device,
        options.workers,
        subjects,
    )


def _plan_input(recipe: Recipe, subject: LMSpec, device: str, options: Launch) -> PlanInput:
    """Return what planning knows of a run; jobs of a cluster may have a GPU where this machine has
    none."""
    if options.launcher != "slurm":
        return plan_input(recipe, subject, device)
    needs_gpu = recipe.run.kernels == "triton" or recipe.optim.precision != "float32"
    return plan_input(recipe, subject, "cuda" if needs_gpu else device, elsewhere=True)


def _run_group(names: list[str], inputs: Sequence[PlanInput], rate: float) -> RunGroup:
    """Return the costs of runs that train together, at `rate` FLOP/s."""
    before_site = max(case.subject.before_site for case in inputs)  # a pass reads all sites
    flops_saes = seconds_saes = 0.0
    for case in inputs:
        d_model = case.subject.d_model
        recipe, tokens = case.recipe, case.recipe.steps * case.recipe.batch
        encoder, decoder = flops.encoder(recipe, d_model), flops.decoder(recipe, d_model)
        auxk = flops.auxk(k_aux(recipe.sae, d_model), d_model)
        flops_saes += tokens * (encoder + decoder + auxk)
        # The sparse parts are limited by memory: they run at about a tenth of the product's rate.
        seconds_saes += tokens * (encoder + 10 * decoder) / rate
    stream_tokens = max(case.recipe.steps * case.recipe.batch for case in inputs)
    flops_lm = stream_tokens * flops.lm(before_site) if inputs[0].live else 0
    return RunGroup(
        names,
        sum(case.recipe.sae.n_latents for case in inputs),
        sum(case.recipe.steps * case.recipe.batch for case in inputs),
        float(flops_saes),
        float(flops_lm),
        2 * flops_lm / rate + seconds_saes,
        int(add_memory(sae_memory(case) for case in inputs) + further_sites(inputs)),
    )


def _read_subjects(recipes: dict[str, Recipe]) -> dict[str, LMSpec]:
    """Read the sizes of each LM once."""
    subjects: dict[str, LMSpec] = {}
    for recipe in recipes.values():
        key = _subject_key(recipe)
        if key not in subjects:
            subjects[key] = read_lm_spec(recipe)
    return subjects


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
    """Train the unfinished runs of a grid, and collect the results.

    Args:
        grid: the recipes.
        folder: the sweep's folder.
        options: where and how to run.
        observe: called with the progress.
        planned: called with the plan before training starts.

    Returns:
        {name of the run: error} of the runs that failed.

    Raises:
        InputError: if another process runs this sweep, or the disk is too small.
        Interrupted: on Ctrl-C, SIGTERM or SIGHUP, after all runs were saved.
    """
    with folder.locked():
        sweep_plan = plan(grid, folder, options)
        planned(sweep_plan)
        if sweep_plan.disk > sweep_plan.free:
            raise InputError(
                f"the disk is too small: {sweep_plan.disk / 1e9:,.1f} GB for checkpoints, "
                f"{sweep_plan.free / 1e9:,.1f} GB free at {folder.path}; "
                "lower run.keep, or give another --out"
            )
        if grid.file.resolve() != folder.file.resolve():
            atomic.write_text(folder.file, grid.file.read_text(encoding="utf-8"))
        jsonio.write_json(
            folder.plan_file,
            {
                key: value
                for key, value in dataclasses.asdict(sweep_plan).items()
                if key not in ("subjects", "free")
            },
        )
        failed = {}
        if sweep_plan.cohorts:
            failed = _launch(grid, folder, options, sweep_plan, observe)
        for name in grid.recipes:
            with suppress(FileNotFoundError):
                folder.error_file(name).unlink()
        for name, why in failed.items():
            jsonio.write_json(folder.error_file(name), {"error": why})
        collect(folder)
    return failed


def _launch(
    grid: Grid, folder: SweepFolder, options: Launch, sweep_plan: SweepPlan, observe: SweepProgress
) -> dict[str, str]:
    """Train the groups of a plan; return {name of the run: error} of those that failed."""
    progress = _Progress(folder, sweep_plan, observe)
    jobs = [group.runs for group in sweep_plan.cohorts]
    if options.launcher == "here":
        failed: dict[str, str] = {}
        for names in jobs:
            try:
                train_here(grid, folder, names, observe=progress.update)
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
    """Train some runs of a sweep as one group in this process.

    Raises:
        InputError: if the sweep has no run of a name.
    """
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
    """Adds up the tokens of a sweep's runs."""

    def __init__(self, folder: SweepFolder, sweep_plan: SweepPlan, observe: SweepProgress):
        self.folder, self.observe = folder, observe
        self.names = [name for group in sweep_plan.cohorts for name in group.runs]
        self.total = sum(group.tokens for group in sweep_plan.cohorts)
        self.tokens: dict[str, int] = {}

    def update(self, run: RunFolder, row: dict[str, Any]) -> None:
        """Take a row of metrics of a run in this process."""
        self.tokens[run.name] = row["tokens"]
        self._report()

    def read(self) -> None:
        """Read the metrics of all runs, which other processes write."""
        for name in self.names:
            self.tokens[name] = _last_tokens(self.folder.run(name).metrics_file)
        self._report()

    def _report(self) -> None:
        ended = (
            sum(finished(self.folder.run(name)) for name in self.names)
            if sum(self.tokens.values()) >= self.total
            else None
        )
        self.observe(
            min(sum(self.tokens.values()), self.total),
            self.total,
            f"{len(self.tokens)} SAE{'s' * (len(self.tokens) > 1)}"
            + (f", {ended} finished" if ended else ""),
        )


def _last_tokens(file: Path) -> int:
    """Return the tokens of the last complete line of a metrics file, reading only its end."""
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
