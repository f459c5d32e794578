"""TODO ksparse.training.resume."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ksparse.config import Recipe
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.sae.model import SAE
from ksparse.sae.sharded import ShardedSAE, shard_shape
from ksparse.storage.run_folder import RunFolder
from ksparse.training import checkpoint
from ksparse.training.checkpoint import TrainState
from ksparse.training.steps.autograd import AutogradStep
from ksparse.training.steps.select import choose_step

log = logging.getLogger("ksparse")


# ---- the parts, in the order of their use --------------------------------------------------------


def restore(
    run: RunFolder, recipe: Recipe, device: torch.device, mesh: Mesh = SINGLE_PROCESS
) -> tuple[TrainState, AutogradStep] | None:
    """Return what the newest intact checkpoint holds, or None if there is none; on a mesh, of the
    same one, this process's slice."""
    from ksparse.sae.serialization import read_shape

    path: Path | None = None

    def find() -> None:
        nonlocal path
        path = newest_checkpoint(run)

    mesh.on_rank0("checkpoint", find)
    step = int(mesh.broadcast_str("step", path.name.rpartition("-")[2] if path else "-1"))
    if step < 0:
        return None
    path = run.checkpoint(step)
    shape, metadata = read_shape(path)
    sae = (
        SAE(shape, metadata)
        if mesh.latent == 1
        else ShardedSAE(
            shard_shape(shape, mesh), metadata, mesh=mesh, capacity=recipe.mesh.capacity
        )
    )
    optimizer = choose_step(sae.to(device), recipe, mesh)
    state = checkpoint.load(path, optimizer)
    if state.mesh == [mesh.data, mesh.latent]:
        torch.set_num_threads(state.threads)
    elif mesh.is_rank0:
        log.info(
            "begun on a mesh of %s x %s, going on on one of %s x %s",
            *state.mesh,
            mesh.data,
            mesh.latent,
        )
    state.mesh, state.threads = [mesh.data, mesh.latent], torch.get_num_threads()
    log.info("going on after step %s", f"{state.step:,}")
    return state, optimizer


def newest_checkpoint(run: RunFolder) -> Path | None:
    """Clean up after a process that was killed, and return the newest intact checkpoint; lines of
    later steps are dropped."""
    run.remove_leftovers()
    path, wrong = run.newest_intact()
    for message in wrong:
        log.warning("%s", message)
    run.forget_after(int(path.name.rpartition("-")[2]) if path else 0)
    return path
