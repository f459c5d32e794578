"""Do latents split as an SAE grows? Decoder neighbours across n; after Leask et al. 2025, arXiv
2502.04878.

A latent of the smaller SAE is kept where the larger has one neighbour of it (a decoder row of
cosine `stability.LEAST` or more), split where it has several, and lost where it has none. A latent
of the larger SAE without a neighbour in the smaller one is new.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ksparse.evals.stability import LEAST, near_pairs
from ksparse.evals.statistics import Value, no_value, share


@torch.no_grad()
def splitting(
    small: tuple[Tensor, np.ndarray],
    large: tuple[Tensor, np.ndarray],
    least: float = LEAST,
    what: str = "comparing latents",
) -> dict[str, Value]:
    """Return the shares of live latents that are kept, split, lost and new from one SAE to a larger
    one.

    Args:
        small: Decoder rows [n, d] of the smaller SAE, and which latents are live, bool [n].
        large: The same of the larger one.
        least: Least cosine of neighbours.
        what: What to call it in progress reports.

    Example:
        >>> import torch
        >>> small = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> large = torch.tensor([[1.0, 0.3, 0.0], [1.0, -0.3, 0.0], [0.0, 0.0, 1.0]])
        >>> alive = np.ones(2, bool), np.ones(3, bool)
        >>> found = splitting((small, alive[0]), (large, alive[1]))
        >>> [round(found[key]["value"], 2) for key in ("kept", "split", "lost", "new")]
        [0.0, 0.5, 0.5, 0.33]
    """
    (one, live), (other, other_live) = small, large
    pairs = near_pairs(
        one[torch.from_numpy(live)], other[torch.from_numpy(other_live)], least, what
    )
    of_small = np.bincount(pairs.first, minlength=int(live.sum()))
    of_large = np.bincount(pairs.second, minlength=int(other_live.sum()))
    return {
        "kept": _share(of_small == 1),
        "split": _share(of_small > 1),
        "lost": _share(of_small == 0),
        "new": _share(of_large == 0),
    }


def _share(chosen: np.ndarray) -> Value:
    return share(int(chosen.sum()), len(chosen)) if len(chosen) else no_value()
