"""Probe loss: how well the best single latent predicts a label.

Gao et al. 2024, section 4.2, eq. 4. For each task a logistic probe is fitted to each latent alone.
The best latent is chosen on the training half of the task's rows, and its loss is taken on the test
half. The paper reports the smallest of n training losses instead; that falls with n even for
latents that carry no information. It is reported too, as `probe_loss_in_sample`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.probing import logistic, tasks
from ksparse.evals.probing.tasks import ProbeTasks, TaskRows
from ksparse.evals.statistics import Clustered, Result, Value
from ksparse.sae.model import SAE

LISTED = 10
"""Best latents that are listed for each task."""
_SLICE = 4_096  # latents fitted at a time
PREDICTORS = ("probe", "channel", "random_sae", "dense_probe", "prior")
"""The best latent, channel and random latent, a probe on all dimensions, and the base rate."""


@dataclass
class BestLatent:
    """The best of a task's n probes, and the training losses [n] of all."""

    latent: int
    weight: float
    bias: float
    losses: Tensor


@dataclass
class TaskLosses:
    """The losses of one task.

    Attributes:
        latent: The best latent in training.
        losses: Test losses by each of `PREDICTORS`.
        in_sample: The training loss of the best latent.
        best_latents: The best latents with their training loss, best first.
        counts: Fields n_train, n_test and positive (the share of label 1) of the result.
    """

    latent: int
    losses: dict[str, Clustered]
    in_sample: Clustered
    best_latents: list[tuple[int, float]]
    counts: dict[str, float]


class Probes(Metric):
    """The loss of each task's best latent, and of four baselines.

    The baselines are the best channel, the best latent of a random SAE, a probe on all dimensions,
    and the base rate.
    """

    passes = 0

    def __init__(self, context: EvalContext):
        super().__init__(context)
        tasks.check_options(context.options)
        self.task_losses: dict[str, TaskLosses] = {}
        self.cut: list[int] = []
        self.n_texts = 0
        self.gain = torch.full((context.sae.shape.n_latents,), -math.inf, dtype=torch.float64)
        self.best_task = torch.full((context.sae.shape.n_latents,), -1, dtype=torch.int32)

    def compute(self, progress: Progress) -> None:
        sae, data = self.context.sae, self.context.data
        self.tasks: ProbeTasks = data.once(
            "probe tasks", lambda: tasks.read(data.lm, data.acts, data.options, progress)
        )
        random_baseline = random_sae(sae, data.options.seed)
        progress("fitting probes", 0, len(self.tasks.names))
        for number, name in enumerate(self.tasks.names):
            rows = (
                data.once(f"probe rows {name}", functools.partial(self.tasks.rows, name))
                if data.options.position == "last"
                else self.tasks.rows(name)
            )
            _check_counts(rows)
            self.cut += rows.cut
            self.n_texts += len(rows.label)
            self.task_losses[name] = self._fit_task(number, rows, random_baseline)
            progress("fitting probes", number + 1, len(self.tasks.names))

    def _fit_task(self, number: int, rows: TaskRows, random_baseline: SAE) -> TaskLosses:
        options, sae = self.context.options, self.context.sae
        train, test = rows.half(True), rows.half(False)
        best, logits = _best_probe(
            _LatentBank(sae, options.probe_on, options.position), train, test, options.probe_l2
        )
        _, random = _best_probe(
            _LatentBank(random_baseline, options.probe_on, options.position),
            train,
            test,
            options.probe_l2,
        )
        losses = {"probe": logits, "random_sae": random} | self.context.data.once(
            f"probe baselines {rows.name}",
            lambda: baselines(train, test, options.position, options.probe_l2),
        )
        y = test.label.double()
        clustered = {
            predictor: Clustered(test.cluster, logistic.cross_entropy(losses[predictor], y))
            for predictor in PREDICTORS
        }
        log_odds = torch.tensor(logistic.log_odds(train.label))
        base_rate_loss = logistic.cross_entropy(log_odds, train.label.double()).mean().item()
        gain = base_rate_loss - best.losses.cpu()
        better = gain > self.gain
        self.gain[better], self.best_task[better] = gain[better], number
        order = best.losses.argsort()[:LISTED].tolist()
        in_sample = Clustered(train.cluster, self._training_losses(best, train))
        return TaskLosses(
            best.latent,
            clustered,
            in_sample,
            [(i, float(best.losses[i])) for i in order],
            {
                "n_train": len(train.label),
                "n_test": len(test.label),
                "positive": rows.label.double().mean().item(),
            },
        )

    def _training_losses(self, best: BestLatent, train: TaskRows) -> Tensor:
        options = self.context.options
        bank = _LatentBank(self.context.sae, options.probe_on, options.position)
        z = bank.values(train, best.latent)
        return logistic.cross_entropy(best.weight * z + best.bias, train.label.double())

    def finalize(self) -> Result:
        tasks_done, options = list(self.task_losses.values()), self.context.options
        losses = {
            predictor: [task.losses[predictor] for task in tasks_done] for predictor in PREDICTORS
        }
        values = {
            "probe_loss": Clustered.mean(losses["probe"]),
            "probe_loss_in_sample": Clustered.mean([task.in_sample for task in tasks_done]),
        }
        values |= {
            f"{predictor}_loss": Clustered.mean(losses[predictor])
            for predictor in PREDICTORS
            if predictor != "probe"
        }
        values |= {
            f"gain_over_{name}": Clustered.mean(
                [baseline - probe for baseline, probe in zip(losses[predictor], losses["probe"])]
            )
            for name, predictor in (("channels", "channel"), ("random_sae", "random_sae"))
        }
        notes = list(self.tasks.notes) + [
            f"{name} is left out: {why}" for name, why in self.tasks.left_out.items()
        ]
        notes += tasks.describe_cuts(
            self.cut,
            self.n_texts,
            "texts",
            min(options.probe_tokens, self.context.lm.context or options.probe_tokens),
            "beginning",
        )
        arrays = {"best_task": self.best_task, "best_gain": self.gain.float()}
        return Result(
            {
                **values,
                "suite": self.tasks.suite,
                "n_tasks": len(tasks_done),
                "tasks": {name: _to_dict(task) for name, task in self.task_losses.items()},
                "notes": notes,
            },
            arrays,
        )


