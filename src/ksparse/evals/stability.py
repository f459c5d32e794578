"""Which latents do other seeds find too? Paulo & Belrose 2025, arXiv 2501.16615.

    match(one, other)              one-to-one partners among decoder rows, by cosine
    stability(run, others, …)      the latents of an SAE that every other seed has too

Two latents can be partners where their decoder rows have a cosine of at least `LEAST`. Among all
such pairs the matching with the largest sum of cosines is taken, each latent at most once: the
optimal assignment, which is computed on the candidate pairs alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksparse.errors import InputError
from ksparse.evals.statistics import Result, Value, no_value, share
from ksparse.progress import report

LEAST = 0.7
"""Smallest cosine of two latents that count as the same."""
COSINES = 2**24
"""Cosines computed at a time."""
GROUPS = 4
"""Groups of latents, of equal size, by density and by effect."""


@dataclass(frozen=True)
class Matching:
    """Partners of the latents of one SAE among those of another.

    Attributes:
        partner: The partner of each latent [n], -1 where it has none.
        cosine: The cosine with it [n], 0 where there is none.
        nearest: The largest cosine with any latent of the other SAE [n].
        candidates: Pairs of a cosine of at least the least one.
    """

    partner: np.ndarray
    cosine: np.ndarray
    nearest: np.ndarray
    candidates: int


@torch.no_grad()
def match(
    one: Tensor, other: Tensor, least: float = LEAST, what: str = "matching latents"
) -> Matching:
    """Match the rows of two decoders one to one by their cosines.

    The pairs whose cosine is at least `least` are found a few rows at a time; the assignment of the
    largest sum of cosines is computed on them alone. It is that of
    `scipy.optimize.linear_sum_assignment` on all cosines, those below `least` set to 0.

    Args:
        one: Decoder rows [n, d].
        other: Decoder rows [m, d].
        least: The smallest cosine of partners, above 0.
        what: What to call it in progress reports.

    Raises:
        InputError: The rows have different widths.

    Example:
        >>> import torch
        >>> rows = torch.eye(3)
        >>> match(rows, rows[[2, 0, 1]]).partner.tolist()
        [1, 2, 0]
    """
    if one.shape[1] != other.shape[1]:
        raise InputError(
            f"decoders of width {one.shape[1]} and {other.shape[1]} cannot be compared; give SAEs "
            "of one site"
        )
    first, second, cosines, nearest = near_pairs(one, other, least, what)
    partner, cosine = np.full(len(one), -1), np.zeros(len(one))
    chosen = _assign(first, second, cosines, len(one), len(other))
    partner[first[chosen]], cosine[first[chosen]] = second[chosen], cosines[chosen]
    return Matching(partner, cosine, nearest, len(first))


class NearPairs(NamedTuple):
    """Pairs of rows of two decoders, in the order of the first: their numbers and cosines, each
    [pairs]; and the largest cosine of each first row with any second one, [n]."""

    first: np.ndarray
    second: np.ndarray
    cosine: np.ndarray
    nearest: np.ndarray


@torch.no_grad()
def near_pairs(one: Tensor, other: Tensor, least: float, what: str) -> NearPairs:
    """Return the pairs of rows of one[n, d] and other[m, d] with a cosine of at least `least`.

    Cosines are computed a few rows at a time.

    Args:
        one: The first rows.
        other: The second rows.
        least: The smallest cosine.
        what: What to call it in progress reports.
    """
    one, other = _unit(one), _unit(other)
    rows, columns, cosines, nearest = [], [], [], []
    size, done = max(1, COSINES // max(1, len(other))), 0
    report(what, 0, len(one))
    for part in one.split(size):
        found = part @ other.T
        row, column = (found >= least).nonzero(as_tuple=True)
        rows.append((row + done).cpu().numpy())
        columns.append(column.cpu().numpy())
        cosines.append(found[row, column].double().cpu().numpy())
        nearest.append(found.amax(1).double().cpu().numpy())
        report(what, done := done + len(part), len(one))
    return NearPairs(*(np.concatenate(parts) for parts in (rows, columns, cosines, nearest)))


def _unit(rows: Tensor) -> Tensor:
    return rows.float() / rows.float().norm(dim=1, keepdim=True).clamp_min(1e-30)


def _assign(
    first: np.ndarray, second: np.ndarray, weight: np.ndarray, n: int, m: int
) -> np.ndarray:
    """Return which pairs are in the matching of the largest sum of weights, as indices.

    Each first row may also stay alone, with a partner of its own of weight 0: then every row is
    matched, as scipy's sparse assignment wants it. All weights are raised by 1, because a stored 0
    would be no edge; this adds the same to every matching.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    used = np.unique(first)
    row = np.searchsorted(used, first)
    alone = np.arange(len(used))
    graph = coo_matrix(
        (
            np.concatenate([1 + weight, np.ones(len(used))]),
            (np.concatenate([row, alone]), np.concatenate([second, m + alone])),
        ),
        shape=(len(used), m + len(used)),
    )
    if not len(used):
        return np.zeros(0, np.int64)
    rows, columns = min_weight_full_bipartite_matching(graph.tocsr(), maximize=True)
    taken = columns < m
    order = np.lexsort((second, row))
    keys = (row[order].astype(np.int64) * m + second[order]).astype(np.int64)
    wanted = rows[taken].astype(np.int64) * m + columns[taken]
    chosen: np.ndarray = order[np.searchsorted(keys, wanted)]
    return chosen


