"""Everything that the rest of a run depends on, in one folder that is there whole or not at all.

    sae.safetensors, sae.json   the autoencoder to use: averaged weights, or the raw ones without an average
    optim.safetensors           raw weights, Adam's moments, the average before correction, tokens since each latent fired
    state.json                  step, tokens, the stream's cursor, threads, constants
    manifest.json               SHA-256 sums of the others

There is no random state: after initialisation nothing is drawn, and the data's order is a function of seed and cursor.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ksparse import files
from ksparse.errors import DiskError, InputError
from ksparse.runs import RunFolder
from ksparse.sae import store
from ksparse.training.optim import Optimizer


@dataclass
class State:
    """What changes during training besides the weights."""

    since: torch.Tensor
    """Tokens since each latent was last active, [n]."""
    baseline: float
    """Mean squared error per component of predicting the mean, on the initial sample; divides the loss."""
    step: int = 0
    tokens: int = 0
    skipped: int = 0
    converged: bool = False
    flops_auxk: float = 0.0
    cursor: dict[str, Any] | None = None
    seconds: float = 0.0
    threads: int = field(default_factory=torch.get_num_threads)


STATE = {"step": int, "tokens": int, "cursor": (dict, type(None)), "baseline": (int, float), "updates": int}
"""The keys that state.json must have."""


def save(run: RunFolder, state: State, optimizer: Optimizer) -> Path:
    """Commit a checkpoint of this step and remove all but the newest `run.keep`."""
    recipe = optimizer.recipe
    path = run.checkpoint(state.step)
    facts = {key: value for key, value in vars(state).items() if key != "since"}
    sae = optimizer.averaged()
    sae.metadata |= {"tokens": state.tokens, "step": state.step, "baseline": state.baseline,
                     "dead_fraction_training": dead_fraction(state, recipe.dead_after)}
    with files.committed(path, step=state.step, recipe=recipe.identity()) as tmp:
        store.write(sae, tmp)
        tensors = {**optimizer.tensors(), "since": state.since}
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp / "optim.safetensors")
        files.write_json(tmp / "state.json", {**facts, "updates": optimizer.updates})
    there = run.checkpoints()
    newest = there.index(path) + 1
    for old in (*there[: max(0, newest - recipe.run.keep)], *there[newest:]):  # a later one was damaged, or it would have been gone on from
        files.remove(old)
    return path


def dead_fraction(state: State, dead_after: int) -> float:
    """Return the share of latents that have not been active for `dead_after` tokens."""
    return (state.since >= dead_after).float().mean().item()


def load(path: Path, optimizer: Optimizer) -> State:
    """Restore the optimiser from a checkpoint that `RunFolder.newest_intact` found, and return the state."""
    facts = files.read_table(path / "state.json", **STATE)
    sae = optimizer.sae
    shapes = {f"raw.{key}": tuple(getattr(sae, key).shape) for key in sae.keys} | {
        f"average.{key}": tuple(mean.shape) for key, mean in optimizer.average.items()}
    tensors = store.tensors(path / "optim.safetensors", shapes | {"since": (sae.shape.n_latents,)})
    optimizer.restore(tensors, facts.pop("updates"))
    return State(since=tensors["since"].to(sae.W_enc.device), **facts)


def check_room(runs: Sequence[tuple[RunFolder, Optimizer]]) -> None:
    """Raise DiskError if the disk cannot hold the checkpoints that are kept and one being written, of all these runs together."""
    needed = 0
    for run, optimizer in runs:
        weights, keep = sum(parameter.numel() for parameter in optimizer.sae.parameters()) * 4, optimizer.recipe.run.keep
        needed += weights * (5 if optimizer.average else 4) * (keep + 1 - min(keep, len(run.checkpoints())))
    path = runs[0][0].path
    free = shutil.disk_usage(path).free
    if free < needed:
        raise DiskError(f"disk too small for {path}: checkpoints need {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free; "
                        "make room, lower --run.keep, or give another --out")


def check_same(run: RunFolder, asked: Any) -> None:
    """Raise InputError, naming the keys, if a run's recipe is not the one asked for."""
    from ksparse.recipe import differences

    changed = differences(run.recipe().identity(), asked.identity())
    if changed:
        raise InputError(f"{run.path} was begun with another recipe: {'; '.join(changed)}. "
                         "Give another --out, or the recipe it was begun with (`ksparse resume` uses that)")
