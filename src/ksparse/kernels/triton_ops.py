"""The sparse operations as Triton kernels, for CUDA tensors: nothing of size [b, n] or [b, k, d]
ever reaches memory.

    x, W, bias          ─▶ tiles: product, best few of each bucket ─▶ [b, candidates] ─▶ topk
                        ─▶ buckets that may have dropped a winner, recomputed ─▶ values, indices
    values, indices, x  ─▶ one sort by latent ─▶ chunks of hot rows ─▶ rows[n, d]
                        ─▶ projection, Adam, norm, average in one pass

The interface is that of `reference`. Sums are in float32 (float64 for float64), in an order that
does not depend on timing, so results repeat bit for bit. Without Triton this module can still be
imported; `available()` is then False. With TRITON_INTERPRET=1 the kernels take CPU tensors.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this system, or a CPU-only torch
    triton = tl = None

_log = logging.getLogger("ksparse")

CHUNK = 512
"""Tokens of one latent that one program sums; a latent with more is split into parts."""
MAX_RECOMPUTED = 0.3
"""The expected number of buckets recomputed for a token, above which more entries are kept."""
MOST_KEPT = 8
L2_SLAB = 2**25
"""Bytes of a slab of columns of x that should stay in the L2 cache while all latents read their
tokens' rows from it (an H200 has 60 MB)."""
MOST_CANDIDATES = 256
"""The most candidates of a token that one program selects from; with more, torch does."""
DENSE_NUMBERS = 2**26
"""Numbers of the product in memory at once, where n is too small for buckets."""


class Tile(NamedTuple):
    """What one program of the encoder product computes. It holds four buckets of latents / 4."""

    tokens: int = 128
    latents: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    group: int = 8
    """Token tiles that go over the latents together, so that both factors stay in the L2 cache."""


TILE = Tile()
FLOAT32_TILE = Tile(tokens=64, latents=128, depth=32, warps=8)
"""Without tensor cores a larger tile does not fit into registers (Triton 3.9 spills 13 kB a thread
for `TILE`)."""


def available() -> bool:
    """Return whether the kernels can be compiled and run here."""
    return triton is not None and torch.cuda.is_available() and _has_private_cache()


@functools.cache
def _has_private_cache() -> bool:
    """Return whether Triton caches compiled kernels in a fixed folder.

    For a user without a home folder it is the working folder, where it would load others' files.
    """
    configured = os.environ.get("TRITON_CACHE_DIR") or os.environ.get("TRITON_HOME")
    folder = configured or os.path.expanduser("~")
    if not os.path.isabs(folder):
        _log.info(
            "no Triton kernels: this user has no home folder; set TRITON_CACHE_DIR to a folder "
            "of this user alone"
        )
    return os.path.isabs(folder)


