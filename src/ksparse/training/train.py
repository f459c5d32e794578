"""Train SAEs on one stream of activations. Read `train_many` as the method section; `train` calls
it with a single SAE."""

from __future__ import annotations

import dataclasses
import logging
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from ksparse import display, distributed
from ksparse import progress as reports
from ksparse.config import (
    ActsConfig,
    Planted,
    Recipe,
    check_schedule,
    differences,
    recipe_of,
    to_toml,
)
from ksparse.data.base import ActivationBatch
from ksparse.data.shards import Shards
from ksparse.data.tensors import is_index
from ksparse.device import resolve_device
from ksparse.distributed import Mesh
from ksparse.errors import InputError, Interrupted, OutOfMemoryError
from ksparse.lm.loading import loading_options, resolve_dtype
from ksparse.planning.meshes import fit_mesh
from ksparse.planning.sharing import stream_key
from ksparse.planning.sites import explain_memory
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training import checkpoint, own_data
from ksparse.training.checkpoint import TrainState
from ksparse.training.resume import check_same, restore
from ksparse.training.sites import at_sites, site_folder
from ksparse.training.source import TRAINING, ActivationSource
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.trainer import SAETrainer, finished, start
from ksparse.trust import code_is_trusted, trusted

log = logging.getLogger("ksparse")

Saved = tuple[TrainState, AutogradStep]
"""What is restored of a run: its state, and its training step with the weights."""


class Unfinished(NamedTuple):
    """A run with steps left, and what was restored of it; None for a new one."""

    run: RunFolder
    recipe: Recipe
    saved: Saved | None

    @property
    def state(self) -> TrainState | None:
        """Its state, if it was restored."""
        return self.saved[0] if self.saved else None


MetricsCallback = Callable[[dict[str, Any]], None]


@overload
def train(
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    out: Path | str | None = None,
    *,
    site: list[str] | tuple[str, ...],
    observe: MetricsCallback = ...,
    trust_remote_code: bool = ...,
    progress: bool = ...,
    **keywords: Any,
) -> dict[str, RunFolder]: ...


@overload
def train(
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    out: Path | str | None = None,
    *,
    data: Any = None,
    observe: MetricsCallback = ...,
    trust_remote_code: bool = ...,
    progress: bool = ...,
    **keywords: Any,
) -> RunFolder: ...


