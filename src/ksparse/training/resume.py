"""Continue a run from its newest checkpoint. Read this file first if resumption is wrong.

What must hold: a run that is stopped or killed at any moment and started again by the same command
ends with the same bits as a run that never stopped: weights, optimizer state, metrics and curve.

What is saved. A checkpoint (`checkpoint.py`) holds the raw weights, Adam's moments, the average of
the weights, the start values of a decoder that is held near them, the tokens since each latent
fired, and the `TrainState`: step, tokens, constants, and the stream's cursor. There is no random
state: nothing is drawn after initialization but by resampling, whose seed is the recipe's and the
number of the update. Not saved, and computed again: the list of dead latents, the monitor's medians
(from metrics.jsonl), the shuffle buffer (from the cursor).

When, and by whom. `train.train_many` lets each trainer save when its checkpoint is due
(`run.save_every` or `run.save_minutes`), on SIGINT, SIGTERM and SIGHUP, and after the last step;
process 0 has the clock and decides for all. `checkpoint.Saver` writes at once on a CPU, and from
copies in a thread on a GPU or a mesh. metrics.jsonl, curve.jsonl and alarms.jsonl are appended to
right after each step, before its checkpoint.

Order of a commit. All files are written to a temporary folder and synced, manifest.json with their
SHA-256 sums last; then the folder is renamed to step-N, then older checkpoints are removed. A
process that is killed leaves either a complete checkpoint or a temporary folder.

What happens on resumption, in this order:

1. `check_same`: the recipe must equal the run's recipe.toml in all keys of its identity. The
   sections `run` and `mesh` and the number of threads may differ. On another mesh results agree up
   to rounding, on the same one bit for bit.
2. `newest_checkpoint`: temporary folders of killed processes are removed; the newest checkpoint
   whose sums are right is chosen, damaged ones are passed over with a warning; lines of
   metrics.jsonl, curve.jsonl and alarms.jsonl after its step are dropped, since those steps are
   taken again.
3. `restore`: shape and metadata are read, a training step is built for this device, and `load`
   checks and fills in tensors and state. torch is given the run's number of threads, on which
   sums depend in the last bit.
4. `train.train_many` opens the stream at the cursor of the trainer that has taken the fewest steps;
   the others skip the batches that they have seen.

The files of the resume path:

    training/train.py             locks the run folder, opens the stream at the cursor
    training/resume.py            this file: checks, finds and loads the checkpoint
    training/checkpoint.py        TrainState; what is saved, and how it is committed
    training/steps/autograd.py    `tensors` and `restore`: the optimizer's state
    training/steps/prefilter.py   the same for the counts of the preselection
    training/trainer.py           saves; reads the curve and the metrics of earlier processes
    storage/run_folder.py         `newest_intact`, `forget_after`
    storage/checksums.py          manifest.json: `checksummed_dir`, `verify`
    storage/atomic.py             temporary names, sync, rename
    sae/serialization.py          tensors by rows, whichever mesh wrote them
    data/live.py, data/sharded.py `batches(cursor)`: where the stream continues

tests/training/test_kill.py, test_train.py and test_checkpoint.py hold it to this.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from ksparse.config import Recipe, differences
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import CorruptError, InputError
from ksparse.sae import serialization
from ksparse.sae.sharded import new_sae
from ksparse.sae.tensor_files import CheckedTensors
from ksparse.storage import jsonio
from ksparse.storage.run_folder import RunFolder
from ksparse.training.checkpoint import FORMAT, OPTIONAL, REQUIRED, TrainState
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.select import build_step

log = logging.getLogger("ksparse")

CURSORS: tuple[dict[str, jsonio.Types], ...] = (
    {"block": int, "place": list, "skip": int, "batch": int},
    {"block": int, "place": list, "skip": int, "batch": int, "lm_batch": int},
    {"step": int},
)
"""The keys of a cursor of live activations, also with a measured `acts.lm_batch`, and of one of
shards."""


def check_same(run: RunFolder, recipe: Recipe) -> None:
    """Raise InputError, naming the keys, if a run was begun with another recipe."""
    changed = differences(run.recipe().fingerprint(), recipe.fingerprint())
    if changed:
        raise InputError(
            f"{run.path} was begun with another recipe: {'; '.join(changed)}. "
            "Give another --out, or the recipe it was begun with (`ksparse resume` uses that)"
        )


def newest_checkpoint(run: RunFolder) -> Path | None:
    """Return the newest intact checkpoint, after removing what killed processes left and the lines
    of later steps."""
    run.remove_leftovers()
    path, damages = run.newest_intact()
    for message in damages:
        log.warning("%s", message)
    run.drop_lines_after(int(path.name.rpartition("-")[2]) if path else 0)
    return path


def restore(
    run: RunFolder, recipe: Recipe, device: torch.device, mesh: Mesh = SINGLE_PROCESS
) -> tuple[TrainState, AutogradStep] | None:
    """Load the newest intact checkpoint of a run.

    Args:
        run: the run's folder, locked by process 0.
        recipe: the recipe to continue with.
        device: where to put the weights.
        mesh: the processes that share the run; all load the same checkpoint, each its shard.

    Returns:
        The state and the training step, or None if there is no checkpoint.
    """
    path: Path | None = None

    def find() -> None:
        nonlocal path
        path = newest_checkpoint(run)

    mesh.on_rank0("checkpoint", find)
    step = int(mesh.broadcast_str("step", path.name.rpartition("-")[2] if path else "-1"))
    if step < 0:
        return None
    path = run.checkpoint(step)
    shape, metadata = serialization.read_shape(path)
    sae = new_sae(shape, metadata, mesh, recipe.mesh.capacity)
    optimizer = build_step(sae.to(device), recipe, mesh)
    state = load(path, optimizer)
    if state.mesh == [mesh.data, mesh.latent]:
        torch.set_num_threads(state.threads)
    elif mesh.is_rank0:
        log.info(
            "the run was begun on a mesh of %s x %s and goes on on one of %s x %s",
            *state.mesh,
            mesh.data,
            mesh.latent,
        )
    state.mesh, state.threads = [mesh.data, mesh.latent], torch.get_num_threads()
    log.info("going on after step %s", f"{state.step:,}")
    return state, optimizer


def load(path: Path, optimizer: AutogradStep) -> TrainState:
    """Fill the training step from a checkpoint, and return the state.

    Args:
        path: a checkpoint whose sums were checked.
        optimizer: a new training step; on a mesh it takes its shard.

    Raises:
        CorruptError: if a key or a tensor is missing, unknown, or not what it must be.
    """
    table = read_state(path / "state.json")
    mesh, n = optimizer.mesh, optimizer.sae.shape.n_latents
    stored = serialization.rows_of(
        path, "optim", mesh.latent_range(n * mesh.latent) if mesh.latent > 1 else None
    )
    counts = {name: () for name in ("screen.candidates", "screen.again") if name in stored}
    tensors = stored.all(_tensor_shapes(stored, optimizer), counts | {"since": (n,)})
    optimizer.restore(tensors, table["updates"])
    return TrainState.from_json(table, tensors["since"].to(optimizer.sae.W_enc.device))


def _tensor_shapes(stored: CheckedTensors, optimizer: AutogradStep) -> dict[str, tuple[int, ...]]:
    """Return the tensors of optim.safetensors with their shapes. Two may be absent: the moments of
    a weight that never had a gradient, and, in older files, averages of thresholds."""
    sae = optimizer.sae
    shapes: dict[str, tuple[int, ...]] = {
        f"raw.{key}": tuple(tensor.shape) for key, tensor in sae.state_dict().items()
    } | {f"average.{key}": tuple(average.shape) for key, average in optimizer.average.items()}
    shapes |= {
        f"average.{key}": shapes[f"raw.{key}"]
        for key in sae.activation.followed
        if f"average.{key}" in stored
    }
    if optimizer.start is not None:
        shapes["start.W_dec"] = shapes["raw.W_dec"]
    for key in sae.state_dict():
        shape = shapes[f"raw.{key}"]
        moments = {f"exp_avg.{key}": shape, f"exp_avg_sq.{key}": shape, f"step.{key}": ()}
        if any(name in stored for name in moments):
            shapes |= moments
    return shapes


def read_state(file: Path) -> dict[str, Any]:
    """Read and check state.json.

    Returns:
        Its table without the format number.

    Raises:
        CorruptError: naming the key that is missing, unknown, or has an impossible value.
        InputError: if a newer ksparse wrote the file.
    """
    table = jsonio.read_numbered(file, FORMAT, REQUIRED, OPTIONAL, unnumbered=1)
    cursor = table["cursor"]
    if cursor is not None:
        keys = next((keys for keys in CURSORS if set(keys) == set(cursor)), None)
        if keys is None:
            known = " or ".join(", ".join(keys) for keys in CURSORS)
            raise CorruptError(
                f"{file}: 'cursor' has the keys {', '.join(cursor)[:80] or 'none'}, expected "
                f"{known}"
            )
        jsonio.check_keys(file, cursor, keys, "cursor.")
    _check_numbers(file, table)
    if file.parent.name != RunFolder(file.parent).checkpoint(table["step"]).name:
        raise CorruptError(
            f"{file}: 'step' is {table['step']}, though its folder is named {file.parent.name}"
        )
    return table


def _check_numbers(file: Path, table: dict[str, Any]) -> None:
    """Raise CorruptError for a number out of its range, or a list of another length."""
    cursor = table["cursor"] or {}
    numbers = {**table, **{f"cursor.{key}": value for key, value in cursor.items()}}
    for name, length in (("mesh", 2), ("cursor.place", 3)):
        values = numbers.get(name, [1] * length)
        if len(values) != length or any(type(value) is not int for value in values):
            raise CorruptError(
                f"{file}: {name!r} is {str(values)[:80]}, expected {length} whole numbers"
            )
        numbers |= {f"{name}.{i}": value for i, value in enumerate(values)}
    for name, value in numbers.items():
        least = int(name in ("threads", "cursor.lm_batch") or name.startswith("mesh."))
        if isinstance(value, (int, float)) and not least <= value < 2**63:
            raise CorruptError(
                f"{file}: {name!r} is {value}, expected a number from {least} to 2^63"
            )
