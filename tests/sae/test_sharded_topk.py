"""Values of all slices are compared a part of the tokens at a time, with the same result."""

from __future__ import annotations

import pytest
import torch

from ksparse.sae import sharded
from ksparse.sae.model import Shape
from ksparse.sae.sharded import ShardedSAE

OFFERED = torch.randint(0, 6, (3, 50, 4), generator=torch.Generator().manual_seed(0)).float()
"""What three slices offer for 50 tokens, many of them equal."""


class Slices:
    """A mesh of three slices seen from one of them."""

    latent = 3

    def __init__(self, rank: int):
        self.latent_rank, self.at, self.calls = rank, 0, 0

    def all_gather(self, name, value, over):
        assert torch.equal(value, OFFERED[self.latent_rank, self.at : self.at + len(value)])
        self.at, self.calls = self.at + len(value), self.calls + 1
        return OFFERED[:, self.at - len(value) : self.at]


def kept(rank: int) -> tuple[torch.Tensor, int]:
    mesh = Slices(rank)
    return ShardedSAE(Shape(8, 16, 4, "none"), mesh=mesh).survivors(OFFERED[rank], 4, 4), mesh.calls


@pytest.mark.parametrize("rank", range(3))
def test_comparing_some_tokens_at_a_time_keeps_the_same_latents(rank, monkeypatch):
    whole, once = kept(rank)
    monkeypatch.setattr(sharded, "COMPARED", 7 * 12 + 5)
    parts, calls = kept(rank)
    assert torch.equal(parts, whole) and (once, calls) == (1, 8)


def test_the_slices_keep_k_values_of_each_token_together():
    assert (sum(kept(rank)[0].sum(1) for rank in range(3)) == 4).all()