def _to_dict(task: TaskLosses) -> dict[str, object]:
    losses: dict[str, Value] = {
        ("loss" if predictor == "probe" else f"{predictor}_loss"): Clustered.mean([loss])
        for predictor, loss in task.losses.items()
    }
    return {
        "latent": task.latent,
        **losses,
        "loss_in_sample": Clustered.mean([task.in_sample]),
        **task.counts,
        "best_latents": [
            {"latent": latent, "loss_in_sample": loss} for latent, loss in task.best_latents
        ],
    }


def _check_counts(rows: TaskRows) -> None:
    """Raise InputError unless both halves have enough rows of both labels."""
    for train, name in ((True, "training"), (False, "test")):
        labels = rows.label[rows.train == train]
        for label in (0, 1):
            count = int((labels == label).sum())
            if count < 5:
                raise InputError(
                    f"task {rows.name}: {count} rows with label {label} in its {name} half; at "
                    "least 5 are needed"
                )


def random_sae(sae: SAE, seed: int) -> SAE:
    """Return a TopK SAE of the same size, k and b_pre with random unit vectors as encoder rows."""
    random = SAE(dataclasses.replace(sae.shape, activation="topk")).to(sae.W_enc.device)
    directions = torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(seed))
    random.W_enc.data = (directions / directions.norm(dim=1, keepdim=True)).to(sae.W_enc)
    random.b_pre.data = sae.b_pre.data.clone()
    return random


def baselines(train: TaskRows, test: TaskRows, position: str, l2: float) -> dict[str, Tensor]:
    """Return the test logits [s] of the baselines that do not depend on the SAE.

    Returns:
        By name: the best channel, a probe on all dimensions (`dense_probe`), and the base rate
        (`prior`).
    """
    _, channel = _best_probe(_ChannelBank(position), train, test, l2)
    x_train, x_test = (_pool(rows.x, rows, position) for rows in (train, test))
    mean = x_train.mean(0)
    # One scale for all dimensions, so that directions keep their proportions.
    scale = (x_train - mean).square().mean().sqrt().clamp_min(1e-30)
    u_train, u_test = (x_train - mean).cpu() / scale.cpu(), (x_test - mean).cpu() / scale.cpu()
    y = train.label.cpu()
    weight, bias = logistic.fit_dense(
        u_train, y, l2=logistic.choose_penalty(u_train, y, train.cluster.cpu())
    )
    dense = (u_test.double() @ weight + bias).to(channel.device)
    return {
        "channel": channel,
        "dense_probe": dense,
        "prior": torch.full_like(channel, logistic.log_odds(train.label)),
    }


