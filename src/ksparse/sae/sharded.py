"""One shard of an SAE whose latents are split over processes: the same equations on local tensors,
joined in three places.

    a latent is kept if its value is among the k largest of all shards      `survivors`
    a reconstruction is the sum of the shards' reconstructions              `_Summed`
    b_pre's gradient from the encoder is a sum over the shards              `_SharedBias`
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ksparse import kernels
from ksparse.distributed import Mesh
from ksparse.limits import COMPARED, values_per_shard
from ksparse.sae.model import SAE, Code, Shape


class ShardedSAE(SAE):
    """An `SAE` that holds the `shape.n_latents` latents of one shard, numbered from 0 in its codes.

    A code holds the values that the shard offered; those that lost to other shards are 0.
    Reconstructions are those of all shards.

    Args:
        shape: the shape of the shard.
        metadata: metadata of the whole SAE.
        mesh: the processes that hold the shards.
        capacity: values that a shard offers per token, as a share of k / shards; 0: k, which makes
            the selection exact.
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
        self.offers = self.exhausted = 0
        """Tokens x shards, and how many of these had every offered value kept, so that more might
        have been; counted where the capacity is bounded."""
        self._among: tuple[Tensor | None, list[int]] = None, []

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
            x, _SharedBias.apply(self.b_pre, self.mesh), self.W_enc, self.b_enc, indices, pre_acts
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
        the first shards; NaN is kept."""
        if offer * self.mesh.latent <= k or not len(values):
            return torch.ones_like(values, dtype=torch.bool)
        return torch.cat(
            [
                self._compared(part, k, offer)
                for part in values.split(max(1, COMPARED // (offer * self.mesh.latent)))
            ]
        )

    def _compared(self, values: Tensor, k: int, offer: int) -> Tensor:
        width, shards = values.shape[1], self.mesh.latent
        padded = torch.nn.functional.pad(values, (0, offer - width), value=-torch.inf)
        together = self.mesh.all_gather("values", padded, "latent").transpose(0, 1).flatten(1)
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
        recon: Tensor = _Summed.apply(super().decoder(code), self.mesh)
        return recon


def compact(kept: Tensor, *parts: Tensor) -> list[Tensor]:
    """Narrow kept[b, m], and parts[b, m] with it, to the largest number kept of a token.

    All kept entries stay. The width is about m / shards, so that decoding and gradients cost each
    shard only its share.
    """
    width = min(kept.shape[1], max(1, int(kept.sum(1).max()))) if len(kept) else 0
    chosen = kept.float().topk(width, dim=1, sorted=False).indices
    return [part.gather(1, chosen) for part in (kept, *parts)]


def shard_of(sae: SAE, mesh: Mesh, capacity: float = 0.0) -> SAE:
    """Return this process's shard of a whole SAE; the SAE itself where there is one shard."""
    if mesh.latent == 1:
        return sae
    shape, rows = shard_shape(sae.shape, mesh), mesh.latent_range(sae.shape.n_latents)
    shard = ShardedSAE(shape, sae.metadata, mesh=mesh, capacity=capacity).to(sae.W_enc.device)
    weights = sae.state_dict()
    for key, tensor in shard.state_dict().items():
        tensor.copy_(weights[key] if key == "b_pre" else weights[key][rows])
    return shard


def shard_shape(shape: Shape, mesh: Mesh) -> Shape:
    """Return the shape of a shard of an SAE of shape `shape`."""
    return replace(shape, n_latents=shape.n_latents // mesh.latent)


class _Summed(torch.autograd.Function):
    """The sum over the shards. All of them compute the same loss from it, so each already has the
    whole gradient."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, mesh: Mesh) -> Tensor:
        return mesh.all_reduce_sum("recon", partial.clone(), "latent")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


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
