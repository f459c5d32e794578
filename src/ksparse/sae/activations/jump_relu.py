"""JumpReLU: z = a where a is above a threshold of its latent."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ksparse.config import JumpReLUConfig
from ksparse.sae.activations.base import (
    Activation,
    Host,
    SparsePreActs,
    TrainingPass,
    start_threshold,
)
from ksparse.sae.code import Code
from ksparse.sae.terms import LossTerm


class JumpReLU(Activation[JumpReLUConfig]):
    """z = a where a = p + b_enc > threshold (Rajamanoharan et al. 2024b). The thresholds [n] get
    gradients by a kernel estimate over a window (`_Jump`, `_Step`)."""

    def __init__(self, options: JumpReLUConfig, n_latents: int):
        super().__init__(options, n_latents)
        self.threshold = nn.Parameter(torch.zeros(n_latents))

    def active_mask(self, sae: Host, products: Tensor) -> Tensor:
        return products + sae.b_enc > self.threshold.clamp_min(0)

    def trainable_mask(self, sae: Host, products: Tensor) -> Tensor:
        return products + sae.b_enc > self.threshold - self.window(sae) / 2

    def window(self, sae: Host) -> float:
        """Return the width of the window, in the unit of this SAE's inputs."""
        return self.options.window(sae.k) * sae.input_norm

    def values(self, sae: Host, listed: SparsePreActs) -> Tensor:
        a = listed.products + listed.gather(sae.b_enc)
        z: Tensor = _Jump.apply(a, listed.gather(self.threshold), self.window(sae))
        return z * listed.mask

    def count(self, sae: Host, listed: SparsePreActs) -> Tensor:
        """Return the number of active latents of each token, [b], with the thresholds' gradient."""
        a = (listed.products + listed.gather(sae.b_enc)).detach()
        steps: Tensor = _Step.apply(a, listed.gather(self.threshold), self.window(sae))
        return (steps * listed.mask).sum(1)

    def loss_terms(
        self, sae: Host, x: Tensor, result: TrainingPass, *, baseline: float, penalty_share: float
    ) -> dict[str, LossTerm]:
        """Return coef times L0 / k, or its squared distance to 1."""
        if result.listed is None:
            return {}
        active = sae.joint.sum("penalty", self.count(sae, result.listed).mean())
        ratio = sae.joint.mean("penalty_mean", active) / sae.k
        excess = (ratio - 1) ** 2 if self.options.penalty == "target" else ratio
        return {"penalty": LossTerm(self.options.coef * excess, penalty_share)}

    @torch.no_grad()
    def start_(self, sae: Host, sample: Tensor) -> None:
        threshold = self.options.threshold * sae.input_norm
        self.threshold.fill_(threshold or start_threshold(sae, sample))

    def start_code(self, sae: Host, x: Tensor) -> Code:
        return sae.code(x, sae.pre_acts_normalized(x))

    @torch.no_grad()
    def constrain_(self) -> None:
        self.threshold.clamp_(min=0.0)  # a value below 0 is no activation

    @torch.no_grad()
    def revive_(self, dead: Tensor) -> None:
        self.threshold[dead] *= 1 - self.options.release


def _window(a: Tensor, threshold: Tensor, width: float) -> Tensor:
    """Return 1 / width where a is within width / 2 of its threshold, else 0: the kernel estimate of
    a density."""
    return ((a - threshold).abs() < width / 2) / width


class _Jump(torch.autograd.Function):
    """a where a > threshold; dz/da = 1 there, dz/dthreshold = -threshold K((a - threshold) / width)
    / width."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(a, threshold)
        ctx.width = width
        return torch.where(a > threshold, a, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, threshold = ctx.saved_tensors
        to_threshold = -threshold * _window(a, threshold, ctx.width) * grad
        return grad * (a > threshold), to_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """1 where a > threshold; d/dthreshold = -K((a - threshold) / width) / width, and no gradient to
    a."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, threshold: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(a, threshold)
        ctx.width = width
        return (a > threshold).to(a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        a, threshold = ctx.saved_tensors
        return None, (-_window(a, threshold, ctx.width) * grad).sum_to_size(threshold.shape), None
