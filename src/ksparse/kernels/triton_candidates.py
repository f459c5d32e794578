"""Candidates for the k largest, by a product in low precision, as Triton kernels.

The caller recomputes the candidates' values exactly (`triton_ops.choose`) and selects among them.

    rows             ─▶ quantize: bfloat16, or int8 with a scale for each row
    x, weight, bias  ─▶ tiles: product, the best few keys of each bucket ─▶ keys[b, candidates]
    keys             ─▶ the c largest, and a bound on all others

A key is a float32 as an integer of the same order, whose lowest bits hold the position in its
bucket. So one maximum finds both, and an entry takes 4 bytes. This costs the score's last bits,
2^-17 of it with buckets of 64: far less than the error of the low precision. Buckets are those of
`triton_ops`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ksparse.kernels import hopper
from ksparse.kernels.triton_ops import (
    MOST_KEPT,
    TILE,
    Tile,
    jit,
    latents_at,
    map_infinite,
    on_device,
    ordered_bits,
    program_tile,
    quantize_row,
    row_options,
    split_buckets,
    tile_product,
    tl,
)

LOWEST_KEY = -(2**31)
MAX_UNCERTAIN = 2e-3
"""The expected fraction of tokens that may be uncertain because a bucket holds more winners than
are kept; each costs a product with all latents."""
MAX_KEYS = 2**14
"""The most keys of a token that one program holds; with more, torch selects."""
BYTES_TILE = TILE._replace(depth=128)


class Quantized(NamedTuple):
    """Rows in low precision."""

    rows: Tensor
    """[n, d] in bfloat16, or in int8 to be multiplied by `scale`."""
    scale: Tensor | None = None
    """[n], for int8."""


class TileCandidates(NamedTuple):
    """The candidates of each token, in no particular order."""

    scores: Tensor
    """[b, c]"""
    latents: Tensor
    """[b, c]"""
    dropped: Tensor
    """[b], an upper bound on the scores of all other latents."""


# ---- quantization


@jit
def _round(x, out, scale, d, COLUMNS: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, COLUMNS)
    part, unit = quantize_row(tl.load(x + row * d + columns, columns < d, 0.0).to(tl.float32))
    tl.store(out + row * d + columns, part, columns < d)
    tl.store(scale + row, unit)


def quantize(x: Tensor, kind: str) -> Quantized:
    """Quantize rows x[m, d] to `kind`: 'bfloat16', or 'int8' with a scale for each row."""
    if kind == "bfloat16":
        return Quantized(x.bfloat16())
    if kind != "int8":
        raise ValueError(f"low precision {kind!r} is unknown; there are bfloat16 and int8")
    return Quantized(*_quantize_int8(x))


def _quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows x[m, d] as int8, and their scale[m]."""
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.ones(len(x), device=x.device)
    if x.numel():
        with on_device(x.device):
            _round[(len(x),)](x.contiguous(), out, scale, x.shape[1], **row_options(x.shape[1]))
    return out, scale


# ---- keys


