"""What the host wants to know of the device, while that goes on working: a wait for all that it has
to do would let it run dry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def copy_async(value: Tensor) -> Callable[[], Any]:
    """Begin to bring a tensor of a few numbers to the host. What is returned gives them as `tolist`
    does; it waits for them, not for what the device is given to do after."""
    if value.device.type != "cuda":
        return value.tolist
    there, event = torch.empty(value.shape, dtype=value.dtype, pin_memory=True), torch.cuda.Event()
    with torch.cuda.device(value.device):
        there.copy_(value, non_blocking=True)
        event.record()

    def numbers() -> Any:
        event.synchronize()
        return there.tolist()

    return numbers


def nonzero_async(mask: Tensor) -> Callable[[], Tensor]:
    """Begin to count where mask[m] is true. What is returned gives those places, in order; it waits
    for the count alone."""
    if mask.device.type != "cuda":
        found = mask.nonzero().squeeze(1)
        return lambda: found
    number = copy_async(mask.sum())
    return functools.cache(lambda: true_positions(mask, number()))


def true_positions(mask: Tensor, number: int) -> Tensor:
    """Return where mask[m] is true, in order, given how often that is; torch's `nonzero` waits for
    all that the device has to do."""
    if not number:
        return torch.empty(0, dtype=torch.long, device=mask.device)
    return mask.byte().sort(descending=True, stable=True).indices[:number]
