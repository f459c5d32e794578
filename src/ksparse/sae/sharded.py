"""An SAE that several processes share, its latents in shards, the batch in parts, or both: the same
equations on local tensors, joined in a few places.

    a latent is kept if its value is among the k largest of all shards      `survivors`
    a reconstruction is the sum of the shards' reconstructions              `MeshJoint.sum`
    b_pre's gradient from the encoder is a sum over the shards              `MeshJoint.b_pre`
    BatchTopK keeps the largest values of all shards and parts              `MeshJoint.kept`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ksparse import kernels
from ksparse.distributed import Mesh
from ksparse.limits import COMPARED, first_offer, values_per_shard
from ksparse.sae.joint import Joint
from ksparse.sae.model import SAE, Code, Shape


class ShardedSAE(SAE):
    """An `SAE` that holds the `shape.n_latents` latents of one shard, numbered from 0 in its codes.

    A code holds the values that the shard offered; those that lost to other shards are 0.
    Reconstructions are those of all shards.

    Args:
        shape: the shape of the shard.
        metadata: metadata of the whole SAE.
        mesh: the processes that share the SAE.
        capacity: values that a shard offers per token, as a share of k / shards; 0: as many as an
            exact selection takes.
    """

    def __init__(
        self,
        shape: Shape,
        metadata: dict[str, Any] | None = None,
        *,
        mesh: Mesh,
        capacity: float = 0.0,
    ):
        super().__init__(shape, metadata)
        self.mesh, self.capacity = mesh, capacity
        self.joint = MeshJoint(mesh, shape.n_latents)
        self.offers = self.exhausted = 0
        """Tokens x shards, and how many of these had every offered value kept, so that more might
        have been; counted where the capacity is bounded."""
        self._among: tuple[Tensor | None, list[int]] = None, []
        self._first: dict[int, int] = {}
        """How many values are offered first, for each k."""

    def empty(self) -> ShardedSAE:
        return ShardedSAE(self.shape, self.metadata, mesh=self.mesh, capacity=self.capacity)

    def count(self, latents: Tensor) -> int:
        return sum(self.counts(latents))

    def counts(self, latents: Tensor) -> list[int]:
        """Return the number of latents in each shard's own list."""
        if self._among[0] is not latents:
            self._among = (
                latents,
                self.mesh.all_gather(
                    "counts", torch.tensor([len(latents)], device=latents.device), "latent"
                )
                .flatten()
                .tolist(),
            )
        return self._among[1]

    def code(
        self, x: Tensor, pre_acts: Tensor, k: int | None = None, among: Tensor | None = None
    ) -> Code:
        if self.mesh.latent == 1:
            return super().code(x, pre_acts, k, among)
        k = self.shape.k if k is None else k
        offer = self.offer(k, among)
        indices = (
            kernels.topk(pre_acts, offer)
            if among is None
            else among[kernels.topk(pre_acts[:, among], min(offer, len(among)))]
        )
        kept = self.survivors(pre_acts.gather(1, indices), k, offer)
        kept, indices = compact(kept, indices)
        values = kernels.selected_pre_acts(
            x, self.joint.b_pre(self.b_pre), self.W_enc, self.b_enc, indices, pre_acts
        )
        return Code(torch.where(kept, torch.relu(values), 0.0), indices)

    def offer(self, k: int, among: Tensor | None = None) -> int:
        """Return how many values a shard offers per token, the same in all shards: k, limited by
        its number of latents and by the capacity."""
        if among is not None:
            return min(k, max(self.counts(among)))
        return values_per_shard(k, self.shape.n_latents, self.mesh.latent, self.capacity)

    @torch.no_grad()
    def survivors(self, values: Tensor, k: int, offer: int) -> Tensor:
        """Return which of the values[b, <= offer] are among the k largest of all shards. Ties go to
        the first shards; NaN is kept.

        Each shard offers its largest few values first. A token for which one of them turns out to
        have them all among the k largest is compared again by all k.
        """
        shards = self.mesh.latent
        if offer * shards <= k or not len(values):
            return torch.ones_like(values, dtype=torch.bool)
        first = min(offer, self._first.setdefault(k, first_offer(k, shards)[0]))
        if offer < k or first == offer:
            return self._in_parts(self._compared, values, k, offer)
        kept = self._in_parts(self._compared_first, values, k, first)
        again = kept[:, -1].nonzero().squeeze(1)
        kept = kept[:, :-1]
        if 2 * len(again) > len(values):  # the k largest are not spread evenly
            self._first[k] = first + max(1, first // 2)
        if len(again):
            kept[again] = self._in_parts(self._compared, values[again], k, offer, "values_again")
        return kept

    def _in_parts(
        self, compare: Callable[..., Tensor], values: Tensor, k: int, offer: int, *name: str
    ) -> Tensor:
        """Compare as many tokens at a time as memory allows."""
        parts = values.split(max(1, COMPARED // (offer * self.mesh.latent)))
        return torch.cat([compare(part, k, offer, *name) for part in parts])

    def _compared_first(self, values: Tensor, k: int, first: int) -> Tensor:
        """Return which of the values[b, m] are kept, and in a further column, which tokens are not
        settled by the first offers."""
        largest = values.topk(min(first, values.shape[1]), dim=1).values
        together = self._gathered("values", largest, first)
        least = together.flatten(1).topk(k, dim=1).values[:, -1:]
        unsettled = (~(together[:, :, -1] < least)).any(1, keepdim=True)
        kept, ties = ~(values <= least), values == least
        earlier = (together[:, : self.mesh.latent_rank] == least[:, :, None]).sum((1, 2))
        left = k - (~(together.flatten(1) <= least)).sum(1) - earlier
        kept |= ties & (ties.cumsum(1) <= left[:, None])
        return torch.cat([kept, unsettled], dim=1)

    def _gathered(self, name: str, values: Tensor, width: int) -> Tensor:
        """Return [b, shards, width]: the values[b, <= width] of all shards."""
        padded = torch.nn.functional.pad(values, (0, width - values.shape[1]), value=-torch.inf)
        return self.mesh.all_gather(name, padded, "latent").transpose(0, 1)

    def _compared(self, values: Tensor, k: int, offer: int, name: str = "values") -> Tensor:
        width, shards = values.shape[1], self.mesh.latent
        together = self._gathered(name, values, offer).flatten(1)
        least = together.topk(k, dim=1).values[:, -1:]
        kept, ties = ~(together <= least), together == least
        kept |= ties & (ties.cumsum(1) <= k - kept.sum(1, keepdim=True))
        kept = kept.view(len(kept), shards, offer)
        if offer < min(k, self.shape.n_latents):
            self.offers, self.exhausted = (
                self.offers + len(kept) * shards,
                self.exhausted + int(kept.all(2).sum()),
            )
        return kept[:, self.mesh.latent_rank, :width]

    def decoder(self, code: Code) -> Tensor:
        return self.joint.sum("recon", super().decoder(code))


def compact(kept: Tensor, *parts: Tensor) -> list[Tensor]:
    """Narrow kept[b, m], and parts[b, m] with it, to the largest number kept of a token.

    All kept entries stay. The width is about m / shards, so that decoding and gradients cost each
    shard only its share.
    """
    width = min(kept.shape[1], max(1, int(kept.sum(1).max()))) if len(kept) else 0
    chosen = kept.float().topk(width, dim=1, sorted=False).indices
    return [part.gather(1, chosen) for part in (kept, *parts)]


class MeshJoint(Joint):
    """What the processes of a mesh compute together.

    Args:
        mesh: the processes.
        n_latents: latents of a shard.
    """

    def __init__(self, mesh: Mesh, n_latents: int):
        self.mesh, self.first_latent = mesh, mesh.latent_rank * n_latents

    def latents(self, number: int) -> int:
        return number * self.mesh.latent

    def tokens(self, number: int) -> int:
        return number * self.mesh.data

    def b_pre(self, b_pre: Tensor) -> Tensor:
        if self.mesh.latent == 1:
            return b_pre
        shared: Tensor = _SharedBias.apply(b_pre, self.mesh)
        return shared

    def sum(self, name: str, share: Tensor) -> Tensor:
        return self._reduced(name, share, "latent")

    def mean(self, name: str, value: Tensor) -> Tensor:
        return self._reduced(name, value, "data")

    def spread(self, rows: Tensor, number: int) -> Tensor:
        if self.mesh.data == 1:
            return super().spread(rows, number)
        mean = self.mesh.all_reduce_sum("spread", rows.sum(0), "data") / number
        squares = self.mesh.all_reduce_sum("spread", (rows - mean).square().sum(), "data")
        return squares / (number * rows.shape[1])

    def _reduced(self, name: str, share: Tensor, axis: str) -> Tensor:
        if self.mesh.axis_size(axis) == 1:
            return share
        reduced: Tensor = _Reduced.apply(share, name, self.mesh, axis)
        return reduced

    def least(self, value: Tensor) -> Tensor:
        return -self.mesh.all_reduce_max("largest", -value, "stream")

    def kept(self, pre_acts: Tensor, k: int, guess: float) -> Tensor:
        """Return the mask of the largest values of all processes. Ties go to the first of them, and
        there to the first tokens."""
        flat, count = pre_acts.flatten(), self.tokens(len(pre_acts)) * k
        above = (flat > max(0.0, guess)).nonzero().squeeze(1)
        if guess > 0:
            number = torch.tensor(len(above))
            if int(self.mesh.all_reduce_sum("largest", number, "all")) < count:
                above = (flat > 0).nonzero().squeeze(1)
        keys = _ordered(flat[above])
        least, before = self._nth_largest(keys, count)
        ties = above[keys == least]
        counts = self.mesh.all_gather("ties", torch.tensor([len(ties)]), "all").flatten().cumsum(0)
        left = before - (int(counts[self.mesh.rank]) - len(ties))
        mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
        mask[above[keys > least]] = True
        mask[ties[: max(0, left)]] = True
        return mask.view(pre_acts.shape)

    def border(self, values: Tensor, count: int) -> float:
        keys = _ordered(values)
        two = [self._nth_largest(keys, number)[0] for number in (count, count + 1)]
        if two[1] < 0:
            return 0.0
        return max(0.0, _from_ordered(torch.tensor(two)).mean().item())

    def _nth_largest(self, keys: Tensor, number: int) -> tuple[int, int]:
        """Find the `number`-th largest key of all processes, eight bits at a time.

        Args:
            keys: this process's keys, int64 below 2^32.
            number: from 1.

        Returns:
            The key, and how many of the keys equal to it are among the `number` largest; -1 and 0
            where there are fewer keys than that.
        """
        found, left = 0, number
        for shift in (24, 16, 8, 0):
            inside = keys[keys >> (shift + 8) == found >> (shift + 8)]
            bins = torch.bincount(inside >> shift & 255, minlength=256).cpu()
            counts = self.mesh.all_reduce_sum("largest", bins, "all")
            from_top = counts.flip(0).cumsum(0)
            if int(from_top[-1]) < left:
                return -1, 0
            at = int((from_top < left).sum())
            left -= int(from_top[at - 1]) if at else 0
            found |= (255 - at) << shift
        return found, left

    def first(self, rows: Tensor, count: int) -> Tensor:
        at = self.mesh.batch_range(self.tokens(len(rows))).start
        return rows[: max(0, count - at)]

    def of_batch(self, values: Tensor) -> Tensor:
        return self.mesh.all_gather("resampled", values, "data").flatten()

    def rows_of_batch(self, rows: Tensor, tokens: Tensor) -> Tensor:
        part = self.mesh.batch_range(self.tokens(len(rows)))
        own = (tokens >= part.start) & (tokens < part.stop)
        out = rows.new_zeros(len(tokens), rows.shape[1])
        out[own] = rows[tokens[own] - part.start]
        return self.mesh.all_reduce_sum("resampled", out, "data")

    def place(self, latents: Tensor) -> tuple[int, int]:
        number = torch.tensor([len(latents)])
        counts = self.mesh.all_gather("counts", number, "latent").flatten().tolist()
        return sum(counts), sum(counts[: self.mesh.latent_rank])


def _ordered(values: Tensor) -> Tensor:
    """Return float32 values as whole numbers from 0 to 2^32 - 1, int64, in the same order."""
    bits = values.detach().contiguous().view(torch.int32)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).long() + 2**31


def _from_ordered(keys: Tensor) -> Tensor:
    """Return the float32 values of keys of `_ordered`."""
    bits = (keys - 2**31).int()
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).view(torch.float32)


def new_sae(shape: Shape, metadata: dict[str, Any], mesh: Mesh, capacity: float = 0.0) -> SAE:
    """Return an SAE with weights of 0, on the CPU: this process's shard where several share it.

    Args:
        shape: the shape of the whole SAE.
        metadata: its metadata.
        mesh: the processes that share it.
        capacity: `mesh.capacity` of the recipe.
    """
    if mesh.size == 1:
        return SAE(shape, metadata)
    shard = replace(shape, n_latents=shape.n_latents // mesh.latent)
    return ShardedSAE(shard, metadata, mesh=mesh, capacity=capacity)


class _Reduced(torch.autograd.Function):
    """The sum over the shards, or the mean over the parts of the batch. All processes compute the
    same loss from it, so each already has the whole gradient."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, name: str, mesh: Mesh, axis: str) -> Tensor:
        total = mesh.all_reduce_sum(name, share.clone(), axis)
        return total if axis == "latent" else total / mesh.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad, None, None, None


class _SharedBias(torch.autograd.Function):
    """b_pre in the encoder: each shard has a part of its gradient, which is summed."""

    @staticmethod
    def forward(ctx: Any, b_pre: Tensor, mesh: Mesh) -> Tensor:
        ctx.mesh = mesh
        return b_pre.view_as(b_pre)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        mesh: Mesh = ctx.mesh
        return mesh.all_reduce_sum("b_pre_encoder", grad.clone(), "latent"), None
