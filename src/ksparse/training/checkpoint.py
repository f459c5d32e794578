"""Everything that the rest of a run depends on, in one folder that is there whole or not at all.

    sae.safetensors, sae.json   the autoencoder to use: averaged weights, or the raw ones without an
                                average
    optim.safetensors           raw weights, Adam's moments, the average before correction, tokens
                                since each latent fired
    state.json                  step, tokens, the stream's cursor, threads, constants
    manifest.json               SHA-256 sums of the others

Where the latents are cut into slices, each process writes the rows of its own
(sae.0-of-2.safetensors, optim.0-of-2.safetensors) into the same folder, which the first process
commits once all are there. Any mesh reads what any mesh wrote: the rows that it wants, from
whichever files hold them.

There is no random state: after initialisation nothing is drawn, and the data's order is a function
of seed and cursor.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import CorruptError, DiskError, InputError, PeerError
from ksparse.sae import serialization
from ksparse.sae.model import Shape
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder, shard_file
from ksparse.training.steps.autograd import AutogradStep


@dataclass
class TrainState:
    """What changes during training besides the weights."""

    since: torch.Tensor
    """Tokens since each latent was last active, [n]."""
    baseline: float
    """Mean squared error per component of predicting the mean, on the initial sample; divides the
    loss."""
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    converged: bool = False
    flops_auxk: float = 0.0
    cursor: dict[str, Any] | None = None
    seconds: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)
    mesh: list[int] = field(default_factory=lambda: [1, 1])
    """Parts of the batch and slices of the latents in the process that this was read from; kept in
    the file where there are several."""
    dead: Callable[[], torch.Tensor] | None = None
    """Gives the latents that have been silent for long, in order; None where `since` was not set by
    a step. Not in the file."""


FORMAT = 2
"""Of state.json: 1 had no number, and nothing else is different."""
STATE: dict[str, jsonio.Types] = {
    "step": int,
    "tokens": int,
    "cursor": (dict, type(None)),
    "baseline": (int, float),
    "updates": int,
}
"""The keys that state.json must have."""
MORE: dict[str, jsonio.Types] = {
    "skipped": int,
    "converged": bool,
    "flops_auxk": (int, float),
    "seconds": (int, float),
    "threads": int,
    "mesh": list,
}
"""Those that it may lack."""
CURSORS: tuple[dict[str, jsonio.Types], ...] = (
    {"block": int, "place": list, "skip": int, "batch": int},
    {"step": int},
)
"""Where live activations go on, and where shards do."""


class Saver:
    """Saves one checkpoint at a time, in a thread of its own if `behind`; what goes wrong there is
    raised by the next call."""

    def __init__(self, mesh: Mesh = SINGLE_PROCESS, *, behind: bool = False):
        self.mesh, self.behind = mesh, behind
        self.thread: threading.Thread | None = None
        self.wrong: BaseException | None = None

    def save(self, run: RunFolder, state: TrainState, optimizer: AutogradStep) -> None:
        """Take what is to be saved, and write it, now or while training goes on."""
        self.wait()
        if not self.behind:
            save(run, state, optimizer)
            return
        self.thread = threading.Thread(
            target=self._work,
            args=(run, snapshot(state, optimizer, copied=True)),
            name="ksparse-saver",
        )
        self.thread.start()

    def _work(self, run: RunFolder, taken: Snapshot) -> None:
        try:
            commit(run, taken, self.mesh)
        except BaseException as error:  # whatever it is, whoever saves next is to have it
            self.wrong = error

    def wait(self) -> None:
        """Wait until what was given is saved; raise what went wrong."""
        self.finish()
        wrong, self.wrong = self.wrong, None
        if wrong is not None:
            raise wrong

    def finish(self) -> None:
        """Wait, whatever comes of it."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None


class Snapshot(NamedTuple):
    """A checkpoint in memory: the whole's shape, metadata and facts, and tensors of this process's
    slice."""

    shape: Shape
    metadata: dict[str, Any]
    facts: dict[str, Any]
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    recipe: dict[str, Any]
    keep: int


def save(run: RunFolder, state: TrainState, optimizer: AutogradStep) -> None:
    """Commit a checkpoint of this step and remove all but the newest `run.keep`."""
    commit(run, snapshot(state, optimizer, copied=False), optimizer.mesh)


