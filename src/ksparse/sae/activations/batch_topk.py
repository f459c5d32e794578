"""BatchTopK: z = ReLU(a) of the b k largest pre-activations of a batch of b tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ksparse.config import BatchTopKConfig
from ksparse.sae.activations.base import Host, start_threshold, threshold_for
from ksparse.sae.activations.relu import Rectified
from ksparse.sae.code import Code

CALIBRATION_TOKENS = (
    4096  # activations on which the threshold is set: L0 is then right to about 1 %
)


class BatchTopK(Rectified[BatchTopKConfig]):
    """z = ReLU(a) of the b k largest of a batch; in use, of those above a threshold, so that no
    token's code depends on another's (Bussmann et al. 2024).

    threshold[1] is followed in training as a running average of the smallest value kept, and set
    for the weights that are saved.
    """

    threshold: Tensor

    def __init__(self, options: BatchTopKConfig, n_latents: int):
        super().__init__(options, n_latents)
        self.register_buffer("threshold", torch.zeros(1))

    def active_mask(self, sae: Host, products: Tensor) -> Tensor:
        return products + sae.b_enc > self.threshold.clamp_min(0)

    def trainable_mask(self, sae: Host, products: Tensor) -> Tensor:
        return sae.joint.kept(products + sae.b_enc, sae.k, guess=self.threshold.item() / 2)

    @torch.no_grad()
    def start_(self, sae: Host, sample: Tensor) -> None:
        self.threshold.fill_(start_threshold(sae, sample))

    def start_code(self, sae: Host, x: Tensor) -> Code:
        return sae.code(x, sae.pre_acts_normalized(x))

    @torch.no_grad()
    def follow_(self, sae: Host, code: Code, updates: int) -> None:
        fired = code.values[code.values > 0]
        least = sae.joint.least(fired.min() if len(fired) else fired.new_tensor(torch.inf))
        if torch.isfinite(least):
            share = max(1 / updates, 1 - self.options.threshold_decay)
            self.threshold.lerp_(least, share)

    @torch.no_grad()
    def calibrate_(self, sae: Host, x: Tensor) -> None:
        self.threshold.fill_(threshold_for(sae, sae.joint.first(x, CALIBRATION_TOKENS)))
