"""Limits on what is held in memory at once: the code keeps to them, and the planner counts with
them. Needs no torch."""

from __future__ import annotations

import math

PRE_ACTS = 2**27
"""Numbers of a batch's dense pre-activations [b, n_latents]; a larger batch is split by tokens."""

SAMPLE = 32_768
"""Activations in the calibration sample, from which b_pre and the constants of a run are computed;
as in the official code."""

COMPARED = 2**26
"""Values of all latent-parallel shards that are compared at a time: k values from each of many
shards can be more than the weights."""

LOGITS_BYTES = 2**30
"""Bytes of logits, and of what is computed from them, that an evaluation holds at a time: a modern
vocabulary has 262,144 entries."""

LOGITS_COPIES = 4
"""Times that a slice of logits may be there at once: those of two passes, and twice what a head
needs on its way to them, such as a soft cap. Losses are taken a few rows at a time."""


def logit_rows(vocabulary: int) -> int:
    """Return how many rows of logits are computed at a time."""
    return max(1, LOGITS_BYTES // (4 * LOGITS_COPIES * max(1, vocabulary)))


def values_per_shard(k: int, n_latents: int, shards: int, capacity: float) -> int:
    """Return how many values of a token a latent-parallel shard contributes to the global top k.

    Args:
        k: active latents of a token.
        n_latents: latents of the shard.
        shards: how many shards there are.
        capacity: `mesh.capacity`, a multiple of k / shards; 0: k, which makes the choice exact.
    """
    return min(k, n_latents, math.ceil(capacity * k / shards) or k)