def snapshot(state: TrainState, optimizer: AutogradStep, *, copied: bool) -> Snapshot:
    """Return what is to be saved; copies on the CPU, so that training may go on, where that is
    asked for."""
    recipe, sae, mesh = optimizer.recipe, optimizer.averaged(), optimizer.mesh
    facts = {
        key: value
        for key, value in vars(state).items()
        if key not in ("since", "dead") and not (key == "mesh" and mesh.size == 1)
    }
    if mesh.size > 1:
        facts["mesh"] = [mesh.data, mesh.latent]
    metadata = sae.metadata | {
        "tokens": state.tokens,
        "step": state.step,
        "baseline": state.baseline,
        "dead_fraction_training": dead_fraction(state, recipe.dead_after, mesh),
    }
    tensors = {
        key: value.detach().to("cpu", copy=True) if copied else value
        for key, value in {**optimizer.tensors(), "since": state.since}.items()
    }
    return Snapshot(
        replace(sae.shape, n_latents=sae.shape.n_latents * mesh.latent),
        metadata,
        copy.deepcopy({**facts, "updates": optimizer.updates}),
        sae.state_dict(),
        tensors,
        recipe.identity(),
        recipe.run.keep,
    )


def commit(run: RunFolder, taken: Snapshot, mesh: Mesh = SINGLE_PROCESS) -> None:
    """Write what was taken, on a mesh each process its slice; the first commits it and removes all
    but the newest `run.keep`."""
    path = run.checkpoint(taken.facts["step"])
    with _folder(path, mesh, step=taken.facts["step"], recipe=taken.recipe) as tmp:
        if mesh.data_rank == 0:
            serialization.write_weights(
                taken.weights, tmp / shard_file("sae", mesh.latent_rank, mesh.latent)
            )
            save_file(
                {key: value.contiguous() for key, value in taken.tensors.items()},
                tmp / shard_file("optim", mesh.latent_rank, mesh.latent),
            )
        if mesh.is_rank0:
            serialization.write_shape(taken.shape, taken.metadata, tmp)
            jsonio.write_json(tmp / "state.json", {"format": FORMAT, **taken.facts})
    if mesh.is_rank0:
        there = run.checkpoints()
        newest = there.index(path) + 1
        for old in (
            *there[: max(0, newest - taken.keep)],
            *there[newest:],
        ):  # a later one was damaged, or it would have been gone on from
            atomic.remove(old)


@contextmanager
def _folder(path: Path, mesh: Mesh, **facts: Any) -> Iterator[Path]:
    """Yield, on every process, the temporary folder that the first one commits once all have
    written; where one fails, nothing is committed."""
    if mesh.size == 1:
        with checksums.checksummed_dir(path, **facts) as tmp:
            yield tmp
        return
    named = False
    try:
        with checksums.checksummed_dir(path, **facts) if mesh.is_rank0 else nullcontext() as tmp:
            name = mesh.broadcast_str("folder", tmp.name if tmp else "", "save")
            named = True
            if not name:
                raise PeerError(
                    f"process 0 of {mesh.size} could not begin checkpoint {path}; its own message "
                    "says why"
                )
            written = False
            try:
                with atomic.translate_oserrors(path):
                    yield path.parent / name
                written = True
            finally:
                failed = mesh.all_reduce_max_ints("written", [int(not written)], "save")[0]
            if failed:
                raise PeerError(
                    f"checkpoint {path} was given up: another process could not write its slice; "
                    "its own message says why"
                )
    finally:
        if mesh.is_rank0 and not named:
            mesh.broadcast_str("folder", "", "save")


def dead_fraction(state: TrainState, dead_after: int, mesh: Mesh = SINGLE_PROCESS) -> float:
    """Return the share of latents, over all slices, that have not been active for `dead_after`
    tokens."""
    share = (state.since >= dead_after).float().mean()
    return (mesh.all_reduce_sum("dead", share, "latent") / mesh.latent).item()


