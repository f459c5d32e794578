"""Is a code still good at another k, or with a threshold in place of k?

Gao et al. 2024, section 5.3. After training, the activation is replaced by TopK(k'), or by z 1[z >
threshold] with one threshold for all latents, and the error and the LM's loss are plotted against
the resulting L0. A code is progressive if more latents always help. Here z are the positive
pre-activations; for an SAE whose gate is part of its values (gated, prolu), the values that the
gate lets through.

    threshold_for(sae, x, l0)          the threshold that gives an L0
    at_threshold(sae, x, threshold)    the code at a threshold
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import HeldOut, SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, ratio
from ksparse.evals.stats import spread
from ksparse.sae.model import SAE, Code

MULTIPLES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, math.sqrt(1 / 2), 1, math.sqrt(2), 2, math.sqrt(8), 4, 8)
"""k' as multiples of the SAE's own L0 on the first tokens."""
CHOSEN_ON = 8_192
"""Tokens on which thresholds are chosen."""
_PRE_ACTS = 2**24  # pre-activations in memory at a time


class Progressive(Metric):
    """L0, error and the LM's loss with the SAE's own activation, with TopK(k'), with a threshold,
    and with all positive latents."""

    comparison_keys = ("own", "topk", "threshold", "all")

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.sums, self.tokens = DocumentSums(), 0

    def prepare(self) -> None:
        sae = self.context.sae
        x = _first_activations(self.context.data)
        own_l0 = float((sae.encode(x).values > 0).sum(1).double().mean())
        self.ks = sorted(
            {min(sae.shape.n_latents, max(1, round(multiple * own_l0))) for multiple in MULTIPLES}
        )
        self.chosen_on = len(x)
        self.thresholds = thresholds_for(sae, x, self.ks)

    def update(self, batch: SAEBatch) -> None:
        if self.tokens >= self.context.options.progressive_tokens:
            return
        held_out, sae, x = batch.held_out, batch.sae, batch.inputs.x
        self.tokens += len(x)
        x64 = x.cpu().double()
        self.sums.add(
            held_out.documents, count=torch.ones(len(x)), square=x64.square().sum(1), sum=x64
        )
        self.sums.add(
            held_out.predicted_documents,
            tokens=torch.ones(int(held_out.predicted.sum())),
            ce_clean=held_out.clean_losses,
        )
        self._add(batch, "own", (batch.code.values > 0).sum(1), batch.recon, batch.spliced.losses)
        acts = positive(sae, x)
        widest = acts.topk(self.ks[-1], dim=1)  # sorted, so TopK(k') is its first k' columns
        for k in self.ks:
            code = Code(widest.values[:, :k], widest.indices[:, :k])
            recon = sae.decode_normalized(code)
            losses = batch.losses_with(recon)
            self._add(batch, f"topk-{k}", (code.values > 0).sum(1), recon, losses)
        for k, threshold in zip((*self.ks, 0), (*self.thresholds, 0.0)):
            above = torch.where(acts > threshold, acts, 0.0)
            recon = above @ sae.W_dec + sae.b_pre
            losses = batch.losses_with(recon)
            self._add(batch, f"threshold-{k}", (above > 0).sum(1), recon, losses)

    def _add(self, batch: SAEBatch, name: str, l0: Tensor, recon: Tensor, losses: Tensor) -> None:
        error = (batch.inputs.x.cpu().double() - recon.cpu().double()).square().sum(1)
        self.sums.add(batch.held_out.documents, **{f"l0 {name}": l0, f"error {name}": error})
        self.sums.add(batch.held_out.predicted_documents, **{f"ce {name}": losses})

    def _point(self, name: str, **settings: Any) -> dict[str, Any]:
        sums = self.sums
        return {
            **settings,
            "l0": ratio(sums[f"l0 {name}"], sums["count"]),
            "nmse": ratio(
                sums[f"error {name}"], spread(sums["square"], sums["sum"], sums["count"])
            ),
            "ce_delta": ratio(sums[f"ce {name}"] - sums["ce_clean"], sums["tokens"]),
        }

    def finalize(self) -> Result:
        as_trained = self._point("own")
        return Result(
            {
                "l0": as_trained["l0"],
                "nmse": as_trained["nmse"],
                "ce_delta": as_trained["ce_delta"],
                "ce_clean": ratio(self.sums["ce_clean"], self.sums["tokens"]),
                "own": as_trained,
                "topk": [self._point(f"topk-{k}", k=k) for k in self.ks],
                "threshold": [
                    self._point(f"threshold-{k}", threshold=threshold, wanted=k)
                    for k, threshold in zip(self.ks, self.thresholds)
                ],
                "all": self._point("threshold-0"),
                "n_tokens": self.tokens,
                "n_documents": len(self.sums),
                "notes": [
                    f"thresholds were chosen for the L0 they have on the first {self.chosen_on:,} "
                    "tokens; l0 is what they have on all"
                ],
            }
        )


def _first_activations(data: HeldOut) -> Tensor:
    """Return the first raw activations of the text, [m, d]; read once for all SAEs."""

    def read() -> Tensor:
        rows: list[Tensor] = []
        for held_out in data:
            rows.append(held_out.x)
            if sum(map(len, rows)) >= CHOSEN_ON:
                break
        if not rows:
            raise data.nothing()
        return torch.cat(rows)[:CHOSEN_ON]

    return data.once("first activations", read)


@torch.no_grad()
def positive(sae: SAE, x: Tensor) -> Tensor:
    """Return the latents' values before any is left out for being too small.

    Args:
        sae: the SAE.
        x: normalized activations, [b, d].

    Returns:
        Values of at least 0, [b, n].
    """
    return sae.activation.positive_values(sae, x)


def threshold_for(sae: SAE, x: Tensor, l0: float) -> float:
    """Return the threshold at which `l0` latents are active on average.

    Args:
        sae: the SAE.
        x: raw activations, [m, d].
        l0: active latents for each activation, on average.

    Raises:
        InputError: as `thresholds_for` does.
    """
    return thresholds_for(sae, x, [l0])[0]


@torch.no_grad()
def thresholds_for(sae: SAE, x: Tensor, l0s: Sequence[float]) -> list[float]:
    """Return a threshold for each L0, exact on x.

    A threshold is the mean of the smallest value above it and the largest below it; 0 where fewer
    latents than requested are positive.

    Args:
        sae: the SAE.
        x: raw activations, [m, d].
        l0s: active latents for each activation, on average.

    Raises:
        InputError: if x is empty, or an L0 is not above 0 and at most `n_latents`.
    """
    for l0 in l0s:
        if not 0 < l0 <= sae.shape.n_latents:
            raise InputError(
                f"no threshold gives an L0 of {l0:g}: give more than 0, and at most the "
                f"{sae.shape.n_latents} latents"
            )
    if not len(x):
        raise InputError("a threshold needs activations to be chosen on; got none")
    counts = [round(l0 * len(x)) for l0 in l0s]
    largest = x.new_zeros(0, dtype=sae.W_enc.dtype)
    for part in x.split(max(1, _PRE_ACTS // sae.shape.n_latents)):
        acts = positive(sae, sae.normalize(part).x).flatten()
        floor = largest[-1] if len(largest) > max(counts) else 0
        largest = torch.cat([largest, acts[acts > floor]])
        largest = largest.topk(min(len(largest), max(counts) + 1)).values
    padded = torch.cat([largest, largest.new_zeros(2)]).double()

    def threshold(count: int) -> float:
        if not count:
            return float(2 * padded[0])
        if count > len(largest):
            return 0.0
        return float((padded[count - 1] + padded[count]) / 2)

    return [threshold(count) for count in counts]


@torch.no_grad()
def at_threshold(sae: SAE, x: Tensor, threshold: float) -> Code:
    """Return the code z 1[z > threshold] of raw activations.

    Args:
        sae: the SAE.
        x: raw activations, [m, d].
        threshold: at least 0.

    Returns:
        A code [m, k], k being the most active latents of one activation; the other rows are padded
        with values of 0.

    Raises:
        InputError: if the threshold is negative.
    """
    if threshold < 0:
        raise InputError(f"the threshold is {threshold:g}; it must not be negative")
    acts = positive(sae, sae.normalize(x).x)
    acts = torch.where(acts > threshold, acts, 0.0)
    values, indices = acts.topk(max(1, int((acts > 0).sum(1).max()) if len(acts) else 1), dim=1)
    return Code(values, indices)
