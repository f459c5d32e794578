"""Train autoencoders on one stream of activations. Read `train_cohort` as the method section; a
single SAE is a cohort of one."""

from __future__ import annotations

import logging
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ksparse import distributed as mesh_of
from ksparse.config import Recipe, check_schedule, differences, to_toml
from ksparse.device import resolve_device
from ksparse.errors import InputError, Interrupted, OutOfMemoryError
from ksparse.planning.plan import explain_memory
from ksparse.storage import atomic, jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training import checkpoint
from ksparse.training.source import ActivationSource
from ksparse.training.trainer import SAETrainer
from ksparse.trust import trusted

log = logging.getLogger("ksparse")

MetricsCallback = Callable[[dict[str, Any]], None]


def train(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    observe: MetricsCallback = lambda row: None,
    trust_remote_code: bool = False,
) -> RunFolder:
    """Train one SAE and leave a run in the folder `out`; if a run with the same recipe is there, go
    on with it.

    out: runs/<a hash of the recipe> if not given.
    observe: called with each row of metrics. Raises Interrupted, once all is saved, on Ctrl-C and
    SIGTERM.
    trust_remote_code: let code that comes with the LM run, in this call alone.
    """
    with trusted(trust_remote_code):
        return train_many(
            [recipe],
            [out or f"runs/{jsonio.digest(recipe.fingerprint())}"],
            observe=lambda run, row: observe(row),
        )[0]


def train_many(
    recipes: Sequence[Recipe],
    outs: Sequence[Path | str],
    *,
    observe: Callable[[RunFolder, dict[str, Any]], None] = lambda run, row: None,
    open_feed: Callable[..., ActivationSource] = ActivationSource,
) -> list[RunFolder]:
    """Train SAEs that differ in anything but where their activations come from; each leaves a run
    as if it had been trained alone.

    The LM and the normalisation run once for all. Members may be finished, at different steps, or
    new: the stream begins where the least advanced one needs it, and each takes part from its own
    step on. A member whose loss is not finite leaves; the others go on, and its error is raised at
    the end. recipes must agree in `acts`, `batch`, the order of the data, device and threads.
    open_feed: called with the recipe, the device, and the mesh where there are several processes;
    gives what they are trained on, where that is not what `acts` says.
    """
    common, runs = shared_stream(recipes), [RunFolder(Path(out)) for out in outs]
    with ExitStack() as stack, _memory_explained(common):
        device = mesh_of.local_device(resolve_device(common.run.device))
        mesh = stack.enter_context(mesh_of.open_mesh(common, device))
        mesh.on_rank0("begin", lambda: _claim(stack, runs, recipes))
        stop = stack.enter_context(_signals())
        threads(common.threads)
        saver = checkpoint.Saver(mesh, behind=mesh.size > 1 or not device.startswith("cpu"))
        stack.callback(saver.finish)
        members = [
            SAETrainer(run, recipe, torch.device(device), saver)
            for run, recipe in zip(runs, recipes)
        ]
        going = [member for member in members if not member.ended]
        if not going:
            return runs
        feed = (
            open_feed(common, torch.device(device), mesh)
            if mesh.size > 1
            else open_feed(common, torch.device(device))
        )
        for member in going:
            member.join(feed, observe)
        mesh.on_rank0(
            "room",
            lambda: checkpoint.check_room([(member.run, member.optimizer) for member in going]),
        )
        began = time.monotonic()

        least = min((member.state for member in going), key=lambda state: state.step)
        step, batches = least.step, stack.enter_context(closing(feed.stream.batches(least.cursor)))
        while going:
            batch = feed.wait(batches)
            step += 1
            x = going[0].optimizer.sae.normalize(batch.x).x
            now = [member for member in going if member.state.step == step - 1]
            for member in now:
                member.step(batch, x)
            for member in now:
                member.log(batch, x)
            signum, *due = mesh.all_reduce_max_ints(
                "stop", [stop[0] if stop else 0, *(int(member.due()) for member in now)]
            )
            for member, wanted in zip(now, due):
                if signum or wanted or member.ended:
                    member.save()
            going = [member for member in going if not member.ended and not member.failed]
            if signum and going:
                saver.wait()
                raise Interrupted(_stopped(going, time.monotonic() - began), signum)
        saver.wait()
    for member in members:
        if member.failed:
            raise member.failed
    return runs


# ---- the parts, in the order of their use --------------------------------------------------------


def shared_stream(recipes: Sequence[Recipe]) -> Recipe:
    """Return a recipe that speaks for all in what they share; raise InputError, naming the keys,
    where they do not agree."""
    if not recipes:
        raise InputError("a cohort needs at least one recipe")
    first = recipes[0]
    for other in recipes[1:]:
        wrong = differences(_stream_of(first), _stream_of(other))
        if wrong:
            raise InputError(
                f"these recipes cannot share a stream of activations: {'; '.join(wrong)}. Train "
                "them apart"
                + (
                    ", or give all of them one `order`"
                    if any(key.startswith("order") for key in wrong)
                    else ""
                )
            )
    return first


def _stream_of(recipe: Recipe) -> dict[str, Any]:
    """Return what the members of a cohort have in common."""
    fingerprint = recipe.fingerprint()
    return {
        "acts": fingerprint["acts"],
        "batch": recipe.batch,
        "order": recipe.data_seed,
        "threads": recipe.threads,
        "curve": {"held_out": recipe.curve.held_out},
        "mesh": asdict(recipe.mesh),
        "run": {"device": recipe.run.device},
    }


def _claim(stack: ExitStack, runs: Sequence[RunFolder], recipes: Sequence[Recipe]) -> None:
    """Lock the runs, and begin those that are new, or that ended before their first step."""
    for run, recipe in zip(runs, recipes, strict=True):
        stack.enter_context(run.locked())
        if run.exists() and (run.begun() or not run.environment_file.is_file()):
            checkpoint.check_same(run, recipe)  # a recipe alone is its owner's
        else:
            begin(run, recipe)


def begin(run: RunFolder, recipe: Recipe) -> None:
    """Write what the run is, before anything else."""
    check_schedule(recipe)
    started = (".lock", "environment.json")  # what a process that was killed in here leaves
    names = [file.name for file in run.path.iterdir()]
    if not run.exists() and any(
        name not in started and not name.startswith(".tmp-") for name in names
    ):
        raise InputError(f"{run.path} is not empty and not a run; give another --out, or empty it")
    run.remove_leftovers()
    jsonio.write_json(run.environment_file, environment())
    atomic.write_text(run.recipe_file, to_toml(recipe))


def threads(number: int) -> None:
    if number:
        torch.set_num_threads(number)


def _stopped(going: list[SAETrainer], seconds: float) -> str:
    first = going[0]
    if len(going) == 1:
        return (
            f"stopped at step {first.state.step:,} of {first.recipe.steps:,}; everything is "
            f"saved. Go on with: ksparse resume {first.run.path}"
        )
    return (
        f"stopped at step {max(member.state.step for member in going):,} after {seconds:,.0f} "
        f"s, with {len(going)} SAEs to finish; everything is saved. The same command goes on"
    )


def environment() -> dict[str, Any]:
    """Return the versions and the hardware, for environment.json."""
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


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM, so that the step is finished and saved; a second one
    stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def handle(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)
        signal.signal(signum, before[signum])
        log.warning("stopping after this step and saving; once more to stop at once")

    # a script's background jobs ignore SIGINT, which is to stay so
    heeded = [
        signum
        for signum in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(signum) not in (signal.SIG_IGN, None)
    ]
    before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {
        signum: signal.signal(signum, handle) for signum in heeded
    }
    try:
        yield seen
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def _memory_explained(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(
            error, (torch.OutOfMemoryError, MemoryError)
        ) and "allocate memory" not in str(error):
            raise  # torch says of the machine's memory that it is out in a plain RuntimeError
        raise OutOfMemoryError(
            f"out of memory: {(str(error) or type(error).__name__).splitlines()[0]} "
            f"{explain_memory(recipe)}"
        ) from error
