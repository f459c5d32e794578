"""Dense regions of a map, and the tokens by which each differs from the rest.

A region is a hill of the density of latents: a kernel density estimate on a grid, of which each
cell belongs to the peak that the steepest way up leads to. A region's tokens are those whose mean
share among its latents exceeds the mean share among all drawn latents most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

GRID = 160
"""Cells of the grid along each side of the map."""
BANDWIDTH = 0.4
"""Bandwidth of the kernel, in units of Scott's rule for two dimensions."""
MOST_REGIONS = 100
"""Regions with the most latents that are returned."""
LEAST_LATENTS, LEAST_SHARE = 8, 0.002
"""Latents of a region at least: a number, and a share of those drawn."""
LIFT, LEAST_HOLDERS = 2.0, 3
"""A token is named if its share is so many times that among all, and so many latents have it."""
TOKENS = 3
"""Tokens of a region at most."""


@dataclass(frozen=True)
class TokenShares:
    """Tokens of every latent with their weights; the weights of a latent sum to 1 at most.

    Args:
        tokens: [n, m] token ids; -1 for none.
        weights: [n, m].
    """

    tokens: np.ndarray
    weights: np.ndarray


def find(places: np.ndarray) -> np.ndarray:
    """Return the region of each latent, [n]; -1 for latents without a place.

    Regions are numbered by their peaks, the highest first.

    Args:
        places: [n, 2]; NaN for latents without a place.

    Example:
        >>> places = np.concatenate([np.eye(50, 2) / 9, np.eye(40, 2) / 9 + 5])
        >>> np.unique(find(places), return_counts=True)[1].tolist()
        [50, 40]
    """
    from scipy.ndimage import gaussian_filter

    region = np.full(len(places), -1)
    drawn = np.isfinite(places).all(1)
    if not drawn.any():
        return region
    points = places[drawn].astype(np.float64)
    low, high = points.min(0), points.max(0)
    span = np.where(high > low, high - low, 1)
    cells = np.minimum(((points - low) / span * GRID).astype(int), GRID - 1)
    counts = np.zeros((GRID, GRID))
    np.add.at(counts, (cells[:, 0], cells[:, 1]), 1)
    spread = (points / span * GRID).std(0)
    widths = np.maximum(BANDWIDTH * spread * len(points) ** (-1 / 6), 0.7)
    peaks = _climb(gaussian_filter(counts, widths, mode="constant", truncate=6))
    peak = peaks[cells[:, 0] * GRID + cells[:, 1]]
    _, region[drawn] = np.unique(peak, return_inverse=True)
    return region


def _climb(density: np.ndarray) -> np.ndarray:
    """Return the rank of the peak that each cell leads up to, [cells]; 0 is the highest."""
    padded = np.pad(density, 1, constant_values=-1.0)
    rows, columns = np.arange(GRID)[:, None], np.arange(GRID)
    best, target = density.copy(), rows * GRID + columns
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            other = padded[1 + down : 1 + down + GRID, 1 + right : 1 + right + GRID]
            steeper = other > best
            best = np.where(steeper, other, best)
            target = np.where(steeper, (rows + down) * GRID + columns + right, target)
    leads: np.ndarray = target.ravel()
    further: np.ndarray = leads[leads]
    while not np.array_equal(further, leads):
        leads, further = further, further[further]
    found, numbers = np.unique(leads, return_inverse=True)
    ranks = np.empty(len(found), int)
    ranks[np.argsort(-density.ravel()[found], kind="stable")] = np.arange(len(found))
    result: np.ndarray = ranks[numbers]
    return result


def describe(
    places: np.ndarray, terms: dict[str, TokenShares], spell: Any, region: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """Return the largest regions: where they are, how many latents they have, and their tokens.

    Args:
        places: [n, 2]; NaN for latents without a place.
        terms: tokens of every latent, by what they are: "fires", "raises".
        spell: a token's string by its id. Tokens that differ in case or outer spaces are one.
        region: the region of each latent; by default as `find` gives it.

    Returns:
        For each region, the largest first: `at` (median place of its latents), `radius` (a circle
        around it with half of them), `count`, and of each kind of terms [[string, share in the
        region, share among all], …].
    """
    region = find(places) if region is None else region
    drawn = region >= 0
    if not drawn.any():
        return []
    counts = np.bincount(region[drawn])
    least = max(LEAST_LATENTS, LEAST_SHARE * drawn.sum())
    order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i] >= least]
    named = {kind: _name(region, each, spell) for kind, each in terms.items()}
    found = []
    for number in order[:MOST_REGIONS]:
        of_region = places[region == number].astype(np.float64)
        at = np.median(of_region, 0)
        radius = float(np.median(np.linalg.norm(of_region - at, axis=1)))
        found.append(
            {
                "at": [float(f"{value:.5g}") for value in at],
                "radius": float(f"{radius:.5g}"),
                "count": int(counts[number]),
                **{kind: names.get(number, []) for kind, names in named.items()},
            }
        )
    return found


def _name(region: np.ndarray, terms: TokenShares, spell: Any) -> dict[int, list[list[Any]]]:
    """Return [[string, share in the region, share among all], …] of each region that has any."""
    latent, place = np.nonzero((terms.tokens >= 0) & (region[:, None] >= 0))
    token, weight = terms.tokens[latent, place], terms.weights[latent, place].astype(np.float64)
    ids, token = np.unique(token, return_inverse=True)
    words, strings = _words([spell(int(i)) for i in ids])
    word, counts = words[token], np.bincount(region[region >= 0])
    size = len(strings)
    # A pair of a latent and a word once, though several tokens may be of that word.
    _, first = np.unique(latent * size + word, return_index=True)
    key = region[latent] * size + word
    used, index = np.unique(key, return_inverse=True)
    mass = np.bincount(index, weights=weight)
    holders = np.bincount(index[first], minlength=len(used))
    of_region, of_word = used // size, used % size
    share = mass / counts[of_region]
    overall = np.bincount(word, weights=weight, minlength=size)[of_word] / counts.sum()
    kept = (share >= LIFT * overall) & (holders >= LEAST_HOLDERS)
    named: dict[int, list[list[Any]]] = {}
    for i in np.lexsort((of_word, overall - share)):
        listed = named.setdefault(int(of_region[i]), []) if kept[i] else None
        if listed is not None and len(listed) < TOKENS:
            shares = (float(f"{value:.3g}") for value in (share[i], overall[i]))
            listed.append([strings[of_word[i]], *shares])
    return named


def _words(strings: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return which word each string is, and the words: without outer spaces, whatever the case."""
    numbers: dict[str, int] = {}
    shown: list[str] = []
    words = np.zeros(len(strings), int)
    for i, string in enumerate(strings):
        bare = string.strip() or string
        words[i] = numbers.setdefault(bare.casefold(), len(shown))
        if words[i] == len(shown):
            shown.append(bare)
    return words, shown
