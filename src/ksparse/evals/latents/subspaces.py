"""Do groups of latents keep to subspaces of their own? Gao et al. 2024, appendix E.7.

W_enc = U S V^T of the latents that fire. A row of U, normalised and squared, says in what shares a
latent reads the d principal directions. Latents are put into an order by the distances between
these shares, the order is cut in two where the parts share the fewest directions, and each
direction goes to the part that reads more of it. `separation` is how much of the one part's reading
is on its own directions, plus the same of the other, less 1: 1 for two subspaces, 0 if both read
alike. Some of it comes from
choosing: rows of noise say how much.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.base import EvalContext, Metric, Progress
from ksparse.evals.latents.properties import Firing, quartiles
from ksparse.evals.statistics import Result

NEIGHBOURS = 15  # of a latent: the one so far away gives the width of its kernel
LEAST_SHARE = 0.05  # of the latents on either side of a cut
_CELLS = 100  # along the order


class Subspaces(Metric):
    """The split of latents and of directions, and what latents on both sides are like."""

    def __init__(self, context: EvalContext):
        super().__init__(context)
        self.firing = context.part(Firing)

    def compute(self, observe: Progress) -> None:
        options, sae = self.context.options, self.context.sae
        self.live = np.flatnonzero(self.firing.density > 0)
        if len(self.live) < 2 * NEIGHBOURS:
            raise InputError(
                f"subspaces needs at least {2 * NEIGHBOURS} latents that fire on the text; "
                f"{len(self.live)} do. Give more --tokens"
            )
        observe("decomposing the encoder", 0, 3)
        draw = np.random.default_rng([options.seed, 7])
        self.shares, self.sizes = shares(
            sae.W_enc.detach()[torch.from_numpy(self.live).to(sae.W_enc.device)]
        )
        self.sample = np.sort(draw.permutation(len(self.live))[: options.subspace_rows])
        observe("ordering latents", 1, 3)
        rows = self.shares[torch.from_numpy(self.sample)].numpy()
        self.order = order(rows, options.ordering, options.seed)
        self.split = split(rows[self.order])
        self.order = self.order[::-1].copy() if self.split.is_last else self.order
        observe("ordering noise", 2, 3)
        noise = draw.standard_normal((min(len(rows), options.subspace_rows), rows.shape[1]))
        noise = (noise / np.linalg.norm(noise, axis=1, keepdims=True)) ** 2
        self.chance = split(noise[order(noise, options.ordering, options.seed)]).separation
        observe("ordering noise", 3, 3)

    def finalize(self) -> Result:
        sae, firing, cut = self.context.sae, self.firing, self.split
        rows = self.shares.numpy()
        own = rows[:, cut.dims].sum(1)  # of every live latent, sampled or not
        first = own >= cut.border
        parts = {"first": first, "second": ~first}
        norms = sae.W_enc.detach().norm(dim=1).cpu().double().numpy()
        tokens = np.where(firing.often, firing.effective_tokens(), np.nan)
        ordered = self.sample[self.order]
        notes = [
            f"{len(self.live):,} of {sae.shape.n_latents:,} latents fire on this text and are "
            "looked at"
        ]
        if len(self.sample) < len(self.live):
            notes.append(
                f"{len(self.sample):,} of them, drawn at random, were put into an order; the "
                "others were then dealt by the directions that they read"
            )
        values = {
            "separation": cut.separation,
            "separation_of_noise": self.chance,
            "latents_share": float(first.mean()),
            "dims_share": len(cut.dims) / rows.shape[1],
            "n_live": len(self.live),
            "n_ordered": len(self.sample),
            "own_share": [
                float(own[first].mean()) if first.any() else None,
                float(1 - own[~first].mean()) if (~first).any() else None,
            ],
            "sides": {
                name: _side(self.live[where], norms, tokens, firing.density)
                for name, where in parts.items()
            },
            "cut": cut.at / len(ordered),
            "along_order": [
                float(part.mean())
                for part in np.array_split(own[ordered], min(_CELLS, len(ordered)))
            ],
            "by_direction": {
                name: rows[where].mean(0).tolist() for name, where in parts.items() if where.any()
            },
            "singular_values": self.sizes.tolist(),
            "notes": notes,
        }
        side = np.full(sae.shape.n_latents, -1)
        side[self.live] = np.where(first, 0, 1)
        return Result(
            values,
            {
                "order": torch.from_numpy(self.live[ordered].astype(np.int32)),
                "side": torch.from_numpy(side.astype(np.int8)),
                "dims": torch.from_numpy(cut.dims.astype(np.int32)),
                "encoder_norm": torch.from_numpy(norms).float(),
            },
        )


class Split(NamedTuple):
    """An order cut in two. The first part is the one that reads fewer directions."""

    at: int
    """Latents in the first part."""
    is_last: bool
    """Whether these are the last ones of the order."""
    dims: np.ndarray
    """The directions of the first part."""
    separation: float
    border: float
    """Share on these directions that is between those of the two parts."""


@torch.no_grad()
def shares(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return squared normalised rows of U of W[n, d] = U S V^T, largest singular value first, [n,
    r] as float64 with rows that sum to 1; and S.

    By the eigenvectors of W^T W, d x d, so that it works for any n; directions that W has nothing
    in are left out.
    """
    rows = W.cpu().double()
    squares, vectors = torch.linalg.eigh(rows.T @ rows)
    squares, vectors = squares.flip(0), vectors.flip(1)
    there = squares > squares[0] * 1e-12
    sizes = squares[there].sqrt()
    U = rows @ vectors[:, there] / sizes
    return U.square() / U.square().sum(1, keepdim=True).clamp_min(1e-300), sizes