def usable(device: torch.device) -> bool:
    """Return whether the kernels take tensors of a device: a GPU, or a CPU in Triton's
    interpreter."""
    return (
        available()
        if device.type == "cuda"
        else triton is not None
        and device.type == "cpu"
        and os.environ.get("TRITON_INTERPRET") == "1"
    )


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function with Triton when it is launched; leave it as it is without Triton."""
    return triton.jit(function) if triton else function


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make a device current inside a `with` block; Triton launches on the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


# ---- the encoder product and its k largest


@jit
def map_infinite(score):
    """Map NaN to infinity, so that it is selected and shows, and -inf to the lowest number, so that
    padding, which is -inf, loses to every latent."""
    return tl.maximum(tl.where(score < float("inf"), score, float("inf")), -3.4028234e38)


@jit
def program_tile(b, n, TOKENS: tl.constexpr, LATENTS: tl.constexpr, GROUP: tl.constexpr):
    """Return this program's tile of the product [b, n]: (index along tokens, index along
    latents)."""
    program, together = tl.program_id(0), GROUP * tl.cdiv(n, LATENTS)
    first = program // together * GROUP
    size = tl.minimum(tl.cdiv(b, TOKENS) - first, GROUP)
    return first + program % together % size, program % together // size


@jit
def tile_product(
    left,
    right,
    d,
    TOKENS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    SUM: tl.constexpr,
):
    """Return the product [TOKENS, LATENTS] of rows and columns of d numbers, summed in SUM.

    left[TOKENS, DEPTH] and right[DEPTH, LATENTS] point at their first DEPTH numbers; EVEN if DEPTH
    divides d."""
    total, at = tl.zeros([TOKENS, LATENTS], SUM), tl.arange(0, DEPTH)
    for start in range(0, d, DEPTH):
        if EVEN:
            row, column = tl.load(left), tl.load(right)
        else:
            inside = start + at < d
            row, column = tl.load(left, inside[None, :], 0), tl.load(right, inside[:, None], 0)
        total = tl.dot(row, column, total, input_precision="ieee", out_dtype=SUM)
        left += DEPTH
        right += DEPTH
    return total


@jit
def split_buckets(tile, TOKENS: tl.constexpr, LATENTS: tl.constexpr):
    """Return a tile [TOKENS, LATENTS] as its buckets [TOKENS, 4, LATENTS / 4].

    Bucket l has the columns 8j + 2l and 8j + 2l + 1: those that one thread holds of an accumulator
    row (wgmma, mma), so that maxima need no exchange between threads. Any other layout is right
    too, only slower."""
    quads = tl.permute(tl.reshape(tile, [TOKENS, LATENTS // 8, 4, 2]), [0, 2, 1, 3])
    return tl.reshape(quads, [TOKENS, 4, LATENTS // 4])


@jit
def _candidates(
    x,
    weight,
    bias,
    values,
    places,
    b,
    n,
    d,
    buckets,
    TOKENS: tl.constexpr,
    LATENTS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    EVEN: tl.constexpr,
    FULL: tl.constexpr,
):
    """One tile of x[b, d] weight[n, d]^T + bias[n]: writes the KEPT best of each bucket to values
    and places[b, buckets, KEPT], best first."""
    tile_b, tile_n = program_tile(b, n, TOKENS, LATENTS, GROUP)
    rows = tile_b * TOKENS + tl.arange(0, TOKENS)
    columns = tile_n * LATENTS + tl.arange(0, LATENTS)
    at = tl.arange(0, DEPTH)
    left = x + tl.minimum(rows, b - 1).to(tl.int64)[:, None] * d + at[None, :]
    right = weight + tl.minimum(columns, n - 1).to(tl.int64)[None, :] * d + at[:, None]
    score = tile_product(left, right, d, TOKENS, LATENTS, DEPTH, EVEN, tl.float32)
    score = map_infinite(score + tl.load(bias + tl.minimum(columns, n - 1)).to(tl.float32)[None, :])
    if not FULL:
        score = tl.where((columns < n)[None, :], score, float("-inf"))
    score = split_buckets(score, TOKENS, LATENTS)
    place = tl.arange(0, LATENTS // 4)[None, None, :]
    to = (rows.to(tl.int64)[:, None] * buckets + tile_n * 4 + tl.arange(0, 4)[None, :]) * KEPT
    for slot in tl.static_range(KEPT):
        best = tl.max(score, 2)
        chosen = tl.min(tl.where(score == best[:, :, None], place, LATENTS // 4), 2)
        tl.store(values + to + slot, best, (rows < b)[:, None])
        tl.store(places + to + slot, chosen.to(tl.uint8), (rows < b)[:, None])
        score = tl.where(place == chosen[:, :, None], float("-inf"), score)


@jit
def _bucket_again(
    x, weight, bias, tokens, buckets, out, n, d, LATENTS: tl.constexpr, DEPTH: tl.constexpr
):
    """One (token, bucket) pair: writes the pre-activations of all latents of the bucket to
    out[pairs, LATENTS / 4]; -inf beyond n."""
    pair = tl.program_id(0).to(tl.int64)
    token, bucket = tl.load(tokens + pair).to(tl.int64), tl.load(buckets + pair)
    place, at = tl.arange(0, LATENTS // 4), tl.arange(0, DEPTH)
    latent = bucket // 4 * LATENTS + place // 2 * 8 + bucket % 4 * 2 + place % 2
    row = tl.minimum(latent, n - 1).to(tl.int64)
    total = tl.zeros([LATENTS // 4, DEPTH], tl.float32)
    for start in range(0, d, DEPTH):
        inside = start + at < d
        part = tl.load(x + token * d + start + at, inside, 0.0).to(tl.float32)
        total += (
            tl.load(weight + row[:, None] * d + start + at[None, :], inside[None, :], 0.0).to(
                tl.float32
            )
            * part[None, :]
        )
    score = map_infinite(tl.sum(total, 1) + tl.load(bias + row).to(tl.float32))
    tl.store(out + pair * (LATENTS // 4) + place, tl.where(latent < n, score, float("-inf")))


def topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    tile: Tile | None = None,
    kept: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the k largest of <x[b], weight[n]> + bias[n] for each token.

    The selection is exact for the float32 sums of products. NaN counts as infinity, -inf as the
    lowest float32.

    Args:
        x: [b, d], rounded to weight's dtype.
        weight: [n, d]
        bias: [n]
        k: How many to select.
        tile: The tile of the product; for tests and measurements.
        kept: How many entries of a bucket are kept; chosen from k if None.

    Returns:
        values[b, k] in float32 and indices[b, k], in no particular order.

    Raises:
        ValueError: k is above n.
    """
    tile = tile or (FLOAT32_TILE if weight.dtype == torch.float32 else TILE)
    (b, n), buckets = (len(x), len(weight)), 4 * -(-len(weight) // tile.latents)
    if not 0 <= k <= n:
        raise ValueError(f"k is {k}, but there are {n} latents: choose 0 to {n} of them")
    if b * k == 0:
        return x.new_zeros(b, k, dtype=torch.float32), torch.zeros(
            b, k, dtype=torch.long, device=x.device
        )
    kept = kept or _kept(k, buckets)
    if (
        kept * buckets < k
        or kept > min(MOST_KEPT, tile.latents // 4)
        or weight.dtype == torch.float64
    ):
        return _dense(x, weight, bias, k)
    x, weight, bias = x.to(weight.dtype).contiguous(), weight.contiguous(), bias.contiguous()
    if x.device.type == "cpu":
        # Triton's interpreter has no product in bfloat16; products of float32 give the same.
        x, weight = x.float(), weight.float()
    values, places = _best_of_buckets(x, weight, bias, kept, tile)
    values, chosen = values.flatten(1).topk(k, dim=1, sorted=False)
    indices = latents_at(chosen // kept, places.flatten(1).gather(1, chosen).long(), tile)
    _admit_dropped_(values, indices, x, weight, bias, places, chosen, tile)
    return values, indices


def _kept(k: int, buckets: int) -> int:
    """Return how many entries of a bucket to keep, so that few buckets are expected to hold that
    many of the k winners. Winners fall into buckets at random."""
    return next(
        (
            m
            for m in range(2, MOST_KEPT + 1)
            if m * buckets >= k and math.comb(k, m) <= MAX_RECOMPUTED * buckets ** (m - 1)
        ),
        MOST_KEPT,
    )


def _best_of_buckets(
    x: Tensor, weight: Tensor, bias: Tensor, kept: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Return values[b, buckets, kept], best first, and their places in the buckets (stage one)."""
    (b, d), n, buckets = x.shape, len(weight), 4 * -(-len(weight) // tile.latents)
    values = torch.empty(b, buckets, kept, dtype=torch.float32, device=x.device)
    places = torch.empty(b, buckets, kept, dtype=torch.uint8, device=x.device)
    with on_device(x.device):
        _candidates[(-(-b // tile.tokens) * buckets // 4,)](
            x,
            weight,
            bias,
            values,
            places,
            b,
            n,
            d,
            buckets,
            TOKENS=tile.tokens,
            LATENTS=tile.latents,
            DEPTH=tile.depth,
            GROUP=tile.group,
            KEPT=kept,
            EVEN=d % tile.depth == 0,
            FULL=n % tile.latents == 0,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return values, places


def latents_at(buckets: Tensor, places: Tensor, tile: Tile) -> Tensor:
    """Return the latents at places in buckets, as `_bucket_again` does."""
    return buckets // 4 * tile.latents + places // 2 * 8 + buckets % 4 * 2 + places % 2


def _admit_dropped_(
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    places: Tensor,
    chosen: Tensor,
    tile: Tile,
) -> None:
    """Let latents that buckets dropped compete with the selected ones; updates values and
    indices[b, k] in place (stage two).

    This certifies the result. Whatever a bucket dropped is at most its last kept value. If that
    value is not among the k selected, k others are at least as large, and nothing the bucket
    dropped is needed. If it is, the dropped values are computed and compete. This only adds
    candidates, so the k-th value only rises, no other bucket's last kept value enters, and once is
    enough. Padding (-inf) is never in the result: as long as some is selected, some bucket with
    dropped latents has all its kept ones selected, and k <= n latents are above it.

    Args:
        values, indices: [b, k], the selection.
        x, weight, bias: As in `topk_encode`.
        places: [b, buckets, kept], the places in their buckets of what was kept.
        chosen: [b, k], which of a token's [buckets * kept] entries were selected.
        tile: The tile of the product.
    """
    k, kept, width = values.shape[1], places.shape[2], tile.latents // 4
    suspect = chosen % kept == kept - 1
    token, j = suspect.nonzero(as_tuple=True)
    if not len(token):
        return
    bucket, counts = chosen[token, j] // kept, suspect.sum(1)
    scores = _bucket_scores(x, weight, bias, token, bucket, tile)
    # Entries that were kept take part with the values they have.
    scores.scatter_(1, places[token, bucket].long(), -torch.inf)
    rows, row = token.unique_consecutive(return_inverse=True)
    nth = torch.arange(len(token), device=x.device) - (counts.cumsum(0) - counts)[token]
    more = scores.new_full((len(rows), int(counts.max()), width), -torch.inf)
    more[row, nth] = scores
    latents = torch.zeros(more.shape, dtype=torch.long, device=x.device)
    latents[row, nth] = latents_at(bucket[:, None], torch.arange(width, device=x.device), tile)
    best, at = torch.cat([values[rows], more.flatten(1)], 1).topk(k, dim=1, sorted=False)
    indices[rows] = torch.cat([indices[rows], latents.flatten(1)], 1).gather(1, at)
    values[rows] = best


def _bucket_scores(
    x: Tensor, weight: Tensor, bias: Tensor, token: Tensor, bucket: Tensor, tile: Tile
) -> Tensor:
    """Return the pre-activations [pairs, tile.latents / 4] of all latents of (token, bucket)
    pairs."""
    scores = torch.empty(len(token), tile.latents // 4, dtype=torch.float32, device=x.device)
    with on_device(x.device):
        _bucket_again[(len(token),)](
            x,
            weight,
            bias,
            token,
            bucket,
            scores,
            len(weight),
            x.shape[1],
            LATENTS=tile.latents,
            DEPTH=64,
            num_warps=4,
        )
    return scores


def _dense(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return what `topk_encode` does from the full product, a few tokens at a time: for k so near n
    that buckets save nothing."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight, bias = weight.to(dtype).t(), bias.to(dtype)
    parts = [
        torch.addmm(bias, part.to(dtype), weight).topk(k, dim=1, sorted=False)
        for part in x.split(max(1, DENSE_NUMBERS // len(bias)))
    ]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


# ---- rows of a matrix, by each token's latents


@jit
def _gather_sum(
    values, indices, weight, out, k, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr
):
    """One token, one block of columns: loads ROWS rows at once."""
    token, columns = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS),
    )
    total = tl.zeros([COLUMNS], SUM)
    for start in range(0, k, ROWS):
        j = start + tl.arange(0, ROWS)
        latent = tl.load(indices + token * k + j, j < k, 0).to(tl.int64)
        value = tl.load(values + token * k + j, j < k, 0.0).to(SUM)
        row = tl.load(
            weight + latent[:, None] * d + columns[None, :],
            (j < k)[:, None] & (columns < d)[None, :],
            0.0,
        ).to(SUM)
        total += tl.sum(value[:, None] * row, 0)
    tl.store(out + token * d + columns, total.to(out.dtype.element_ty), columns < d)


@jit
def _gather_dot(
    x, indices, weight, out, k, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr
):
    """One token, ROWS of its latents."""
    token, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    latent = tl.load(indices + token * k + j, j < k, 0).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], SUM)
    for start in range(0, d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        part = tl.load(x + token * d + columns, columns < d, 0.0).to(SUM)
        row = tl.load(
            weight + latent[:, None] * d + columns[None, :],
            (j < k)[:, None] & (columns < d)[None, :],
            0.0,
        ).to(SUM)
        total += row * part[None, :]
    tl.store(out + token * k + j, tl.sum(total, 1).to(out.dtype.element_ty), j < k)


def _columns(d: int) -> tuple[int, int]:
    """Return (columns of a block, its warps): 16 bytes of bfloat16 a thread; blocks divide d where
    it has such a divisor."""
    block = min(1024, d & -d)
    block = block if block >= 128 else min(1024, max(16, 1 << (d - 1).bit_length()))
    return block, max(1, block // 256)


def _sum_dtype(*tensors: Tensor) -> Any:
    return tl.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else tl.float32


def gather_sum(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Return out[b, d] = sum over j of values[b, j] * weight[indices[b, j]].

    Its dtype is the wider of the two.
    """
    (b, k), d, (block, warps) = indices.shape, weight.shape[1], _columns(weight.shape[1])
    out = torch.empty(
        b, d, dtype=torch.promote_types(values.dtype, weight.dtype), device=weight.device
    )
    if out.numel():
        with on_device(weight.device):
            _gather_sum[(b, -(-d // block))](
                values.contiguous(),
                indices.contiguous(),
                weight.contiguous(),
                out,
                k,
                d,
                ROWS=8,
                COLUMNS=block,
                SUM=_sum_dtype(values, weight),
                num_warps=warps,
            )
    return out


def gather_dot(
    x: Tensor, indices: Tensor, weight: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return out[b, j] = <x[b], weight[indices[b, j]]>, in `dtype` or else the wider of the two
    dtypes."""
    (b, k), d, (block, warps) = indices.shape, weight.shape[1], _columns(weight.shape[1])
    out = torch.empty(
        b, k, dtype=dtype or torch.promote_types(x.dtype, weight.dtype), device=weight.device
    )
    if out.numel():
        with on_device(weight.device):
            _gather_dot[(b, -(-k // 8))](
                x.contiguous(),
                indices.contiguous(),
                weight.contiguous(),
                out,
                k,
                d,
                ROWS=8,
                COLUMNS=block,
                SUM=_sum_dtype(x, weight),
                num_warps=warps,
            )
    return out


@jit
def ordered_bits(bits):
    """Map the bits of a float32 to an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _ranks(number, mask, at):
    """Return each number's rank: the larger comes first, of equals the earlier; NaN counts as the
    largest, masked numbers as the smallest."""
    key = tl.where(number == number, ordered_bits(number.to(tl.int32, bitcast=True)), 2147483647)
    key = tl.where(mask, key, -2147483648)
    before = (key[None, :] > key[:, None]) | (
        (key[None, :] == key[:, None]) & (at[None, :] < at[:, None])
    )
    return tl.sum(before.to(tl.int32), 1)


@jit
def _products(x, weight, bias, latents, mask, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return <x, weight[latent]> + bias of each latent in the mask."""
    latent = tl.load(latents, mask, 0).to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        part = tl.load(x + columns, columns < d, 0.0).to(tl.float32)
        total += (
            tl.load(
                weight + latent[:, None] * d + columns[None, :],
                mask[:, None] & (columns < d)[None, :],
                0.0,
            ).to(tl.float32)
            * part[None, :]
        )
    return tl.sum(total, 1) + tl.load(bias + latent, mask, 0.0).to(tl.float32)


@jit
def _choose(
    x,
    latents,
    scores,
    weight,
    bias,
    values,
    indices,
    spread,
    near,
    ranked,
    exact,
    c,
    k,
    d,
    margin,
    CANDIDATES: tl.constexpr,
    FIRST: tl.constexpr,
    COLUMNS: tl.constexpr,
    MORE: tl.constexpr,
    MORE_COLUMNS: tl.constexpr,
):
    """One token: computes the k candidates of the best scores exactly, then, in the order of their
    scores, those that may still be better than the worst of these; selects the k best."""
    token, j, first = tl.program_id(0).to(tl.int64), tl.arange(0, CANDIDATES), tl.arange(0, FIRST)
    latents, scores = latents + token * c, scores + token * c
    near, ranked, exact = near + token * c, ranked + token * c, exact + token * c
    score, latent = tl.load(scores + j, j < c, 0.0), tl.load(latents + j, j < c, 0)
    rank = _ranks(score, j < c, j)
    tl.store(near + rank, score, j < c)
    tl.store(ranked + rank, latent.to(tl.int32), j < c)
    tl.debug_barrier()  # one of the program's warps reads what another has written

    value = _products(x + token * d, weight, bias, ranked + first, first < k, d, FIRST, COLUMNS)
    off = tl.where(first < k, value - tl.load(near + first, first < k, 0.0), 0.0)
    off = tl.sqrt(tl.sum(off * off, 0) / k)
    tl.store(spread + token, off)
    tl.store(exact + first, value, first < k)
    least = tl.min(tl.where(first < k, value, float("inf")), 0) - margin * off
    start = k
    while tl.load(near + start, start < c, float("-inf")) > least:
        more = start + tl.arange(0, MORE)
        mask = tl.load(near + more, more < c, float("-inf")) > least
        tl.store(
            exact + more,
            _products(x + token * d, weight, bias, ranked + more, mask, d, MORE, MORE_COLUMNS),
            mask,
        )
        start += MORE
    tl.debug_barrier()

    mask = (j < k) | (tl.load(near + j, j < c, float("-inf")) > least)
    value = tl.load(exact + j, mask, 0.0)
    rank = _ranks(value, mask, j)
    tl.store(values + token * k + rank, value, mask & (rank < k))
    tl.store(
        indices + token * k + rank, tl.load(ranked + j, mask, 0).to(tl.int64), mask & (rank < k)
    )


def _candidate_block(first: int) -> dict[str, int]:
    """Return the columns that are loaded at once of `first` rows, and of how many further rows, and
    the warps for them."""
    return {"COLUMNS": max(16, 4096 // first), "MORE": 16, "MORE_COLUMNS": 128, "num_warps": 1}


def choose(
    x: Tensor,
    latents: Tensor,
    scores: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    *,
    margin: float = math.inf,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute candidates' values exactly, in float32, and select the k largest.

    Args:
        x: [b, d]
        latents: The candidates [b, c].
        scores: Their approximate values [b, c].
        weight: [n, d]
        bias: [n]
        k: How many to select.
        margin: A candidate whose score is this many spreads below the smallest of the first k
            values is not computed.

    Returns:
        values[b, k] and indices[b, k], largest first, NaN counting as the largest; and spread[b],
        the root mean square of value - score over the k candidates of the best scores.
    """
    (b, c), d = latents.shape, weight.shape[1]
    if c > MOST_CANDIDATES:
        return _choose_of_many(x, latents, scores, weight, bias, k)
    values, indices = (
        torch.empty(b, k, device=x.device),
        torch.empty(b, k, dtype=torch.long, device=x.device),
    )
    spread, (near, exact) = torch.empty(b, device=x.device), torch.empty(2, b, c, device=x.device)
    ranked = torch.empty(b, c, dtype=torch.int32, device=x.device)
    padded, first = (max(16, 1 << (size - 1).bit_length()) for size in (c, k))
    if b:
        with on_device(x.device):
            _choose[(b,)](
                x.contiguous(),
                latents.contiguous(),
                scores.contiguous(),
                weight.contiguous(),
                bias,
                values,
                indices,
                spread,
                near,
                ranked,
                exact,
                c,
                k,
                d,
                min(margin, 1e30),
                CANDIDATES=padded,
                FIRST=first,
                **_candidate_block(first),
            )
    return values, indices, spread


def _choose_of_many(
    x: Tensor, latents: Tensor, scores: Tensor, weight: Tensor, bias: Tensor, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `choose` does with an infinite margin, the spread over all candidates."""
    exact = gather_dot(x, latents, weight, dtype=torch.float32) + bias[latents]
    values, at = exact.topk(k, dim=1)
    return values, latents.gather(1, at), (exact - scores).square().mean(1).sqrt()


@jit
def _decode(
    values,
    indices,
    weight,
    bias,
    x,
    error,
    squares,
    slopes,
    k,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One token: sums its rows, and multiplies them with the error while they are in the cache."""
    token, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    inside = columns < d
    off = tl.load(bias + columns, inside, 0.0) - tl.load(x + token * d + columns, inside, 0.0).to(
        tl.float32
    )
    for start in range(0, k, ROWS):
        j = start + tl.arange(0, ROWS)
        latent = tl.load(indices + token * k + j, j < k, 0).to(tl.int64)
        value = tl.load(values + token * k + j, j < k, 0.0)
        row = tl.load(
            weight + latent[:, None] * d + columns[None, :], (j < k)[:, None] & inside[None, :], 0.0
        ).to(tl.float32)
        off += tl.sum(value[:, None] * row, 0)
    tl.store(error + token * d + columns, off, inside)
    tl.store(squares + token, tl.sum(off * off, 0))
    for back in range(0, k, ROWS):  # last rows first, since they are in the nearest cache
        j = (k - 1) // ROWS * ROWS - back + tl.arange(0, ROWS)
        latent = tl.load(indices + token * k + j, j < k, 0).to(tl.int64)
        row = tl.load(
            weight + latent[:, None] * d + columns[None, :], (j < k)[:, None] & inside[None, :], 0.0
        ).to(tl.float32)
        slope = tl.sum(row * off[None, :], 1)
        tl.store(
            slopes + token * k + j,
            tl.where(tl.load(values + token * k + j, j < k, 0.0) > 0, slope, 0.0),
            j < k,
        )


def _row_block(columns: int, size: int) -> dict[str, int]:
    """Return how many rows of numbers of `size` bytes are loaded at once, and the warps for them.

    A thread has 16 bytes of a row, and at most 128 numbers.
    """
    warps = min(16, max(1, columns * size // 512))
    return {"ROWS": max(2, min(16, 4096 * warps // columns)), "num_warps": warps}


def decode(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, x: Tensor, error: Tensor
) -> tuple[Tensor, Tensor]:
    """Decode a code, and multiply the error with the rows in use, all in float32.

    Args:
        values: [b, k]
        indices: [b, k]
        weight: [n, d], the decoder.
        bias: [d]
        x: [b, d]
        error: [b, d], written: sum over j of values[b, j] weight[indices[b, j]] + bias - x.

    Returns:
        The error's squared norm [b], and <error, row> [b, k] where the value is above 0, else 0.
    """
    (b, k), d = indices.shape, weight.shape[1]
    squares, slopes = torch.empty(b, device=x.device), torch.empty(b, k, device=x.device)
    columns = max(16, 1 << (d - 1).bit_length())
    if b:
        with on_device(x.device):
            _decode[(b,)](
                values.contiguous(),
                indices.contiguous(),
                weight.contiguous(),
                bias,
                x.contiguous(),
                error,
                squares,
                slopes,
                k,
                d,
                COLUMNS=columns,
                **_row_block(columns, weight.element_size()),
            )
    return squares, slopes


# ---- rows of a matrix, by each latent's tokens


class Lists(NamedTuple):
    """The (token, latent) pairs of indices[b, k], sorted by latent and then by token."""

    order: Tensor
    """[pairs]: the pairs' numbers. Those of latent i are order[starts[i] : starts[i + 1]]."""
    latents: Tensor
    """[pairs]: their latents, in that order."""
    starts: Tensor
    """[n + 1]"""
    k: int
    """Pairs of a token."""
    chunk: int
    """Each `chunk` pairs in turn are summed as one part where all of them are of one latent."""


def sort_by_latent(indices: Tensor, n: int, *, chunk: int | None = None) -> Lists:
    """Sort the pairs of indices[b, k] by latent, once for both weights' gradients.

    Args:
        indices: [b, k]
        n: The number of latents.
        chunk: As in `Lists`; CHUNK if None.
    """
    latents, order = torch.sort(indices.flatten().int(), stable=True)
    starts = torch.searchsorted(
        latents, torch.arange(n + 1, dtype=torch.int32, device=indices.device)
    )
    return Lists(order, latents, starts, indices.shape[1], chunk or CHUNK)


@jit
def _segment(
    order,
    values,
    x,
    begin,
    end,
    columns,
    k,
    d,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
):
    """Return the sum over pairs begin .. end of values[pair] * x[token of the pair], at some
    columns."""
    total = tl.zeros([COLUMNS], SUM)
    for start in range(begin, end, ROWS):
        at = start + tl.arange(0, ROWS)
        pair = tl.load(order + at, at < end, 0)
        value = tl.load(values + pair, at < end, 0.0).to(SUM)
        row = tl.load(
            x + (pair // k)[:, None] * d + columns[None, :],
            (at < end)[:, None] & (columns < d)[None, :],
            0.0,
        ).to(SUM)
        total += tl.sum(value[:, None] * row, 0)
    return total


@jit
def _weight(order, weights, begin, end, SUM: tl.constexpr):
    """Return the sum over pairs begin .. end of weights[pair]."""
    total = tl.zeros([32], SUM)
    for start in range(begin, end, 32):
        at = start + tl.arange(0, 32)
        total += tl.load(weights + tl.load(order + at, at < end, 0), at < end, 0.0).to(SUM)
    return tl.sum(total, 0)


@jit
def _parts(
    order,
    latents,
    values,
    x,
    weights,
    parts,
    part_sums,
    k,
    d,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
    MEASURED: tl.constexpr,
):
    """CHUNK pairs, one block of columns: sums them if they are all of one latent."""
    part, columns = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS),
    )
    begin, end = part * CHUNK, (part + 1) * CHUNK
    if tl.load(latents + begin) == tl.load(latents + end - 1):
        tl.store(
            parts + part * d + columns,
            _segment(order, values, x, begin, end, columns, k, d, ROWS, COLUMNS, SUM),
            columns < d,
        )
        if MEASURED:  # noqa: SIM102 (settled when the kernel is compiled)
            if tl.program_id(1) == 0:
                tl.store(part_sums + part, _weight(order, weights, begin, end, SUM))


@jit
def _rows(
    order,
    starts,
    values,
    x,
    weights,
    parts,
    part_sums,
    out,
    squares,
    sums,
    k,
    d,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SUM: tl.constexpr,
    MEASURED: tl.constexpr,
):
    """One latent, one block of columns: sums its pairs, without atomics.

    For a hot latent, with more than CHUNK pairs, these are the pairs before its parts, its parts in
    order, and the pairs after them.
    """
    latent, columns = (
        tl.program_id(0).to(tl.int64),
        tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS),
    )
    begin, end = tl.load(starts + latent), tl.load(starts + latent + 1)
    hot, first, last = end - begin > CHUNK, (begin + CHUNK - 1) // CHUNK, end // CHUNK
    head = tl.where(hot, first * CHUNK, end)
    total = _segment(order, values, x, begin, head, columns, k, d, ROWS, COLUMNS, SUM)
    if hot:
        for part in range(first, last):
            total += tl.load(parts + part * d + columns, columns < d, 0.0)
        total += _segment(order, values, x, last * CHUNK, end, columns, k, d, ROWS, COLUMNS, SUM)
    tl.store(out + latent * d + columns, total.to(out.dtype.element_ty), columns < d)
    if MEASURED:
        tl.store(squares + latent * tl.num_programs(1) + tl.program_id(1), tl.sum(total * total, 0))
        if tl.program_id(1) == 0:
            weight = _weight(order, weights, begin, head, SUM)
            if hot:
                for part in range(first, last):
                    weight += tl.load(part_sums + part)
                weight += _weight(order, weights, last * CHUNK, end, SUM)
            tl.store(sums + latent, weight)


def scatter_outer(values: Tensor, indices: Tensor, x: Tensor, n: int) -> Tensor:
    """Return out[i] = sum over (b, j) with indices[b, j] = i of values[b, j] * x[b], as [n, d] in
    the wider of the two dtypes. Deterministic."""
    return scatter_transposed(sort_by_latent(indices, n), values, x)


def scatter_transposed(
    lists: Lists, values: Tensor, x: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """Return `scatter_outer` from sorted pairs, in `dtype` or else the wider of the two dtypes."""
    return _scatter(lists, values, x, None, dtype)[0]


def scatter_measured(
    lists: Lists, values: Tensor, x: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `scatter_outer` from sorted pairs, with each row's squared norm [n] and the sum [n] of
    weights[b, k] over each latent's pairs."""
    return _scatter(lists, values, x, weights.contiguous(), None)


def _slab_columns(x: Tensor) -> tuple[int, int]:
    """Return `_columns` of x[b, d], fewer where such a slab of x would not stay in the L2 cache."""
    block, warps = _columns(x.shape[1])
    while block > 128 and len(x) * block * x.element_size() > L2_SLAB:
        block, warps = block // 2, max(1, warps // 2)
    return block, warps


def _scatter(
    lists: Lists, values: Tensor, x: Tensor, weights: Tensor | None, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    n, d, (block, warps) = len(lists.starts) - 1, x.shape[1], _slab_columns(x)
    dtype, sums = dtype or torch.promote_types(values.dtype, x.dtype), _sum_dtype(values, x)
    out, wide = (
        torch.empty(n, d, dtype=dtype, device=x.device),
        torch.float64 if sums is tl.float64 else torch.float32,
    )
    values, x, blocks = values.contiguous(), x.contiguous(), -(-d // block)
    squares, total = (
        torch.zeros(n, blocks, dtype=wide, device=x.device),
        torch.zeros(n, dtype=wide, device=x.device),
    )
    if out.numel() == 0 or values.numel() == 0:
        return out.zero_(), squares.sum(1), total
    count, weighed = len(lists.order) // lists.chunk, values if weights is None else weights
    parts, part_sums = (
        torch.empty(count, d, dtype=wide, device=x.device),
        torch.empty(count, dtype=wide, device=x.device),
    )
    options = {
        "CHUNK": lists.chunk,
        "ROWS": 4,
        "COLUMNS": block,
        "SUM": sums,
        "MEASURED": weights is not None,
        "num_warps": warps,
    }
    with on_device(x.device):
        if count:
            _parts[(count, blocks)](
                lists.order,
                lists.latents,
                values,
                x,
                weighed,
                parts,
                part_sums,
                lists.k,
                d,
                **options,
            )
        _rows[(n, blocks)](
            lists.order,
            lists.starts,
            values,
            x,
            weighed,
            parts,
            part_sums,
            out,
            squares,
            total,
            lists.k,
            d,
            **options,
        )
    return out, squares.sum(1), total


# ---- the optimizer's pass over the rows


@jit
def _squares(grad, weight, out, d, PROJECT: tl.constexpr, COLUMNS: tl.constexpr):
    """One row: writes the squared norm of its gradient, without the component along the weight's
    row if PROJECT."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    g = tl.load(grad + row * d + columns, columns < d, 0.0).to(tl.float32)
    if PROJECT:
        w = tl.load(weight + row * d + columns, columns < d, 0.0).to(tl.float32)
        g -= tl.sum(g * w, 0) * w
    tl.store(out + row, tl.sum(g * g, 0))


@jit
def quantize_row(row):
    """Return a row as int8, whose largest magnitude is 127, and its scale."""
    most = tl.max(tl.abs(row), 0)
    unit = tl.where(most > 0, most / 127, 1.0)
    return tl.floor(row / unit + 0.5).to(tl.int8), unit


@jit
def _adam(w, g, m, v, rate, beta2, gain1, gain2, eps, root):
    """Return a row and its moments after a step of Adam."""
    m += (g - m) * gain1
    v = v * beta2 + g * g * gain2
    w -= rate * m / (tl.sqrt(v) * root + eps)
    return w, m, v


@jit
def _adam_row(
    weight,
    grad,
    first,
    second,
    average,
    bf16_copy,
    int8_copy,
    scale,
    clip_at,
    d,
    rate,
    beta2,
    gain1,
    gain2,
    eps,
    root,
    gain,
    PROJECT: tl.constexpr,
    UNIT: tl.constexpr,
    AVERAGE: tl.constexpr,
    HALF: tl.constexpr,
    BYTES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One row, read once and written once; nothing is written where the clip is NaN.

    Columns beyond d have weight and gradient 0 and a second moment of 1, so they stay at 0 whatever
    eps is."""
    clip, columns = tl.load(clip_at), tl.arange(0, COLUMNS)
    at, inside = tl.program_id(0).to(tl.int64) * d + columns, columns < d
    w, g = tl.load(weight + at, inside, 0.0), tl.load(grad + at, inside, 0.0).to(tl.float32)
    m, v = (
        tl.load(first + at, inside, 0.0).to(tl.float32),
        tl.load(second + at, inside, 1.0).to(tl.float32),
    )
    if AVERAGE:
        # Read here, because nothing is read while the program's warps synchronise below.
        mean = tl.load(average + at, inside, 0.0)
    if PROJECT:
        g -= tl.sum(g * w, 0) * w
    g *= clip
    # One condition for all columns; otherwise each number would be stored by itself.
    g, moved = tl.where(g == g, g, 0.0), tl.where(clip == clip, inside, False)
    w, m, v = _adam(w, g, m, v, rate, beta2, gain1, gain2, eps, root)
    if UNIT:
        length = tl.sqrt(tl.sum(w * w, 0))
        w *= 1 / tl.where(length > 0, length, 1.0)
    tl.store(weight + at, w, moved)
    tl.store(first + at, m.to(first.dtype.element_ty), moved)
    tl.store(second + at, v.to(second.dtype.element_ty), moved)
    if AVERAGE:
        tl.store(average + at, mean + (w - mean) * gain, moved)
    if HALF:
        tl.store(bf16_copy + at, w.to(bf16_copy.dtype.element_ty), moved)
    if BYTES:
        part, unit = quantize_row(w)
        tl.store(int8_copy + at, part, moved)
        tl.store(scale + tl.program_id(0), unit, clip == clip)


def row_options(d: int) -> dict[str, int]:
    """Return the options of a kernel that holds a row of d numbers in registers: four a thread, 16
    bytes."""
    columns = max(16, 1 << (d - 1).bit_length())
    return {"COLUMNS": columns, "num_warps": min(32, max(1, columns // 128))}


def row_squares(grad: Tensor, weight: Tensor, *, project: bool = False) -> Tensor:
    """Return each gradient row's squared norm [n], for clipping.

    Args:
        grad: [n, d]
        weight: [n, d]
        project: Leave out the component along the weight's row.
    """
    out = torch.zeros(len(grad), dtype=torch.float32, device=grad.device)
    if grad.numel():
        with on_device(grad.device):
            _squares[(len(grad),)](
                grad.contiguous(),
                weight.contiguous(),
                out,
                grad.shape[1],
                PROJECT=project,
                **row_options(grad.shape[1]),
            )
    return out


class RowCopies(NamedTuple):
    """What `adam_rows_` writes besides the weight[n, d] and its moments; None is left out."""

    average: Tensor | None = None
    """The averaged weight [n, d] in float32."""
    decay: float = 1.0
    """Decay of the average."""
    bf16_copy: Tensor | None = None
    """A copy [n, d] of the weight in bfloat16."""
    int8_copy: Tensor | None = None
    """A copy [n, d] of the weight in int8, with `scale`."""
    scale: Tensor | None = None
    """[n], for int8."""

    @property
    def flags(self) -> dict[str, bool]:
        """What `_adam_row` is compiled to write."""
        written = {"AVERAGE": self.average, "HALF": self.bf16_copy, "BYTES": self.int8_copy}
        return {name: tensor is not None for name, tensor in written.items()}


def adam_rows_(
    weight: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    step: int,
    rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    clip: float | Tensor = 1.0,
    project: bool = False,
    unit_norm: bool = False,
    copies: RowCopies = RowCopies(),
) -> None:
    """Update weight[n, d] by a step of Adam, in one pass over its rows.

    In this order: remove the gradient's component along the row (`project`), multiply by `clip`,
    update the moments, step, normalise rows (`unit_norm`), average += (weight - average) *
    (1 - decay), write the quantized copies. native.cpp's ks_update does the same.

    Args:
        weight: [n, d] in float32.
        grad: [n, d]
        first: The first moment [n, d].
        second: The second moment [n, d].
        step: The number of the step, from 1.
        rate: The learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        clip: A factor on the gradient. Nothing is changed where it is NaN. As a float32 tensor of
            one number it need not be known yet on the host.
        project: Remove the gradient's component along the row.
        unit_norm: Normalise rows to norm 1.
        copies: The average and the quantized copies.

    Raises:
        ValueError: A tensor is not contiguous, not [n, d], or not of its dtype.
    """
    _check_rows(weight, grad, first, second, copies)
    if weight.numel() == 0:
        return
    clip = clip if isinstance(clip, Tensor) else torch.full((), clip, device=weight.device)
    d, bias1, bias2 = weight.shape[1], 1 - beta1**step, 1 - beta2**step
    rule = (rate / bias1, beta2, 1 - beta1, 1 - beta2, eps, 1 / math.sqrt(bias2), 1 - copies.decay)
    extra = [
        weight if tensor is None else tensor
        for tensor in (copies.average, copies.bf16_copy, copies.int8_copy, copies.scale)
    ]
    flags = {"PROJECT": project, "UNIT": unit_norm, **copies.flags}
    with on_device(weight.device):
        _adam_row[(len(weight),)](
            weight, grad, first, second, *extra, clip, d, *rule, **flags, **row_options(d)
        )


def _check_rows(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, copies: RowCopies
) -> None:
    """Raise ValueError for a tensor that the pass over the rows cannot take."""
    average = copies.average
    for name, tensor in {
        "weight": weight,
        "grad": grad,
        "first": first,
        "second": second,
        "average": average,
        "bf16_copy": copies.bf16_copy,
        "int8_copy": copies.int8_copy,
    }.items():
        if tensor is not None and (tensor.shape != weight.shape or not tensor.is_contiguous()):
            raise ValueError(
                f"{name} is {list(tensor.shape)} with strides {tensor.stride()}; expected a "
                f"contiguous {list(weight.shape)}"
            )
    if weight.dtype != torch.float32 or (average is not None and average.dtype != torch.float32):
        raise ValueError(
            f"weight and average must be float32, got {weight.dtype}; name a bfloat16 copy in "
            "`bf16_copy`"
        )
