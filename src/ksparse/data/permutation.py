"""Pseudo-random permutations as a function of a key: nothing is stored, any element can be computed
alone."""

from __future__ import annotations

import numpy as np

_ROUNDS = 4


def permutation(index: np.ndarray, n: int, key: tuple[int, ...]) -> np.ndarray:
    """Return where the permutation of range(n) chosen by `key` sends each element of `index`.

    A Feistel network permutes the next power of four; results outside range(n) are permuted again
    ("cycle walking"), which leaves a permutation of range(n).

    Args:
        index: Numbers in range(n), of any shape.
        n: The size of the permutation.
        key: Whole numbers that choose it.
    """
    half = max(1, (int(n - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = [_mix(np.array([_fold(key) + number], np.uint64))[0] for number in range(_ROUNDS)]
    out = np.asarray(index, np.uint64).copy()
    todo = np.ones(out.shape, bool)
    while todo.any():
        left, right = out[todo] >> np.uint64(half), out[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        out[todo] = (left << np.uint64(half)) | right
        todo &= out >= n
    return out.astype(np.int64)


def _fold(key: tuple[int, ...]) -> int:
    state = 0
    for part in key:
        state = int(_mix(np.array([(state ^ part) % 2**64], np.uint64))[0])
    return state % 2**63


def _mix(value: np.ndarray) -> np.ndarray:
    """Mix 64 bits (the finaliser of splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed
