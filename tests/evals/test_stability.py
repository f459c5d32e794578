"""Stability: the matching is scipy's, a duplicate is stable, random decoders have what theory says."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.special import betainc

from ksparse.errors import InputError
from ksparse.evals import stability as module
from ksparse.evals.stability import match, stability


def unit(n, d, seed):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def cosines(one, other):
    unit_rows = [torch.nn.functional.normalize(rows, dim=1) for rows in (one, other)]
    return (unit_rows[0] @ unit_rows[1].T).double().numpy()


@pytest.mark.parametrize(
    "n, m, d, least", [(60, 60, 3, 0.7), (40, 70, 3, 0.9), (70, 40, 4, 0.5), (30, 30, 2, 0.2)]
)
@pytest.mark.parametrize("part", [2**24, 100])
def test_the_matching_is_scipys_assignment_of_the_cosines_above_the_least(
    n, m, d, least, part, monkeypatch
):
    monkeypatch.setattr(module, "COSINES", part)
    one, other = unit(n, d, 0), 3 * unit(m, d, 1)
    found = match(one, other, least)
    dense = cosines(one, other)
    above = np.where(dense >= least, dense, 0)
    rows, columns = linear_sum_assignment(above, maximize=True)
    kept = above[rows, columns] > 0
    assert found.cosine.sum() == pytest.approx(above[rows, columns].sum(), rel=1e-6)
    expected = np.full(n, -1)
    expected[rows[kept]] = columns[kept]
    assert (found.partner == expected).all()
    assert found.candidates == (above > 0).sum()
    np.testing.assert_allclose(found.nearest, dense.max(1), atol=1e-6)
    taken = found.partner[found.partner >= 0]
    assert len(set(taken)) == len(taken)


def test_a_row_that_was_split_in_two_has_one_partner():
    one = unit(20, 8, 0)
    other = torch.cat([one, one[:1]])
    partners = match(torch.cat([one, one[:1]]), one).partner
    assert (partners >= 0).sum() == 20
    assert (match(one, other).partner >= 0).all()


def test_a_duplicated_seed_has_stability_1_and_a_permuted_one_too():
    rows = unit(500, 16, 3)
    shuffled = rows[torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    found = stability(rows, {"a": rows, "b": shuffled}, np.full(500, 0.1))
    assert found["stable"]["value"] == 1.0 and found["pairs"]["b"]["value"] == 1.0
    assert (found.arrays["found_in"] == 1).all()
    torch.testing.assert_close(found.arrays["nearest"], torch.ones(500))


def test_random_decoders_have_as_many_candidates_as_theory_says():
    n, d, least = 1500, 12, 0.7
    found = match(unit(n, d, 0), unit(n, d, 1), least)
    chance = 0.5 * betainc((d - 1) / 2, 0.5, 1 - least**2)
    expected = n * n * chance
    assert abs(found.candidates - expected) < 5 * math.sqrt(expected)


def test_planted_stable_and_unstable_latents_are_told_apart():
    d, n = 64, 300
    shared = unit(200, d, 0)

    def seed(number):
        noise = 0.4 * unit(200, d, 10 + number)
        rows = torch.cat([shared + noise, unit(100, d, 20 + number)])
        return rows[torch.randperm(n, generator=torch.Generator().manual_seed(number))]

    run = torch.cat([shared, unit(100, d, 9)])
    density = np.concatenate([np.full(200, 0.1), np.full(100, 0.001)])
    effect = (np.arange(n), np.concatenate([np.full(200, 2.0), np.full(100, 0.5)]))
    found = stability(run, {"a": seed(1), "b": seed(2)}, density, effect, cosines=density)
    planted = np.arange(n) < 200
    assert ((found.arrays["found_in"].numpy() == 1) == planted).all()
    assert found["stable"]["value"] == pytest.approx(2 / 3)
    for groups in (found["by_density"], found["by_effect"]):
        assert [group["latents"] for group in groups] == [75] * 4
        assert groups[0]["stable"]["value"] == 0 and groups[3]["stable"]["value"] == 1
    assert found["encoder_cosine"]["stable"]["value"] == pytest.approx(0.1)
    assert found["encoder_cosine"]["dead"]["value"] is None


def test_a_latent_that_only_one_seed_has_is_not_stable_and_dead_ones_do_not_count():
    rows = unit(10, 32, 0)
    other = rows.clone()
    other[3] = unit(1, 32, 5)
    density = np.full(10, 0.1)
    density[7] = 0.0
    found = stability(rows, {"a": rows, "b": other}, density)
    assert found["stable"]["value"] == pytest.approx(8 / 9)
    assert found["found_in_one"]["value"] == 1
    assert found.arrays["found_in"][3] == 0.5
    assert found["stable_of_all"]["value"] == pytest.approx(9 / 10)


def test_decoders_of_other_widths_are_refused():
    with pytest.raises(InputError, match="width 8 and 16"):
        match(unit(4, 8, 0), unit(4, 16, 0))
