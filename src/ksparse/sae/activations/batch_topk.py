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
        guess = self.threshold.item() / 2
        return largest_mask(products + sae.b_enc, len(products) * sae.k, guess=guess)

    @torch.no_grad()
    def start_(self, sae: Host, sample: Tensor) -> None:
        self.threshold.fill_(start_threshold(sae, sample))

    def start_code(self, sae: Host, x: Tensor) -> Code:
        return sae.code(x, sae.pre_acts_normalized(x))

    @torch.no_grad()
    def follow_(self, code: Code, updates: int) -> None:
        if len(fired := code.values[code.values > 0]):
            share = max(1 / updates, 1 - self.options.threshold_decay)
            self.threshold.lerp_(fired.min(), share)

    @torch.no_grad()
    def calibrate_(self, sae: Host, x: Tensor) -> None:
        self.threshold.fill_(threshold_for(sae, x[:CALIBRATION_TOKENS]))


def largest_mask(pre_acts: Tensor, count: int, guess: float = 0.0) -> Tensor:
    """Return where pre_acts[b, n] has its `count` largest values above 0, as bool[b, n]; fewer
    where fewer are above 0.

    Args:
        pre_acts: values [b, n].
        count: how many to keep.
        guess: a value thought to be below them. It changes the time, never the result.
    """
    flat = pre_acts.flatten()
    above = (flat > max(0.0, guess)).nonzero().squeeze(1)
    if len(above) < count and guess > 0:
        above = (flat > 0).nonzero().squeeze(1)
    if len(above) > count:
        above = above[flat[above].topk(count, sorted=False).indices]
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[above] = True
    return mask.view(pre_acts.shape)
