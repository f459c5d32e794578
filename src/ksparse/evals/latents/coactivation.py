"""Which latents fire on the same tokens: counts over pairs, without an n by n table."""

from __future__ import annotations

import numpy as np

LISTED = 8
"""Coactivating latents kept for each latent."""
LEAST = 2
"""Tokens on which two latents must fire together; one is chance."""
_PAIRS = 2**28  # the most pairs to count; beyond that, fewer tokens are used
_CELLS = 2**24  # pairs of latents in one block of counts, most of them zero


def find_coactivating(token: np.ndarray, latent: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Find the latents that each latent fires together with.

    Args:
        token: The token of each activation, [m].
        latent: The latent of each activation, [m]; a (token, latent) occurs once.
        n: The number of latents.

    Returns:
        Arrays [n, LISTED], most correlated first: `together_latent` (-1 for none), `together_phi`
        (the correlation) and `together_count` (tokens on which both fire).
    """
    from scipy.sparse import csr_array

    rows, token = np.unique(token, return_inverse=True)
    kept = _limit_pairs(token, len(rows))
    token, latent, tokens = token[kept], latent[kept], int(token[kept].max(initial=-1)) + 1
    fires = csr_array((np.ones(len(latent), np.float32), (token, latent)), shape=(tokens, n))
    fired = np.bincount(latent, minlength=n).astype(np.float64)
    other, phi, count = (
        np.full((n, LISTED), -1, np.int32),
        np.zeros((n, LISTED), np.float32),
        np.zeros((n, LISTED), np.int32),
    )
    step = max(1, _CELLS // n)
    by_latent = fires.T.tocsr()
    for first in range(0, n, step):
        both = (by_latent[first : first + step] @ fires).tocoo()
        row, column, together = both.row + first, both.col, both.data.astype(np.float64)
        kept = (row != column) & (together >= LEAST)
        row, column, together = row[kept], column[kept], together[kept]
        score = correlation(together, fired[row], fired[column], tokens)
        order = np.lexsort((column, -score, row))
        order = order[score[order] > 0]
        rank = np.arange(len(order)) - np.searchsorted(row[order], row[order])
        order, rank = order[rank < LISTED], rank[rank < LISTED]
        for table, values in ((other, column), (phi, score), (count, together)):
            table[row[order], rank] = values[order]
    return {"together_latent": other, "together_phi": phi, "together_count": count}


def correlation(both: np.ndarray, one: np.ndarray, other: np.ndarray, tokens: int) -> np.ndarray:
    """Return phi = (n n11 - n1 n2) / sqrt(n1 (n - n1) n2 (n - n2)) from counts over n tokens.

    0 where a latent fires on every token or on none.
    """
    spread = one * (tokens - one) * other * (tokens - other)
    return np.where(
        spread > 0, (tokens * both - one * other) / np.sqrt(np.where(spread > 0, spread, 1)), 0
    )


def _limit_pairs(token: np.ndarray, tokens: int) -> np.ndarray:
    """Return a mask of activations: those of the first tokens, with at most `_PAIRS` pairs."""
    pairs = np.cumsum(np.bincount(token, minlength=tokens).astype(np.int64) ** 2)
    return token < max(1, int(np.searchsorted(pairs, _PAIRS, "right")))
