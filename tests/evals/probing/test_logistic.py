"""The probes are those of a trusted solver, on anything that latents and labels may be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksparse.errors import InputError
from ksparse.evals.probing import logistic

L2 = 1e-3


def problem(seed: int, rows: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a latent z[s] and labels y[s]: noise, a shifted mean, separable, sparse, an outlier, a large offset, in turn."""
    generator = torch.Generator().manual_seed(seed)
    y = (torch.rand(rows, generator=generator) < 0.2 + 0.6 * (seed % 7) / 7).double()
    y[:2] = torch.tensor([0.0, 1.0])
    z = torch.randn(rows, generator=generator, dtype=torch.float64)
    kind = seed % 6
    if kind == 1:
        z = z + 2 * y
    elif kind == 2:
        z = (2 * y - 1) * (1 + z.abs()) * 50
    elif kind == 3:
        z = torch.relu(z - 1.5) * 100 * (y + 0.2)
    elif kind == 4:
        z[0] = 1e4
    elif kind == 5:
        z = 1e-4 * (z + y) + 10
    return z, y


def scikit(z: torch.Tensor, y: torch.Tensor) -> tuple[float, float, float]:
    """Return (weight, bias, loss) of scikit-learn for the input scaled to mean 0 and variance 1, as our penalty is defined."""
    from sklearn.linear_model import LogisticRegression

    scaled = ((z - z.mean()) / z.std(correction=0)).numpy()
    model = LogisticRegression(
        C=1 / (L2 * len(y)), solver="newton-cholesky", tol=1e-12, max_iter=10_000
    ).fit(scaled[:, None], y.numpy())
    weight, bias = model.coef_[0, 0], model.intercept_[0]
    return (
        weight,
        bias,
        logistic.cross_entropy(torch.from_numpy(scaled * weight + bias), y).mean().item(),
    )


@pytest.mark.parametrize("seed", range(100))
def test_the_fit_is_that_of_scikit_learn(seed):
    pytest.importorskip("sklearn", reason="scikit-learn is what the fit is held against")
    z, y = problem(seed)
    fit = logistic.fit(z[None], y, l2=L2)
    weight, bias, loss = scikit(z, y)
    deviation = z.std(correction=0).item()
    assert fit.weight.item() * deviation == pytest.approx(weight, abs=1e-6)
    assert fit.bias.item() + fit.weight.item() * z.mean().item() == pytest.approx(bias, abs=1e-6)
    assert fit.loss.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_the_sparse_fit_is_the_dense_one(seed):
    generator = torch.Generator().manual_seed(seed)
    z = (
        torch.randn(40, 200, generator=generator).relu()
        * (torch.rand(40, 200, generator=generator) < 0.3)
        * 10.0 ** (seed % 5 - 2)
    )
    z[0] = 0
    z[1] = 3.0
    y = (torch.rand(200, generator=generator) < 0.4).long()
    latents, rows = z.nonzero(as_tuple=True)
    shuffled = torch.randperm(len(latents), generator=generator)
    dense = logistic.fit(z, y, l2=L2)
    sparse = logistic.fit_sparse(
        latents[shuffled], rows[shuffled], z[latents, rows][shuffled], y, 40, l2=L2
    )
    for one, other in zip(dense, sparse):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_the_probes_that_are_not_finished_are_near_and_the_best_are_exact():
    problems = [problem(seed) for seed in range(0, 60, 6)] + [
        problem(seed) for seed in range(1, 60, 6)
    ]
    y = problems[0][1]
    z = torch.stack([z for z, _ in problems])
    exact, some = logistic.fit(z, y, l2=L2), logistic.fit(z.float(), y, l2=L2, finish=3)
    torch.testing.assert_close(some.loss, exact.loss, rtol=1e-6, atol=1e-6)
    deviation = z.std(dim=1, correction=0)
    torch.testing.assert_close(
        some.weight * deviation, exact.weight * deviation, rtol=1e-4, atol=1e-4
    )
    best = exact.loss.argsort()[:3]
    rounded = logistic.fit(z.float(), y, l2=L2)
    torch.testing.assert_close(some.weight[best], rounded.weight[best], rtol=1e-12, atol=0)


