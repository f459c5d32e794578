"""Named loss terms. Training minimises their weighted sum, and logs each under its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor


class LossTerm(NamedTuple):
    """One term of the loss, a scalar with gradient.

    Args:
        value: the term before weighting.
        weight: its factor in the loss.
        unit: a constant that the value is divided by: the baseline, for squared errors.
    """

    value: Tensor
    weight: float = 1.0
    unit: float = 1.0

    @property
    def logged(self) -> Tensor:
        """The value in its unit, without its weight."""
        return self.value / self.unit

    @property
    def weighted(self) -> Tensor:
        """What the term adds to the loss. The weight comes first, which fixes the rounding."""
        return self.weight * self.value / self.unit


def total_loss(terms: Mapping[str, LossTerm]) -> Tensor:
    """Return the weighted sum of the terms, added in their order."""
    first, *others = (term.weighted for term in terms.values())
    return sum(others, start=first)
