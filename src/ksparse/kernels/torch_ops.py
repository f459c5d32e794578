"""The sparse operations at the speed of plain torch, on any device: no loop, no [b, k, d] tensor.

An embedding bag reads rows and sums them in one pass: forward over each token's latents, backward
over each latent's tokens (the transposed lists, from one sort).
"""

from __future__ import annotations

import functools
import threading
import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_GROUP = 16  # values in a group of the two-stage selection
_ROWS = 2048  # tokens whose gathered rows are in memory at once
_LATENTS = 1024  # latents whose sums are computed before they are copied out: they fit the cache
_lock = threading.Lock()


def topk(pre_acts: Tensor, k: int) -> Tensor:
    """Return indices[b, k] of the k largest of pre_acts[b, n], exactly.

    First the k best groups by their maxima are found, then the k best values in them. Each of the k
    largest lies in one of these groups, since every group ranked before its own holds a value at
    least as large. The matrix is read once instead of being partly sorted.
    """
    n = pre_acts.shape[-1]
    if k == 0 or n % _GROUP or n < 8 * _GROUP * k or pre_acts.device.type != "cpu":
        return pre_acts.topk(k, dim=-1, sorted=False).indices
    # Groups are strided, so that the maximum is a vector operation.
    grouped = pre_acts.view(-1, _GROUP, n // _GROUP)
    groups = grouped.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(2, groups.unsqueeze(1).expand(-1, _GROUP, -1)).flatten(1)
    best = candidates.topk(k, dim=-1, sorted=False).indices
    return best // k * (n // _GROUP) + groups.gather(1, best % k)


def gather_sum(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return out[b, d] = sum over j of values[b, j] * weight[indices[b, j]]."""
    if indices.numel() == 0:
        return weight.new_zeros(len(indices), weight.shape[1])
    return embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def gather_dot(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return out[b, j] = <x[b], weight[indices[b, j]]>."""
    b, k = indices.shape
    if b * k == 0:
        return x.new_zeros(b, k)
    if not _has_sampled_product(x):
        parts = zip(indices.split(_ROWS), x.split(_ROWS))
        return torch.cat(
            [torch.bmm(weight[rows], part.unsqueeze(-1)).squeeze(-1) for rows, part in parts]
        )
    _consume_csr_warning()
    starts = torch.arange(0, b * k + 1, k)
    pattern = torch.sparse_csr_tensor(
        starts, indices.flatten(), x.new_zeros(b * k), (b, len(weight)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, x, weight.t(), beta=0.0).values().view(b, k)


def _has_sampled_product(x: Tensor) -> bool:
    """Return whether torch has a sampled dense product for x; it comes with MKL, in float32 and
    float64."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and torch.backends.mkl.is_available()
    )


@functools.cache
def _consume_csr_warning() -> None:
    """Make torch give its warning that sparse CSR is in beta here, where it is ignored.

    torch gives it once in a process, with the first such tensor.
    """
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0, 0], [], torch.empty(0), (1, 1), check_invariants=False)


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, n: int) -> Tensor:
    """Return out[i] = sum over (b, j) with indices[b, j] = i of values[b, j] * x[b], as [n, d]."""
    return scatter_transposed(sort_by_latent(indices, n), values, x)


def sort_by_latent(indices: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """Sort the (token, latent) pairs of indices[b, k] by latent.

    Returns:
        The pairs' order [b * k]; where each latent's pairs begin and end in it [n + 1]; and k.
    """
    flat = indices.flatten()
    ends = torch.bincount(flat, minlength=n).cumsum(0)
    return (
        torch.sort(flat.int(), stable=True).indices,
        torch.cat([ends.new_zeros(1), ends]),
        indices.shape[1],
    )


def scatter_sum(lists: tuple[Tensor, Tensor, int], values: Tensor) -> Tensor:
    """Return the sum [n] of each latent's values[b, k]; deterministic, unlike bincount on a GPU."""
    return scatter_transposed(lists, values, values.new_ones(len(values), 1)).squeeze(1)


def scatter_transposed(
    lists: tuple[Tensor, Tensor, int], values: Tensor, x: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return `scatter_outer` from transposed lists: each latent's row is one bag of tokens.

    No atomics are used, so the result is deterministic.

    Args:
        lists: What `transposed` returned.
        values: [b, k]
        x: [b, d]
        out: [n, d], written instead of a new tensor if given.
    """
    order, starts, k = lists
    tokens, weights = order // k, values.flatten()[order]
    if out is None:
        return _sum_bags(tokens, starts, weights, x)
    ends = [*starts[_LATENTS:-1:_LATENTS].tolist(), len(order)]
    for latents, bags, first, end in zip(
        out.split(_LATENTS), starts[:-1].split(_LATENTS), [0, *ends], ends
    ):
        offsets = torch.cat([bags - first, bags.new_tensor([end - first])])
        latents.copy_(_sum_bags(tokens[first:end], offsets, weights[first:end], x))
    return out


def _sum_bags(tokens: Tensor, starts: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    return embedding_bag(
        tokens, x, starts, per_sample_weights=weights, mode="sum", include_last_offset=True
    )
