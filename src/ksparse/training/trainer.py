"""One SAE in training: its weights, its state, its run's files. Its cohort hands it the batches.

Member(run, recipe, device)   the newest intact checkpoint, if there is one
.join(feed, observe)          start, where there was none; open the logs
.step(batch, x)               gradient, optimiser, dead counters
.log(batch, x)  .save()       metrics.jsonl, curve.jsonl and alarms.jsonl; a checkpoint
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
from ksparse.lm.provenance import describe
from ksparse.planning import flops
from ksparse.sae.init import initialize_
from ksparse.sae.losses import Losses
from ksparse.sae.model import SAE, Shape
from ksparse.sae.sharded import ShardedSAE, shard_of
from ksparse.storage.run_folder import RunFolder
from ksparse.training import checkpoint, convergence
from ksparse.training.checkpoint import TrainState
from ksparse.training.loggers import open_loggers
from ksparse.training.monitor import Monitor
from ksparse.training.resume import restore
from ksparse.training.source import ActivationSource
from ksparse.training.steps.async_copy import nonzero_async
from ksparse.training.steps.autograd import AutogradStep, rate_share
from ksparse.training.steps.select import choose_step

log = logging.getLogger("ksparse")

AUDITED = 64  # tokens of a logged step on which a screen is held against the exact choice


class SAETrainer:
    """An SAE that trains on the batches it is given."""

    state: TrainState
    optimizer: AutogradStep
    """Both are set once it has `started`: from a checkpoint at once, else by `join`."""
    held_out: Tensor
    """Set by `join` where its curve has points."""

    def __init__(
        self, run: RunFolder, recipe: Recipe, device: torch.device, saver: checkpoint.Saver
    ):
        self.run, self.recipe, self.device, self.saver, self.mesh = (
            run,
            recipe,
            device,
            saver,
            saver.mesh,
        )
        self.failed: NonFiniteError | None = None
        self.points = convergence.points(recipe)
        restored = restore(run, recipe, device, self.mesh)
        self.started = restored is not None
        if restored:
            self.state, self.optimizer = restored

    @property
    def ended(self) -> bool:
        """Whether there is no step left: all are done, or the loss has converged."""
        return self.started and (self.state.converged or self.state.step >= self.recipe.steps)

    def join(
        self, feed: ActivationSource, observe: Callable[[RunFolder, dict[str, Any]], None]
    ) -> None:
        """Begin to take part."""
        self.feed = feed
        if not self.started:
            self.state, self.optimizer = start(self.recipe, feed, self.mesh)
            self.started = True
        self.send = (
            [
                self.run.append_metrics,
                lambda row: observe(self.run, row),
                *open_loggers(self.recipe, self.run),
            ]
            if self.mesh.is_rank0
            else []
        )
        self.curve = self.run.curve()
        self.alarms = Monitor(self.recipe, self.run.metrics())
        if self.points:
            self.held_out = feed.held_out
        self.began = self.saved = time.monotonic()
        self.spent, self.first = self.state.seconds, self.state.tokens

    def step(self, batch: ActivationBatch, x: Tensor) -> None:
        """Take one step on normalised activations x[b, d] of a batch; leave the cohort where the
        loss is not finite."""
        state, recipe = self.state, self.recipe
        state.step += 1
        self.part, self.grad_norm = train_step(self.optimizer, x, state, recipe)
        if not math.isfinite(self.grad_norm):
            self._skip(batch)
        state.tokens += recipe.batch
        state.cursor = batch.cursor

    def log(self, batch: ActivationBatch, x: Tensor) -> None:
        """Write what is due at this step: a line of metrics, a point of the curve, what calls for
        attention."""
        state, recipe = self.state, self.recipe
        if self.failed:
            return
        if state.step in self.points:
            self._measure()
        dead = None
        if state.step % recipe.run.log_every == 0 or state.step == 1 or self.ended:
            now = time.monotonic()
            state.seconds = self.spent + now - self.began
            row = (
                metrics(
                    self.part,
                    self.grad_norm,
                    state,
                    recipe,
                    self.feed.stream.mixing(),
                    self.optimizer,
                )
                | self.optimizer.audit(x[:AUDITED])
                | {
                    "waiting": self.feed.waited / max(now - self.began, 1e-9),
                    "tokens_per_s": (state.tokens - self.first) / max(now - self.began, 1e-9),
                    "seconds": state.seconds,
                }
            )
            for each in self.send:
                each(row)
            dead = row["dead"]
        for alarm in (
            self.alarms.see(state.step, state.tokens, self.grad_norm, dead)
            if self.mesh.is_rank0
            else ()
        ):
            log.warning(
                "step %s: %s%s",
                f"{state.step:,}",
                alarm["says"],
                f" ({alarm['kept_back']:,} more such steps since the last warning)"
                if alarm["kept_back"]
                else "",
            )
            self.run.append_alarm(alarm)

    def _measure(self) -> None:
        """Add a point to the curve, and end the run where it has converged."""
        state, recipe, sae = self.state, self.recipe, self.optimizer.sae
        losses = {
            "loss_raw": convergence.loss(self.optimizer.raw(), self.held_out),
            "loss_ema": convergence.loss(self.optimizer.averaged(), self.held_out)
            if recipe.ema
            else None,
        }
        row = (
            {"step": state.step, "tokens": state.tokens}
            | flops_so_far(state, recipe, sae.shape.d_model, self.feed.lm_parameters)
            | {
                key: value if value is not None and math.isfinite(value) else None
                for key, value in losses.items()
            }
        )
        row |= {
            "loss": min(
                (value for value in (row["loss_raw"], row["loss_ema"]) if value is not None),
                default=None,
            ),
            "l0": l0(self.part, self.mesh),
            "dead": checkpoint.dead_fraction(state, recipe.dead_after, self.mesh),
        }
        if self.mesh.is_rank0:
            self.run.append_curve(row)
            self.curve.append(row)
        state.converged = bool(
            self.mesh.all_reduce_max_ints(
                "converged",
                [int(self.mesh.is_rank0 and convergence.converged(self.curve, recipe.curve))],
            )[0]
        )

    def due(self) -> bool:
        """Return whether it is time for a checkpoint; the first process has the clock."""
        return self.mesh.is_rank0 and checkpoint_due(self.state.step, self.saved, self.recipe)

    def save(self) -> None:
        """Save a checkpoint."""
        if self.failed:
            return
        self.state.seconds = self.spent + time.monotonic() - self.began
        self.saver.save(self.run, self.state, self.optimizer)
        self.saved = time.monotonic()

    def _skip(self, batch: ActivationBatch) -> None:
        """Leave, naming the documents, or count the batch and go on without it."""
        state = self.state
        self.optimizer.forget()
        if self.recipe.run.on_nonfinite == "stop":
            self.saver.wait()
            names = self.feed.stream.document_names(batch.documents)
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


def start(
    recipe: Recipe, feed: ActivationSource, mesh: Mesh = SINGLE_PROCESS
) -> tuple[TrainState, AutogradStep]:
    """Initialise an SAE from the first activations (which does not move the stream); on a mesh, a
    slice of the same SAE."""
    look = feed.look
    shape = Shape(
        feed.stream.d_model,
        recipe.sae.n_latents,
        recipe.sae.k,
        recipe.acts.normalize,
        look.factor,
        recipe.sae.activation.kind,
    )
    subject = {"subject": describe(lm.model)} if (lm := getattr(feed.source, "lm", None)) else {}
    sae = SAE(
        shape,
        {
            "acts": asdict(recipe.acts),
            **subject,
            "policy": feed.policy,
            "dead_after": recipe.dead_after,
            "ksparse": version("ksparse"),
        },
    )
    sae = (
        sae if mesh.latent > 1 else sae.to(feed.device)
    )  # the whole may be too large for one device
    sample, b_pre = look.x.to(sae.W_enc.device), feed.center(recipe.sae.b_pre_init)
    initialize_(sae, sample, recipe.sae, torch.Generator().manual_seed(recipe.seed), b_pre=b_pre)
    sae = shard_of(sae, mesh, recipe.mesh.capacity).to(feed.device)
    log.info(
        "learning rate %.2g (%s); latents are dead after %s tokens",
        recipe.lr,
        "given" if recipe.optim.lr else f"{recipe.optim.lr_at_32k:g} x sqrt(32,768 / n)",
        f"{recipe.dead_after:,}",
    )
    state = TrainState(
        since=torch.zeros(sae.shape.n_latents, dtype=torch.long, device=feed.device),
        baseline=look.baseline,
        mesh=[mesh.data, mesh.latent],
    )
    return state, choose_step(sae, recipe, mesh)


def train_step(
    optimizer: AutogradStep, x: Tensor, state: TrainState, recipe: Recipe
) -> tuple[Losses, float]:
    """Take step number state.step on normalised activations x[b, d]; return its losses and code,
    and the gradient's norm before clipping.

    Where loss or gradient is not finite the norm is NaN, and neither weights nor dead counters
    change.
    """
    if recipe.sae.uses_auxk:
        tokens, number = (
            auxk_tokens(recipe.sae, len(x) * optimizer.mesh.data),
            optimizer.sae.count(dead_latents(state, recipe)),
        )
        state.flops_auxk += tokens * flops.auxk(
            min(k_aux(recipe.sae, x.shape[1]), number), x.shape[1]
        )
    grad_norm = None
    while grad_norm is None:  # a step may find that it has to take the batch in again
        part = backward(optimizer, x, state, recipe)
        since = update_dead_counts(state.since, part, recipe.batch, optimizer.mesh)
        dead = nonzero_async(
            since >= recipe.dead_after
        )  # asked before the rows move, so that a GPU has told by the time of the next step
        grad_norm = optimizer.step(state.step)
    if math.isfinite(grad_norm):
        state.since, state.dead = since, dead
    return part, grad_norm


def backward(optimizer: AutogradStep, x: Tensor, state: TrainState, recipe: Recipe) -> Losses:
    """Have the optimiser take in the gradients of normalised activations x[b, d]; return its losses
    and code."""
    return optimizer.backward(
        x,
        baseline=state.baseline,
        dead=dead_latents(state, recipe),
        k_aux=k_aux(recipe.sae, x.shape[1]),
    )


def dead_latents(state: TrainState, recipe: Recipe) -> Tensor:
    """Return the latents that count as dead in the coming step, in order."""
    return (state.dead or nonzero_async(state.since >= recipe.dead_after))()


def update_dead_counts(
    since: Tensor, part: Losses, tokens: int, mesh: Mesh = SINGLE_PROCESS
) -> Tensor:
    """Return the dead counters since[n] some tokens later; a latent fired if one of its values is
    above 0, being chosen is not enough."""
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
    """Return one line of metrics.jsonl."""
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
        if recipe.mesh.capacity and isinstance(optimizer.sae, ShardedSAE)
        else {}
    )


def l0(part: Losses, mesh: Mesh = SINGLE_PROCESS) -> float:
    """Return the mean number of values above 0, over all parts of the batch and slices."""
    active = (part.code.values > 0).sum(1).float().mean()
    return (
        mesh.all_reduce_sum("l0", mesh.all_reduce_sum("l0", active, "latent"), "data") / mesh.data
    ).item()


def checkpoint_due(step: int, saved: float, recipe: Recipe) -> bool:
    if recipe.run.save_every:
        return step % recipe.run.save_every == 0
    return time.monotonic() - saved >= 60 * recipe.run.save_minutes


def flops_so_far(
    state: TrainState, recipe: Recipe, d_model: int, lm_parameters: int
) -> dict[str, float]:
    """Return the FLOPs of a run up to now, by part and in sum; the LM's are not in the sum."""
    parts = {
        "flops_encoder": float(state.tokens * flops.encoder(recipe, d_model)),
        "flops_decoder": float(state.tokens * flops.decoder(recipe, d_model)),
        "flops_auxk": float(state.flops_auxk),
    }
    return {
        "flops": sum(parts.values()),
        **parts,
        "flops_lm": float(state.tokens * flops.lm(lm_parameters)),
    }
