"""The range of a latent's values. A value far beyond it is one that the LM has never seen, and
what the LM does there says little about the latent."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ksparse.sae.model import SAE

FAR = 3.0
"""A value is far if it is more than this many times the largest one."""
_log = logging.getLogger("ksparse")


@torch.no_grad()
def reach(sae: SAE, latent: int) -> float:
    """Return the largest value that a latent has on any input of typical norm; its values on text
    are hardly larger."""
    row = sae.W_enc[latent]
    product = float(sae.input_norm * row.norm() - row @ sae.b_pre)
    return sae.activation.value_at(sae, latent, product)


def warn_beyond(
    sae: SAE, values: Mapping[int, float], largest: Mapping[int, float] | None = None
) -> None:
    """Log a warning for each latent that is to be held at a value far beyond its range.

    Args:
        sae: the SAE.
        values: {latent: the value to hold it at}.
        largest: {latent: its largest value on a text}; for latents that are not in it, `reach`.
    """
    for latent, value in values.items():
        known = (largest or {}).get(latent, 0.0)
        most = known or reach(sae, latent)
        if abs(value) > FAR * most:
            _log.warning(
                "latent %s at %g is %s times its largest value%s, %.3g: what the LM does there "
                "says little of the latent",
                latent,
                value,
                f"{abs(value) / most:.3g}" if most else "infinitely many",
                "" if known else " on any input",
                most,
            )
