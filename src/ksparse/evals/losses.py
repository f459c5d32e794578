"""Losses of predictions, and the divergence between two, from slices of logits [r, v].

A log-softmax is never stored: with a vocabulary of 262,144, copies of a slice cost half as much as
the head that made it. It is taken apart into numbers of a row and terms relative to the row's
largest logit, a few rows at a time, which stay in the cache. With z the logits less the largest of
them, p the unchanged and q the changed prediction, and S = sum of exp(z),

    loss       = log S - z[target]
    KL(p || q) = sum of exp(z_p) (z_p - z_q) / S_p  - log S_p + log S_q

Terms are float32, as the logits; sums of them become float64 as soon as a row has one of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = {"cpu": 2**20}
"""Logits of the rows taken at a time, so that they stay in a processor's cache."""
_BLOCK_ON_DEVICE = 2**25
"""The same for an accelerator, where small blocks would wait for their launches."""


class Compared(NamedTuple):
    """Losses [r] of two predictions in nats, and the divergence of the second from the first."""

    clean: Tensor
    changed: Tensor
    kl: Tensor


@torch.inference_mode()
def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the losses [r] of predictions, in nats, as float64 on the CPU.

    Args:
        logits: [r, v] in float32.
        targets: the token that came, [r].

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2])).exp()
        tensor([4.], dtype=torch.float64)
    """
    below = _buffer(logits)
    largest, total = [], []
    for block in _blocks(logits):
        out = below[: len(logits[block])]
        largest.append(_subtract_largest(logits[block], out))
        total.append(out.exp_().sum(-1))
    return _double(largest) + _double(total).log() - _picked(logits, targets)


@torch.inference_mode()
def compare(clean: Tensor, changed: Tensor, targets: Tensor) -> Compared:
    """Return the losses [r] of two predictions, and KL(clean || changed), as float64 on the CPU.

    Args:
        clean: logits [r, v] in float32.
        changed: the logits of the same rows after a change, [r, v] in float32.
        targets: the token that came, [r].

    Example:
        >>> import torch
        >>> clean, changed = torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0, 3.0]])
        >>> compare(clean, changed, torch.tensor([0])).kl
        tensor([0.], dtype=torch.float64)
    """
    buffers = _buffer(clean), _buffer(clean)
    largest_p, largest_q, total_p, total_q, products = [], [], [], [], []
    for block in _blocks(clean):
        p, q = clean[block], changed[block]
        weights, difference = (buffer[: len(p)] for buffer in buffers)
        largest_q.append(_subtract_largest(q, difference))
        total_q.append(torch.exp(difference, out=weights).sum(-1))
        largest_p.append(_subtract_largest(p, weights))
        torch.sub(weights, difference, out=difference)
        total_p.append(weights.exp_().sum(-1))
        products.append(difference.mul_(weights).sum(-1))
    sum_p = _double(total_p)
    log_p, log_q = sum_p.log(), _double(total_q).log()
    return Compared(
        _double(largest_p) + log_p - _picked(clean, targets),
        _double(largest_q) + log_q - _picked(changed, targets),
        _double(products) / sum_p - log_p + log_q,
    )


def gradient(kind: str, clean: Tensor, changed: Tensor, targets: Tensor) -> Tensor:
    """Return the gradient [r, v] of each row's loss with respect to its changed logits.

    Args:
        kind: 'kl' for KL(clean || changed), 'ce' for the loss of the changed prediction.
        clean: as in `compare`.
        changed: as in `compare`.
        targets: as in `compare`.

    Example:
        >>> import torch
        >>> clean, changed = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> gradient("ce", clean, changed, torch.tensor([1]))
        tensor([[ 0.5000, -0.5000]])
    """
    slope = changed.softmax(-1)
    if kind == "kl":
        return slope.sub_(clean.softmax(-1))
    return slope.scatter_add_(1, targets[:, None], -torch.ones_like(slope[:, :1]))


def _subtract_largest(logits: Tensor, out: Tensor) -> Tensor:
    """Write the logits less the largest of each row [r, v]; return the largest, [r]."""
    largest = logits.amax(-1, keepdim=True)
    torch.sub(logits, largest, out=out)
    return largest.squeeze(-1)


def _block_rows(logits: Tensor) -> int:
    return max(1, _BLOCK.get(logits.device.type, _BLOCK_ON_DEVICE) // logits.shape[1])


def _blocks(logits: Tensor) -> Iterator[slice]:
    step = _block_rows(logits)
    return (slice(start, start + step) for start in range(0, len(logits), step))


def _buffer(logits: Tensor) -> Tensor:
    return torch.empty_like(logits[: _block_rows(logits)])


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    return _double([logits.gather(1, targets[:, None]).squeeze(1)])


def _double(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts).cpu().double()  # in this order: not every accelerator has float64
