"""One slice of an autoencoder whose latents are spread over processes: the same equations on local
tensors, joined in three places.

a latent survives if its value is among the k largest of all slices        `survivors`
a reconstruction is the sum of the slices' reconstructions                 `_Summed`
b_pre's gradient on the encoder's side is a sum over the slices            `_Shared`
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
    """`SAE` with the `shape.n_latents` latents of one slice, which codes number from 0.

    A code holds what the slice offered; what other slices' values beat has the value 0.
    Reconstructions are those of all slices.
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
        """Tokens x slices, and those of which every offered value survived, so that more might
        have; counted where the capacity is bounded."""
        self._among: tuple[Tensor | None, list[int]] = None, []

    def empty(self) -> ShardedSAE:
        return ShardedSAE(self.shape, self.metadata, mesh=self.mesh, capacity=self.capacity)

    def count(self, latents: Tensor) -> int:
        return sum(self.counts(latents))

    def counts(self, latents: Tensor) -> list[int]:
        """Return how many latents each slice has in its own list of them."""
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
        values = kernels.selected(
            x, _SharedBias.apply(self.b_pre, self.mesh), self.W_enc, self.b_enc, indices, pre_acts
        )
        return Code(torch.where(kept, torch.relu(values), 0.0), indices)

    def offer(self, k: int, among: Tensor | None = None) -> int:
        """Return how many values of a token a slice offers, the same in all slices: k, or as many
        as it has, or as the capacity allows."""
        if among is not None:
            return min(k, max(self.counts(among)))
        return values_per_shard(k, self.shape.n_latents, self.mesh.latent, self.capacity)

    @torch.no_grad()
    def survivors(self, values: Tensor, k: int, offer: int) -> Tensor:
        """Return which of the values[b, <= offer] are among the k largest of all slices; equal ones
        in the order of the slices. NaN survives."""
        if offer * self.mesh.latent <= k or not len(values):
            return torch.ones_like(values, dtype=torch.bool)
        return torch.cat(
            [
                self._compared(some, k, offer)
                for some in values.split(max(1, COMPARED // (offer * self.mesh.latent)))
            ]
        )

    def _compared(self, values: Tensor, k: int, offer: int) -> Tensor:
        width, slices = values.shape[1], self.mesh.latent
        padded = torch.nn.functional.pad(values, (0, offer - width), value=-torch.inf)
        together = self.mesh.all_gather("values", padded, "latent").transpose(0, 1).flatten(1)
        least = together.topk(k, dim=1).values[:, -1:]
        kept, ties = ~(together <= least), together == least
        kept |= ties & (ties.cumsum(1) <= k - kept.sum(1, keepdim=True))
        kept = kept.view(len(kept), slices, offer)
        if offer < min(k, self.shape.n_latents):
            self.offers, self.exhausted = (
                self.offers + len(kept) * slices,
                self.exhausted + int(kept.all(2).sum()),
            )
        return kept[:, self.mesh.latent_rank, :width]

    def decoder(self, code: Code) -> Tensor:
        return _Summed.apply(super().decoder(code), self.mesh)


def compact(kept: Tensor, *parts: Tensor) -> list[Tensor]:
    """Return kept[b, m] and what goes with it [b, m] as wide as the largest number kept of a token,
    all of these in it: about m / slices, so that decoding and gradients cost a slice its share and
    not the whole."""
    width = min(kept.shape[1], max(1, int(kept.sum(1).max()))) if len(kept) else 0
    chosen = kept.float().topk(width, dim=1, sorted=False).indices
    return [part.gather(1, chosen) for part in (kept, *parts)]


def shard_of(sae: SAE, mesh: Mesh, capacity: float = 0.0) -> SAE:
    """Return this process's slice of a whole autoencoder; itself where there is one slice."""
    if mesh.latent == 1:
        return sae
    shape, rows = shard_shape(sae.shape, mesh), mesh.latent_range(sae.shape.n_latents)
    own = ShardedSAE(shape, sae.metadata, mesh=mesh, capacity=capacity).to(sae.W_enc.device)
    weights = sae.state_dict()
    for key, tensor in own.state_dict().items():
        tensor.copy_(weights[key] if key == "b_pre" else weights[key][rows])
    return own


def shard_shape(shape: Shape, mesh: Mesh) -> Shape:
    """Return the shape of a slice of an autoencoder of shape `shape`."""
    return replace(shape, n_latents=shape.n_latents // mesh.latent)


class _Summed(torch.autograd.Function):
    """The sum over the slices. All of them compute the same loss from it, so each has the whole
    gradient already."""

    @staticmethod
    def forward(ctx, own, mesh):
        return mesh.all_reduce_sum("recon", own.clone(), "latent")

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SharedBias(torch.autograd.Function):
    """b_pre as the encoder has it: each slice has a part of its gradient."""

    @staticmethod
    def forward(ctx, b_pre, mesh):
        ctx.mesh = mesh
        return b_pre.view_as(b_pre)

    @staticmethod
    def backward(ctx, grad):
        return ctx.mesh.all_reduce_sum("b_pre_encoder", grad.clone(), "latent"), None
