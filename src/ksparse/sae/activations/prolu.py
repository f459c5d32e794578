"""ProLU: z = p where both p and p + b_enc are positive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ksparse.config import ProLUConfig
from ksparse.sae.activations.base import Activation, Host, SparsePreActs, TrainingPass, l1_penalty
from ksparse.sae.terms import LossTerm


class ProLU(Activation[ProLUConfig]):
    """z = p where p > 0 and a = p + b_enc > 0: the bias gates and is not added (Taggart 2024)."""

    def active_mask(self, sae: Host, products: Tensor) -> Tensor:
        return (products > 0) & (products + sae.b_enc > 0)

    def values(self, sae: Host, listed: SparsePreActs) -> Tensor:
        gated: Tensor = _ProLU.apply(
            listed.products, listed.gather(sae.b_enc), self.options.gradient
        )
        return gated * listed.mask

    def loss_terms(
        self, sae: Host, x: Tensor, result: TrainingPass, *, baseline: float, penalty_share: float
    ) -> dict[str, LossTerm]:
        """Return l1 times the values."""
        if not self.options.l1:
            return {}
        paid = l1_penalty(result.code.values, x)
        penalty = sae.joint.sum("penalty", self.options.l1 * paid)
        return {"penalty": LossTerm(penalty, penalty_share)}

    def positive_values(self, sae: Host, x: Tensor) -> Tensor:
        return self.encode(sae, x).dense(len(sae.b_enc))

    def value_at(self, sae: Host, latent: int, product: float) -> float:
        return max(0.0, product)


class _ProLU(torch.autograd.Function):
    """p where p > 0 and p + b > 0. relu: dz/dp = dz/db = 1 there. ste: the step's derivative is
    taken as 1, so that dz/dp = 1 + p and dz/db = p."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, b: Tensor, gradient: str) -> Tensor:
        gate = (p > 0) & (p + b > 0)
        ctx.save_for_backward(p, gate)
        ctx.gradient, ctx.bias_shape = gradient, b.shape
        return torch.where(gate, p, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        p, gate = ctx.saved_tensors
        grad = grad * gate
        to_bias = grad * p if ctx.gradient == "ste" else grad
        return (
            (grad + to_bias if ctx.gradient == "ste" else grad),
            to_bias.sum_to_size(ctx.bias_shape),
            None,
        )