def order(rows: np.ndarray, how: str = "spectral", seed: int = 0) -> np.ndarray:
    """Return an order of rows[m, d] in which near ones are near.

    spectral: by the second eigenvector of the normalised Laplacian of Gaussian kernels, each as
    wide as its row's neighbours are far.
    """
    line = _umap(rows, seed) if how == "umap" else _fiedler(rows)
    return np.argsort(line, kind="stable")


def _fiedler(rows: np.ndarray) -> np.ndarray:
    from scipy.sparse.linalg import LinearOperator, eigsh

    m = len(rows)
    square = np.einsum("md,md->m", rows, rows)
    away = square[:, None] + square[None, :]
    away -= 2 * rows @ rows.T
    np.maximum(away, 0, out=away)
    neighbours = min(NEIGHBOURS, m - 1)
    width = np.sqrt(np.maximum(np.partition(away, neighbours, axis=1)[:, neighbours], 1e-300))
    away /= -width[:, None]
    away /= width[None, :]
    kernel = np.exp(away, out=away)
    root = 1 / np.sqrt(kernel.sum(1))
    known = (
        1 / root / np.linalg.norm(1 / root)
    )  # the first eigenvector, of value 1, which is taken out

    def times(v: np.ndarray) -> np.ndarray:
        v = v.ravel()
        return (
            root * (kernel @ (root * v)) + v - 2 * known * (known @ v)
        )  # one more on all but the known one: nothing is negative

    start = np.random.default_rng(0).standard_normal(m)
    _, vectors = eigsh(
        LinearOperator((m, m), matvec=times),
        k=1,
        which="LA",
        v0=start - known * (known @ start),
        tol=1e-6,
    )
    return vectors[:, 0] * root


def _umap(rows: np.ndarray, seed: int) -> np.ndarray:
    try:
        from umap import UMAP
    except ModuleNotFoundError:
        raise InputError(
            "--ordering umap needs the package umap-learn: pip install 'ksparse[umap]'; spectral "
            "needs nothing"
        ) from None
    return UMAP(
        n_components=1, n_neighbors=min(NEIGHBOURS, len(rows) - 1), random_state=seed, n_jobs=1
    ).fit_transform(rows)[:, 0]


def split(rows: np.ndarray) -> Split:
    """Cut ordered rows[m, d], each summing to 1, where the two parts are most separate for their
    sizes; the part that reads fewer directions is called the first."""
    m, d = rows.shape
    least = max(1, int(np.ceil(LEAST_SHARE * m)))
    before = np.cumsum(rows, 0)
    at = np.arange(least, m - least + 1)
    left = before[at - 1] / at[:, None]
    right = (before[-1] - before[at - 1]) / (m - at)[:, None]
    gaps = np.maximum(left - right, 0).sum(
        1
    )  # sum over the left's directions of left - right: own share of both, less 1
    best = int(np.argmax(gaps * np.sqrt(at * (m - at))))  # means of few rows differ by chance alone
    mine = left[best] > right[best]
    own = rows[:, mine].sum(1)
    border = float((own[: at[best]].mean() + own[at[best] :].mean()) / 2)
    if mine.sum() * 2 <= d:
        return Split(int(at[best]), False, np.flatnonzero(mine), float(gaps[best]), border)
    return Split(int(m - at[best]), True, np.flatnonzero(~mine), float(gaps[best]), 1 - border)


def _side(
    latents: np.ndarray, norms: np.ndarray, tokens: np.ndarray, density: np.ndarray
) -> dict[str, Any]:
    """Return what the latents on a side are like: quartiles of their encoder norm, effective tokens
    and density."""
    return {
        "n_latents": len(latents),
        "encoder_norm": quartiles(norms[latents]),
        "effective_tokens": quartiles(tokens[latents]),
        "density": quartiles(density[latents]),
    }
