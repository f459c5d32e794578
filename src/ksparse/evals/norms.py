"""Do activations of large norm take the slots? arXiv 2606.15054.

An SAE that scores latents by inner product (normalisation none or dataset) gives large activations
more active latents, and lets them be the strongest examples of most latents. Normalisation by the
activation's own norm scores by cosine. Both scores are measured for either kind of SAE: a value as
the SAE has it in raw units (inner product), and divided by the norm (cosine).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import DocumentSums, Result, Value, no_value, ratio, share

DECILES = 10


class Norms(Metric):
    """L0, error and strongest examples by decile of the activation's norm, its mean over d_model
    removed where the normalisation does so."""

    needs_text = False

    def __init__(self, context: EvalContext):
        super().__init__(context)
        n = context.sae.shape.n_latents
        self.tokens: list[dict[str, Tensor]] = []
        self.count = 0
        self.best = {score: np.zeros(n) for score in ("inner", "cosine")}
        self.at = {score: np.full(n, -1) for score in self.best}

    def update(self, batch: SAEBatch) -> None:
        inputs, code = batch.inputs, batch.code
        x, recon = inputs.x.cpu().double(), batch.recon.cpu().double()
        scale, length = inputs.scale.cpu().double().squeeze(-1), x.norm(dim=1)
        self.tokens.append(
            {
                "documents": batch.held_out.documents.cpu(),
                "norm": scale * length,
                "l0": (code.values > 0).sum(1).cpu().double(),
                "error": (x - recon).square().sum(1),
                "square": x.square().sum(1),
            }
        )
        row, slot = (code.values > 0).cpu().nonzero(as_tuple=True)
        latent = code.indices.cpu()[row, slot].numpy()
        value = code.values.cpu()[row, slot].double()
        scores = {"inner": value * scale[row], "cosine": value / length[row].clamp_min(1e-30)}
        for name, score in scores.items():
            order = score.argsort(stable=True).numpy()  # the last of equal latents stays
            found, last = np.zeros_like(self.best[name]), np.full_like(self.at[name], -1)
            found[latent[order]] = score.numpy()[order]
            last[latent[order]] = row.numpy()[order] + self.count
            better = found > self.best[name]
            self.best[name][better], self.at[name][better] = found[better], last[better]
        self.count += len(x)

    def finalize(self) -> Result:
        table = {key: torch.cat([part[key] for part in self.tokens]) for key in self.tokens[0]}
        rank = np.argsort(np.argsort(table["norm"].numpy(), kind="stable"), kind="stable")
        decile = rank * DECILES // max(1, len(rank))
        sums = DocumentSums()
        for number in range(DECILES):
            here = torch.from_numpy(decile == number).double()
            sums.add(
                table["documents"],
                **{
                    f"{key} {number}": here * table[key]
                    for key in ("norm", "l0", "error", "square")
                },
                **{f"count {number}": here},
            )
        sums.add(table["documents"], l0=table["l0"])
        numbers = range(DECILES)
        top = DECILES - 1
        return Result(
            {
                "norm": [ratio(sums[f"norm {i}"], sums[f"count {i}"]) for i in numbers],
                "l0": [ratio(sums[f"l0 {i}"], sums[f"count {i}"]) for i in numbers],
                "slots": [ratio(sums[f"l0 {i}"], sums["l0"]) for i in numbers],
                "fvu": [ratio(sums[f"error {i}"], sums[f"square {i}"]) for i in numbers],
                "strongest": {name: self._strongest(name, decile) for name in self.at},
                "slots_of_top": ratio(sums[f"l0 {top}"], sums["l0"]),
                "strongest_in_top": self._in_top(
                    "inner" if self._scores_inner else "cosine", decile
                ),
                "strongest_in_top_inner": self._in_top("inner", decile),
                "strongest_in_top_cosine": self._in_top("cosine", decile),
                "score": "inner product" if self._scores_inner else "cosine",
            }
        )

    @property
    def _scores_inner(self) -> bool:
        """Whether the SAE's own values are inner products with activations of their own norm."""
        return self.context.sae.shape.normalize in ("none", "dataset")

    def _strongest(self, score: str, decile: np.ndarray) -> list[float]:
        """Return the share of live latents whose strongest example is in each decile."""
        at = self.at[score][self.at[score] >= 0]
        counts = np.bincount(decile[at], minlength=DECILES)
        return [float(count) / max(1, len(at)) for count in counts]

    def _in_top(self, score: str, decile: np.ndarray) -> Value:
        at = self.at[score][self.at[score] >= 0]
        return share(int((decile[at] == DECILES - 1).sum()), len(at)) if len(at) else no_value()
