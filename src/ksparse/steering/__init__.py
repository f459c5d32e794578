"""Use an SAE inside a running language model, with plain forward hooks on any Hugging Face model.

| module | provides |
|---|---|
| attachment | `attach` puts an SAE into the forward pass; `steer` clamps or scales latents |
| calls | which positions of a call an SAE may change, also during `generate` with a cache |
| attribution | `attribute`, `attribute_choice`: activation × gradient (Gao et al. 2024, E.3) |
| comparison | `continue_text` and `compare`: continuations with and without steering |

By default the SAE's reconstruction error is kept: x' = x + scale · W_decᵀ change. Only the change
reaches the LM, however poor the reconstruction. Blocks nest, so several SAEs can be attached at
several sites at once; each sees the changes made by those before it.
"""

from ksparse.steering.attachment import (
    Change,
    Positions,
    Tap,
    acts_at,
    attach,
    check_latents,
    clamped,
    load_lm,
    scaled,
    steer,
    sum_changes,
)
from ksparse.steering.attribution import (
    Attribution,
    Metric,
    attribute,
    attribute_choice,
    attribute_positions,
    logit_difference,
    token_id,
)
from ksparse.steering.comparison import Comparison, Continuation, compare, continue_text

__all__ = [
    "Attribution",
    "Change",
    "Comparison",
    "Continuation",
    "Metric",
    "Positions",
    "Tap",
    "acts_at",
    "attach",
    "attribute",
    "attribute_choice",
    "attribute_positions",
    "check_latents",
    "clamped",
    "compare",
    "continue_text",
    "load_lm",
    "logit_difference",
    "scaled",
    "steer",
    "sum_changes",
    "token_id",
]