def _best_probe(
    bank: _ProbeBank, train: TaskRows, test: TaskRows, l2: float
) -> tuple[BestLatent, Tensor]:
    """Fit a probe to each latent; return the best in training and its logits [s] on test rows."""
    fitted = bank.fit(train, l2)
    latent = int(fitted.loss.argmin())
    weight, bias = fitted.weight[latent], fitted.bias[latent]
    logits = weight * bank.values(test, latent) + bias
    return BestLatent(latent, weight.item(), bias.item(), fitted.loss), logits


# ---- inputs of probes ----------------------------------------------------------------------------


class _ProbeBank(Protocol):
    """Many scalar functions of a row (latents or channels), each the input of a probe."""

    def fit(self, rows: TaskRows, l2: float) -> logistic.ProbeFit:
        """Fit a probe to each."""

    def values(self, rows: TaskRows, latent: int) -> Tensor:
        """Return the values [s] of one, float64."""


class _ChannelBank:
    """The site's own channels."""

    def __init__(self, position: str):
        self.position = position

    def fit(self, rows: TaskRows, l2: float) -> logistic.ProbeFit:
        return logistic.fit(_pool(rows.x, rows, self.position).T.contiguous(), rows.label, l2=l2)

    def values(self, rows: TaskRows, latent: int) -> Tensor:
        return _pool(rows.x[:, latent : latent + 1], rows, self.position)[:, 0].double()


class _LatentBank:
    """An SAE's latents, before or after its TopK."""

    def __init__(self, sae: SAE, on: str, position: str):
        self.sae, self.on, self.position = sae, on, position

    def fit(self, rows: TaskRows, l2: float) -> logistic.ProbeFit:
        if self.on == "acts":
            return logistic.fit_sparse(
                *self._entries(rows), rows.label, self.sae.shape.n_latents, l2=l2
            )
        centred = self._centre(rows)  # shared by all slices
        parts = (
            logistic.fit(
                self._pre_acts(rows, centred, slice(at, at + _SLICE)),
                rows.label,
                l2=l2,
                finish=4 * LISTED,
            )
            for at in range(0, self.sae.shape.n_latents, _SLICE)
        )
        return logistic.ProbeFit(*(torch.cat(column) for column in zip(*parts)))

    def values(self, rows: TaskRows, latent: int) -> Tensor:
        if self.on == "pre_acts":
            return self._pre_acts(rows, self._centre(rows), slice(latent, latent + 1))[0].double()
        latents, owners, values = self._entries(rows)
        chosen = latents == latent
        return torch.zeros(len(rows.label), dtype=torch.float64, device=rows.x.device).index_add(
            0, owners[chosen], values[chosen].double()
        )

    def _centre(self, rows: TaskRows) -> Tensor:
        """Return x - b_pre; pooled by mean already here, since pre-activations are linear in it."""
        x = self.sae.normalize(rows.x).x - self.sae.b_pre
        return _pool(x, rows, "mean") if self.position == "mean" else x

    def _pre_acts(self, rows: TaskRows, centred: Tensor, part: slice) -> Tensor:
        """Return pre-activations of a slice of the latents, [part, s]."""
        z = torch.addmm(self.sae.b_enc[part, None], self.sae.W_enc[part], centred.T)
        return _pool(z.T, rows, "max").T.contiguous() if self.position == "max" else z

    def _entries(self, rows: TaskRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return latent, row and pooled value of all pairs with an activation above 0."""
        code = self.sae.encode(rows.x)
        act, slot = (code.values > 0).nonzero(as_tuple=True)
        key = code.indices[act, slot] * len(rows.label) + rows.owner[act]
        keys, inverse = key.unique(return_inverse=True)
        values = torch.zeros(len(keys), device=key.device).scatter_reduce(
            0, inverse, code.values[act, slot], "amax" if self.position == "max" else "sum"
        )
        owner = keys % len(rows.label)
        if self.position == "mean":
            values = values / torch.bincount(rows.owner, minlength=len(rows.label))[owner]
        return keys // len(rows.label), owner, values


def _pool(values: Tensor, rows: TaskRows, position: str) -> Tensor:
    """Pool values[m, c] of activations to rows [s, c]: the only one ("last"), mean or max."""
    if position == "last":
        return values
    shape = (len(rows.label), values.shape[1])
    owner = rows.owner[:, None].expand_as(values)
    if position == "max":
        return torch.full(shape, -math.inf, device=values.device).scatter_reduce(
            0, owner, values, "amax"
        )
    return torch.zeros(shape, device=values.device).scatter_reduce(
        0, owner, values, "mean", include_self=False
    )