def test_a_latent_without_variance_says_no_more_than_the_label():
    y = torch.tensor([0, 1, 1, 1, 0, 1])
    fit = logistic.fit(torch.tensor([[7.0] * 6, [0.0] * 6, [1e-30] * 6]), y, l2=L2)
    assert fit.weight.tolist() == [0, 0, 0]
    assert fit.bias.tolist() == pytest.approx([math.log(2)] * 3)
    assert fit.loss.tolist() == pytest.approx(
        [-(4 * math.log(2 / 3) + 2 * math.log(1 / 3)) / 6] * 3
    )


def test_a_binary_latent_has_the_conditional_entropy_of_the_label():
    """With next to no penalty the best probe on a 0/1 latent predicts the share of each of its two groups."""
    z = torch.tensor([[1.0] * 40 + [0.0] * 60])
    y = torch.tensor([1] * 30 + [0] * 10 + [1] * 15 + [0] * 45)
    entropy = lambda p: -(p * math.log(p) + (1 - p) * math.log(1 - p))
    expected = 0.4 * entropy(0.75) + 0.6 * entropy(0.25)
    assert logistic.fit(z, y, l2=1e-9).loss.item() == pytest.approx(expected, abs=1e-7)


def test_the_penalty_does_not_depend_on_scale_and_place():
    z, y = problem(1)
    fits = logistic.fit(torch.stack([z, 1000 * z - 5, -z / 1000]), y, l2=0.1)
    assert fits.loss.tolist() == pytest.approx([fits.loss[0].item()] * 3, rel=1e-9)


@given(st.integers(0, 10_000), st.floats(-6, 6), st.booleans())
def test_no_input_ends_in_nan_and_no_fit_is_worse_than_the_label(seed, power, outlier):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (60,), generator=generator)
    y[:2] = torch.tensor([0, 1])
    z = torch.randn(3, 60, generator=generator, dtype=torch.float64) * 10.0**power
    z[0] *= (2 * y - 1).double()
    if outlier:
        z[:, 5] = 10.0 ** (power + 8)
    fit = logistic.fit(z, y, l2=1e-3)
    assert all(torch.isfinite(field).all() for field in fit)
    prior = logistic.cross_entropy(torch.tensor(logistic.log_odds(y)), y.double()).mean()
    assert (fit.loss <= prior + 1e-9).all()


def test_labels_of_one_kind_are_refused():
    for labels, count in ((torch.ones(5), 5), (torch.zeros(5), 0)):
        with pytest.raises(InputError, match=f"rows of both labels, got {count} of 5"):
            logistic.fit(torch.zeros(1, 5), labels, l2=L2)


@pytest.mark.parametrize("rows, width", [(50, 4), (30, 80)])
def test_the_probe_on_all_dimensions_is_that_of_scikit_learn(rows, width):
    linear = pytest.importorskip(
        "sklearn.linear_model", reason="scikit-learn is what the fit is held against"
    )
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator) + 3
    y = (x[:, 0] + torch.randn(rows, generator=generator) > 3).long()
    weight, bias = logistic.fit_dense(x, y, l2=0.05)
    model = linear.LogisticRegression(
        C=1 / (0.05 * rows), solver="lbfgs", tol=1e-10, max_iter=100_000
    ).fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(weight.numpy(), model.coef_[0], atol=1e-5)
    assert bias.item() == pytest.approx(model.intercept_[0], abs=1e-4)


def test_the_penalty_of_noise_is_chosen_large_and_of_a_clear_signal_small():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 100, generator=generator)
    each = torch.arange(200)
    assert logistic.choose_penalty(x, torch.randint(2, (200,), generator=generator), each) >= 1
    assert logistic.choose_penalty(x, (x[:, 0] > 0).long(), each) < 1


def test_the_penalty_is_judged_on_documents_that_the_fit_has_not_seen():
    """Each of 20 documents has a direction and a label of its own: what is learned of some says nothing of the others."""
    generator = torch.Generator().manual_seed(0)
    document = torch.arange(200) // 10
    y = torch.randint(2, (20,), generator=generator)[document]
    x = 5 * torch.eye(40)[document] + 0.01 * torch.randn(200, 40, generator=generator)
    assert logistic.choose_penalty(x, y, document) >= 1
    assert logistic.choose_penalty(x, y, torch.arange(200)) < 1


def test_a_penalty_is_chosen_where_clusters_hold_one_label_each():
    x, y = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 2
    assert logistic.choose_penalty(x, y, y) > 0
