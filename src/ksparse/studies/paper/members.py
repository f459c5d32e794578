"""The SAEs of the study, by name, and the stages in which they are trained.

All are trained on the same activations in the same order, so that differences between them are not
differences of data. `n` and `k` are the recipe's; single comparisons, of which several seeds or
slow baselines are trained, use `compared` latents.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from ksparse.config import CurveConfig, Recipe, ReLUConfig, TopKConfig
from ksparse.data import shards
from ksparse.data.contexts import Corpus
from ksparse.device import resolve_device
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.progress import report
from ksparse.studies.gaussian import GaussianSource
from ksparse.studies.study import Study
from ksparse.training.source import ActivationSource

L1 = 0.02
"""The first penalty weight tried for ReLU; the second is L1_STEP times it (see `next_weight`)."""
L1_STEP = 2.0
MOST_PENALTIES = 8
CLEAR, CLOSE = 1.1, 2.5
"""How far L0 of the weights around k must be from k, and how far they may be from one another."""
GAUSSIAN_ROWS = 8_192
"""Held-out Gaussian rows."""
MULTI = 1 / 8
"""Weight of Multi-TopK's loss at 4k (section 5.3)."""
UNTIED: dict[str, Any] = {"init": "independent"}
NO_AUXK: dict[str, Any] = {"auxk_coef": 0.0}
DEAD = {
    "no AuxK": NO_AUXK,
    "untied": UNTIED,
    "no AuxK, untied": NO_AUXK | UNTIED,
}


