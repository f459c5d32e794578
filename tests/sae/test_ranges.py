"""A value far beyond what a latent ever has is said to be."""

from __future__ import annotations

import pytest
import torch

from ksparse.sae import ranges
from ksparse.sae.model import SAE, Shape


def some(activation="relu", normalize="unit_norm") -> SAE:
    sae = SAE(Shape(8, 16, 16, normalize, 1.0, activation))
    generator = torch.Generator().manual_seed(0)
    for weight in sae.parameters():
        weight.data = torch.randn(weight.shape, generator=generator)
    return sae


@pytest.mark.parametrize(
    "activation", ["topk", "batch_topk", "relu", "gated", "prolu", "jump_relu"]
)
def test_no_input_of_that_norm_has_a_larger_value_and_one_has_it(activation):
    sae = some(activation)
    x = torch.nn.functional.normalize(
        torch.randn(4096, 8, generator=torch.Generator().manual_seed(1)), dim=1
    )
    for latent in range(16):
        best = torch.nn.functional.normalize(sae.W_enc[latent].detach(), dim=0)[None]
        largest = sae.encode_normalized(torch.cat([x, best])).dense(16)[:, latent].max().item()
        assert largest <= ranges.reach(sae, latent) + 1e-5
        assert largest == pytest.approx(ranges.reach(sae, latent), rel=1e-4) or largest == 0


def test_only_values_beyond_three_times_the_largest_are_said(caplog):
    sae = some()
    ranges.warn_beyond(sae, {1: 2.9, 2: -2.9}, {1: 1.0, 2: 1.0})
    assert not caplog.records
    ranges.warn_beyond(sae, {1: -3.1, 2: 0.0}, {1: 1.0, 2: 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "latent 1 at -3.1 is 3.1 times its largest value, 1: what the LM does there says little of the latent"
    ]
    latent = max(range(16), key=lambda i: ranges.reach(sae, i))
    ranges.warn_beyond(sae, {latent: 4 * ranges.reach(sae, latent)})
    assert "is 4 times its largest value on any input" in caplog.records[-1].getMessage()
