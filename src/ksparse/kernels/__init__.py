"""Sparse operations: one adjoint pair, the selection, and both as differentiable functions.

    topk(pre_acts[b, n], k)                -> indices[b, k]    no gradient
    gather_sum(values, indices, weight)    -> [b, d]           decode
    selected(x, b_pre, W_enc, b_enc, …)    -> [b, k]           pre-activations of selected latents

| module | provides |
|---|---|
| reference | the definition, in a few lines of plain torch |
| torch_ops | the same at the speed of plain torch, on any device |
| native | compiled for the CPU at hand, with candidates in low precision |
| triton_ops, triton_candidates | Triton kernels for CUDA tensors |
| hopper | a CUDA kernel for candidates on Hopper GPUs |

The functions here run torch_ops. Inside `using("reference")` they run the definition.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from ksparse.kernels import reference, torch_ops

IMPLEMENTATIONS = {"reference": reference, "fast": torch_ops}
_implementation: ContextVar[ModuleType] = ContextVar("implementation", default=torch_ops)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Use one implementation, 'reference' or 'fast', inside a `with` block.

    It applies to the calling thread; a backward pass runs what its forward pass ran.
    """
    token = _implementation.set(IMPLEMENTATIONS[name])
    try:
        yield
    finally:
        _implementation.reset(token)


@torch.no_grad()
def topk(pre_acts: Tensor, k: int) -> Tensor:
    """Return the indices [b, k] of the k largest pre-activations [b, n], in no particular order.

    Ties are broken arbitrarily.
    """
    return _implementation.get().topk(pre_acts, k)


def gather_sum(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return the sums [b, d] of rows of weight[n, d] at indices[b, k], weighted by values[b, k].

    This decodes a sparse code, without bias.
    """
    return _GatherSum.apply(values, indices, weight)


def selected_pre_acts(
    x: Tensor,
    b_pre: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    indices: Tensor,
    pre_acts: Tensor | None,
) -> Tensor:
    """Return the pre-activations W_enc (x - b_pre) + b_enc at some latents, with sparse gradients.

    Args:
        x: [b, d]
        b_pre: [d]
        W_enc: [n, d]
        b_enc: [n], or None for no bias.
        indices: [b, k], the latents.
        pre_acts: [b, n], from which the values are read; computed if None.

    Returns:
        [b, k]
    """
    return _Selected.apply(x, b_pre, W_enc, b_enc, indices, pre_acts)


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, weight):
        ctx.save_for_backward(values, indices, weight)
        ctx.implementation = _implementation.get()
        return ctx.implementation.gather_sum(values, indices, weight)

    @staticmethod
    def backward(ctx, grad):
        (values, indices, weight), ops = ctx.saved_tensors, ctx.implementation
        grad = grad.contiguous()
        needs_values, _, needs_weight = ctx.needs_input_grad
        d_values = ops.gather_dot(grad, indices, weight) if needs_values else None
        d_weight = ops.scatter_outer(values, indices, grad, len(weight)) if needs_weight else None
        return d_values, None, d_weight


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b_pre, W_enc, b_enc, indices, pre_acts):
        centred = x - b_pre
        ctx.save_for_backward(centred, W_enc, indices)
        ctx.implementation = _implementation.get()
        if pre_acts is not None:
            return pre_acts.gather(1, indices)
        products = ctx.implementation.gather_dot(centred, indices, W_enc)
        return products if b_enc is None else products + b_enc[indices]

    @staticmethod
    def backward(ctx, grad):
        (centred, W_enc, indices), ops = ctx.saved_tensors, ctx.implementation
        needs_x, needs_b_pre, needs_W_enc, needs_b_enc = ctx.needs_input_grad[:4]
        n = len(W_enc)
        d_x = ops.gather_sum(grad, indices, W_enc) if needs_x else None
        # b_pre's gradient is reduced over the batch before the multiplication (appendix D.2)
        per_latent = torch.bincount(indices.flatten(), grad.flatten(), n).to(grad.dtype)
        d_b_pre = -(per_latent @ W_enc) if needs_b_pre else None
        d_W_enc = ops.scatter_outer(grad, indices, centred, n) if needs_W_enc else None
        return d_x, d_b_pre, d_W_enc, per_latent if needs_b_enc else None, None, None
