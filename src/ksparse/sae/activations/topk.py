"""TopK: z = ReLU(a) of the k largest pre-activations a of each token."""

from __future__ import annotations

from torch import Tensor

from ksparse.config import TopKConfig
from ksparse.sae.activations.base import Activation, Host, TrainingPass
from ksparse.sae.code import Code


class TopK(Activation[TopKConfig]):
    """z = ReLU(TopK(a)), a = p + b_enc (Gao et al. 2024, section 2.3). `SAE.code` selects, for any
    k and among any latents, and across the shards of a sharded SAE."""

    def encode(self, sae: Host, x: Tensor) -> Code:
        return sae.code(x, sae.pre_acts_normalized(x))

    def forward(self, sae: Host, x: Tensor) -> TrainingPass:
        pre_acts = sae.pre_acts_normalized(x)
        code = sae.code(x, pre_acts)
        return TrainingPass(code, sae.decode_normalized(code), pre_acts)