@dataclass(frozen=True)
class Sizes:
    """The sizes that the study varies.

    Attributes:
        n: The largest number of latents.
        k: The middle k.
        d_model: The width of the activations.
        seeds: SAEs of each kind in the comparison of activations.
    """

    n: int
    k: int
    d_model: int
    seeds: int

    @property
    def latents(self) -> list[int]:
        """Four sizes, each twice the one before."""
        return [self.n >> i for i in (3, 2, 1, 0)]

    @property
    def sparsities(self) -> list[int]:
        """Three values of k around the recipe's."""
        return [self.k // 2, self.k, 2 * self.k]

    @property
    def compared(self) -> int:
        """Latents of comparisons of one size."""
        return self.latents[0]

    @property
    def all_k(self) -> list[int]:
        """Values of k from k / 4 to 16 k, as far as there are latents and dimensions for them."""
        most = min(self.compared // 2, self.d_model)
        return [k for k in (self.k // 4, *self.sparsities, 4 * self.k, 16 * self.k) if k <= most]

    def check(self) -> None:
        """Raise InputError for sizes that leave nothing to vary."""
        if self.k < 4 or self.n < 8 * 4 * self.k:
            raise InputError(
                f"the study varies k from k / 4 to 2 k and n from n / 8 to n; with k = {self.k} "
                f"and n = {self.n:,} that is not possible. Give k of at least 4, and n of at least "
                "32 k"
            )


def topk(n: int, k: int, seed: int = 0) -> str:
    """Name a TopK SAE.

    Example:
        >>> topk(2048, 32), topk(2048, 32, seed=1)
        ('topk n2048 k32', 'topk n2048 k32 seed1')
    """
    return f"topk n{n} k{k}" + _seed(seed)


def relu(n: int, l1: float, seed: int = 0) -> str:
    """Name a ReLU SAE."""
    return f"relu n{n} l{l1:g}" + _seed(seed)


def multi(sizes: Sizes) -> str:
    """Name the SAE trained with Multi-TopK."""
    return f"multi-topk n{sizes.compared} k{sizes.k}"


def without(part: str, sizes: Sizes) -> str:
    """Name the SAE trained without a part of the recipe, a key of `DEAD`."""
    return f"{part} n{sizes.n} k{sizes.k}"


def gaussian(n: int, k: int) -> str:
    """Name an SAE trained on Gaussian data."""
    return f"gaussian n{n} k{k}"


def _seed(seed: int) -> str:
    return f" seed{seed}" if seed else ""


# ---- the stages --------------------------------------------------------------------------------


def write_activations(study: Study) -> None:
    """Write the activations that all SAEs train on, unless the recipe names some; read them from
    then on."""
    acts, rows = study.acts, study.options.tokens or study.base.tokens
    if acts.shards:
        return
    lm = LM(acts=acts, device=resolve_device(study.options.device))
    folder = shards.write(
        lm,
        Corpus(acts, lm.tokenizer, "train"),
        study.path / "acts",
        rows=rows,
        dtype="bfloat16",
        progress=lambda done: report("activations", done, rows),
    )
    study.use_acts(dataclasses.replace(acts, shards=str(folder)))


def width(study: Study) -> int:
    """Return the width of the activations, which are on disk."""
    return shards.Shards(study.acts.shards).d_model


def train_topk(study: Study, sizes: Sizes) -> None:
    """Train TopK over n and k, over seeds, and with Multi-TopK."""
    make = functools.partial(_recipe, study)
    grid = {topk(n, k): make(n, k) for n in sizes.latents for k in sizes.sparsities}
    n = sizes.compared
    wide = {topk(n, k): make(n, k) for k in sizes.all_k}
    seeds = {topk(n, sizes.k, seed): make(n, sizes.k, seed) for seed in range(sizes.seeds)}
    multi_topk = {multi(sizes): make(n, sizes.k, multi_topk=MULTI)}
    study.train(grid | wide | seeds | multi_topk, what="training TopK")


def train_relu(study: Study, sizes: Sizes) -> list[float]:
    """Train ReLU with penalties until L0 spans k, then the seeds of the two nearest.

    Returns:
        The two penalty weights between whose L0 the recipe's k lies, of rising L0; one if k was not
        reached.
    """
    n = sizes.compared
    l0: dict[float, float] = {}

    def train_weights(weights: list[float], seeds: range) -> None:
        study.train(
            {
                relu(n, l1, seed): _recipe(study, n, sizes.k, seed, activation=ReLUConfig(l1=l1))
                for l1 in weights
                for seed in seeds
            },
            what="training ReLU",
        )
        l0.update((l1, last_l0(study, relu(n, l1))) for l1 in weights)

    train_weights([L1, L1_STEP * L1], range(1))
    while len(l0) < MOST_PENALTIES and (weight := next_weight(l0, sizes.k)) is not None:
        train_weights([weight], range(1))
    nearest = nearest_weights(l0, sizes.k)
    train_weights(nearest, range(sizes.seeds))
    return nearest


def next_weight(l0: dict[float, float], k: int) -> float | None:
    """Return the penalty weight to try next; None once two lie closely around k.

    Until k lies between two weights, the next one follows the slope of log L0 against the log of
    the weight, by a factor of 2 to 8. Then the interval is halved until its L0 differ by at most
    `CLOSE`.

    Example:
        >>> next_weight({0.02: 800.0, 0.04: 400.0}, 50), next_weight({0.04: 100.0, 0.16: 20.0}, 50)
        (0.32, 0.08)
        >>> next_weight({0.04: 70.0, 0.08: 40.0}, 50) is None
        True
    """
    nearest = nearest_weights(l0, k)
    if len(nearest) == 2:
        sparse, dense = nearest
        close = l0[dense] <= CLOSE * l0[sparse]
        return None if close else _rounded(math.sqrt(sparse * dense))
    up = min(l0.values()) > k / CLEAR
    ends = sorted(l0, reverse=not up)[-2:]
    (w0, y0), (w1, y1) = ((math.log(w), math.log(max(l0[w], 1e-3))) for w in ends)
    slope = min((y1 - y0) / (w1 - w0), -1e-3)
    target = math.log(k / CLEAR**2 if up else k * CLEAR**2)
    factor = math.exp(min(abs((target - y1) / slope), math.log(8)))
    return _rounded(math.exp(w1) * (max(factor, 2) if up else 1 / max(factor, 2)))


def _rounded(weight: float) -> float:
    return float(f"{weight:.2g}")


def nearest_weights(l0: dict[float, float], k: int) -> list[float]:
    """Return the two weights whose L0 lie around k, the sparser first; the nearest if none do.

    L0 on held-out text differs from that of training, so both must be clear of k by the factor
    `CLEAR`.

    Example:
        >>> nearest_weights({0.02: 90.0, 0.04: 50.0, 0.08: 20.0}, 32)
        [0.08, 0.04]
    """
    below = [weight for weight in l0 if l0[weight] * CLEAR <= k]
    above = [weight for weight in l0 if l0[weight] >= k * CLEAR]
    if not below or not above:
        return [min(l0, key=lambda weight: abs(math.log(max(l0[weight], 1e-9) / k)))]
    return [max(below, key=l0.__getitem__), min(above, key=l0.__getitem__)]


def last_l0(study: Study, member: str) -> float:
    """Return the mean L0 of the last tenth of a run's logged steps."""
    rows = [row["l0"] for row in study.run_folder(member).metrics()]
    if not rows:
        raise InputError(
            f"{member} logged no step: the study reads L0 there. Train on more tokens, or with a "
            "smaller run.log_every"
        )
    return statistics.fmean(rows[-max(1, len(rows) // 10) :])


def train_dead(study: Study, sizes: Sizes) -> None:
    """Train the largest SAE without AuxK, without tied initialisation, and without both."""
    study.train(
        {
            without(part, sizes): _recipe(study, sizes.n, sizes.k, **changes)
            for part, changes in DEAD.items()
        },
        what="training without parts",
    )


def train_gaussian(study: Study, sizes: Sizes) -> None:
    """Train TopK of all sizes but the largest on Gaussian data of the activations' mean and
    covariance."""

    def open_gaussian(recipe: Recipe, device: torch.device) -> ActivationSource:
        return GaussianSource(recipe, dataclasses.replace(recipe, acts=study.acts), device)

    acts = dataclasses.replace(study.acts, text=f"gaussian:{study.acts.text}", shards="")
    members = {
        gaussian(n, sizes.k): dataclasses.replace(
            _recipe(study, n, sizes.k),
            acts=acts,
            curve=CurveConfig(held_out=GAUSSIAN_ROWS, octaves=2, per_octave=1),
        )
        for n in sizes.latents[:-1]
    }
    study.train(members, what="training on Gaussian data", open_source=open_gaussian)


def _recipe(study: Study, n: int, k: int, seed: int = 0, **changes: Any) -> Recipe:
    changes.setdefault("activation", TopKConfig())
    return study.recipe(tokens=study.base.tokens, n=n, k=k, seed=seed, **changes)