def stability(
    run: Tensor,
    others: Mapping[str, Tensor],
    density: np.ndarray,
    effect: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    cosines: np.ndarray | None = None,
    least: float = LEAST,
) -> Result:
    """Return which latents of an SAE have a partner in every other seed.

    Args:
        run: Its decoder rows [n, d].
        others: The decoder rows of SAEs trained with other seeds, by name.
        density: Share of tokens on which each latent fires [n]; those of 0 are dead.
        effect: Some latents and what each does to the LM, if it was measured.
        cosines: Cosine of each latent's encoder and decoder rows [n], to compare stable latents
            with others by it.
        least: The smallest cosine of partners.

    Returns:
        A result: the share of live latents that are stable, with a standard error over latents; of
        each pair of SAEs the share with a partner; the share by density and by effect. Arrays:
        `found_in` (share of the other seeds with a partner), `nearest` (mean over the seeds of the
        largest cosine with any latent), both [n].
    """
    matchings = {
        name: match(run, rows, least, f"matching with {name}") for name, rows in others.items()
    }
    found = np.stack([one.partner >= 0 for one in matchings.values()])
    stable = np.asarray(found.all(0))
    live, anywhere = density > 0, np.asarray(found.any(0))
    result: dict[str, Any] = {
        "name": "stability",
        "least": least,
        "seeds": list(others),
        "stable": _share(stable, live),
        "stable_of_all": _share(stable, np.ones_like(live)),
        "found_in_one": _share(anywhere, live),
        "pairs": {name: _share(one, live) for name, one in zip(others, found)},
        "candidates": {name: one.candidates for name, one in matchings.items()},
        "by_density": _by_group(stable, np.flatnonzero(live), density[live]),
    }
    if effect is not None:
        latents, size = effect
        kept = live[latents] & np.isfinite(size)
        result["by_effect"] = _by_group(stable, latents[kept], size[kept])
    if cosines is not None:
        result["encoder_cosine"] = {
            "stable": mean(cosines[live & stable]),
            "others": mean(cosines[live & ~stable]),
            "dead": mean(cosines[~live]),
        }
    nearest = np.mean([one.nearest for one in matchings.values()], axis=0)
    arrays = {"found_in": found.mean(0), "nearest": nearest}
    return Result(
        result, {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}
    )


def _share(chosen: np.ndarray, among: np.ndarray) -> Value:
    total = int(among.sum())
    return share(int((chosen & among).sum()), total) if total else no_value()


def mean(values: np.ndarray) -> Value:
    """Return a mean with its standard error over latents; no value of nothing."""
    if not len(values):
        return no_value()
    se = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": float(values.mean()), "se": se}


def _by_group(stable: np.ndarray, latents: np.ndarray, by: np.ndarray) -> list[dict[str, Any]]:
    """Return the share of stable latents in groups of equal size by rising `by`[latents]."""
    order = np.argsort(by, kind="stable")
    parts: Sequence[np.ndarray] = (
        np.array_split(order, min(GROUPS, len(order))) if len(order) else []
    )
    return [
        {
            "from": float(by[part[0]]),
            "to": float(by[part[-1]]),
            "latents": len(part),
            "stable": share(int(stable[latents[part]].sum()), len(part)),
        }
        for part in parts
    ]
