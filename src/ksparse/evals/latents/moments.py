"""How often and how strongly each latent fires: moments that several evaluations share."""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch


class Moments(Metric):
    """Moments of each latent's activation over the text.

    Attributes:
        sums: Sums of the activation to the powers 0 (how often it is above 0) to 4, [5, n].
        largest: The largest activation, [n].
        tokens: The number of tokens.
    """

    needs_text = False

    def __init__(self, context: EvalContext):
        super().__init__(context)
        n = context.sae.shape.n_latents
        self.sums, self.largest, self.tokens = (
            torch.zeros(5, n, dtype=torch.float64),
            torch.zeros(n),
            0,
        )

    def update(self, batch: SAEBatch) -> None:
        values, indices = (part.cpu() for part in batch.code)
        active = values > 0
        values, indices = values[active], indices[active]
        for power, sums in enumerate(self.sums):
            sums.index_add_(0, indices, values.double() ** power)
        self.largest.scatter_reduce_(0, indices, values.float(), "amax")
        self.tokens += len(active)

    @property
    def means(self) -> Tensor:
        """Means over all tokens, [5, n]: density, E[a], E[a^2], E[a^3] and E[a^4]."""
        return self.sums / max(1, self.tokens)

    @property
    def mean_act(self) -> Tensor:
        """Mean activation over the tokens where the latent fires, [n]."""
        return self.sums[1] / self.sums[0].clamp_min(1)
