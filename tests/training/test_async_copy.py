"""Numbers and places arrive as they were when they were asked for, on a CPU and on a GPU."""

import math

import pytest
import torch

from ksparse.training.steps.async_copy import copy_async, nonzero_async, true_positions

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_marked_gives_the_places_in_order(share):
    mask = (torch.rand(5000, generator=torch.Generator().manual_seed(0)) < share).to(DEVICE)
    there = mask.nonzero().squeeze(1)
    assert torch.equal(nonzero_async(mask)(), there) and torch.equal(
        true_positions(mask, len(there)), there
    )


def test_numbers_arrive_as_they_were_when_they_were_asked_for():
    value = torch.tensor([1.5, math.nan, -math.inf], dtype=torch.float64, device=DEVICE)
    asked = copy_async(value)
    if DEVICE == "cuda":  # on the device what follows comes after
        value.zero_()
    assert str(asked()) == "[1.5, nan, -inf]"
