"""Shards keep the k largest values of all of them, whatever they exchange to find out."""

from __future__ import annotations

import pytest
import torch

from ksparse.limits import first_offer
from ksparse.sae import sharded
from ksparse.sae.model import Shape
from ksparse.sae.sharded import ShardedSAE

from ..mesh_of_threads import Hub, ThreadMesh, on_mesh

TOKENS, N, K = 200, 96, 12


def values(kind: str) -> torch.Tensor:
    """Return what the latents of all shards have, [tokens, n]."""
    draw = torch.Generator().manual_seed(0)
    if kind == "many ties":
        return torch.randint(-3, 6, (TOKENS, N), generator=draw).float()
    found = torch.randn(TOKENS, N, generator=draw)
    if kind == "all in the first shard":
        found[:, : N // 4] += 9
    return found


def kept(kind: str, shards: int, capacity: float = 0.0):
    """Return which of all values are kept, [tokens, n], and the bytes that a shard gave by name."""

    def choose(mesh):
        own = values(kind)[:, mesh.latent_range(N)]
        sae = ShardedSAE(Shape(8, N // shards, K, "none"), mesh=mesh, capacity=capacity)
        offer = sae.offer(K)
        order = own.sort(dim=1, descending=True, stable=True).indices
        chosen = order[:, :offer].sort(dim=1).values  # as the compiled kernels choose
        for _ in range(2):  # the first call may change how many are offered
            mask = sae.survivors(own.gather(1, chosen), K, offer)
        return torch.zeros_like(own).scatter_(1, chosen, mask.float()), mesh.sent

    parts = on_mesh(1, shards, choose)
    return torch.cat([part for part, _ in parts], 1), parts[0][1]


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["none equal", "many ties", "all in the first shard"])
def test_the_k_largest_are_kept_with_ties_in_the_order_of_latents(kind, shards):
    whole = values(kind)
    order = whole.sort(dim=1, descending=True, stable=True).indices[:, :K]
    assert torch.equal(kept(kind, shards)[0], torch.zeros(TOKENS, N).scatter_(1, order, 1.0))


def test_comparing_some_tokens_at_a_time_keeps_the_same_latents(monkeypatch):
    whole = kept("none equal", 4)[0]
    monkeypatch.setattr(sharded, "COMPARED", 7 * 12 + 5)
    assert torch.equal(kept("none equal", 4)[0], whole)


def test_a_shard_offers_few_values_first_and_all_only_of_tokens_that_are_not_settled():
    first, share = first_offer(K, 4)
    sent = kept("none equal", 4)[1]
    assert first < K and sent["values"] == 2 * 4 * TOKENS * first
    assert 0 < sent["values_again"] < 2 * 4 * TOKENS * K * 3 * share


def test_shards_that_are_not_alike_offer_more_from_then_on():
    first = first_offer(K, 4)[0]
    sent = kept("all in the first shard", 4)[1]
    assert sent["values"] == 4 * TOKENS * (first + min(K, first + first // 2))


def test_a_bounded_capacity_is_one_exchange():
    found, sent = kept("none equal", 4, capacity=2.0)
    assert sent == {"values": 2 * 4 * TOKENS * 6} and (found.sum(1) == K).all()


def test_nan_is_kept_so_that_the_loss_shows_it():
    def choose(mesh):
        own = torch.full((1, 4), float(mesh.latent_rank))
        if mesh.latent_rank == 1:
            own[0, 2] = torch.nan
        return ShardedSAE(Shape(8, 4, 4, "none"), mesh=mesh).survivors(own, 4, 4)

    assert bool(on_mesh(1, 4, choose)[1][0, 2])


@pytest.mark.parametrize("k, shards", [(4, 2), (32, 2), (32, 8), (64, 64), (2048, 128)])
def test_the_first_offers_of_all_shards_are_at_least_k(k, shards):
    first, share = first_offer(k, shards)
    assert k <= first * shards and first <= k and 0 <= share < 0.3


@pytest.mark.parametrize("capacity, offer", [(0.0, 8), (1.0, 2), (1.25, 3), (8.0, 8)])
def test_a_shard_has_k_values_to_offer_or_what_the_capacity_allows(capacity, offer):
    mesh = ThreadMesh(1, 4, 0, Hub())
    assert ShardedSAE(Shape(4, 16, 8), mesh=mesh, capacity=capacity).offer(8) == offer
