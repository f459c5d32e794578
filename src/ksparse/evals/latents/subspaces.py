"""Whether two groups of latents read separate subspaces (Gao et al. 2024, appendix E.7).

Let W_enc = U S V^T, of the latents that fire. A row of U, squared and normalised, holds the shares
in which a latent reads the principal directions. Latents are ordered by the distances between their
shares. The order is cut in two where the parts share the fewest directions, and each direction goes
to the part that reads more of it.

`separation` is the share of the first part's reading on its own directions, plus the same of the
second, minus 1: it is 1 for two subspaces and 0 if both parts read alike. Part of it comes from
choosing the cut; rows of noise show how much.
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

NEIGHBOURS = 15
"""A latent's kernel is as wide as the distance to its neighbour of this rank."""
LEAST_SHARE = 0.05
"""Smallest share of the latents on either side of a cut."""
_CELLS = 100  # cells along the order in the result


class Subspaces(Metric):
    """The split of latents and directions into two subspaces, and properties of both sides."""

    needs_text = False

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
        generator = np.random.default_rng([options.seed, 7])
        self.shares, self.sizes = shares(
            sae.W_enc.detach()[torch.from_numpy(self.live).to(sae.W_enc.device)]
        )
        self.sample = np.sort(generator.permutation(len(self.live))[: options.subspace_rows])
        observe("ordering latents", 1, 3)
        rows = self.shares[torch.from_numpy(self.sample)].numpy()
        self.order = order(rows, options.ordering, options.seed)
        self.split = split(rows[self.order])
        self.order = self.order[::-1].copy() if self.split.is_last else self.order
        observe("ordering noise", 2, 3)
        noise = generator.standard_normal((min(len(rows), options.subspace_rows), rows.shape[1]))
        noise = (noise / np.linalg.norm(noise, axis=1, keepdims=True)) ** 2
        self.chance = split(noise[order(noise, options.ordering, options.seed)]).separation
        observe("ordering noise", 3, 3)

    def finalize(self) -> Result:
        sae, firing, cut = self.context.sae, self.firing, self.split
        rows = self.shares.numpy()
        # Share on the first part's directions, of every live latent, sampled or not.
        share = rows[:, cut.dims].sum(1)
        first = share >= cut.border
        parts = {"first": first, "second": ~first}
        norms = sae.W_enc.detach().norm(dim=1).cpu().double().numpy()
        tokens = np.where(firing.fires_enough, firing.effective_tokens(), np.nan)
        ordered = self.sample[self.order]
        notes = [
            f"{len(self.live):,} of {sae.shape.n_latents:,} latents fire on this text and are used"
        ]
        if len(self.sample) < len(self.live):
            notes.append(
                f"{len(self.sample):,} of them, drawn at random, were ordered; the others were "
                "then assigned by the directions that they read"
            )
        values = {
            "separation": cut.separation,
            "separation_of_noise": self.chance,
            "latents_share": float(first.mean()),
            "dims_share": len(cut.dims) / rows.shape[1],
            "n_live": len(self.live),
            "n_ordered": len(self.sample),
            "own_share": [
                float(share[first].mean()) if first.any() else None,
                float(1 - share[~first].mean()) if (~first).any() else None,
            ],
            "sides": {
                name: _describe_side(self.live[members], norms, tokens, firing.density)
                for name, members in parts.items()
            },
            "cut": cut.at / len(ordered),
            "along_order": [
                float(part.mean())
                for part in np.array_split(share[ordered], min(_CELLS, len(ordered)))
            ],
            "by_direction": {
                name: rows[members].mean(0).tolist()
                for name, members in parts.items()
                if members.any()
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
    """An order cut in two; the first part is the one that reads fewer directions.

    Attributes:
        at: Latents in the first part.
        is_last: Whether the first part is at the end of the order.
        dims: The directions of the first part.
        separation: How separate the parts are, from 0 to 1.
        border: The share on `dims` midway between the means of both parts.
    """

    at: int
    is_last: bool
    dims: np.ndarray
    separation: float
    border: float


@torch.no_grad()
def shares(W: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares in which each row of W[n, d] = U S V^T reads the principal directions.

    Computed from the eigenvectors of W^T W, d x d, so that it works for any n. Directions without
    any variance are left out.

    Returns:
        Squared rows of U, normalised to sum to 1, float64 [n, r], and S [r], largest first.
    """
    rows = W.cpu().double()
    squares, vectors = torch.linalg.eigh(rows.T @ rows)
    squares, vectors = squares.flip(0), vectors.flip(1)
    kept = squares > squares[0] * 1e-12
    singular_values = squares[kept].sqrt()
    U = rows @ vectors[:, kept] / singular_values
    return U.square() / U.square().sum(1, keepdim=True).clamp_min(1e-300), singular_values


def order(rows: np.ndarray, how: str = "spectral", seed: int = 0) -> np.ndarray:
    """Return an order of rows[m, d] in which similar rows are close.

    Args:
        rows: The rows.
        how: `spectral` orders by the second eigenvector of the normalised Laplacian of Gaussian
            kernels, as wide as a row's neighbours are far; `umap` by UMAP in one dimension.
        seed: Seed of UMAP.
    """
    coordinate = _umap(rows, seed) if how == "umap" else _fiedler(rows)
    return np.argsort(coordinate, kind="stable")


def _fiedler(rows: np.ndarray) -> np.ndarray:
    """Return the Fiedler vector [m] of the rows' similarity graph."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    m = len(rows)
    norm2 = np.einsum("md,md->m", rows, rows)
    distance = norm2[:, None] + norm2[None, :]
    distance -= 2 * rows @ rows.T
    np.maximum(distance, 0, out=distance)
    neighbours = min(NEIGHBOURS, m - 1)
    width = np.sqrt(np.maximum(np.partition(distance, neighbours, axis=1)[:, neighbours], 1e-300))
    distance /= -width[:, None]
    distance /= width[None, :]
    kernel = np.exp(distance, out=distance)
    root = 1 / np.sqrt(kernel.sum(1))
    known = 1 / root / np.linalg.norm(1 / root)  # the first eigenvector, of eigenvalue 1

    def multiply(v: np.ndarray) -> np.ndarray:
        """Multiply by the matrix with the known eigenvector removed and the others shifted by 1.

        The shift keeps them positive, so that the second eigenvector has the largest eigenvalue.
        """
        v = v.ravel()
        return root * (kernel @ (root * v)) + v - 2 * known * (known @ v)

    start = np.random.default_rng(0).standard_normal(m)
    _, vectors = eigsh(
        LinearOperator((m, m), matvec=multiply),
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
    """Cut ordered rows[m, d], each summing to 1, where both parts are most separate for their size.

    The first part is the one that reads fewer directions.
    """
    m, d = rows.shape
    smallest = max(1, int(np.ceil(LEAST_SHARE * m)))
    before = np.cumsum(rows, 0)
    at = np.arange(smallest, m - smallest + 1)
    left = before[at - 1] / at[:, None]
    right = (before[-1] - before[at - 1]) / (m - at)[:, None]
    # Summed over the directions that the left reads more, left - right is the separation.
    separations = np.maximum(left - right, 0).sum(1)
    # Weighted by size, because means of few rows differ by chance.
    best = int(np.argmax(separations * np.sqrt(at * (m - at))))
    of_left = left[best] > right[best]
    share = rows[:, of_left].sum(1)
    border = float((share[: at[best]].mean() + share[at[best] :].mean()) / 2)
    separation = float(separations[best])
    if of_left.sum() * 2 <= d:
        return Split(int(at[best]), False, np.flatnonzero(of_left), separation, border)
    return Split(int(m - at[best]), True, np.flatnonzero(~of_left), separation, 1 - border)


def _describe_side(
    latents: np.ndarray, norms: np.ndarray, tokens: np.ndarray, density: np.ndarray
) -> dict[str, Any]:
    """Return quartiles of the encoder norm, effective tokens and density of a side's latents."""
    return {
        "n_latents": len(latents),
        "encoder_norm": quartiles(norms[latents]),
        "effective_tokens": quartiles(tokens[latents]),
        "density": quartiles(density[latents]),
    }
