"""ReLU: z = ReLU(a), sparse by an L1 penalty."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from ksparse.config import ReLUConfig
from ksparse.config.activations import ActivationOptions
from ksparse.sae.activations.base import Activation, Host, SparsePreActs, TrainingPass, l1_penalty
from ksparse.sae.terms import LossTerm

Options_co = TypeVar("Options_co", bound=ActivationOptions, covariant=True)


class Rectified(Activation[Options_co]):
    """Values are ReLU(a), a = p + b_enc, of the latents that count."""

    def active_mask(self, sae: Host, products: Tensor) -> Tensor:
        return products + sae.b_enc > 0

    def values(self, sae: Host, listed: SparsePreActs) -> Tensor:
        return torch.relu(listed.products + listed.gather(sae.b_enc)) * listed.mask


class ReLU(Rectified[ReLUConfig]):
    """z = ReLU(a) (Gao et al. 2024, section B.2)."""

    def loss_terms(
        self, sae: Host, x: Tensor, result: TrainingPass, *, baseline: float, penalty_share: float
    ) -> dict[str, LossTerm]:
        """Return l1 times the values, each times its decoder row's norm where the options say
        so."""
        if not self.options.l1 or result.listed is None:
            return {}
        paid = result.code.values
        if self.options.penalty == "decoder_norm":
            paid = paid * result.listed.gather(sae.W_dec.norm(dim=1))
        penalty = sae.joint.sum("penalty", self.options.l1 * l1_penalty(paid, x))
        return {"penalty": LossTerm(penalty, penalty_share)}
