"""The sparse operations at the speed of plain torch, on any device: no loop, no [b, k, d] tensor.

An embedding bag reads rows and sums them in one pass, forward over the tokens' latents and backward
over the latents' tokens (the transposed lists, from one sort).
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")

_GROUP = 16  # values in a group of the two-stage selection
_ROWS = 2048  # tokens whose gathered rows are in memory at once
# whose sums are made at once on their way into memory that is used again: they stay in cache
_LATENTS = 1024


def topk(pre_acts: Tensor, k: int) -> Tensor:
    """Return indices[b, k] of the k largest, exactly: first the k best groups by their maxima, then
    the k best in them.

    Each of the k largest lies in one of the k groups with the largest maxima, since every group
    ahead of its own holds a value at least as large. Reads the matrix once instead of sorting in
    it.
    """
    n = pre_acts.shape[-1]
    if k == 0 or n % _GROUP or n < 8 * _GROUP * k or pre_acts.device.type != "cpu":
        return pre_acts.topk(k, dim=-1, sorted=False).indices
    grouped = pre_acts.view(
        -1, _GROUP, n // _GROUP
    )  # strided groups, so that the maximum is a vector operation
    groups = grouped.amax(1).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(2, groups.unsqueeze(1).expand(-1, _GROUP, -1)).flatten(1)
    best = candidates.topk(k, dim=-1, sorted=False).indices
    return best // k * (n // _GROUP) + groups.gather(1, best % k)


def gather_sum(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    if indices.numel() == 0:
        return weight.new_zeros(len(indices), weight.shape[1])
    return embedding_bag(indices, weight, per_sample_weights=values, mode="sum")


def gather_dot(x: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    b, k = indices.shape
    if b * k == 0:
        return x.new_zeros(b, k)
    if not _has_sampled_product(x):
        parts = zip(indices.split(_ROWS), x.split(_ROWS))
        return torch.cat(
            [torch.bmm(weight[rows], part.unsqueeze(-1)).squeeze(-1) for rows, part in parts]
        )
    starts = torch.arange(0, b * k + 1, k)
    pattern = torch.sparse_csr_tensor(
        starts, indices.flatten(), x.new_zeros(b * k), (b, len(weight)), check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, x, weight.t(), beta=0.0).values().view(b, k)


def _has_sampled_product(x: Tensor) -> bool:
    """Whether torch has a sampled dense product here; it comes with MKL, for whole and double
    precision."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and torch.backends.mkl.is_available()
    )


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, n: int) -> Tensor:
    return scatter_transposed(transposed(indices, n), values, x)


def transposed(indices: Tensor, n: int) -> tuple[Tensor, Tensor, int]:
    """Sort the (token, latent) pairs of indices[b, k] by latent: (their order, where each latent's
    begin and end [n + 1], k)."""
    flat = indices.flatten()
    ends = torch.bincount(flat, minlength=n).cumsum(0)
    return (
        torch.sort(flat.int(), stable=True).indices,
        torch.cat([ends.new_zeros(1), ends]),
        indices.shape[1],
    )


def scatter_sum(lists: tuple[Tensor, Tensor, int], values: Tensor) -> Tensor:
    """Return [n]: the sum of each latent's values[b, k]. As deterministic, where a bincount on a
    GPU is not."""
    return scatter_transposed(lists, values, values.new_ones(len(values), 1)).squeeze(1)


def scatter_transposed(
    lists: tuple[Tensor, Tensor, int], values: Tensor, x: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return [n, d]: each latent's row is one bag of tokens. No atomics: deterministic. `out` takes
    the sums, where it is given."""
    order, starts, k = lists
    tokens, weights = order // k, values.flatten()[order]
    if out is None:
        return _bags(tokens, starts, weights, x)
    ends = [*starts[_LATENTS:-1:_LATENTS].tolist(), len(order)]
    for latents, bags, first, end in zip(
        out.split(_LATENTS), starts[:-1].split(_LATENTS), [0, *ends], ends
    ):
        latents.copy_(
            _bags(
                tokens[first:end],
                torch.cat([bags - first, bags.new_tensor([end - first])]),
                weights[first:end],
                x,
            )
        )
    return out


def _bags(tokens: Tensor, starts: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    return embedding_bag(
        tokens, x, starts, per_sample_weights=weights, mode="sum", include_last_offset=True
    )
