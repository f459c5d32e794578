"""Reading a few numbers from the device without waiting for all of its queued work.

A plain `.item()` or `.nonzero()` waits until the device has done everything that it was given, and
leaves it idle until the host gives it more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def copy_async(value: Tensor) -> Callable[[], Any]:
    """Start copying a tensor of a few numbers to the host.

    Returns:
        A function that returns them as `tolist` does. It waits for the copy, not for work that the
        device is given afterwards.
    """
    if value.device.type != "cuda":
        return value.tolist
    pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    event = torch.cuda.Event()
    with torch.cuda.device(value.device):
        pinned.copy_(value, non_blocking=True)
        event.record()

    def numbers() -> Any:
        event.synchronize()
        return pinned.tolist()

    return numbers


def nonzero_async(mask: Tensor) -> Callable[[], Tensor]:
    """Start counting where mask[m] is true.

    Returns:
        A function that returns those indices, ascending. It waits for the count alone.
    """
    if mask.device.type != "cuda":
        indices = mask.nonzero().squeeze(1)
        return lambda: indices
    number = copy_async(mask.sum())
    return functools.cache(lambda: true_positions(mask, number()))


def true_positions(mask: Tensor, number: int) -> Tensor:
    """Return the indices where mask[m] is true, ascending, given how many there are. Unlike
    `nonzero`, it does not wait for the device."""
    if not number:
        return torch.empty(0, dtype=torch.long, device=mask.device)
    return mask.byte().sort(descending=True, stable=True).indices[:number]
