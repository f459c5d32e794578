"""What training costs in FLOPs, a multiplication and an addition counted as two: the formula behind
plans, curves and laws.

| part | FLOPs per activation | |
|---|---|---|
| encoder | 2 n d | the product that chooses |
| decoder | 8 k d | reconstruction, its two gradients, the encoder's gradient: 2kd each; five times that with Multi-TopK, whose code has k and 4k |
| AuxK | 8 k_aux d | the same four over the dead latents, on steps that have any; fewer where fewer are dead |
| LM | 2 (parameters of its matrices up to the site) | stated apart: it is paid once for a cohort, or not at all from shards |

Of another activation than TopK the code is taken to have k values, whatever it has. It counts what
the method needs, whatever kernel does it: dense libraries spend 12nd, and an optimiser's step is
left out.
"""  # noqa: E501 (a table)

from __future__ import annotations

from typing import TYPE_CHECKING

from ksparse.config import Recipe

if TYPE_CHECKING:  # plans need no torch
    from torch import nn


SPARSER = 5
"""AuxK's code is treated as a list where it has fewer than one in so many of the dead latents;
above that, dense products are faster (docs/lab-book.md)."""


def encoder(recipe: Recipe, d_model: int) -> int:
    return 2 * recipe.sae.n_latents * d_model


def decoder(recipe: Recipe, d_model: int) -> int:
    return 8 * recipe.sae.k * d_model * (5 if recipe.sae.multi_topk else 1)


def auxk(latents: int, d_model: int) -> int:
    """Return the FLOPs per activation of AuxK over so many latents."""
    return 8 * latents * d_model


def lm(parameters: int) -> int:
    """Return the FLOPs per activation of an LM with so many parameters in matrices up to the
    site."""
    return 2 * parameters


def before_site(model: nn.Module, site: nn.Module, at: str) -> int:
    """Count the matrices' parameters that are used up to the site; modules are listed in the order
    of their use."""
    from torch.nn import Embedding

    inside = {id(module) for module in site.modules()} if at == "out" else set()
    total, reached = 0, False
    for module in model.modules():
        reached |= module is site
        if reached and id(module) not in inside:
            break
        if not isinstance(module, Embedding):
            total += sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)
    return total
