"""A slice works on the latents that survive in it, not on all that it offered."""

import torch

from ksparse.sae.sharded import compact


def test_a_slices_code_is_as_wide_as_its_largest_number_of_survivors():
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(50, 40, generator=generator).topk(12).indices
    values, kept = (
        torch.randn(50, 12, generator=generator),
        torch.rand(50, 12, generator=generator) < 0.25,
    )
    values[7, 3], kept[7, 3] = torch.nan, True

    def dense(kept, values, indices):
        return torch.zeros(50, 40).scatter_add(1, indices, torch.where(kept, values, 0.0))

    narrow = compact(kept, values, indices)
    assert narrow[0].shape == (50, int(kept.sum(1).max())) and narrow[0].shape[1] < 12
    assert torch.equal(narrow[0].sum(1), kept.sum(1))
    torch.testing.assert_close(
        dense(*narrow), dense(kept, values, indices), rtol=0, atol=0, equal_nan=True
    )


def test_a_slice_without_survivors_tokens_or_latents_has_an_empty_code():
    for kept, shape in (
        (torch.zeros(3, 4, dtype=torch.bool), (3, 1)),
        (torch.zeros(0, 4, dtype=torch.bool), (0, 0)),
        (torch.zeros(3, 0, dtype=torch.bool), (3, 0)),
    ):
        assert [part.shape for part in compact(kept, kept.long())] == [shape, shape]
