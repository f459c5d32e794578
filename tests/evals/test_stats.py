"""What `stats` counts of single latents: bands of sizes, histograms, tokens, companions; each against its definition, latent by latent."""

from __future__ import annotations

import numpy as np
import pytest

from ksparse.evals import stats
from ksparse.evals.latents import coactivation

N, TOKENS, VOCABULARY = 12, 400, 30


@pytest.fixture
def fired():
    """Return (token, latent, value) of activations; latent 0 fires always, 11 never, 10 exactly with 9."""
    random = np.random.default_rng(3)
    fires = random.random((TOKENS, N)) < np.linspace(1.1, 0.02, N)
    fires[:, 11], fires[:, 10] = False, fires[:, 9]
    token, latent = fires.nonzero()
    return token, latent.astype(np.int32), random.exponential(size=len(token)).astype(np.float32)


def test_bands_hold_equally_many_and_are_ordered_by_size(fired):
    _, latent, value = fired
    band = stats.band_of(latent, value, N, 4)
    for i in range(N - 1):
        sizes = [value[(latent == i) & (band == b)] for b in range(4)]
        assert max(map(len, sizes)) - min(map(len, sizes)) <= 1
        assert all(
            above.min() >= below.max()
            for above, below in zip(sizes, sizes[1:])
            if len(above) and len(below)
        )


@pytest.mark.parametrize(
    "examples, expected", [(0, (0, 0)), (1, (1, 1)), (3, (3, 3)), (8, (4, 5)), (9, (4, 5))]
)
def test_examples_are_dealt_evenly_to_bands(examples, expected):
    assert tuple(stats.bands(examples).values()) == expected


def test_examples_of_a_band_are_of_that_band_one_a_context(fired):
    token, latent, value = fired
    context = token // 4
    chosen, place = stats.best_per_band(
        latent, context, value, np.random.default_rng(0).random(len(value)), N, 8
    )
    band = stats.band_of(latent, value, N, 4)
    assert (band[chosen] == place // 5).all() and len(chosen) > 50
    keys = list(zip(latent[chosen], place))
    assert (
        len(set(keys)) == len(keys) == len(set(zip(latent[chosen], band[chosen], context[chosen])))
    )


def test_a_histogram_counts_every_activation_of_its_latent_once(fired):
    _, latent, value = fired
    largest = np.array([value[latent == i].max(initial=0) for i in range(N)])
    counted = stats.histograms(latent, value, largest)
    for i in range(N):
        expected, _ = np.histogram(
            value[latent == i].astype(np.float32),
            bins=np.linspace(0, largest[i] or 1, stats.BINS + 1, dtype=np.float64),
        )
        assert (
            counted[i].sum() == (latent == i).sum() and np.abs(counted[i] - expected).sum() <= 2
        )  # a value on an edge


def test_the_tokens_a_latent_fires_on_are_weighed_by_its_values(fired):
    at, latent, value = fired
    token = (at**2) % VOCABULARY
    found = stats.fired_on(latent, token, value, N, VOCABULARY)
    for i in range(N):
        mass = np.bincount(token[latent == i], value[latent == i], minlength=VOCABULARY)
        there = found["on_token"][i] >= 0
        assert there.sum() == min(stats.TOKENS, (mass > 0).sum())
        shares = mass[found["on_token"][i][there]] / max(1e-9, mass.sum())
        assert np.allclose(found["on_share"][i][there], shares) and (np.diff(shares) <= 0).all()
        assert not len(shares) or shares[0] == pytest.approx(mass.max() / mass.sum())


def test_one_large_activation_outweighs_many_small_ones():
    token, value = np.array([7, 7, 7, 3]), np.array([0.1, 0.1, 0.1, 5], np.float32)
    found = stats.fired_on(np.zeros(4, np.int32), token, value, 1, 10)
    assert found["on_token"][0, 0] == 3 and found["on_share"][0, 0] == pytest.approx(5 / 5.3)


def test_companions_are_the_latents_of_highest_correlation(fired):
    token, latent, _ = fired
    found = coactivation.find_coactivating(token * 7 + 3, latent, N)
    fires = np.zeros((TOKENS, N))
    fires[token, latent] = 1
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.nan_to_num(np.corrcoef(fires.T)) - 2 * np.eye(N)
    both = fires.T @ fires
    for i in range(N):
        expected = sorted(
            ((phi[i, j], j) for j in range(N) if phi[i, j] > 1e-9 and both[i, j] >= 2),
            key=lambda pair: (-round(pair[0], 9), pair[1]),
        )
        others = found["together_latent"][i]
        assert others[others >= 0].tolist() == [j for _, j in expected[: coactivation.LISTED]]
        assert np.allclose(
            found["together_phi"][i][others >= 0],
            [phi for phi, _ in expected[: coactivation.LISTED]],
            atol=1e-6,
        )
        assert (found["together_count"][i][others >= 0] == both[i, others[others >= 0]]).all()
    assert found["together_latent"][9, 0] == 10 and found["together_phi"][9, 0] == pytest.approx(1)


def test_companions_do_not_depend_on_the_size_of_blocks(fired, monkeypatch):
    token, latent, _ = fired
    whole = coactivation.find_coactivating(token, latent, N)
    monkeypatch.setattr(coactivation, "_CELLS", 5 * N)
    parts = coactivation.find_coactivating(token, latent, N)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_too_many_pairs_are_counted_on_the_first_tokens(fired, monkeypatch):
    token, latent, _ = fired
    monkeypatch.setattr(
        coactivation,
        "_PAIRS",
        int(np.bincount(token[token < 100]).astype(int) @ np.bincount(token[token < 100])),
    )
    few, first = (
        coactivation.find_coactivating(token, latent, N),
        coactivation.find_coactivating(token[token < 100], latent[token < 100], N),
    )
    assert all(np.array_equal(few[name], first[name]) for name in few)


def test_nothing_that_fires_has_no_companions():
    found = coactivation.find_coactivating(np.zeros(0, int), np.zeros(0, int), 3)
    assert (found["together_latent"] == -1).all()
