"""SAEs of every activation and normalisation, with weights that are all different from 0."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ksparse.sae.model import SAE, Shape

METADATA = {
    "acts": {
        "lm": "gpt2",
        "site": "resid_post.8",
        "text": "some/text",
        "context": 64,
        "bos": "auto",
    },
    "step": 7,
    "tokens": 1000,
}


def build(
    activation: str = "topk",
    normalize: str = "none",
    *,
    d: int = 6,
    n: int = 20,
    k: int = 4,
    factor: float = 0.3,
) -> SAE:
    """Return an SAE with random weights; decoder rows have norm 1."""
    sae = SAE(
        Shape(d, n, k, normalize, factor if normalize == "dataset" else 1.0, activation), METADATA
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key in sae.state_dict():
            getattr(sae, key).copy_(torch.randn(getattr(sae, key).shape, generator=generator))
        if "threshold" in sae.state_dict():
            sae.threshold.abs_().mul_(0.5)
    sae.normalize_decoder_()
    return sae


@pytest.fixture
def make_sae() -> Callable[..., SAE]:
    return build


@pytest.fixture
def x() -> torch.Tensor:
    """Raw activations [200, 6], away from 0."""
    return 3 * torch.randn(200, 6, generator=torch.Generator().manual_seed(1)) + 1