def train(
    recipe: Recipe | Path | str | dict[str, Any] | None = None,
    out: Path | str | None = None,
    *,
    data: Any = None,
    observe: MetricsCallback = lambda row: None,
    trust_remote_code: bool = False,
    progress: bool = True,
    **keywords: Any,
) -> RunFolder | dict[str, RunFolder]:
    """Train one SAE, or continue its run if the folder holds one with the same recipe.

    Where `site` is a list or a pattern, train one at each site, on one pass of the LM.

    Args:
        recipe: what to train: a recipe, a TOML file or nested dictionaries; by default the demo's.
        out: the run's folder; runs/HASH by default, with a hash of the recipe. Of several sites,
            the folder in which each has its own, named by the site.
        data: activations to train on in place of an LM's: a numpy array or torch tensor [rows, d],
            an iterator of them, which is written to the run's folder first, or a folder or file
            (docs/own-activations.md); or known features, `ksparse.config.Planted` (docs/kinds.md).
        observe: called with each row of metrics; of several sites it says which, `row["site"]`.
        trust_remote_code: allow code that comes with the LM to run, during this call.
        progress: show how far it is on standard error: a bar on a terminal, one line in a notebook,
            a line every few seconds in a log.
        keywords: keys of the recipe by the last part of their names, which replace those of
            `recipe` (`ksparse.config.recipe_of`).

    Returns:
        The run's folder; of several sites {site: its run's folder}.

    Raises:
        InputError: if the recipe cannot be trained, or the folder holds something else; if the LM
            has no site of a name or pattern.
        Interrupted: on Ctrl-C, SIGTERM or SIGHUP, after a checkpoint was saved.
        NonFiniteError: if the loss or its gradient is not finite.

    Example:
        >>> import ksparse
        >>> run = ksparse.train(
        ...     lm="pylm/0.3m", site="resid_post.1", n_latents=512, k=8, tokens=2048, mix=2048,
        ...     out="runs/short",
        ... )
        >>> ksparse.load(run).metadata["step"]
        2
        >>> import torch
        >>> run = ksparse.train(
        ...     data=torch.randn(4096, 16), n_latents=64, k=4, tokens=2048, out="runs/own"
        ... )
        >>> runs = ksparse.train(
        ...     lm="pylm/0.3m", site=["resid_post.[01]", "mlp_out.0"], n_latents=64, k=4,
        ...     tokens=2048, mix=2048, out="runs/sites",
        ... )
        >>> list(runs), runs["mlp_out.0"].path.as_posix()
        (['resid_post.0', 'resid_post.1', 'mlp_out.0'], 'runs/sites/mlp_out.0')
    """
    recipe = recipe_of(recipe, **keywords)
    with trusted(trust_remote_code), display.shown("training", progress) as bar:
        several = recipe.acts.names_several_sites
        if data is not None:
            if several:
                raise InputError(
                    f"data is given and acts.site is {recipe.acts.site!r}, which may name several "
                    "sites; give the activations of each with a call of its own"
                )
            recipe, out = own_data.place(data, recipe, out)
        out = out or f"runs/{jsonio.digest(recipe.fingerprint())}"
        recipes = at_sites(recipe)
        folders = [site_folder(out, site) if several else Path(out) for site in recipes]
        sites = dict(zip(folders, recipes)) if several else {}

        def tell(run: RunFolder, row: dict[str, Any]) -> None:
            if run.path in sites:
                row = row | {"site": sites[run.path]}
            if bar:
                bar.note_metrics(row)
            observe(row)

        runs = train_many(list(recipes.values()), folders, observe=tell)
        return dict(zip(recipes, runs)) if several else runs[0]


def train_many(
    recipes: Sequence[Recipe],
    outs: Sequence[Path | str],
    *,
    observe: Callable[[RunFolder, dict[str, Any]], None] = lambda run, row: None,
    open_source: Callable[..., ActivationSource] = ActivationSource,
) -> list[RunFolder]:
    """Train SAEs that share one stream of activations; each run is what it would be alone.

    The LM and the normalization run once for all. Recipes at several sites of the LM share its
    passes, each of which reads them all; each site has a shuffle buffer of its own. Runs may be
    new, unfinished at different steps, or finished: the stream starts where the run that is
    furthest behind needs it, and the others join at their own step. A run whose loss is not finite
    leaves; its error is raised when the others have finished.

    Args:
        recipes: what to train; their `stream_key`s must be equal.
        outs: the folder of each run.
        observe: called with the run and each row of its metrics.
        open_source: called with a recipe, the device and, if there are several processes, the mesh;
            returns the source of activations. For sources other than the recipe's `acts`.

    Returns:
        The folders of the runs.

    Raises:
        InputError: if the recipes cannot share a stream, or one of them cannot be trained.
        Interrupted: on Ctrl-C, SIGTERM or SIGHUP, after all runs were saved.
        NonFiniteError: if the loss or gradient of a run is not finite.
    """
    shared, runs = shared_stream(recipes), [RunFolder(Path(out)) for out in outs]
    with ExitStack() as stack, _explain_out_of_memory(recipes):
        device = distributed.local_device(resolve_device(shared.run.device))
        recipes = [_with_lm_dtype(recipe, device) for recipe in recipes]
        shared = recipes[0]
        shape = fit_mesh(shared, device, distributed.processes())
        mesh = stack.enter_context(distributed.open_mesh(shape, device))
        for recipe in recipes[1:]:
            distributed.check(dataclasses.replace(recipe, mesh=shape.mesh), mesh.data, mesh.size)
        mesh.on_rank0("begin", lambda: _lock_and_begin(stack, runs, recipes))
        signals = stack.enter_context(_stop_signals())
        set_threads(shared.threads)
        saver = checkpoint.Saver(mesh, behind=mesh.size > 1 or not device.startswith("cpu"))
        stack.callback(saver.finish)

        unfinished = _restore_unfinished(runs, recipes, torch.device(device), mesh)
        if not unfinished:
            return runs
        groups = _by_site(unfinished)
        sources = _open_sources(open_source, groups, torch.device(device), mesh)
        for run, _, saved in unfinished:
            _check_unchanged(run, saved, sources[0])
        reports.expect(_expected_parts(sources, groups))
        trainers: list[SAETrainer] = []
        for source, group in zip(sources, groups):
            trainers += (
                SAETrainer(
                    run, recipe, source, *(saved or start(recipe, source, mesh)), saver, observe
                )
                for run, recipe, saved in group
            )
            if len(groups) > 1:  # one sample in memory at a time
                source.forget_calibration()
        mesh.on_rank0("room", lambda: _check_room(trainers))
        _take_all_steps(trainers, sources[0], signals)
        saver.wait()
    for trainer in trainers:
        if trainer.failed:
            raise trainer.failed
    return runs


