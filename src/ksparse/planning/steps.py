"""Which step a device takes, and whether activations are prefetched: one rule for training and
planning."""

from __future__ import annotations

from ksparse.config import Recipe


def prefetches(recipe: Recipe, device: str) -> bool:
    """Return whether activations are computed by a thread of their own."""
    return recipe.run.ahead == "on" or (recipe.run.ahead == "auto" and device.startswith("cuda"))
