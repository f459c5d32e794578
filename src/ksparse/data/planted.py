"""Activations made of known features, so that what an SAE finds can be compared with the truth.

    truth = PlantedFeatures(Planted(features=512, d_model=128, exponent=1.0, least=1e-3))
    x, z  = truth.draw(4096, "a name")        activations [4096, 128], values [4096, 512]

Everything is a function of the options and a name. Generators are seeded by a hash, so that no draw
is that of an SAE's start values: `randn` of the same seed would be the features themselves.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ksparse.config import Planted
from ksparse.data.generated import GeneratedStream

_RATE = 0.01  # of the steps that drive directions apart
_LEAST_OWN = 0.01  # of a correlated score's variance, its own


class PlantedFeatures:
    """Known features: their directions, how often they fire, and their values.

    Args:
        options: What they are like.

    Example:
        >>> from ksparse.config import Planted
        >>> truth = PlantedFeatures(Planted(features=32, d_model=16, probability=0.25))
        >>> x, z = truth.draw(1000, "example")
        >>> x.shape, z.shape, bool((z > 0).float().mean().sub(0.25).abs() < 0.02)
        (torch.Size([1000, 16]), torch.Size([1000, 32]), True)
    """

    directions: Tensor
    """Unit rows [features, d_model]."""
    frequency: Tensor
    """How often each feature is asked to fire, [features]."""

    def __init__(self, options: Planted):
        self.options = options
        n, rng = options.features, self._generator
        self.directions = _apart(
            torch.randn(n, options.d_model, generator=rng("directions")), options.apart
        )
        self.frequency = _frequencies(options)
        self.means = torch.linspace(options.sizes[0], options.sizes[1], n)
        mean, deviation = options.spread
        self.deviations = (mean + deviation * torch.randn(n, generator=rng("spread"))).abs()
        bias = torch.randn(options.d_model, generator=rng("bias"))
        self.bias = options.bias * bias / bias.norm()
        self._levels = _levels(options)
        self._exclusive = self._choose_exclusive()
        self._factors = options.correlation * torch.randn(n, options.rank, generator=rng("factors"))
        squares = self._factors.square().sum(1, keepdim=True)
        self._factors *= ((1 - _LEAST_OWN) / squares.clamp_min(1e-30)).sqrt().clamp_max(1.0)
        self._own = (1 - self._factors.square().sum(1)).sqrt()
        self._asked = self._compensated().clamp(0, 1)

    def _generator(self, *names: object) -> torch.Generator:
        what = f"planted {self.options.seed} {names}".encode()
        seed = int.from_bytes(hashlib.sha256(what).digest()[:8], "big") >> 1
        return torch.Generator().manual_seed(seed)

    def draw(self, count: int, *names: object) -> tuple[Tensor, Tensor]:
        """Return activations x[count, d] and the values z[count, features] behind them.

        Args:
            count: Number of rows.
            names: What the draw is called; another name is another draw.
        """
        rng, n = self._generator("rows", *names), self.options.features
        if self.options.rank:
            shared = torch.randn(count, self.options.rank, generator=rng) @ self._factors.T
            score = shared + torch.randn(count, n, generator=rng) * self._own
            fires = score > math.sqrt(2) * torch.erfinv(1 - 2 * self._asked)
        else:
            fires = torch.rand(count, n, generator=rng) < self._asked
        noise = torch.randn(count, n, generator=rng) if self.deviations.any() else 0.0
        z = (self.means + noise * self.deviations).clamp_min(0) * fires
        self._apply_trees_(z, rng)
        return z @ self.directions + self.bias, z

    def _apply_trees_(self, z: Tensor, rng: torch.Generator) -> None:
        """Silence children without their parent, and all but one of those that exclude one another;
        scale children by their parent. In place, from the roots down."""
        for parents, children in self._levels:  # [p], [p, c]; -1 where there is no child
            there = children >= 0
            values = z[:, children.clamp_min(0)] * there
            above = z[:, parents]
            factor = (above > 0).float()
            if self.options.scaled:
                factor = above / self.means[parents].clamp_min(1e-30)
            values = values * factor[:, :, None]
            draw = torch.rand(values.shape, generator=rng) * (values > 0)
            winner = draw >= draw.amax(2, keepdim=True)
            values = torch.where(winner | ~self._exclusive[parents], values, 0.0)
            z[:, children[there]] = values[:, there]

    def _choose_exclusive(self) -> Tensor:
        """Return which features have children that exclude one another, bool[features]."""
        chosen = torch.zeros(self.options.features, dtype=torch.bool)
        several = [parents[(children >= 0).sum(1) > 1] for parents, children in self._levels]
        if several:
            parents = torch.cat(several)
            order = torch.randperm(len(parents), generator=self._generator("exclusive"))
            chosen[parents[order[: int(self.options.exclusive * len(parents))]]] = True
        return chosen[:, None]

    def _compensated(self) -> Tensor:
        """Return how often each feature would fire without its tree, so that within it the
        frequency is about the one asked for."""
        asked = self.frequency.clone()
        if not self.options.compensate:
            return asked
        for parents, children in self._levels:
            there = children >= 0
            among = self.frequency[children.clamp_min(0)] * there / self.frequency[parents][:, None]
            rivals = (among.sum(1, keepdim=True) - among) * self._exclusive[parents]
            asked[children[there]] = (among * (1 + rivals))[there]
        return asked


class PlantedStream(GeneratedStream):
    """Batches of planted features.

    Args:
        truth: The features.
        batch: Rows of a batch.
        seed: Seed of the rows, beside that of the features.
        device: Where they are put.
    """

    NAME = "planted features"

    def __init__(self, truth: PlantedFeatures, *, batch: int, seed: int, device: torch.device):
        super().__init__(truth.options.d_model, batch=batch, seed=seed, device=device)
        self.truth = truth

    def rows(self, count: int, number: int) -> Tensor:
        return self.truth.draw(count, self.seed, number)[0].to(self.device)


def _frequencies(options: Planted) -> Tensor:
    n, most, least = options.features, options.probability, options.least or options.probability
    if not options.exponent or n == 1:
        return torch.linspace(most, least, n)
    law = torch.arange(1, n + 1, dtype=torch.float64) ** -options.exponent
    return (least + (most - least) * (law - law[-1]) / (law[0] - law[-1])).float()


def _levels(options: Planted) -> list[tuple[Tensor, Tensor]]:
    """Return, for each generation that has children, the parents [p] and their children [p, c]."""
    levels, parents, used = [], torch.arange(options.roots), options.roots
    for _ in range(options.depth):
        number = min(len(parents) * options.children, options.features - used)
        if number <= 0:
            break
        children = torch.full((len(parents) * options.children,), -1)
        children[:number] = used + torch.arange(number)
        levels.append((parents, children.view(len(parents), options.children)))
        parents, used = used + torch.arange(number), used + number
    return levels


def _apart(rows: Tensor, steps: int) -> Tensor:
    """Return rows[n, d] at norm 1, driven apart by some steps down the sum of squared cosines."""
    rows = torch.nn.functional.normalize(rows, dim=1)
    moving = rows.clone().requires_grad_()
    adam = torch.optim.Adam([moving], lr=_RATE)
    for _ in range(steps):
        unit = torch.nn.functional.normalize(moving, dim=1)
        # The sum of all squared cosines is that of the squared Gram matrix over d.
        loss = (unit.T @ unit).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return torch.nn.functional.normalize(moving.detach(), dim=1)
