"""Limits on what is held in memory at once: the code keeps to them, and the planner counts with
them. Needs no torch."""

from __future__ import annotations

import functools
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


@functools.cache
def widest(k: int, shards: int, tokens: int) -> int:
    """Return about how many of a token's k active latents the fullest token of a batch has in one
    shard, if they fall on the shards at random: less than one token in the batch has more.

    Example:
        >>> [widest(64, shards, 4096) for shards in (1, 2, 8, 64)]
        [64, 46, 18, 6]
    """
    if shards == 1:
        return k
    tail = 0.0
    for count in range(k, 0, -1):
        tail += math.exp(_log_binomial(k, count, 1 / shards))
        if tail * tokens >= 1:
            return count
    return 1


def _log_binomial(number: int, count: int, share: float) -> float:
    """Return the logarithm of the probability that `count` of `number` fall on a part with this
    share."""
    log = math.lgamma(number + 1) - math.lgamma(count + 1) - math.lgamma(number - count + 1)
    return log + (
        count * math.log(share) + (number - count) * math.log1p(-share) if share < 1 else 0
    )


@functools.cache
def first_offer(k: int, shards: int) -> tuple[int, float]:
    """Return how many values of a token a shard offers first, and the share of tokens that are then
    expected to need all of its k, if the k largest fall on the shards at random.

    The number is the one with the fewest values to exchange. A token is settled by the first offers
    unless a shard has all of them among the k largest, since then it may have more.

    Example:
        >>> [first_offer(64, shards)[0] for shards in (2, 8, 64)]
        [42, 17, 7]
    """
    tail, best = 0.0, (k, 0.0, float(k))
    for count in range(k, math.ceil(k / shards) - 1, -1):
        tail += math.exp(_log_binomial(k, count, 1 / shards))
        again = min(1.0, shards * tail)
        if count < k and count + again * k < best[2]:
            best = count, again, count + again * k
    return best[:2]