@jit
def _keys(
    x,
    weight,
    bias,
    x_scale,
    scale,
    keys,
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
    BYTES: tl.constexpr,
):
    """One tile of the product: writes the KEPT largest keys of each bucket, largest first, to
    keys[b, buckets, KEPT]."""
    tile_b, tile_n = program_tile(b, n, TOKENS, LATENTS, GROUP)
    rows = tile_b * TOKENS + tl.arange(0, TOKENS)
    columns = tile_n * LATENTS + tl.arange(0, LATENTS)
    row, column = tl.minimum(rows, b - 1), tl.minimum(columns, n - 1)
    at = tl.arange(0, DEPTH)
    left = x + row.to(tl.int64)[:, None] * d + at[None, :]
    right = weight + column.to(tl.int64)[None, :] * d + at[:, None]
    SUM: tl.constexpr = tl.int32 if BYTES else tl.float32
    total = tile_product(left, right, d, TOKENS, LATENTS, DEPTH, EVEN, SUM)
    if BYTES:
        score = (
            total.to(tl.float32)
            * tl.load(x_scale + row)[:, None]
            * tl.load(scale + column)[None, :]
            + tl.load(bias + column)[None, :]
        )
    else:
        score = map_infinite(total + tl.load(bias + column)[None, :])
    if not FULL:
        score = tl.where((columns < n)[None, :], score, float("-inf"))

    key = split_buckets(ordered_bits(score.to(tl.int32, bitcast=True)), TOKENS, LATENTS)
    # The position is stored reversed, so that of equal scores the first wins.
    position = LATENTS // 4 - 1 - tl.arange(0, LATENTS // 4)
    key = (key & -(LATENTS // 4)) | position[None, None, :]
    to = (
        keys + (rows.to(tl.int64)[:, None] * buckets + tile_n * 4 + tl.arange(0, 4)[None, :]) * KEPT
    )
    for slot in tl.static_range(KEPT):
        best = tl.max(key, 2)
        tl.store(to + slot, best, (rows < b)[:, None])
        key = tl.where(key == best[:, :, None], -2147483648, key)


@jit
def _largest(
    keys,
    scores,
    latents,
    dropped,
    size,
    c,
    KEPT: tl.constexpr,
    LATENTS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One token: selects the c largest of its keys. The c-th is found by bisection."""
    token, at = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    key = tl.load(keys + token * size + at, at < size, -2147483648)
    low, high = tl.min(key, 0).to(tl.int64), tl.max(key, 0).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        count = tl.sum((key >= middle.to(tl.int32)).to(tl.int32), 0)
        low, high = (
            tl.where(count >= c, middle, low),
            tl.where(count > c, high, tl.where(count == c, middle, middle - 1)),
        )
    above, equal = key > low.to(tl.int32), key == low.to(tl.int32)
    taken = above | (
        equal & (tl.cumsum(equal.to(tl.int32), 0) <= c - tl.sum(above.to(tl.int32), 0))
    )
    slot = token * c + tl.cumsum(taken.to(tl.int32), 0) - 1
    place, bucket = LATENTS // 4 - 1 - (key & (LATENTS // 4 - 1)), at // KEPT
    tl.store(
        scores + slot, ordered_bits(key | (LATENTS // 4 - 1)).to(tl.float32, bitcast=True), taken
    )
    tl.store(
        latents + slot,
        (bucket // 4 * LATENTS + place // 2 * 8 + bucket % 4 * 2 + place % 2).to(tl.int64),
        taken,
    )
    # What a bucket dropped is at most the last key it kept. That key is either among those not
    # taken here, or is counted although it was taken.
    most = tl.max(tl.where(taken & (at % KEPT != KEPT - 1), -2147483648, key), 0)
    tl.store(dropped + token, ordered_bits(most | (LATENTS // 4 - 1)).to(tl.float32, bitcast=True))


def candidates(
    x: Tensor,
    low: Quantized,
    bias: Tensor,
    c: int,
    *,
    k: int | None = None,
    tile: Tile | None = None,
    kept: int | None = None,
) -> TileCandidates | None:
    """Find c candidates for the k largest of <x[b], low[n]> + bias[n].

    Args:
        x: [b, d], quantized here as `low` is.
        low: The latents, quantized.
        bias: [n]
        c: How many candidates to return for each token.
        k: How many will be selected among them; c if None.
        tile: The tile of the product; for tests and measurements.
        kept: How many entries of a bucket are kept; chosen from k if None.

    Returns:
        The candidates, or None where n is too small for buckets to hold c. Scores are rounded up,
        by at most 2^-17 with the default tile.
    """
    if not (tile or kept) and (result := _hopper_candidates(x, low, bias, c)):
        return result
    tile = tile or (TILE if low.scale is None else BYTES_TILE)
    full_buckets = 4 * (len(low.rows) // tile.latents)
    kept = kept or _kept(c if k is None else k, full_buckets)
    if not 0 < c <= kept * full_buckets or kept > tile.latents // 4 or not len(x):
        return None
    return largest(_keys_of_buckets(x, low, bias, kept, tile), c, kept, tile)


def _hopper_candidates(x: Tensor, low: Quantized, bias: Tensor, c: int) -> TileCandidates | None:
    """Return the candidates by the kernel for Hopper; None where it cannot be used."""
    if low.scale is None or not hopper.usable(x.device) or not len(x) or c > len(low.rows):
        return None
    plan = hopper.plan(low.rows.shape[1], c)
    if plan is None:
        return None
    x_low, x_unit = _quantize_int8(x.contiguous())
    return TileCandidates(*hopper.candidates(x_low, x_unit, low.rows, low.scale, bias, c, plan))


def _keys_of_buckets(x: Tensor, low: Quantized, bias: Tensor, kept: int, tile: Tile) -> Tensor:
    """Return the `kept` largest keys of each bucket as [b, buckets * kept]."""
    weight, scale = low
    b, (n, d), buckets = len(x), weight.shape, 4 * -(-len(weight) // tile.latents)
    rows, x_scale = quantize(x.contiguous(), "bfloat16" if scale is None else "int8")
    if x.device.type == "cpu" and scale is None:
        # Triton's interpreter has no product in bfloat16; products of float32 give the same.
        rows, weight = rows.float(), weight.float()
    keys = torch.empty(b, buckets * kept, dtype=torch.int32, device=x.device)
    with on_device(x.device):
        _keys[(-(-b // tile.tokens) * buckets // 4,)](
            rows,
            weight,
            bias,
            bias if x_scale is None else x_scale,
            bias if scale is None else scale,
            keys,
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
            BYTES=scale is not None,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return keys


def _kept(k: int, buckets: int) -> int:
    """Return how many entries of a bucket to keep, so that few tokens are expected to have more of
    their k winners in one. Winners fall into buckets at random."""
    return next(
        (
            m
            for m in range(2, MOST_KEPT)
            if m * buckets >= k and math.comb(k, m) <= MAX_UNCERTAIN * buckets ** (m - 1)
        ),
        MOST_KEPT,
    )


def largest(keys: Tensor, c: int, kept: int, tile: Tile) -> TileCandidates:
    """Return the c largest of keys[b, buckets * kept] as candidates."""
    b, size = keys.shape
    if size > MAX_KEYS:
        return largest_by_sorting(keys, c, kept, tile)
    scores, dropped = torch.empty(b, c, device=keys.device), torch.empty(b, device=keys.device)
    latents = torch.empty(b, c, dtype=torch.long, device=keys.device)
    padded = max(16, 1 << (size - 1).bit_length())
    with on_device(keys.device):
        _largest[(b,)](
            keys,
            scores,
            latents,
            dropped,
            size,
            c,
            KEPT=kept,
            LATENTS=tile.latents,
            SIZE=padded,
            num_warps=8 if padded > 4096 else 4,
        )
    return TileCandidates(scores, latents, dropped)


def largest_by_sorting(keys: Tensor, c: int, kept: int, tile: Tile) -> TileCandidates:
    """Return what `largest` returns, in plain torch: its definition."""
    best, at = keys.topk(c, dim=1)
    others = keys.scatter(1, at, torch.where(at % kept == kept - 1, best, LOWEST_KEY))
    place, bucket = tile.latents // 4 - 1 - (best & (tile.latents // 4 - 1)).long(), at // kept
    return TileCandidates(
        _score(best, tile), latents_at(bucket, place, tile), _score(others.amax(1), tile)
    )


def _score(keys: Tensor, tile: Tile) -> Tensor:
    keys = keys | (tile.latents // 4 - 1)
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)
