"""Gated: gates decide which latents are active, magnitudes their values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ksparse.config import GatedConfig
from ksparse.sae.activations.base import Activation, Host, SparsePreActs, TrainingPass, l1_penalty
from ksparse.sae.terms import LossTerm


class Gated(Activation[GatedConfig]):
    """z = ReLU(exp(r_mag) p + b_mag) where a = p + b_enc > 0 (Rajamanoharan et al. 2024a).

    Gates and magnitudes share W_enc up to a factor per latent. r_mag[n] and b_mag[n] are trained.
    """

    SCALE_FREE = ("r_mag",)

    def __init__(self, options: GatedConfig, n_latents: int):
        super().__init__(options, n_latents)
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.b_mag = nn.Parameter(torch.zeros(n_latents))

    def active_mask(self, sae: Host, products: Tensor) -> Tensor:
        magnitudes = self.r_mag.exp() * products + self.b_mag
        return self.trainable_mask(sae, products) & (magnitudes > 0)

    def trainable_mask(self, sae: Host, products: Tensor) -> Tensor:
        return products + sae.b_enc > 0

    def values(self, sae: Host, listed: SparsePreActs) -> Tensor:
        open_gates = listed.products.detach() + listed.gather(sae.b_enc.detach()) > 0
        scaled = listed.gather(self.r_mag).exp() * listed.products
        return torch.relu(scaled + listed.gather(self.b_mag)) * (listed.mask & open_gates)

    def gates(self, sae: Host, listed: SparsePreActs) -> Tensor:
        """Return ReLU(a), which the penalty and the auxiliary loss are about."""
        return torch.relu(listed.products + listed.gather(sae.b_enc)) * listed.mask

    def loss_terms(
        self, sae: Host, x: Tensor, result: TrainingPass, *, baseline: float, penalty_share: float
    ) -> dict[str, LossTerm]:
        """Return l1 times the gates, and the error of decoding the gates by a decoder that gets no
        gradient from it."""
        if result.listed is None:
            return {}
        terms, listed = {}, result.listed
        if self.options.l1:
            paid = l1_penalty(self.gates(sae, listed), x)
            penalty = sae.joint.sum("penalty", self.options.l1 * paid)
            terms["penalty"] = LossTerm(penalty, penalty_share)
        # The gates are not shared with the penalty: the order in which gradients add up, and with
        # it the last bit of every run, would change.
        share = listed.decode_without_bias(self.gates(sae, listed), sae.W_dec.detach())
        decoded = sae.joint.sum("recon", share)
        error = (decoded + sae.b_pre.detach() - x).square().mean()
        return terms | {"gate_error": LossTerm(error, self.options.aux, baseline)}

    def positive_values(self, sae: Host, x: Tensor) -> Tensor:
        return self.encode(sae, x).dense(len(sae.b_enc))

    def value_at(self, sae: Host, latent: int, product: float) -> float:
        return max(0.0, float(self.r_mag[latent].exp()) * product + float(self.b_mag[latent]))