def _by_site(unfinished: list[Unfinished]) -> list[list[Unfinished]]:
    """Return runs grouped by their sites."""
    groups: dict[str, list[Unfinished]] = {}
    for one in unfinished:
        groups.setdefault(one.recipe.acts.site, []).append(one)
    return list(groups.values())


def _open_sources(
    open_source: Callable[..., ActivationSource],
    groups: list[list[Unfinished]],
    device: torch.device,
    mesh: Mesh,
) -> list[ActivationSource]:
    """Open the activations of each group of runs, from one stream; the first has the stream."""
    recipes = [group[0].recipe for group in groups]
    several = {"sites": [recipe.acts.site for recipe in recipes]} if len(groups) > 1 else {}
    first = open_source(recipes[0], device, *([mesh] if mesh.size > 1 else []), **several)
    return [first.at(number, recipe) for number, recipe in enumerate(recipes)]


def _expected_parts(
    sources: list[ActivationSource], groups: list[list[Unfinished]]
) -> dict[str, reports.Expected]:
    """Return the work that runs have left, for `reports.expect`; each site is read in one pass of
    the LM, to the last of them."""
    everyone = [one for group in groups for one in group]
    behind = min(everyone, key=lambda one: one.state.step if one.state else 0).state
    steps = max(one.recipe.steps for one in everyone) - (behind.step if behind else 0)
    parts: dict[str, reports.Expected] = {}
    for source, group in zip(sources, groups):
        tokens = sum(one.recipe.steps * one.recipe.batch for one in group)
        found = source.expected_parts(behind.cursor if behind else None, steps, tokens)
        for name, part in found.items():
            known = parts.get(name, reports.Expected(0.0, 0))
            parts[name] = (
                reports.Expected(known.work + part.work, known.units + part.units)
                if name == TRAINING
                else max(known, part)
            )
    return parts


def _take_all_steps(
    trainers: list[SAETrainer], source: ActivationSource, signals: list[int]
) -> None:
    """Train until all have ended or failed; raise Interrupted, with everything saved, on a
    signal."""
    began, mesh, saver = time.monotonic(), trainers[0].mesh, trainers[0].saver
    furthest_behind = min((trainer.state for trainer in trainers), key=lambda state: state.step)
    step = furthest_behind.step
    everyone, total = list(trainers), sum(t.recipe.steps * t.recipe.batch for t in trainers)
    reports.report(TRAINING, sum(trainer.state.tokens for trainer in everyone), total)
    with closing(source.stream.batches(furthest_behind.cursor)) as batches:
        while trainers:
            batch = source.next_batch(batches)
            step += 1
            joined = [trainer for trainer in trainers if trainer.state.step == step - 1]
            inputs = _inputs(batch, joined)
            results = [trainer.step(*inputs[trainer.source.number]) for trainer in joined]
            for trainer, (losses, grad_norm) in zip(joined, results):
                trainer.log(inputs[trainer.source.number][1], losses, grad_norm)
            signum = _save_due(joined, signals, mesh)
            reports.report(TRAINING, sum(trainer.state.tokens for trainer in everyone), total)
            trainers = [t for t in trainers if not t.ended and not t.failed]
            if signum and trainers:
                saver.wait()
                raise Interrupted(_stop_message(trainers, time.monotonic() - began), signum)


