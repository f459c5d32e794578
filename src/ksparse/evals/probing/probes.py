"""Do single latents know what we know? Probe loss: Gao et al. 2024, section 4.2, eq. 4.

For each task a logistic probe is fitted to each latent alone. The best latent is chosen on the
training half of the task's rows and its loss taken on the other half: the smallest of n losses on
the rows of the fit, which the paper reports, falls with n even for latents that know nothing. That
number is reported beside it, as `probe_loss_in_sample`.
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

LISTED = 10  # best latents of each task
_SLICE = 4_096  # latents at a time
KINDS = ("probe", "channel", "random_sae", "dense_probe", "prior")


@dataclass
class BestLatent:
    """The best of n probes of a task: which, its weight and bias, and the training loss of all
    [n]."""

    latent: int
    weight: float
    bias: float
    losses: Tensor


@dataclass
class TaskLosses:
    """One task's losses, a Clustered for each kind of probe, and the latents that were best in
    training."""

    latent: int
    losses: dict[str, Clustered]
    in_sample: Clustered
    listed: list[tuple[int, float]]
    facts: dict[str, float]


class Probes(Metric):
    """The loss of the best single latent of each task, beside channels, random latents, all
    dimensions and the label's share."""

    passes = 0

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.judged: dict[str, TaskLosses] = {}
        self.unseen: list[int] = []
        self.texts = 0
        self.gain = torch.full((context.sae.shape.n_latents,), -math.inf, dtype=torch.float64)
        self.best_task = torch.full((context.sae.shape.n_latents,), -1, dtype=torch.int32)

    def compute(self, observe: Progress) -> None:
        sae, data = self.context.sae, self.context.data
        self.tasks: ProbeTasks = data.once(
            "probe tasks", lambda: tasks.read(data.lm, data.acts, data.options, observe)
        )
        rivals = random_sae(sae, data.options.seed)
        for number, name in enumerate(self.tasks.names):
            rows = (
                data.once(f"probe rows {name}", functools.partial(self.tasks.rows, name))
                if data.options.position == "last"
                else self.tasks.rows(name)
            )
            _check(rows)
            self.unseen, self.texts = [*self.unseen, *rows.unseen], self.texts + len(rows.label)
            self.judged[name] = self._judge(number, rows, rivals)
            observe("fitting probes", number + 1, len(self.tasks.names))

    def _judge(self, number: int, rows: TaskRows, rivals: SAE) -> TaskLosses:
        options, sae = self.context.options, self.context.sae
        train, test = rows.half(True), rows.half(False)
        best, logits = _probe(
            _Latents(sae, options.probe_on, options.position), train, test, options.probe_l2
        )
        _, random = _probe(
            _Latents(rivals, options.probe_on, options.position), train, test, options.probe_l2
        )
        losses = {"probe": logits, "random_sae": random} | self.context.data.once(
            f"probe baselines {rows.name}",
            lambda: baselines(train, test, options.position, options.probe_l2),
        )
        y = test.label.double()
        clustered = {
            kind: Clustered(test.cluster, logistic.cross_entropy(losses[kind], y)) for kind in KINDS
        }
        prior = (
            logistic.cross_entropy(
                torch.tensor(logistic.log_odds(train.label)), train.label.double()
            )
            .mean()
            .item()
        )
        gain = prior - best.losses.cpu()
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
        z = _Latents(self.context.sae, options.probe_on, options.position).values(
            train, best.latent
        )
        return logistic.cross_entropy(best.weight * z + best.bias, train.label.double())

    def finalize(self) -> Result:
        judged, options = self.judged, self.context.options
        of = {kind: [each.losses[kind] for each in judged.values()] for kind in KINDS}
        values = {
            "probe_loss": Clustered.mean(of["probe"]),
            "probe_loss_in_sample": Clustered.mean([each.in_sample for each in judged.values()]),
        }
        values |= {f"{kind}_loss": Clustered.mean(of[kind]) for kind in KINDS if kind != "probe"}
        values |= {
            f"gain_over_{name}": Clustered.mean([a - b for a, b in zip(of[kind], of["probe"])])
            for name, kind in (("channels", "channel"), ("random_sae", "random_sae"))
        }
        notes = list(self.tasks.notes) + [
            f"{name} is left out: {why}" for name, why in self.tasks.left_out.items()
        ]
        notes += tasks.lost(
            self.unseen,
            self.texts,
            "texts",
            min(options.probe_tokens, self.context.lm.context or options.probe_tokens),
            "beginning",
        )
        arrays = {"best_task": self.best_task, "best_gain": self.gain.float()}
        return Result(
            {
                **values,
                "suite": self.tasks.suite,
                "n_tasks": len(judged),
                "tasks": {name: _shown(each) for name, each in judged.items()},
                "notes": notes,
            },
            arrays,
        )


def _shown(judged: TaskLosses) -> dict[str, object]:
    losses: dict[str, Value] = {
        ("loss" if kind == "probe" else f"{kind}_loss"): Clustered.mean([each])
        for kind, each in judged.losses.items()
    }
    return {
        "latent": judged.latent,
        **losses,
        "loss_in_sample": Clustered.mean([judged.in_sample]),
        **judged.facts,
        "best_latents": [
            {"latent": latent, "loss_in_sample": loss} for latent, loss in judged.listed
        ],
    }


