"""The solver: many fits at once are what scipy finds, derivatives are right, intervals hold what they promise, outliers do not rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from ksparse.scaling.laws import published, solver
from ksparse.scaling.laws.forms import forms
from ksparse.scaling.laws.solver import Terms


def eq3() -> tuple[Terms, np.ndarray, np.ndarray]:
    """Return the columns, the true coefficients and the log losses of equation 3 on the grid of the GPT-4 points."""
    points = published.gpt4()
    form = forms("nk", points)[0]
    return (
        form.terms(points),
        np.array([published.EQ3[each.name] for each in form.coefficients]),
        np.log(published.eq3(published.EQ3, points["n"], points["k"])),
    )


def power(x: np.ndarray) -> Terms:
    one = np.ones_like(x)
    return Terms(np.stack([one, np.log(x)], 1), one[:, None])


def noisy(logs: np.ndarray, seed: int, noise: float = 0.01) -> np.ndarray:
    return logs + np.log1p(noise * np.random.default_rng(seed).standard_normal(len(logs)))


def test_the_value_is_equation_3_and_the_slopes_are_its_derivatives():
    terms, theta, logs = eq3()
    value, slopes = terms.slopes(theta)
    assert np.allclose(value, logs, atol=1e-12) and np.array_equal(value, terms.value(theta))
    for i in range(len(theta)):
        step = 1e-6 * np.eye(len(theta))[i]
        assert np.allclose(
            slopes[:, i], (terms.value(theta + step) - terms.value(theta - step)) / 2e-6, atol=1e-7
        )


def test_points_without_noise_give_back_their_coefficients():
    terms, theta, logs = eq3()
    found = solver.fit(terms, logs)
    assert np.allclose(found.theta, theta, atol=1e-4) and found.reached > 4


def test_many_fits_at_once_are_those_of_scipy():
    """`refit` is the fast copy, scipy's least squares the definition: with weights, Huber's loss, and a coefficient held."""
    terms, theta, logs = eq3()
    random = np.random.default_rng(1)
    weights, data = (
        random.integers(0, 3, (4, len(logs))).astype(float),
        np.stack([noisy(logs, seed, 0.02) for seed in range(4)]),
    )
    held = np.zeros((4, 6), bool)
    held[2, 3] = held[3, 5] = True
    start = np.tile(theta, (4, 1))
    start[held] += 0.005
    for delta in (0.01, math.inf):
        found = solver.refit(terms, data, start, weights=weights, delta=delta, held=held)
        for i in range(4):
            free = ~held[i]

            def residuals(some: np.ndarray) -> np.ndarray:
                full = start[i].copy()
                full[free] = some
                return terms.value(full) - data[i]

            def loss(z: np.ndarray) -> np.ndarray:  # scipy's has one weight for all
                size, near = np.sqrt(z), np.minimum(np.sqrt(z), delta)
                with np.errstate(divide="ignore"):
                    slope = np.where(size > near, near / np.maximum(size, 1e-300), 1.0)
                return np.stack(
                    [
                        weights[i] * 2 * near * (size - near / 2),
                        weights[i] * slope,
                        np.zeros_like(z),
                    ]
                )

            expected = optimize.least_squares(
                residuals,
                start[i][free],
                loss=loss,
                x_scale="jac",
                ftol=1e-15,
                xtol=1e-15,
                gtol=1e-15,
                max_nfev=5000,
            )
            costs = [
                float(solver.loss(residuals(each), weights[i], delta))
                for each in (found[i][free], expected.x)
            ]
            assert costs[0] <= costs[1] * (1 + 1e-7)
            assert np.array_equal(found[i][held[i]], start[i][held[i]])


def test_an_outlier_hardly_moves_the_fit():
    terms, theta, logs = eq3()
    clean, spoilt = noisy(logs, 3), noisy(logs, 3)
    spoilt[20] += 1.0
    plain = solver._polish(terms, spoilt, np.ones(45), theta, math.inf).x
    moved = [
        np.abs(terms.value(each) - terms.value(solver.fit(terms, clean).theta)).max()
        for each in (solver.fit(terms, spoilt).theta, plain)
    ]
    assert moved[0] < moved[1] / 5, moved


CASES = {
    "eq3": lambda: eq3(),
    "power and floor": lambda: (
        power(x := np.geomspace(2**11, 2**19, 9)),
        np.array([1.0, -0.25, -1.8]),
        np.log(math.e * x**-0.25 + math.exp(-1.8)),
    ),
    "compute": lambda: (
        power(x := np.geomspace(3.6e-11, 4e-4, 12)),
        np.log([0.056, math.exp(-0.084), 0.09]),
        np.log(0.056 * x**-0.084 + 0.09),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_coefficient_lies_in_its_interval_in_nine_trials_of_ten(name):
    terms, theta, logs = CASES[name]()
    trials = 50
    inside, width = np.zeros(len(theta)), []
    for seed in range(trials):
        found = solver.fit(terms, noisy(logs, seed))
        ends = np.array(solver.intervals(found))
        inside += (ends[:, 0] <= theta) & (theta <= ends[:, 1])
        width.append(ends[:, 1] - ends[:, 0])
    assert (inside >= 0.9 * trials).all(), inside
    scatter = solver.quantile(found, 0.95) * np.sqrt(
        np.diag(solver.covariance(solver.fit(terms, noisy(logs, 0))))
    )
    assert (np.median(width, 0) < 4 * scatter).all()  # twice the linear width at most


def test_an_interval_ends_where_the_loss_has_risen_to_the_bar():
    terms, theta, logs = eq3()
    found = solver.fit(terms, noisy(logs, 5))
    low, high = solver.intervals(found)[1]
    rise = []
    for value in (low, high):
        held = np.arange(6) == 1
        start = found.theta.copy()
        start[1] = value
        end = solver.refit(
            terms,
            found.logs,
            start[None],
            weights=found.weights,
            delta=found.delta,
            held=held[None],
        )[0]
        rise.append(
            float(solver.loss(terms.value(end) - found.logs, found.weights, found.delta))
            - found.cost
        )
    inside, variance = solver._psi(found.residuals, found)
    assert np.allclose(rise, solver.quantile(found, 0.95) ** 2 * variance / (2 * inside), rtol=0.02)


def test_without_an_irreducible_term_in_the_data_its_interval_reaches_down_to_nothing():
    x = np.geomspace(2**11, 2**19, 9)
    terms = power(x)
    for seed in range(2):
        logs = noisy(np.log(1.03 * x**-0.04), seed)
        found = solver.fit(terms, logs)
        low, high = solver.intervals(found)[2]
        assert (
            low == -math.inf and math.log(0.05) < high < logs[-1]
        )  # above it there would be no room for a power


def test_more_independent_points_make_the_interval_narrower_and_copies_do_not():
    """Weights sum to the number of measurements: nine points said four times over, each with a quarter of the weight, are nine points."""
    x = np.geomspace(2**11, 2**19, 9)
    logs = noisy(np.log(2 * x**-0.25 + 0.1), 0)
    once = solver.fit(power(x), logs)
    copies = solver.fit(power(np.tile(x, 4)), np.tile(logs, 4), weights=np.full(36, 0.25))
    assert copies.freedom == pytest.approx(6) and once.freedom == 6
    assert np.allclose(solver.intervals(copies), solver.intervals(once), rtol=0.02)


def test_resampling_whole_clusters_spreads_wider_than_resampling_copies():
    x = np.geomspace(2**11, 2**19, 9)
    logs = noisy(np.log(2 * x**-0.25 + 0.1), 0)
    copies = solver.fit(power(np.tile(x, 4)), np.tile(logs, 4), weights=np.full(36, 0.25))
    spread = [
        np.std(solver.resampled(copies, 200, clusters=clusters)[:, 1])
        for clusters in (np.tile(np.arange(9), 4), None)
    ]
    assert spread[0] > 1.5 * spread[1]


@pytest.mark.parametrize("kind", ["pairs", "residuals", "wild"])
def test_the_bootstrap_is_the_same_with_the_same_seed(kind):
    terms, _, logs = eq3()
    found = solver.fit(terms, noisy(logs, 1))
    first, second = (solver.resampled(found, 20, seed=4, kind=kind) for _ in range(2))
    assert np.array_equal(first, second) and first.std(0).min() > 0


def test_predictions_hold_the_truth_in_nine_trials_of_ten():
    points = published.gpt4()
    form = forms("nk", points)[0]
    terms, theta, logs = eq3()
    at = form.terms(
        {"n": np.array([48_000.0, 2**20]), "k": np.array([90.0, 100.0])}
    )  # between the points, and beyond them
    inside = np.zeros(2)
    for seed in range(40):
        low, high = solver.interval_at(solver.fit(terms, noisy(logs, seed)), at)
        inside += (low <= at.value(theta)) & (at.value(theta) <= high)
    assert (inside >= 36).all(), inside
