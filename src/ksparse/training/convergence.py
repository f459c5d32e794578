"""The held-out loss along a run: at which steps it is measured, and whether it still falls.

The loss is the normalized MSE: the squared error divided by that of predicting the mean of the same
held-out activations, both float64 sums. It is measured with the raw weights and with their average,
since early averages are worse (Gao et al. 2024, A.5). Laws are fitted to the smaller of the two.
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

ROWS = 2048
"""Held-out activations that are encoded at a time."""


def points(recipe: Recipe) -> set[int]:
    """Return the steps at which the loss is measured: `curve.per_octave` for each doubling of the
    tokens, up to the last step. Empty if the recipe has no curve."""
    curve = recipe.curve
    shares = [2 ** (-i / curve.per_octave) for i in range(curve.octaves * curve.per_octave + 1)]
    return {max(1, round(recipe.steps * share)) for share in shares} if curve.held_out else set()


@torch.no_grad()
def loss(sae: SAE, raw: Tensor) -> float:
    """Return the normalized MSE of an SAE on raw activations [rows, d_model]; infinity in place of
    NaN."""
    error, square, total = 0.0, 0.0, torch.zeros(raw.shape[1], dtype=torch.float64)
    for rows in raw.split(ROWS):
        x = sae.normalize(rows).x
        recon = sae.decode_normalized(sae.encode_normalized(x))
        error += (recon - x).cpu().double().square().sum().item()
        square += x.cpu().double().square().sum().item()
        total += x.cpu().double().sum(0)
    value = error / (square - total.square().sum().item() / len(raw))
    return value if math.isfinite(value) else math.inf


def converged(rows: Sequence[dict[str, Any]], curve: CurveConfig) -> bool:
    """Return whether the loss falls by less than `curve.converged` per doubling of the tokens.

    The slope is that of a least-squares line of log loss against log tokens over the last
    `curve.window` octaves. The points must span the window, and be at least three.

    Args:
        rows: the rows of curve.jsonl, in order.
        curve: the options; `converged` = 0 turns this off.
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