def _check(rows: TaskRows) -> None:
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
    """Return a TopK SAE of the same size, k and b_pre whose encoder rows are random directions."""
    made = SAE(dataclasses.replace(sae.shape, activation="topk")).to(sae.W_enc.device)
    directions = torch.randn(sae.W_enc.shape, generator=torch.Generator().manual_seed(seed))
    made.W_enc.data = (directions / directions.norm(dim=1, keepdim=True)).to(sae.W_enc)
    made.b_pre.data = sae.b_pre.data.clone()
    return made


def baselines(train: TaskRows, test: TaskRows, position: str, l2: float) -> dict[str, Tensor]:
    """Return test logits of what does not depend on the SAE: the best channel, a probe on all
    dimensions, the label's share."""
    _, channel = _probe(_Channels(position), train, test, l2)
    x_train, x_test = (
        _pooled(rows.x, rows, "mean" if position == "mean" else position) for rows in (train, test)
    )
    mean = x_train.mean(0)
    scale = (
        (x_train - mean).square().mean().sqrt().clamp_min(1e-30)
    )  # one for all, so that directions keep their proportions
    u_train, u_test = (x_train - mean).cpu() / scale.cpu(), (x_test - mean).cpu() / scale.cpu()
    y = train.label.cpu()
    weight, bias = logistic.fit_whole(
        u_train, y, l2=logistic.choose_penalty(u_train, y, train.cluster.cpu())
    )
    dense = (u_test.double() @ weight + bias).to(channel.device)
    return {
        "channel": channel,
        "dense_probe": dense,
        "prior": torch.full_like(channel, logistic.log_odds(train.label)),
    }


def _probe(bank: _Bank, train: TaskRows, test: TaskRows, l2: float) -> tuple[BestLatent, Tensor]:
    """Fit a probe to each latent of a bank; return the best in training, and its logits [s] on the
    test rows."""
    fitted = bank.fit(train, l2)
    latent = int(fitted.loss.argmin())
    weight, bias = fitted.weight[latent], fitted.bias[latent]
    return BestLatent(latent, weight.item(), bias.item(), fitted.loss), weight * bank.values(
        test, latent
    ) + bias


# ---- what is probed ------------------------------------------------------------------------------


class _Bank(Protocol):
    """Numbers that a text or a token has one of for each latent: a probe for each, and one latent's
    values [s] as float64."""

    def fit(self, rows: TaskRows, l2: float) -> logistic.ProbeFit: ...
    def values(self, rows: TaskRows, latent: int) -> Tensor: ...


class _Channels:
    """The site's own channels."""

    def __init__(self, position: str):
        self.position = position

    def fit(self, rows: TaskRows, l2: float) -> logistic.ProbeFit:
        return logistic.fit(_pooled(rows.x, rows, self.position).T.contiguous(), rows.label, l2=l2)

    def values(self, rows: TaskRows, latent: int) -> Tensor:
        return _pooled(rows.x[:, latent : latent + 1], rows, self.position)[:, 0].double()


class _Latents:
    """An SAE's latents, before or after its TopK."""

    def __init__(self, sae: SAE, on: str, position: str):
        self.sae, self.on, self.position = sae, on, position

    def fit(self, rows: TaskRows, l2: float) -> logistic.ProbeFit:
        if self.on == "acts":
            return logistic.fit_sparse(
                *self._entries(rows), rows.label, self.sae.shape.n_latents, l2=l2
            )
        centred = self._centred(rows)  # once for all slices
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
            return self._pre_acts(rows, self._centred(rows), slice(latent, latent + 1))[0].double()
        latents, owners, values = self._entries(rows)
        mine = latents == latent
        return torch.zeros(len(rows.label), dtype=torch.float64, device=rows.x.device).index_add(
            0, owners[mine], values[mine].double()
        )

    def _centred(self, rows: TaskRows) -> Tensor:
        """Return x - b_pre; the mean over positions is taken of it, since pre-activations are
        linear in it."""
        x = self.sae.normalize(rows.x).x - self.sae.b_pre
        return _pooled(x, rows, "mean") if self.position == "mean" else x

    def _pre_acts(self, rows: TaskRows, centred: Tensor, part: slice) -> Tensor:
        """Return pre-activations [part, s]."""
        z = torch.addmm(self.sae.b_enc[part, None], self.sae.W_enc[part], centred.T)
        return _pooled(z.T, rows, "max").T.contiguous() if self.position == "max" else z

    def _entries(self, rows: TaskRows) -> tuple[Tensor, Tensor, Tensor]:
        """Return (latent, row, value) of all activations above 0, each latent and row once."""
        code = self.sae.encode(rows.x)
        at, slot = (code.values > 0).nonzero(as_tuple=True)
        key = code.indices[at, slot] * len(rows.label) + rows.owner[at]
        keys, inverse = key.unique(return_inverse=True)
        values = torch.zeros(len(keys), device=key.device).scatter_reduce(
            0, inverse, code.values[at, slot], "amax" if self.position == "max" else "sum"
        )
        owner = keys % len(rows.label)
        if self.position == "mean":
            values = values / torch.bincount(rows.owner, minlength=len(rows.label))[owner]
        return keys // len(rows.label), owner, values


def _pooled(values: Tensor, rows: TaskRows, position: str) -> Tensor:
    """Return [s, c] from values[m, c] of all activations: the last's, which is the only one, or the
    mean or largest of each row."""
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
