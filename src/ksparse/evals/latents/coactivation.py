"""Which latents fire together: counts over pairs of latents on the same tokens, without an n by n
table."""

from __future__ import annotations

import numpy as np

LISTED = 8
"""Companions kept of each latent."""
LEAST = 2
"""Tokens on which two latents must fire together: one is chance."""
_PAIRS = 2**28  # counted at most; beyond, fewer tokens are looked at
_CELLS = 2**24  # pairs of latents in one block of counts, most of them empty


def coactivating(token: np.ndarray, latent: np.ndarray, n: int) -> dict[str, np.ndarray]:
    """Return the latents that each fires together with, [n, LISTED], from activations (number of
    the token, latent), each pair once.

    together_latent (-1: none), together_phi (by which they are sorted), together_count (tokens on
    which both fire).
    """
    from scipy.sparse import csr_array

    rows, token = np.unique(token, return_inverse=True)
    few = _fewer(token, len(rows))
    token, latent, tokens = token[few], latent[few], int(token[few].max(initial=-1)) + 1
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
        mine, theirs, together = both.row + first, both.col, both.data.astype(np.float64)
        there = (mine != theirs) & (together >= LEAST)
        mine, theirs, together = mine[there], theirs[there], together[there]
        found = correlation(together, fired[mine], fired[theirs], tokens)
        order = np.lexsort((theirs, -found, mine))
        order = order[found[order] > 0]
        place = np.arange(len(order)) - np.searchsorted(mine[order], mine[order])
        order, place = order[place < LISTED], place[place < LISTED]
        for table, column in ((other, theirs), (phi, found), (count, together)):
            table[mine[order], place] = column[order]
    return {"together_latent": other, "together_phi": phi, "together_count": count}


def correlation(both: np.ndarray, one: np.ndarray, other: np.ndarray, tokens: int) -> np.ndarray:
    """Return phi = (n n11 - n1 n2) / sqrt(n1 (n - n1) n2 (n - n2)) from counts over n tokens; 0
    where a latent fires always."""
    spread = one * (tokens - one) * other * (tokens - other)
    return np.where(
        spread > 0, (tokens * both - one * other) / np.sqrt(np.where(spread > 0, spread, 1)), 0
    )


def _fewer(token: np.ndarray, tokens: int) -> np.ndarray:
    """Return which activations are looked at: those of the first tokens, so that there are not too
    many pairs."""
    pairs = np.cumsum(np.bincount(token, minlength=tokens).astype(np.int64) ** 2)
    return token < max(1, int(np.searchsorted(pairs, _PAIRS, "right")))
