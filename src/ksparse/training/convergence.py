"""The held-out loss along a run: at which steps it is taken, what a line of curve.jsonl holds, and
whether it still falls.

The loss is normalised MSE: squared error over that of predicting the mean of the same held-out
activations, float64 sums divided once; with the raw weights and with their average, since early
averages are worse (Gao et al. 2024, A.5). The smaller of the two is what laws are fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse.config import CurveConfig, Recipe
from ksparse.sae.model import SAE

ROWS = 2048  # held-out activations whose codes are in memory at once


def points(recipe: Recipe) -> set[int]:
    """Return the steps at which the loss is taken: `per_octave` to each doubling, the last step
    among them."""
    curve = recipe.curve
    shares = [2 ** (-i / curve.per_octave) for i in range(curve.octaves * curve.per_octave + 1)]
    return {max(1, round(recipe.steps * share)) for share in shares} if curve.held_out else set()


@torch.no_grad()
def loss(sae: SAE, raw: Tensor) -> float:
    """Return the normalised MSE on raw activations [m, d]; infinite where it is not finite."""
    error, square, total = 0.0, 0.0, torch.zeros(raw.shape[1], dtype=torch.float64)
    for part in raw.split(ROWS):
        x = sae.normalize(part).x
        recon = sae.decode_normalized(sae.encode_normalized(x))
        error += (recon - x).cpu().double().square().sum().item()
        square += x.cpu().double().square().sum().item()
        total += x.cpu().double().sum(0)
    value = error / (square - total.square().sum().item() / len(raw))
    return value if math.isfinite(value) else math.inf


def converged(rows: Sequence[dict[str, Any]], curve: CurveConfig) -> bool:
    """Return whether the loss falls by less than `curve.converged` for a doubling of the tokens.

    The slope is that of a least-squares line through log loss against log tokens over the last
    `curve.window` octaves, which smooths; at least three points, so that a run does not end before
    they span the window.
    """
    if not curve.converged or not rows:
        return False
    first = rows[-1]["tokens"] / 2**curve.window
    if rows[0]["tokens"] > first * 1.01:
        return False
    window = [row for row in rows if row["tokens"] >= first * 0.99 and row["loss"]]
    if len(window) < 3:
        return False
    slope = np.polyfit(
        np.log([row["tokens"] for row in window]), np.log([row["loss"] for row in window]), 1
    )[0]
    return bool(1 - 2**slope < curve.converged)
