"""Is a code still good at another k, or with a threshold in the place of k? Gao et al. 2024,
section 5.3.

After training the activation is replaced by TopK(k'), or by z 1[z > threshold] with one threshold
for all latents, and the error and the loss of the LM are traced against the L0 that this gives. A
code is progressive if more latents always help.

    threshold_for(sae, x, l0)    the threshold that gives a wanted L0      at_threshold(sae, x,
                                 threshold)   the code that it gives

z are the positive pre-activations; of an SAE whose gate is part of its values (gated, prolu) the
values that the gate lets through.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, ratio
from ksparse.evals.stats import spread
from ksparse.sae.model import SAE, Code

MULTIPLES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, math.sqrt(1 / 2), 1, math.sqrt(2), 2, math.sqrt(8), 4, 8)
"""k' over the SAE's own k, or over the L0 that it has where it has no k."""
CHOSEN_ON = 8_192  # tokens that thresholds are chosen on


class Progressive(Metric):
    """L0, error and loss of the LM with the SAE's own activation, with TopK(k'), with a threshold,
    with all positive latents."""

    beside = ("own", "topk", "threshold", "all")

    def __init__(self, subject: EvalContext):
        super().__init__(subject)
        self.sums, self.tokens, sae = DocumentSums(), 0, subject.sae
        rows = _first_rows(subject)
        own = float((sae.encode(rows).values > 0).sum(1).double().mean())
        self.ks = sorted(
            {min(sae.shape.n_latents, max(1, round(multiple * own))) for multiple in MULTIPLES}
        )
        self.chosen_on = len(rows)
        self.thresholds = thresholds_for(sae, rows, self.ks)

    def see(self, seen: SAEBatch) -> None:
        if self.tokens >= self.subject.options.progressive_tokens:
            return
        batch, sae, x = seen.batch, seen.sae, seen.inputs.x
        self.tokens += len(x)
        x64 = x.cpu().double()
        self.sums.add(
            batch.documents, count=torch.ones(len(x)), square=x64.square().sum(1), sum=x64
        )
        self.sums.add(
            batch.predicted_documents,
            tokens=torch.ones(int(batch.predicted.sum())),
            ce_clean=batch.losses(batch.clean),
        )
        self._add(seen, "own", (seen.code.values > 0).sum(1), seen.recon, seen.spliced.losses)
        acts = positive(sae, x)
        widest = acts.topk(
            self.ks[-1], dim=1
        )  # the largest first, so that each k' is a beginning of it
        for k in self.ks:
            code = Code(widest.values[:, :k], widest.indices[:, :k])
            recon = sae.decode_normalized(code)
            self._add(seen, f"topk-{k}", (code.values > 0).sum(1), recon, seen.losses_with(recon))
        for k, threshold in zip((*self.ks, 0), (*self.thresholds, 0.0)):
            some = torch.where(acts > threshold, acts, 0.0)
            recon = some @ sae.W_dec + sae.b_pre
            self._add(seen, f"threshold-{k}", (some > 0).sum(1), recon, seen.losses_with(recon))

    def _add(self, seen: SAEBatch, name: str, l0: Tensor, recon: Tensor, losses: Tensor) -> None:
        error = (seen.inputs.x.cpu().double() - recon.cpu().double()).square().sum(1)
        self.sums.add(seen.batch.documents, **{f"l0 {name}": l0, f"error {name}": error})
        self.sums.add(seen.batch.predicted_documents, **{f"ce {name}": losses})

    def _point(self, name: str, **what: Any) -> dict[str, Any]:
        sums = self.sums
        return {
            **what,
            "l0": ratio(sums[f"l0 {name}"], sums["count"]),
            "nmse": ratio(
                sums[f"error {name}"], spread(sums["square"], sums["sum"], sums["count"])
            ),
            "ce_delta": ratio(sums[f"ce {name}"] - sums["ce_clean"], sums["tokens"]),
        }

    def result(self) -> Result:
        own, everything = self._point("own"), self._point("threshold-0")
        return Result(
            {
                "l0": own["l0"],
                "nmse": own["nmse"],
                "ce_delta": own["ce_delta"],
                "ce_clean": ratio(self.sums["ce_clean"], self.sums["tokens"]),
                "own": own,
                "topk": [self._point(f"topk-{k}", k=k) for k in self.ks],
                "threshold": [
                    self._point(f"threshold-{k}", threshold=threshold, wanted=k)
                    for k, threshold in zip(self.ks, self.thresholds)
                ],
                "all": everything,
                "n_tokens": self.tokens,
                "n_documents": len(self.sums),
                "notes": [
                    f"thresholds were chosen for the L0 they have on the first {self.chosen_on:,} "
                    "tokens; l0 is what they have on all"
                ],
            }
        )


def _first_rows(subject: EvalContext) -> Tensor:
    """Return the first raw activations of the text [m, d]."""

    def read() -> Tensor:
        rows: list[Tensor] = []
        for batch in subject.data:
            rows.append(batch.x)
            if sum(map(len, rows)) >= CHOSEN_ON:
                break
        if not rows:
            raise subject.data.nothing()
        return torch.cat(rows)[:CHOSEN_ON]

    return subject.data.once("first rows", read)


@torch.no_grad()
def positive(sae: SAE, x: Tensor) -> Tensor:
    """Return the values [b, n] >= 0 that the latents have for normalised x[b, d] if nothing is left
    out for being too small."""
    return sae.activation.positive_values(sae, x)


def threshold_for(sae: SAE, x: Tensor, l0: float) -> float:
    """Return the threshold at which raw activations x[m, d] have so many active latents on
    average."""
    return thresholds_for(sae, x, [l0])[0]


@torch.no_grad()
def thresholds_for(sae: SAE, x: Tensor, l0s: Sequence[float]) -> list[float]:
    """Return a threshold for each wanted L0: the mean of the two values between which as many are
    above as it asks for.

    0 where fewer latents than that are positive at all. Exact on x; other text has about the same
    L0.
    """
    for l0 in l0s:
        if not 0 < l0 <= sae.shape.n_latents:
            raise InputError(
                f"an L0 of {l0:g} is not to be had: give more than 0, and at most the "
                f"{sae.shape.n_latents} latents"
            )
    if not len(x):
        raise InputError("a threshold needs activations to be chosen on; got none")
    wanted = [round(l0 * len(x)) for l0 in l0s]
    largest = x.new_zeros(0, dtype=sae.W_enc.dtype)
    for part in x.split(max(1, 2**24 // sae.shape.n_latents)):
        acts = positive(sae, sae.normalize(part).x).flatten()
        floor = largest[-1] if len(largest) > max(wanted) else 0
        largest = torch.cat([largest, acts[acts > floor]])
        largest = largest.topk(min(len(largest), max(wanted) + 1)).values
    ends = torch.cat([largest, largest.new_zeros(2)]).double()
    return [
        float((ends[min(count, len(largest)) - 1] + ends[min(count, len(largest))]) / 2)
        if 0 < count <= len(largest)
        else 0.0
        if count
        else float(2 * ends[0])
        for count in wanted
    ]


@torch.no_grad()
def at_threshold(sae: SAE, x: Tensor, threshold: float) -> Code:
    """Return the code of raw activations x[m, d] by z 1[z > threshold]; rows are padded with values
    of 0."""
    if threshold < 0:
        raise InputError(f"the threshold is {threshold:g}; it must not be negative")
    acts = positive(sae, sae.normalize(x).x)
    acts = torch.where(acts > threshold, acts, 0.0)
    values, indices = acts.topk(max(1, int((acts > 0).sum(1).max()) if len(acts) else 1), dim=1)
    return Code(values, indices)
