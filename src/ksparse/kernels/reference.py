"""The definition of the sparse operations, in a few lines of plain torch.

Every other implementation must agree with it. b activations, k selected latents each, n latents,
d = d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk(pre_acts: Tensor, k: int) -> Tensor:
    """Return indices[b, k] of the k largest of pre_acts[b, n], in no particular order."""
    return pre_acts.topk(k, dim=-1, sorted=False).indices


def gather_sum(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return out[b, d] = sum over j of values[b, j] * weight[indices[b, j]].

    A sparse code times a dense matrix.
    """
    return torch.einsum("bk,bkd->bd", values, weight[indices])


def gather_dot(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return out[b, j] = <x[b], weight[indices[b, j]]>.

    A dense product, computed only at the given latents.
    """
    return torch.einsum("bd,bkd->bk", x, weight[indices])


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, n: int) -> Tensor:
    """Return out[i] = sum over (b, j) with indices[b, j] = i of values[b, j] * x[b], as [n, d].

    The gradient of either weight.
    """
    out = torch.zeros(n, x.shape[1], dtype=x.dtype, device=x.device)
    return out.index_add_(
        0, indices.flatten(), (values.unsqueeze(-1) * x.unsqueeze(1)).flatten(0, 1)
    )
