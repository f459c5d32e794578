"""FLOPs of training, a multiplication and an addition counted as two: the formula behind plans,
curves and scaling laws.

    part      FLOPs per activation   what for
    encoder   2 n d                  the product that selects
    decoder   8 k d                  reconstruction, its two gradients, the encoder's gradient:
                                     2 k d each; five times that with Multi-TopK (k and 4k)
    prefixes  6 k d                  Matryoshka: its latents are decoded once more, each prefix
                                     adding a group to the one before, with two gradients; less
                                     by the latents behind the largest prefix
    AuxK      8 k_aux d              the same four over dead latents, in steps that have any;
                                     less if fewer than k_aux are dead
    LM        2 parameters           of its matrices up to the site; reported apart, since SAEs that
                                     share a stream pay it once, and with shards it is 0. With
                                     sae.lm_loss also the whole LM once, and its part behind
                                     the site twice: spliced, and back

Activations other than TopK are counted as if k latents were active. The formula counts what the
method needs, whichever kernels compute it: dense libraries spend 12 n d. The optimizer's update is
left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ksparse.config import Recipe

if TYPE_CHECKING:  # planning needs no torch
    from torch import nn


SPARSER = 5
"""AuxK's code is kept sparse if fewer than 1 in SPARSER dead latents are active; otherwise dense
products are faster (docs/lab-book.md)."""


def encoder(recipe: Recipe, d_model: int) -> int:
    """Return the FLOPs per activation of the encoder's product."""
    return 2 * recipe.sae.n_latents * d_model


def decoder(recipe: Recipe, d_model: int) -> int:
    """Return the FLOPs per activation of the sparse parts: the decoder and all gradients.

    Example:
        >>> from ksparse.config import Recipe, from_dict
        >>> plain, nested = Recipe(), from_dict({"sae": {"prefixes": [256, 1024]}})
        >>> decoder(nested, 64) / decoder(plain, 64)
        1.75
    """
    sae = recipe.sae
    decodes = 8 * (5 if sae.multi_topk else 1) + (6 if sae.nested_sizes else 0)
    return decodes * sae.k * d_model


def auxk(latents: int, d_model: int) -> int:
    """Return the FLOPs per activation of AuxK with `latents` active latents."""
    return 8 * latents * d_model


def lm(parameters: int) -> int:
    """Return the FLOPs per activation of an LM with `parameters` in its matrices up to the site."""
    return 2 * parameters


def lm_loss(parameters: int, before: int) -> int:
    """Return the FLOPs per activation of `sae.lm_loss`: the unchanged LM, the spliced one from the
    site on, and the gradient back to the site.

    Args:
        parameters: of all matrices of the LM, the head included.
        before: of those up to the site.
    """
    return 2 * parameters + 4 * (parameters - before)


def before_site(model: nn.Module, site: nn.Module, at: str) -> int:
    """Count the parameters of the matrices that the LM uses up to a site.

    Args:
        model: the LM, whose modules are listed in the order of their use.
        site: the module that the site belongs to.
        at: "out" for the module's output, which its own matrices compute; else its input.
    """
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
