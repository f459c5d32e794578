"""Is k too low or too high? The decoder-projection proxy of Chanin & Garriga-Alonso 2025, arXiv
2508.16560.

Where L0 is too low, latents mix correlated features, and where it is too high they find degenerate
ones; either way activations have more than they should of many decoder directions. All products of
activations with decoder rows, (x - b_pre) W_dec^T [tokens, n], are sorted; the proxy is the value
that rank x tokens of them exceed. It is comparable among SAEs of one stream, one n and one rank
above all their L0, and the best L0 is where it is smallest.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.base import EvalContext, Metric
from ksparse.evals.batches import SAEBatch
from ksparse.evals.statistics import Result, Value, no_value
from ksparse.progress import Progress, report
from ksparse.sae.model import SAE

RANKS = (1 / 8, 1 / 4, 3 / 8, 1 / 2)
"""Ranks at which the proxy is measured, as shares of n."""
RANK = 1 / 4
"""The rank that counts."""
TOKENS = 4_096
"""Tokens that are projected, at most."""
PROJECTIONS = 2**26
"""Projections held at once, at most."""
GROUPS = 8
"""Groups of documents, from whose values the standard error comes."""


@torch.no_grad()
def project(sae: SAE, x: Tensor) -> Tensor:
    """Return the products (x - b_pre) W_dec^T of normalised activations x[b, d], [b, n]."""
    return (x - sae.b_pre) @ sae.W_dec.T


def at_rank(projections: Tensor, share: float) -> float:
    """Return the value that share x n of the projections of a token exceed, on average.

    Args:
        projections: [b, n].
        share: The rank, as a share of n, from 0 to 1.

    Example:
        >>> import torch
        >>> at_rank(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5)
        2.0
    """
    flat = projections.flatten()
    above = min(len(flat) - 1, round(share * len(flat)))
    return float(flat.kthvalue(len(flat) - above).values)


@torch.no_grad()
def mean_cosine(rows: Tensor) -> float:
    """Return the mean absolute cosine of two different rows of a decoder [n, d]; 0 of one row.

    Mixed latents have larger ones: the same paper's simpler proxy.
    """
    unit = rows.float() / rows.float().norm(dim=1, keepdim=True).clamp_min(1e-30)
    n, total = len(unit), 0.0
    for part in unit.split(max(1, PROJECTIONS // 4 // n)):
        total += float((part @ unit.T).abs().double().sum())
    return (total - n) / (n * (n - 1)) if n > 1 else 0.0


def best_k(ks: list[int], values: list[float]) -> tuple[float, bool]:
    """Return the k at which a proxy is smallest, and whether that is inside the ks.

    Inside, it is the vertex of the parabola in log k through the smallest value and its
    neighbours.

    Args:
        ks: Rising values of k, at least 3.
        values: The proxy at each.

    Example:
        >>> best_k([4, 8, 16], [1.0, 0.5, 1.0])
        (8.0, True)
    """
    at = int(np.argmin(values))
    if at in (0, len(ks) - 1):
        return float(ks[at]), False
    x, y = np.log(ks[at - 1 : at + 2]), np.array(values[at - 1 : at + 2])
    a, b, _ = np.polyfit(x - x[1], y, 2)
    vertex = x[1] - b / (2 * a) if a > 0 else x[1]
    return round(float(np.exp(np.clip(vertex, x[0], x[2]))), 6), True


class DecoderProjection(Metric):
    """The decoder-projection proxy at several ranks, and the mean cosine of decoder rows."""

    needs_text = False

    def __init__(self, context: EvalContext):
        super().__init__(context)
        most = min(TOKENS, max(1, PROJECTIONS // context.sae.shape.n_latents))
        self.room = self.most = most
        self.x: list[Tensor] = []
        self.documents: list[Tensor] = []
        self.l0 = 0.0
        self.tokens = 0

    def update(self, batch: SAEBatch) -> None:
        self.l0 += float((batch.code.values > 0).sum())
        self.tokens += len(batch.code.values)
        if self.room > 0:
            x = batch.inputs.x[: self.room]
            self.x.append(x)
            self.documents.append(batch.held_out.documents[: self.room].cpu())
            self.room -= len(x)

    def compute(self, progress: Progress) -> None:
        report("projecting on the decoder")
        sae, x = self.context.sae, torch.cat(self.x)
        _, group = torch.cat(self.documents).unique(return_inverse=True)
        projections = project(sae, x).cpu()
        parts = [projections[group % GROUPS == number] for number in range(GROUPS)]
        self.points: list[dict[str, Any]] = [
            {"rank": rank, "projection": _with_error(projections, parts, rank)} for rank in RANKS
        ]
        self.cosine = mean_cosine(sae.W_dec)

    def finalize(self) -> Result:
        (chosen,) = (point for point in self.points if point["rank"] == RANK)
        return Result(
            {
                "projection": chosen["projection"],
                "ranks": self.points,
                "mean_cosine": {"value": self.cosine, "se": None},
                "l0": {"value": self.l0 / max(1, self.tokens), "se": None},
                "k": self.context.sae.shape.k,
                "n_projected": sum(map(len, self.x)),
            }
        )


def _with_error(projections: Tensor, parts: list[Tensor], rank: float) -> Value:
    """Return the proxy with its standard error over groups of documents."""
    if not projections.numel():
        return no_value()
    values = [at_rank(part, rank) for part in parts if part.numel()]
    se = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": at_rank(projections, rank), "se": se}
