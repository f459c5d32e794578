"""Write checkpoints: folders with everything that the rest of a run depends on.

    sae.safetensors, sae.json   the SAE to use: averaged weights, or the raw ones if the recipe
                                averages none
    optim.safetensors           raw weights, Adam's moments, the average before its correction, and
                                the tokens since each latent fired
    state.json                  step, tokens, the stream's cursor, threads, constants
    manifest.json               SHA-256 sums of the other files

A checkpoint is written to a temporary folder and renamed once it is complete. With latent-parallel
shards each process writes its own rows (sae.0-of-2.safetensors, optim.0-of-2.safetensors) into the
same folder, which process 0 commits once all have written. A run on any mesh can read what a run on
any other wrote.

There is no random state: nothing is drawn after initialization, and the order of the data is a
function of seed and cursor. `ksparse.training.resume` reads checkpoints and states the protocol.
"""

from __future__ import annotations

import copy
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import DiskError, PeerError
from ksparse.planning.costs import disk_bytes
from ksparse.sae import serialization
from ksparse.sae.model import Shape
from ksparse.storage import atomic, checksums, jsonio
from ksparse.storage.run_folder import RunFolder, shard_file
from ksparse.training.steps.autograd import AutogradStep

FORMAT = 2
"""Format number of state.json; 1 had none and differs in nothing else."""


@dataclass
class TrainState:
    """What changes during training besides the weights.

    `since` is saved in optim.safetensors, everything else in state.json, whose keys `REQUIRED` and
    `OPTIONAL` list. What a running trainer needs only for itself does not belong here.
    """

    since: Tensor
    """Tokens since each latent last fired, [n_latents]."""
    baseline: float
    """Mean squared error per component of predicting the mean, on the calibration sample; the loss
    is divided by it."""
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    """Batches left out because their loss or gradient was not finite."""
    converged: bool = False
    flops_auxk: float = 0.0
    cursor: dict[str, Any] | None = None
    """Where the stream of activations continues; None is its start."""
    seconds: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)
    mesh: list[int] = field(default_factory=lambda: [1, 1])
    """[data, latent] sizes of the mesh; in the file only if it has several processes."""

    def to_json(self, updates: int) -> dict[str, Any]:
        """Return the contents of state.json but for the format number.

        Args:
            updates: how often the weights were updated, which the training step counts.
        """
        table: dict[str, Any] = {
            "baseline": self.baseline,
            "step": self.step,
            "tokens": self.tokens,
            "skipped": self.skipped,
            "converged": self.converged,
            "flops_auxk": self.flops_auxk,
            "cursor": copy.deepcopy(self.cursor),
            "seconds": self.seconds,
            "threads": self.threads,
        }
        if self.mesh != [1, 1]:
            table["mesh"] = list(self.mesh)
        return table | {"updates": updates}

    @classmethod
    def from_json(cls, table: dict[str, Any], since: Tensor) -> TrainState:
        """Return the state that a checked state.json and `since[n_latents]` hold.

        Args:
            table: what `resume.read_state` returns; keys that older files lack keep their default.
            since: tokens since each latent last fired.
        """
        return cls(since, **{key: table[key] for key in SAVED if key in table})


REQUIRED: dict[str, jsonio.Types] = {
    "step": int,
    "tokens": int,
    "cursor": (dict, type(None)),
    "baseline": (int, float),
    "updates": int,
}
"""Keys that state.json must have."""
OPTIONAL: dict[str, jsonio.Types] = {
    "skipped": int,
    "converged": bool,
    "flops_auxk": (int, float),
    "seconds": (int, float),
    "threads": int,
    "mesh": list,
}
"""Keys that an older state.json, or one of a single process, may lack."""
SAVED = tuple(key for key in (*REQUIRED, *OPTIONAL) if key != "updates")
"""The fields of `TrainState` in state.json."""


class Saver:
    """Saves one checkpoint at a time, in a thread if `behind`. An error of the thread is raised by
    the next call of `save` or `wait`."""

    def __init__(self, mesh: Mesh = SINGLE_PROCESS, *, behind: bool = False):
        self.mesh, self.behind = mesh, behind
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None

    def save(self, run: RunFolder, state: TrainState, optimizer: AutogradStep) -> None:
        """Save a checkpoint: now, or from copies while training goes on."""
        self.wait()
        if not self.behind:
            save(run, state, optimizer)
            return
        self.thread = threading.Thread(
            target=self._commit,
            args=(run, snapshot(state, optimizer, copied=True)),
            name="ksparse-saver",
        )
        self.thread.start()

    def _commit(self, run: RunFolder, contents: Snapshot) -> None:
        try:
            commit(run, contents, self.mesh)
        except BaseException as error:  # raised again in the thread that trains
            self.error = error

    def wait(self) -> None:
        """Wait until the last checkpoint is saved; raise the error if that failed."""
        self.finish()
        error, self.error = self.error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait without raising."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None


