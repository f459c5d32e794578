"""What values a latent has: a value far beyond them is one that the LM never saw, and what it does
then says nothing of the latent."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from ksparse.sae.model import SAE

FAR = 3.0
"""Times the largest value, beyond which a value is called far."""
_log = logging.getLogger("ksparse")


@torch.no_grad()
def reach(sae: SAE, latent: int) -> float:
    """Return the value of a latent on the input of typical norm that it likes best: none that it
    has in a text is much larger."""
    row = sae.W_enc[latent]
    product = float(sae.input_norm * row.norm() - row @ sae.b_pre)
    if sae.shape.activation == "gated":
        return max(0.0, float(sae.r_mag[latent].exp()) * product + float(sae.b_mag[latent]))
    return max(
        0.0, product + (0.0 if sae.shape.activation == "prolu" else float(sae.b_enc[latent]))
    )


def warn_beyond(
    sae: SAE, values: Mapping[int, float], largest: Mapping[int, float] | None = None
) -> None:
    """Log a warning for each latent that is to be held far beyond its range.

    largest: {latent: its largest value on a text}, where that is known; else what it can reach at
    all.
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
