"""What becomes of pre-activations: one module per activation, in the place of TopK.

| kind | value z of p = W_enc (x - b_pre), a = p + b_enc | its tensors |
|---|---|---|
| topk | ReLU(a) of the k largest a | |
| batch_topk | ReLU(a) of the b k largest of b tokens; in use, where a > threshold | threshold[1] |
| relu | ReLU(a) | |
| jump_relu | a where a > threshold | threshold[n] |
| gated | ReLU(exp(r_mag) p + b_mag) where a > 0 | r_mag[n], b_mag[n] |
| prolu | p where a > 0 and p > 0 | |

To add one: an option class in `ksparse.config.activations`, a module here, a line in ACTIVATIONS.
"""

from __future__ import annotations

from typing import Any

from ksparse.config import ACTIVATION_CONFIGS
from ksparse.sae.activations.base import Activation as Activation
from ksparse.sae.activations.base import SparsePreActs as SparsePreActs
from ksparse.sae.activations.base import TrainingPass as TrainingPass
from ksparse.sae.activations.batch_topk import BatchTopK
from ksparse.sae.activations.gated import Gated
from ksparse.sae.activations.jump_relu import JumpReLU
from ksparse.sae.activations.prolu import ProLU
from ksparse.sae.activations.relu import ReLU
from ksparse.sae.activations.topk import TopK

ACTIVATIONS: dict[str, type[Activation[Any]]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "relu": ReLU,
    "jump_relu": JumpReLU,
    "gated": Gated,
    "prolu": ProLU,
}


def build_activation(kind: str, n_latents: int) -> Activation[Any]:
    """Return an activation with tensors of zero and default options."""
    return ACTIVATIONS[kind](ACTIVATION_CONFIGS[kind](), n_latents)
