"""What an SAE found of known features: `measure(sae, options)`.

Each feature has at most one latent, its partner: of all assignments of latents to features, the one
whose cosines of decoder row and direction have the largest sum (`evals.stability.match`). The mean
of these cosines is the MCC (mean correlation coefficient), as in SAELens' benchmark (Chanin &
Garriga-Alonso 2026, arXiv 2602.14687), but for the sign: a latent that points the other way is no
detector of a feature whose values are positive.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ksparse.config import Planted
from ksparse.data.planted import PlantedFeatures
from ksparse.errors import InputError
from ksparse.evals.stability import COSINES, LEAST, match
from ksparse.evals.statistics import Result, ratio, share
from ksparse.progress import report
from ksparse.sae.model import SAE

ROWS = 65_536
"""Rows on which latents and features are compared."""
FOUND = 0.9
"""Cosine from which a feature counts as found."""
_ANY = 1e-6  # least cosine of partners
_BATCH = 8_192


@torch.no_grad()
def measure(sae: SAE, planted: Planted | PlantedFeatures, rows: int = ROWS) -> Result:
    """Compare an SAE with the features that its activations are made of.

    Args:
        sae: An SAE of this width. It reads raw activations, as ever.
        planted: The features, or their options.
        rows: Number of rows, which no training has seen.

    Returns:
        Numbers with standard errors over partners (of the shares, over latents or features; of the
        error and L0, over rows):

        * `mcc`: mean cosine of the min(n, features) best partners, 0 for one that has none;
        * `found`: share of the features whose partner has a cosine of at least 0.9;
        * `precision`, `recall`, `f1`: does the partner fire where the feature does? The mean over
          the same partners, 0 for one that never fires;
        * `uniqueness`: different features that are some latent's nearest, over n;
        * `dead`: share of latents that never fire on the rows;
        * `duplicated`: share of latents that fire and are near a feature (cosine 0.7 or more) whose
          partner is another latent;
        * `nmse`, `l0`, `true_l0`.

    Raises:
        InputError: The SAE reads activations of another width.

    Example:
        >>> import torch
        >>> from ksparse import SAE
        >>> from ksparse.config import Planted
        >>> from ksparse.sae.model import Shape
        >>> sae = SAE(Shape(16, 32, 4, "none"))
        >>> _ = torch.nn.init.normal_(sae.W_dec)
        >>> result = measure(sae, Planted(features=32, d_model=16), rows=256)
        >>> result["dead"]["value"]
        1.0
    """
    truth = planted if isinstance(planted, PlantedFeatures) else PlantedFeatures(planted)
    if sae.d_model != truth.options.d_model:
        raise InputError(
            f"the SAE reads activations of width {sae.d_model}, the planted features have width "
            f"{truth.options.d_model}; give the options of the stream that it was trained on"
        )
    directions = truth.directions.to(sae.W_dec)
    matching = match(directions, sae.W_dec, _ANY, "matching features")
    firing = _Firing(sae, truth, matching.partner, rows)
    best = np.argsort(-matching.cosine, kind="stable")[: min(sae.n_latents, len(directions))]
    n, ones = sae.n_latents, np.ones(len(best))
    cosine, feature = _nearest(sae.W_dec, directions)
    # A latent that is far from its partner has not taken that feature from others.
    owner = np.where(matching.cosine >= LEAST, matching.partner, -1)[feature]
    near = (cosine >= LEAST) & (owner >= 0) & (owner != np.arange(n))
    return Result(
        {
            "name": "planted",
            "n_latents": n,
            "features": len(directions),
            "rows": rows,
            "mcc": ratio(matching.cosine[best], ones),
            "found": share(int((matching.cosine >= FOUND).sum()), len(directions)),
            "precision": ratio(firing.precision[best], ones),
            "recall": ratio(firing.recall[best], ones),
            "f1": ratio(firing.f1[best], ones),
            "uniqueness": share(len(np.unique(feature)), n),
            "dead": share(int((firing.of_latent == 0).sum()), n),
            "duplicated": share(int((near & (firing.of_latent > 0)).sum()), n),
            "nmse": firing.nmse,
            "l0": firing.l0,
            "true_l0": firing.true_l0,
        }
    )


class _Firing:
    """How often latents, features and both of two partners fire on rows of the stream."""

    def __init__(self, sae: SAE, truth: PlantedFeatures, partner: np.ndarray, rows: int):
        partners = torch.from_numpy(partner).clamp_min(0)
        both = torch.zeros(len(partner), dtype=torch.float64)
        of_feature, of_latent = both.clone(), torch.zeros(sae.n_latents, dtype=torch.float64)
        per_row: list[np.ndarray] = []
        mean = truth.draw(_BATCH, "evaluation", 0)[0].mean(0)
        for number in range(math.ceil(rows / _BATCH)):
            report("comparing with the truth", number * _BATCH, rows)
            count = min(_BATCH, rows - number * _BATCH)
            x, z = truth.draw(count, "evaluation", number)
            code = sae.encode(x.to(sae.W_dec))
            active = (code.dense(sae.n_latents) > 0).cpu()
            fires = z > 0
            both += (active[:, partners] & fires).sum(0)
            of_latent += active.sum(0)
            of_feature += fires.sum(0)
            error = (sae.decode(code).cpu() - x).double().square().sum(1)
            spread = (x - mean).double().square().sum(1)
            sizes = (error, spread, active.sum(1).double(), fires.sum(1).double())
            per_row.append(torch.stack(sizes).numpy())
        errors, spreads, active_latents, active_features = np.concatenate(per_row, 1)
        ones = np.ones(rows)
        self.nmse = ratio(errors, spreads)
        self.l0, self.true_l0 = ratio(active_latents, ones), ratio(active_features, ones)
        self.of_latent: np.ndarray = of_latent.numpy()
        fired = np.where(partner >= 0, self.of_latent[partners.numpy()], 0.0)
        hits, features = np.where(partner >= 0, both.numpy(), 0.0), of_feature.numpy()
        self.precision, self.recall = _over(hits, fired), _over(hits, features)
        self.f1 = _over(2 * hits, fired + features)


def _over(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return part / whole, 0 where there is no whole."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _nearest(rows: Tensor, others: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest cosine of each of rows[n, d] with any of others[m, d], and which it is."""
    unit, parts = functional.normalize(others.float(), dim=1), []
    for part in rows.float().split(max(1, COSINES // len(others))):
        parts.append((functional.normalize(part, dim=1) @ unit.T).max(1))
    cosines, indices = (torch.cat(tensors).cpu().numpy() for tensors in zip(*parts))
    return cosines, indices