class Snapshot(NamedTuple):
    """The contents of a checkpoint: shape and metadata of the whole SAE, and this process's shard
    of the tensors."""

    shape: Shape
    metadata: dict[str, Any]
    facts: dict[str, Any]
    """The contents of state.json."""
    weights: dict[str, Tensor]
    tensors: dict[str, Tensor]
    recipe: dict[str, Any]
    keep: int


def save(run: RunFolder, state: TrainState, optimizer: AutogradStep) -> None:
    """Commit a checkpoint of this step, and remove all but the newest `run.keep`."""
    commit(run, snapshot(state, optimizer, copied=False), optimizer.mesh)


def snapshot(state: TrainState, optimizer: AutogradStep, *, copied: bool) -> Snapshot:
    """Return the contents of a checkpoint of this step.

    Args:
        state: the run's state.
        optimizer: its training step, which holds the weights.
        copied: copy the tensors to the CPU, so that training can go on while they are written.
    """
    recipe, sae, mesh = optimizer.recipe, optimizer.averaged(), optimizer.mesh
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
        state.to_json(optimizer.updates),
        sae.state_dict(),
        tensors,
        recipe.fingerprint(),
        recipe.run.keep,
    )


def commit(run: RunFolder, contents: Snapshot, mesh: Mesh = SINGLE_PROCESS) -> None:
    """Write a checkpoint, and remove all but the newest `run.keep`.

    On a mesh each latent shard is written by the first process that holds it; process 0 commits.
    """
    step = contents.facts["step"]
    path = run.checkpoint(step)
    with _shared_folder(path, mesh, step=step, recipe=contents.recipe) as tmp:
        if mesh.data_rank == 0:
            serialization.write_weights(
                contents.weights, tmp / shard_file("sae", mesh.latent_rank, mesh.latent)
            )
            save_file(
                {key: value.contiguous() for key, value in contents.tensors.items()},
                tmp / shard_file("optim", mesh.latent_rank, mesh.latent),
            )
        if mesh.is_rank0:
            serialization.write_shape(contents.shape, contents.metadata, tmp)
            jsonio.write_json(tmp / "state.json", {"format": FORMAT, **contents.facts})
    if mesh.is_rank0:
        checkpoints = run.checkpoints()
        end = checkpoints.index(path) + 1
        # Checkpoints of later steps are damaged: otherwise the run had continued from them.
        for old in (*checkpoints[: max(0, end - contents.keep)], *checkpoints[end:]):
            atomic.remove(old)


@contextmanager
def _shared_folder(path: Path, mesh: Mesh, **facts: Any) -> Iterator[Path]:
    """Yield on every process the temporary folder that process 0 commits once all have written; if
    one fails, nothing is committed."""
    if mesh.size == 1:
        with checksums.checksummed_dir(path, **facts) as tmp:
            yield tmp
        return
    name_sent = False
    try:
        with checksums.checksummed_dir(path, **facts) if mesh.is_rank0 else nullcontext() as tmp:
            name = mesh.broadcast_str("folder", tmp.name if tmp else "", "save")
            name_sent = True
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
                    f"checkpoint {path} was given up: another process could not write its shard; "
                    "its own message says why"
                )
    finally:
        if mesh.is_rank0 and not name_sent:  # the others wait for it
            mesh.broadcast_str("folder", "", "save")


def dead_fraction(state: TrainState, dead_after: int, mesh: Mesh = SINGLE_PROCESS) -> float:
    """Return the share of latents, over all shards, that have not fired for `dead_after` tokens."""
    share = (state.since >= dead_after).float().mean()
    return (mesh.all_reduce_sum("dead", share, "latent") / mesh.latent).item()


def check_room(runs: Sequence[tuple[RunFolder, AutogradStep]]) -> None:
    """Raise DiskError if the disk cannot hold the checkpoints that these runs keep and the ones
    being written."""
    needed = 0
    for run, optimizer in runs:
        shard = sum(parameter.numel() for parameter in optimizer.sae.parameters())
        parameters = shard * optimizer.mesh.latent
        needed += disk_bytes(optimizer.recipe, parameters, existing=len(run.checkpoints()))
    path = runs[0][0].path
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DiskError(
            f"disk too small for {path}: checkpoints need {needed / 1e6:,.0f} MB, "
            f"{free / 1e6:,.0f} MB are free; "
            "make room, lower --run.keep, or give another --out"
        )
