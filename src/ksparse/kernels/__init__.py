"""The sparse operations: one adjoint pair, the selection, and the two of them as differentiable
functions.

    topk(pre_acts[b, n], k)                -> indices[b, k]        no gradient
    gather_sum(values, indices, weight)    -> [b, d]               decode
    selected(x, b_pre, W_enc, b_enc, ...)  -> [b, k]               pre-activations at the selected
        latents

`using("reference")` switches to the slow definitions for a block of code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ksparse.kernels import reference, torch_ops

IMPLEMENTATIONS = {"reference": reference, "fast": torch_ops}
_current: ModuleType = torch_ops


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use one implementation, 'reference' or 'fast', inside a with block."""
    global _current
    before, _current = _current, IMPLEMENTATIONS[name]
    try:
        yield
    finally:
        _current = before


@torch.no_grad()
def topk(pre_acts: Tensor, k: int) -> Tensor:
    """Return indices[b, k] of the k largest pre-activations. Ties are broken arbitrarily."""
    return _current.topk(pre_acts, k)


def gather_sum(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return [b, d]: rows of weight[n, d] weighted by values[b, k] and summed. Without bias."""
    return _GatherSum.apply(values, indices, weight)


def selected(
    x: Tensor,
    b_pre: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    indices: Tensor,
    pre_acts: Tensor | None,
) -> Tensor:
    """Return pre-activations [b, k] at `indices` of W_enc (x - b_pre) + b_enc, or without bias.

    Their values are read from pre_acts[b, n] where that is given, else computed. The gradient is
    sparse.
    """
    return _Selected.apply(x, b_pre, W_enc, b_enc, indices, pre_acts)


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, weight):
        ctx.save_for_backward(values, indices, weight)
        return _current.gather_sum(values, indices, weight)

    @staticmethod
    def backward(ctx, grad):
        values, indices, weight = ctx.saved_tensors
        grad = grad.contiguous()
        d_values = _current.gather_dot(grad, indices, weight) if ctx.needs_input_grad[0] else None
        d_weight = (
            _current.scatter_outer(values, indices, grad, len(weight))
            if ctx.needs_input_grad[2]
            else None
        )
        return d_values, None, d_weight


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b_pre, W_enc, b_enc, indices, pre_acts):
        centred = x - b_pre
        ctx.save_for_backward(centred, W_enc, indices)
        if pre_acts is not None:
            return pre_acts.gather(1, indices)
        products = _current.gather_dot(centred, indices, W_enc)
        return products if b_enc is None else products + b_enc[indices]

    @staticmethod
    def backward(ctx, grad):
        centred, W_enc, indices = ctx.saved_tensors
        n = len(W_enc)
        d_x = _current.gather_sum(grad, indices, W_enc) if ctx.needs_input_grad[0] else None
        # b_pre's gradient is reduced over the batch before the multiplication (appendix D.2)
        per_latent = torch.bincount(indices.flatten(), grad.flatten(), n).to(grad.dtype)
        d_b_pre = -(per_latent @ W_enc) if ctx.needs_input_grad[1] else None
        d_W_enc = (
            _current.scatter_outer(grad, indices, centred, n) if ctx.needs_input_grad[2] else None
        )
        return d_x, d_b_pre, d_W_enc, per_latent if ctx.needs_input_grad[3] else None, None, None