def load(path: Path, optimizer: AutogradStep) -> TrainState:
    """Restore the optimiser, or its slice, from a checkpoint that `RunFolder.newest_intact` found,
    and return the state."""
    facts = read_state(path / "state.json")
    sae = optimizer.sae
    raw = sae.state_dict()
    shapes = {f"raw.{key}": tuple(tensor.shape) for key, tensor in raw.items()} | {
        f"average.{key}": tuple(mean.shape) for key, mean in optimizer.average.items()
    }
    mesh, n = optimizer.mesh, sae.shape.n_latents
    weights = serialization.rows_of(
        path, "optim", mesh.latent_range(n * mesh.latent) if mesh.latent > 1 else None
    )
    followed = sae.activation.followed
    shapes |= {  # older files have none
        f"average.{key}": shapes[f"raw.{key}"] for key in followed if f"average.{key}" in weights
    }
    for key in raw:
        moments = {
            f"exp_avg.{key}": shapes[f"raw.{key}"],
            f"exp_avg_sq.{key}": shapes[f"raw.{key}"],
            f"step.{key}": (),
        }
        if any(name in weights for name in moments):  # what has had no gradient has none
            shapes |= moments
    counts = {name: () for name in ("screen.candidates", "screen.again") if name in weights} | {
        "since": (n,)
    }
    tensors = weights.all(shapes, counts)
    optimizer.restore(tensors, facts.pop("updates"))
    return TrainState(since=tensors["since"].to(sae.W_enc.device), **facts)


def read_state(file: Path) -> dict[str, Any]:
    """Read state.json; raise CorruptError, naming the key, for what a run cannot go on from."""
    facts = jsonio.read_numbered(file, FORMAT, STATE, MORE, unnumbered=1)
    cursor = facts["cursor"]
    if cursor is not None:
        keys = next((keys for keys in CURSORS if set(keys) == set(cursor)), None)
        if keys is None:
            known = " or ".join(", ".join(keys) for keys in CURSORS)
            raise CorruptError(
                f"{file}: 'cursor' has the keys {', '.join(cursor)[:80] or 'none'}, expected "
                f"{known}"
            )
        jsonio.check_keys(file, cursor, keys, "cursor.")
    numbers = {**facts, **{f"cursor.{key}": value for key, value in (cursor or {}).items()}}
    for name, length in (("mesh", 2), ("cursor.place", 3)):
        values = numbers.get(name, [1] * length)
        if len(values) != length or any(type(value) is not int for value in values):
            raise CorruptError(
                f"{file}: {name!r} is {str(values)[:80]}, expected {length} whole numbers"
            )
        numbers |= {f"{name}.{i}": value for i, value in enumerate(values)}
    for name, value in numbers.items():
        least = int(name == "threads" or name.startswith("mesh."))
        if isinstance(value, (int, float)) and not least <= value < 2**63:
            raise CorruptError(
                f"{file}: {name!r} is {value}, expected a number from {least} to 2^63"
            )
    if file.parent.name != RunFolder(file.parent).checkpoint(facts["step"]).name:
        raise CorruptError(
            f"{file}: 'step' is {facts['step']}, though its folder is named {file.parent.name}"
        )
    return facts


def check_room(runs: Sequence[tuple[RunFolder, AutogradStep]]) -> None:
    """Raise DiskError if the disk cannot hold the checkpoints that are kept and one being written,
    of all these runs together."""
    needed = 0
    for run, optimizer in runs:
        weights, keep = (
            sum(parameter.numel() for parameter in optimizer.sae.parameters()) * 4,
            optimizer.recipe.run.keep,
        )
        needed += (
            weights
            * (5 if optimizer.average else 4)
            * (keep + 1 - min(keep, len(run.checkpoints())))
            * optimizer.mesh.latent
        )
    path = runs[0][0].path
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DiskError(
            f"disk too small for {path}: checkpoints need {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free; "
            "make room, lower --run.keep, or give another --out"
        )


def check_same(run: RunFolder, asked: Any) -> None:
    """Raise InputError, naming the keys, if a run's recipe is not the one asked for."""
    from ksparse.config import differences

    changed = differences(run.recipe().identity(), asked.identity())
    if changed:
        raise InputError(
            f"{run.path} was begun with another recipe: {'; '.join(changed)}. "
            "Give another --out, or the recipe it was begun with (`ksparse resume` uses that)"
        )
