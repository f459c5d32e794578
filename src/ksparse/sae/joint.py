"""What an SAE computes together with the processes that share it. Alone, each of these is what one
process has; `ksparse.sae.sharded.MeshJoint` asks the others.

A sum over the shards of the latents is the same on all of them, and so is the loss that follows
from it: the gradient of the sum is already the whole gradient of each share. In the same way each
part of a batch has the gradient of a mean over its parts.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Joint:
    """One process that shares its SAE with no other."""

    first_latent = 0
    """The number of this shard's first latent in the whole SAE."""

    def latents(self, number: int) -> int:
        """Return how many latents all shards have, if this one has `number`."""
        return number

    def tokens(self, number: int) -> int:
        """Return how many tokens all parts of the batch have, if this process has `number`."""
        return number

    def b_pre(self, b_pre: Tensor) -> Tensor:
        """Return b_pre for the encoder; its gradient is that of all shards."""
        return b_pre

    def sum(self, name: str, share: Tensor) -> Tensor:
        """Return the sum of the shards' shares, counted as `name`."""
        return share

    def mean(self, name: str, value: Tensor) -> Tensor:
        """Return the mean of a value over the parts of the batch, which are of equal size."""
        return value

    def spread(self, rows: Tensor, number: int) -> Tensor:
        """Return the variance of rows of the batch, averaged over components.

        Args:
            rows: [<= number, d], those of this process.
            number: how many all processes have.
        """
        return (rows - rows.mean(0)).square().mean()

    def least(self, value: Tensor) -> Tensor:
        """Return the least of the values of all processes."""
        return value

    def kept(self, pre_acts: Tensor, k: int, guess: float) -> Tensor:
        """Return where pre_acts[b, n] of all processes have the largest values above 0, k for each
        token of the batch, as bool[b, n]; `guess` is a value thought to be below them."""
        return largest_mask(pre_acts, len(pre_acts) * k, guess)

    def border(self, values: Tensor, count: int) -> float:
        """Return the middle between the `count`-th largest value of all processes and the next one;
        0 if that is negative, or there is none.

        Args:
            values: this process's count + 1 largest values, or all of them.
            count: how many lie above the border.
        """
        if len(values) <= count:
            return 0.0
        return max(0.0, values.topk(count + 1).values[-2:].mean().item())

    def first(self, rows: Tensor, count: int) -> Tensor:
        """Return this process's part of the first `count` rows of the batch."""
        return rows[:count]

    def of_batch(self, values: Tensor) -> Tensor:
        """Return a value per token of the whole batch, from those [b] of this part of it."""
        return values

    def rows_of_batch(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Return rows of the whole batch, from those [b, d] of this part of it.

        Args:
            rows: [b, d]
            tokens: numbers of tokens [m] in the batch.
        """
        return rows[tokens]

    def place(self, latents: Tensor) -> tuple[int, int]:
        """Return how many latents the lists of all shards hold, and how many of them come before
        this shard's."""
        return len(latents), 0


def largest_mask(pre_acts: Tensor, count: int, guess: float = 0.0) -> Tensor:
    """Return where pre_acts[b, n] has its `count` largest values above 0, as bool[b, n]; fewer
    where fewer are above 0.

    Args:
        pre_acts: values [b, n].
        count: how many to keep.
        guess: a value thought to be below them. It changes the time, never the result.
    """
    flat = pre_acts.flatten()
    above = (flat > max(0.0, guess)).nonzero().squeeze(1)
    if len(above) < count and guess > 0:
        above = (flat > 0).nonzero().squeeze(1)
    if len(above) > count:
        above = above[flat[above].topk(count, sorted=False).indices]
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[above] = True
    return mask.view(pre_acts.shape)
