"""The order of the data is a permutation, a function of its key, and needs no memory."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ksparse.data.permutation import permutation


@given(n=st.integers(1, 3000), key=st.tuples(st.integers(0, 2**40), st.integers(0, 1000)))
def test_it_is_a_permutation(n, key):
    assert np.array_equal(np.sort(permutation(np.arange(n), n, key)), np.arange(n))


@pytest.mark.parametrize(
    "n", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 65_536, 65_537]
)
def test_it_is_a_permutation_at_and_beside_powers_of_two(n):
    assert np.array_equal(np.sort(permutation(np.arange(n), n, (0, 0))), np.arange(n))


def test_any_part_can_be_asked_for_alone():
    whole = permutation(np.arange(1000), 1000, (3, 4))
    assert np.array_equal(permutation(np.arange(300, 700), 1000, (3, 4)), whole[300:700])
    assert np.array_equal(permutation(np.array([[7], [9]]), 1000, (3, 4)), whole[[[7], [9]]])
    assert permutation(np.arange(0), 1000, (3, 4)).shape == (0,)


def test_billions_need_no_memory():
    n = 3 * 10**9
    out = permutation(np.arange(n - 50, n), n, (0, 0))
    assert len(set(out.tolist())) == 50 and out.min() >= 0 and out.max() < n


def test_every_part_of_the_key_counts_and_so_does_their_order():
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (0, 2), (0,), (2**40, 0)]
    orders = {permutation(np.arange(100), 100, key).tobytes() for key in keys}
    assert len(orders) == len(keys)
    assert np.array_equal(
        permutation(np.arange(100), 100, (5, 6)), permutation(np.arange(100), 100, (5, 6))
    )


def test_the_argument_is_left_as_it_was():
    index = np.arange(100)
    permutation(index, 100, (0, 0))
    assert np.array_equal(index, np.arange(100))


def test_neighbours_are_sent_apart_and_places_are_even():
    n = 4096
    out = permutation(np.arange(n), n, (0, 0))
    assert np.abs(np.diff(out)).mean() == pytest.approx(n / 3, rel=0.1)  # as for a random order
    assert np.abs(np.corrcoef(np.arange(n), out)[0, 1]) < 0.08
    halves = [np.mean(permutation(np.arange(n // 2), n, (0, key)) < n / 2) for key in range(20)]
    assert np.mean(halves) == pytest.approx(0.5, abs=0.02)