def _inputs(
    batch: ActivationBatch, trainers: list[SAETrainer]
) -> dict[int, tuple[ActivationBatch, Tensor]]:
    """Return the batch at the site of each trainer, by its number, with its normalized
    activations."""
    sites = {trainer.source.number: trainer.optimizer.sae for trainer in trainers}
    return {
        number: (part := batch.at(number), sae.normalize(part.x).x) for number, sae in sites.items()
    }


def _save_due(trainers: list[SAETrainer], signals: list[int], mesh: Mesh) -> int:
    """Save those that are due or have ended, or all on a signal; return the signal, or 0."""
    # All processes save and stop at the same step.
    signum, *due = mesh.all_reduce_max_ints(
        "stop", [signals[0] if signals else 0, *(int(trainer.due()) for trainer in trainers)]
    )
    for trainer, save_now in zip(trainers, due):
        if signum or save_now or trainer.ended:
            trainer.save()
    return signum


# ---- before the first step -----------------------------------------------------------------------


def shared_stream(recipes: Sequence[Recipe]) -> Recipe:
    """Return one of several recipes, to stand for all of them in what they share.

    Raises:
        InputError: naming the keys that differ, if the recipes cannot share a stream.
    """
    if not recipes:
        raise InputError("there is nothing to train; give at least one recipe")
    first = recipes[0]
    for other in recipes[1:]:
        changed = differences(stream_key(first), stream_key(other))
        if changed:
            raise InputError(
                f"these recipes cannot share a stream of activations: {'; '.join(changed)}. Train "
                "them apart"
                + (
                    ", or give all of them one `order`"
                    if any(key.startswith("order") for key in changed)
                    else ""
                )
            )
    return first


def _with_lm_dtype(recipe: Recipe, device: str) -> Recipe:
    """Return a recipe that says in which precision its LM runs; of shards, in which it ran; of
    tensors that anybody made, no LM unless one was given; and of planted features none."""
    acts = recipe.acts
    if Planted.from_text(acts.text):
        acts = dataclasses.replace(acts, lm="", site="", lm_dtype="float32")
        return dataclasses.replace(recipe, acts=acts)
    if acts.shards and is_index(acts.shards):
        lm, site, text = (
            "" if getattr(acts, key) == getattr(ActsConfig, key) else getattr(acts, key)
            for key in ("lm", "site", "text")
        )
        acts = dataclasses.replace(acts, lm=lm, site=site, text=text, lm_dtype="float32")
        return dataclasses.replace(recipe, acts=acts)
    if acts.lm_dtype != "auto":
        return recipe
    if acts.shards:
        stored = Shards(acts.shards).manifest["acts"].get("lm_dtype", "float32")
        acts = dataclasses.replace(acts, lm_dtype=stored)
    else:
        acts = resolve_dtype(acts, device, loading_options(acts, code_is_trusted()))
    return dataclasses.replace(recipe, acts=acts)


def _lock_and_begin(stack: ExitStack, runs: Sequence[RunFolder], recipes: Sequence[Recipe]) -> None:
    """Lock the runs until the stack closes, and begin those that are new or ended before their
    first step."""
    for run, recipe in zip(runs, recipes, strict=True):
        stack.enter_context(run.locked())
        # A recipe without environment.json was put there by hand: it is not to be replaced.
        if run.exists() and (run.has_results() or not run.environment_file.is_file()):
            check_same(run, recipe)
        else:
            begin(run, recipe)


def begin(run: RunFolder, recipe: Recipe) -> None:
    """Write what a run is, before anything else.

    Raises:
        InputError: if the folder holds anything but what a killed process leaves.
    """
    check_schedule(recipe)
    leftovers = (".lock", "environment.json", own_data.ACTS)
    names = [file.name for file in run.path.iterdir()]
    if not run.exists() and any(
        name not in leftovers and not name.startswith(".tmp-") for name in names
    ):
        raise InputError(f"{run.path} is not empty and not a run; give another --out, or empty it")
    run.remove_leftovers()
    jsonio.write_json(run.environment_file, environment())
    atomic.write_text(run.recipe_file, to_toml(recipe))


def _restore_unfinished(
    runs: Sequence[RunFolder], recipes: Sequence[Recipe], device: torch.device, mesh: Mesh
) -> list[Unfinished]:
    """Restore all runs; return those with steps left."""
    restored = [restore(run, recipe, device, mesh) for run, recipe in zip(runs, recipes)]
    return [
        Unfinished(run, recipe, saved)
        for run, recipe, saved in zip(runs, recipes, restored)
        if saved is None or not finished(recipe, saved[0])
    ]


def _check_unchanged(run: RunFolder, saved: Saved | None, source: ActivationSource) -> None:
    """Raise InputError if a run was begun on tensors that have been indexed anew since, with other
    content."""
    policy = saved[1].sae.metadata.get("policy") or {} if saved else source.policy
    if policy.get("tensors") != source.policy.get("tensors"):
        raise InputError(
            f"{run.path} was begun on other activations than {source.recipe.acts.shards} has now: "
            "it was indexed again with other files or content. Bring the old ones back, or give "
            "another --out"
        )


def set_threads(number: int) -> None:
    """Set torch's number of CPU threads; 0 leaves it."""
    if number:
        torch.set_num_threads(number)


def _check_room(trainers: Sequence[SAETrainer]) -> None:
    checkpoint.check_room([(trainer.run, trainer.optimizer) for trainer in trainers])


def environment() -> dict[str, Any]:
    """Return the versions and the hardware, as environment.json has them."""
    packages = ("ksparse", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "arguments": sys.argv[1:],
    }


# ---- stopping ------------------------------------------------------------------------------------


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Yield a list to which the first SIGINT, SIGTERM or SIGHUP is appended, so that the step is
    finished and saved; a second one of the same kind stops at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signum, before[signum])
        log.warning("stopping after this step and saving; once more to stop at once")

    # Ignored signals stay ignored: a script's background jobs ignore SIGINT, nohup ignores SIGHUP.
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    signums = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {
        signum: signal.getsignal(signum)
        for signum in signums
        if signal.getsignal(signum) not in (signal.SIG_IGN, None)
    }
    for signum in before:
        signal.signal(signum, handle)
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _stop_message(unfinished: list[SAETrainer], seconds: float) -> str:
    first = unfinished[0]
    if len(unfinished) == 1:
        return (
            f"stopped at step {first.state.step:,} of {first.recipe.steps:,}; everything is "
            f"saved. Go on with: ksparse resume {first.run.path}"
        )
    return (
        f"stopped at step {max(trainer.state.step for trainer in unfinished):,} after "
        f"{seconds:,.0f} s, with {len(unfinished)} SAEs to finish; everything is saved. The same "
        "command goes on"
    )


@contextmanager
def _explain_out_of_memory(recipes: Sequence[Recipe]) -> Iterator[None]:
    """Turn a lack of memory into an error that says what the plan counts and what reduces it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch reports a lack of main memory as a plain RuntimeError.
        if not isinstance(
            error, (torch.OutOfMemoryError, MemoryError)
        ) and "allocate memory" not in str(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {(str(error) or type(error).__name__).splitlines()[0]} "
            f"{explain_memory(recipes)}"
        ) from error
