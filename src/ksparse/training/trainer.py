"""One SAE in training: its weights, its state, and the files of its run.

    start(recipe, source, mesh)                       a new SAE; `resume.restore` continues one
    SAETrainer(run, recipe, source, …)                opens its logs
    .step(batch, x)                                   gradient, optimizer, dead counters
    .log(x, losses, grad_norm)                        metrics.jsonl, curve.jsonl, alarms.jsonl
    .save()                                           a checkpoint

`train_many` hands the same batches to all trainers that share a stream.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ksparse.config import Recipe, auxk_tokens, k_aux
from ksparse.data.base import ActivationBatch
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import NonFiniteError
from ksparse.lm.provenance import describe_lm
from ksparse.planning import flops
from ksparse.sae.init import initialize_
from ksparse.sae.losses import Losses
from ksparse.sae.model import Shape
from ksparse.sae.sharded import ShardedSAE, new_sae
from ksparse.storage.run_folder import RunFolder
from ksparse.training import checkpoint, convergence, warm_start
from ksparse.training.checkpoint import TrainState
from ksparse.training.loggers import open_loggers
from ksparse.training.monitor import Monitor
from ksparse.training.source import ActivationSource
from ksparse.training.steps.async_copy import nonzero_async
from ksparse.training.steps.autograd import AutogradStep, rate_share
from ksparse.training.steps.select import build_step

log = logging.getLogger("ksparse")

AUDITED = 64
"""Tokens of a logged step on which the preselection is compared with the exact choice."""


class SAETrainer:
    """An SAE that trains on the batches it is handed.

    Args:
        run: the run's folder.
        recipe: what to train.
        source: where the activations come from.
        state: the run's state, new or restored.
        optimizer: the training step, which holds the weights.
        saver: writes the checkpoints.
        observe: called with the run and each row of metrics.
    """

    def __init__(
        self,
        run: RunFolder,
        recipe: Recipe,
        source: ActivationSource,
        state: TrainState,
        optimizer: AutogradStep,
        saver: checkpoint.Saver,
        observe: Callable[[RunFolder, dict[str, Any]], None],
    ):
        self.run, self.recipe, self.source, self.saver = run, recipe, source, saver
        self.state, self.optimizer, self.mesh = state, optimizer, optimizer.mesh
        self.dead = DeadLatents(recipe.dead_after)
        self.failed: NonFiniteError | None = None
        self.writers: list[Callable[[dict[str, Any]], None]] = []
        if self.mesh.is_rank0:
            self.writers = [
                run.append_metrics,
                lambda row: observe(run, row),
                *open_loggers(recipe, run),
            ]
        self.curve = run.curve()
        self.monitor = Monitor(recipe, run.metrics())
        self.points = convergence.points(recipe)
        self.held_out = source.held_out if self.points else None
        self.started_at = self.saved_at = time.monotonic()
        self.seconds_before, self.tokens_before = state.seconds, state.tokens

    @property
    def ended(self) -> bool:
        """Whether no step is left: all are taken, or the loss has converged."""
        return finished(self.recipe, self.state)

    def step(self, batch: ActivationBatch, x: Tensor) -> tuple[Losses, float]:
        """Take one step.

        Args:
            batch: the batch.
            x: its normalized activations [b, d_model].

        Returns:
            The losses, and the gradient's norm: NaN if the batch was left out. If the recipe does
            not leave such batches out, `failed` is set.
        """
        state, recipe = self.state, self.recipe
        state.step += 1
        if recipe.sae.k_first != recipe.sae.k:
            self.optimizer.set_k(recipe.sae.k_at(state.step, recipe.steps))
        if self.source.lm_loss is not None:
            self.optimizer.lm_loss = self.source.lm_loss.of(self.optimizer.sae, recipe.sae, batch)
        losses, grad_norm = train_step(self.optimizer, x, state, recipe, self.dead)
        if not math.isfinite(grad_norm):
            self._leave_out(batch)
        state.tokens += recipe.batch
        state.cursor = batch.cursor
        return losses, grad_norm

    def log(self, x: Tensor, losses: Losses, grad_norm: float) -> None:
        """Write what is due at this step: a row of metrics, a point of the curve, alarms.

        Args:
            x: the normalized activations [b, d_model] of the step.
            losses: what `step` returned.
            grad_norm: what `step` returned.
        """
        state, recipe = self.state, self.recipe
        if self.failed:
            return
        if state.step in self.points:
            self._measure_held_out_loss(losses)
        dead = None
        if state.step % recipe.run.log_every == 0 or state.step == 1 or self.ended:
            row = self._row(x, losses, grad_norm)
            for write in self.writers:
                write(row)
            dead = row["dead"]
        if self.mesh.is_rank0:
            self._warn(grad_norm, dead)

    def _row(self, x: Tensor, losses: Losses, grad_norm: float) -> dict[str, Any]:
        """Return a row of metrics.jsonl."""
        state = self.state
        elapsed = time.monotonic() - self.started_at
        tokens = state.tokens - self.tokens_before
        state.seconds = self.seconds_before + elapsed
        mixing = self.source.stream.same_context_fraction()
        return (
            metrics(losses, grad_norm, state, self.recipe, mixing, self.optimizer)
            | self.optimizer.audit(x[:AUDITED])
            | {
                "waiting": self.source.whole.seconds_waited / max(elapsed, 1e-9),
                "tokens_per_s": 1 / max(self.source.seconds_per_token(elapsed, tokens), 1e-12),
                "seconds": state.seconds,
            }
        )

    def _warn(self, grad_norm: float, dead: float | None) -> None:
        """Log and write the alarms of this step; `dead` is None if it was not computed."""
        state = self.state
        for alarm in self.monitor.see(state.step, state.tokens, grad_norm, dead):
            log.warning(
                "%s, step %s: %s%s",
                self.run.path,
                f"{state.step:,}",
                alarm["says"],
                f" ({alarm['kept_back']:,} more such steps since the last warning)"
                if alarm["kept_back"]
                else "",
            )
            self.run.append_alarm(alarm)

    def _measure_held_out_loss(self, step_losses: Losses) -> None:
        """Append a point to the curve, and end the run if its loss has converged."""
        if self.held_out is None:
            return
        state, recipe, optimizer = self.state, self.recipe, self.optimizer
        raw = convergence.loss(optimizer.raw(), self.held_out)
        ema = convergence.loss(optimizer.averaged(), self.held_out) if recipe.ema else math.inf
        finite = {"loss_raw": raw, "loss_ema": ema}
        losses = {key: value if math.isfinite(value) else None for key, value in finite.items()}
        d_model = optimizer.sae.shape.d_model
        row = (
            {"step": state.step, "tokens": state.tokens}
            | flops_so_far(state, recipe, d_model, self._lm_flops)
            | losses
            | {
                "loss": min(
                    (value for value in losses.values() if value is not None), default=None
                ),
                "l0": l0(step_losses, self.mesh),
                "dead": checkpoint.dead_fraction(state, recipe.dead_after, self.mesh),
            }
        )
        if self.mesh.is_rank0:
            self.run.append_curve(row)
            self.curve.append(row)
        converged = self.mesh.is_rank0 and convergence.converged(self.curve, recipe.curve)
        state.converged = bool(self.mesh.all_reduce_max_ints("converged", [int(converged)])[0])

    @property
    def _lm_flops(self) -> int:
        """FLOPs of the LM per activation: to the site, and for the loss behind it."""
        return flops.lm(self.source.lm_parameters) + self.source.flops_of_lm_loss

    def due(self) -> bool:
        """Return whether a checkpoint is due; on a mesh process 0 has the clock."""
        return self.mesh.is_rank0 and checkpoint_due(self.state.step, self.saved_at, self.recipe)

    def save(self) -> None:
        """Save a checkpoint, unless the trainer has failed."""
        if self.failed:
            return
        self.state.seconds = self.seconds_before + time.monotonic() - self.started_at
        self.saver.save(self.run, self.state, self.optimizer)
        self.saved_at = time.monotonic()

    def _leave_out(self, batch: ActivationBatch) -> None:
        """Count a batch whose loss or gradient is not finite; or fail, naming its documents, if
        `run.on_nonfinite` is "stop"."""
        state = self.state
        self.optimizer.forget()
        if self.recipe.run.on_nonfinite == "stop":
            self.saver.wait()
            names = self.source.stream.document_names(batch.documents)
            last = self.run.newest_intact()[0]
            self.failed = NonFiniteError(
                f"the loss or its gradient is NaN or infinite at step {state.step:,}, on documents "
                f"{', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; the last good "
                "checkpoint is "
                f"{last or 'none'}. A smaller --optim.lr or --optim.clip 1 may help; "
                "--run.on-nonfinite skip leaves such batches out"
            )
            return
        state.skipped += 1
        log.warning(
            "step %s left out: its loss or gradient is not finite (%s so far)",
            state.step,
            state.skipped,
        )


def finished(recipe: Recipe, state: TrainState) -> bool:
    """Return whether no step of a run is left: all are taken, or the loss has converged."""
    return state.converged or state.step >= recipe.steps


def start(
    recipe: Recipe, source: ActivationSource, mesh: Mesh = SINGLE_PROCESS
) -> tuple[TrainState, AutogradStep]:
    """Initialize an SAE from the calibration sample, which does not move the stream.

    Args:
        recipe: what to train.
        source: where the activations come from.
        mesh: the processes that share the run; each gets its shard of the same SAE.

    Returns:
        The state before the first step, and the training step.
    """
    calibration = source.calibration
    shape = Shape(
        source.d_model,
        recipe.sae.n_latents,
        recipe.sae.k_at(1, recipe.steps),
        recipe.acts.normalize,
        calibration.factor,
        recipe.sae.activation.kind,
    )
    lm = source.lm
    metadata = {
        "acts": asdict(recipe.acts),
        **({"subject": describe_lm(lm.model)} if lm else {}),
        "policy": source.policy,
        **({"prefixes": list(sizes)} if (sizes := recipe.sae.nested_sizes) else {}),
        "dead_after": recipe.dead_after,
        "ksparse": version("ksparse"),
    }
    if shape.normalize == "none":
        metadata["input_rms"] = calibration.x.cpu().double().square().mean().sqrt().item()
    sae = new_sae(shape, metadata, mesh, recipe.mesh.capacity).to(source.device)
    sample, b_pre = calibration.x.to(sae.W_enc.device), source.center(recipe.sae.b_pre_init)
    initialize_(sae, sample, recipe.sae, torch.Generator().manual_seed(recipe.seed), b_pre=b_pre)
    since = torch.zeros(sae.shape.n_latents, dtype=torch.long, device=source.device)
    if recipe.sae.start:
        sae.metadata["start"] = parent = warm_start.begin_from_(sae, recipe.sae, sample)
        if recipe.sae.uses_auxk:  # what the parent lacks is revived at once
            since[max(0, parent["n_latents"] - sae.joint.first_latent) :] = recipe.dead_after
    log.info(
        "learning rate %.2g (%s); latents are dead after %s tokens",
        recipe.lr,
        "given"
        if recipe.optim.lr
        else f"{recipe.sae.activation.law_factor() * recipe.optim.lr_at_32k:g} x sqrt(32,768 / n)",
        f"{recipe.dead_after:,}",
    )
    state = TrainState(
        since=since,
        baseline=calibration.baseline,
        mesh=[mesh.data, mesh.latent],
    )
    return state, build_step(sae, recipe, mesh)


class DeadLatents:
    """The latents that are dead in the coming step; a GPU lists them while it works on.

    A listing is started right after a step's counters are known, so that its length has reached
    the host before the next step asks for it.
    """

    def __init__(self, dead_after: int):
        self.dead_after = dead_after
        self._indices: Callable[[], Tensor] | None = None

    def indices(self, since: Tensor) -> Tensor:
        """Return the indices of dead latents in ascending order; `since[n]` is read if no listing
        was started."""
        return (self._indices or self.start(since))()

    def start(self, since: Tensor) -> Callable[[], Tensor]:
        """Start to list the dead latents of `since[n]`; the returned function waits for the
        list."""
        return nonzero_async(since >= self.dead_after)

    def keep(self, indices: Callable[[], Tensor]) -> None:
        """Let the next step use a listing that was started."""
        self._indices = indices


def train_step(
    optimizer: AutogradStep,
    x: Tensor,
    state: TrainState,
    recipe: Recipe,
    dead: DeadLatents | None = None,
) -> tuple[Losses, float]:
    """Take step number `state.step` on a batch.

    Args:
        optimizer: the SAE's training step.
        x: normalised activations [b, d_model].
        state: counters, which are updated in place.
        recipe: the recipe.
        dead: the dead latents, kept from step to step; None lists them from `state.since`.

    Returns:
        The losses and the code, and the gradient's norm before clipping. The norm is NaN if the
        loss or the gradient is not finite; weights and dead counters then stay as they are.
    """
    dead = dead or DeadLatents(recipe.dead_after)
    latents = dead.indices(state.since)
    if recipe.sae.uses_auxk:
        tokens, number = (
            auxk_tokens(recipe.sae, len(x) * optimizer.mesh.data),
            optimizer.sae.count(latents),
        )
        state.flops_auxk += tokens * flops.auxk(
            min(k_aux(recipe.sae, x.shape[1]), number), x.shape[1]
        )
    grad_norm = None
    while grad_norm is None:  # None: the step needs the batch's gradients once more
        part = optimizer.backward(
            x, baseline=state.baseline, dead=latents, k_aux=k_aux(recipe.sae, x.shape[1])
        )
        since = update_dead_counts(state.since, part, recipe.batch, optimizer.mesh)
        # Before the weights move, so that a GPU has counted them by the time of the next step.
        listing = dead.start(since)
        grad_norm = optimizer.step(state.step)
    if math.isfinite(grad_norm):
        state.since = since
        dead.keep(listing)
    return part, grad_norm


def update_dead_counts(
    since: Tensor, part: Losses, tokens: int, mesh: Mesh = SINGLE_PROCESS
) -> Tensor:
    """Return the dead counters after a batch.

    A latent fired if one of its values is above 0; being selected is not enough.

    Args:
        since: tokens since each latent last fired, [n_latents].
        part: the losses of the batch, with its code.
        tokens: tokens of the batch, over all processes.
        mesh: the processes that share the run.
    """
    n, (values, indices) = len(since), part.code
    fired = torch.zeros(n + 1, dtype=torch.uint8, device=since.device).scatter_(
        0, torch.where(values > 0, indices, n).flatten(), 1
    )[:n]
    if mesh.data > 1:
        fired = mesh.all_reduce_max("fired", fired, "data")
    return (since + tokens).masked_fill_(fired.bool(), 0)


def metrics(
    part: Losses,
    grad_norm: float,
    state: TrainState,
    recipe: Recipe,
    mixing: float | None,
    optimizer: AutogradStep,
) -> dict[str, Any]:
    """Return what a row of metrics.jsonl says of a step.

    Args:
        part: the losses of the step, with its code.
        grad_norm: the gradient's norm before clipping; NaN if the batch was left out.
        state: the state after the step.
        recipe: the recipe.
        mixing: `ActivationStream.same_context_fraction()`.
        optimizer: the training step.
    """
    mesh = optimizer.mesh
    finite = bool(torch.isfinite(part.total))
    terms = {name: value.item() if finite else None for name, value in part.terms.items()}
    return {
        "step": state.step,
        "tokens": state.tokens,
        "nmse": terms.pop("nmse"),
        "auxk": terms.pop("auxk", 0.0 if finite else None),
        "l0": l0(part, mesh),
        "dead": checkpoint.dead_fraction(state, recipe.dead_after, mesh),
        "lr": recipe.lr * rate_share(state.step, recipe),
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "skipped": state.skipped,
        "neighbours_in_batch": mixing,
        **terms,
    } | (
        {"capacity_used_up": optimizer.sae.exhausted / max(1, optimizer.sae.offers)}
        if recipe.mesh.capacity and isinstance(optimizer.sae, ShardedSAE) and mesh.latent > 1
        else {}
    )


def l0(part: Losses, mesh: Mesh = SINGLE_PROCESS) -> float:
    """Return the mean number of active latents per token, over the batch and all shards."""
    active = (part.code.values > 0).sum(1).float().mean()
    return (
        mesh.all_reduce_sum("l0", mesh.all_reduce_sum("l0", active, "latent"), "data") / mesh.data
    ).item()


def checkpoint_due(step: int, saved_at: float, recipe: Recipe) -> bool:
    """Return whether a checkpoint is due at a step; `saved_at` is when the last one was saved, on
    the clock of `time.monotonic`."""
    if recipe.run.save_every:
        return step % recipe.run.save_every == 0
    return time.monotonic() - saved_at >= 60 * recipe.run.save_minutes


def flops_so_far(
    state: TrainState, recipe: Recipe, d_model: int, lm_flops: int
) -> dict[str, float]:
    """Return the FLOPs of a run so far, by part and in sum; the sum leaves out the LM's."""
    parts = {
        "flops_encoder": float(state.tokens * flops.encoder(recipe, d_model)),
        "flops_decoder": float(state.tokens * flops.decoder(recipe, d_model)),
        "flops_auxk": float(state.flops_auxk),
    }
    return {
        "flops": sum(parts.values()),
        **parts,
        "flops_lm": float(state.tokens * lm_flops),
    }
