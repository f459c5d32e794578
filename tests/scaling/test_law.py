"""One law: recovered from known points, honest about published ones, and clear about points that do not suffice."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ksparse.errors import InputError
from ksparse.scaling.laws import law as laws
from ksparse.scaling.laws import published, solver


def form_of(law: laws.Law, name: str) -> laws.Candidate:
    return next(each for each in law.candidates if each.form.name == name)


@pytest.fixture(scope="module")
def gpt4() -> laws.Law:
    return laws.fit(published.gpt4(), "nk", draws=100)


@pytest.fixture(scope="module")
def gpt2() -> laws.Law:
    return laws.fit(published.gpt2(), "nk", draws=0)


def test_the_joint_law_fits_the_published_gpt4_points_better_than_the_printed_coefficients(gpt4):
    points = published.gpt4()
    printed = np.log(points["loss"]) - np.log(
        published.eq3(published.EQ3, points["n"], points["k"])
    )
    assert gpt4.form.name == "eq3" and gpt4.log_rms <= 0.0100
    assert np.sqrt((printed**2).mean()) > 0.0135
    assert gpt4.fit.starts == 16 and gpt4.fit.reached > 8


def test_the_published_points_are_said_to_err_in_a_pattern(gpt4):
    assert gpt4.correlation > 0.5 and any(
        "neighbours err alike" in sentence for sentence in gpt4.summary()
    )
    assert any("the points ask for it" in sentence for sentence in gpt4.summary())


def test_on_the_gpt2_points_equation_3_fits_badly_and_the_form_that_fits_is_named(gpt2):
    assert gpt2.log_rms == pytest.approx(0.0253, abs=5e-4)
    assert gpt2.best.form.name == "eq3_free" and gpt2.best.log_rms < 0.008
    assert any(
        "eq3_free" in sentence and "AICc lower by 48" in sentence for sentence in gpt2.summary()
    )
    assert laws.fit(published.gpt2(), "nk", form="best", draws=0).form.name == "eq3_free"


def test_a_form_with_more_coefficients_never_fits_worse(gpt2):
    for inner, outer in (
        ("eq3_no_floor", "eq3"),
        ("eq3", "eq3_bent"),
        ("eq3_bent", "eq3_free"),
        ("eq3_no_floor", "power_each"),
        ("power_each", "power_floor_each"),
    ):
        assert form_of(gpt2, outer).log_rms <= form_of(gpt2, inner).log_rms * 1.001, (inner, outer)


def test_aicc_is_its_formula(gpt2):
    found = form_of(gpt2, "eq3")
    m, p = 25, 7
    assert found.aicc == pytest.approx(
        m * math.log(found.log_rms**2) + 2 * p + 2 * p * (p + 1) / (m - p - 1)
    )


def test_law_json_has_coefficients_with_intervals_points_and_the_error_of_extrapolation(gpt4):
    found = json.loads(json.dumps(gpt4.to_dict(), allow_nan=False))
    assert list(found["coefficients"]) == ["alpha", "b_k", "b_n", "g", "zeta", "eta"]
    for each in found["coefficients"].values():
        assert (
            each["low"] < each["value"] < each["high"]
            and each["bootstrap_low"] < each["bootstrap_high"]
        )
    assert (
        found["law"] == "nk"
        and found["log_rms"] == gpt4.log_rms
        and 0 < found["extrapolation_error"] < 0.03
    )
    assert len(found["points"]) == 45 and found["starts_at_best"] <= found["starts"] == 16
    for point in found["points"]:
        assert point["fitted"] * math.exp(point["residual"]) == pytest.approx(point["loss"])


def test_the_extrapolation_error_is_that_of_a_fit_without_the_largest_n(gpt4):
    points = published.gpt4()
    small = points["n"] < points["n"].max()
    part = laws.fit({name: column[small] for name, column in points.items()}, "nk", draws=0)
    said = np.array([part.predict(n=2**19, k=k).value for k in points["k"][~small]])
    errors = np.abs(said / points["loss"][~small] - 1)
    assert gpt4.extrapolation.error == pytest.approx(
        errors.mean(), rel=1e-3
    ) and gpt4.extrapolation.largest == pytest.approx(errors.max(), rel=1e-3)
    assert gpt4.extrapolation.value == 2**19 and len(gpt4.extrapolation.points) == 5


def test_leaving_one_out_is_fitting_the_others(gpt4):
    fitted, errors = gpt4.fit, []
    for i in range(45):
        rest = np.arange(45) != i
        theta = solver.refit(
            fitted.terms.rows(rest),
            fitted.logs[rest],
            fitted.theta[None],
            weights=np.ones(44),
            delta=fitted.delta,
        )[0]
        errors.append(fitted.logs[i] - fitted.terms.value(theta)[i])
    assert (
        gpt4.leave_one_out == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-5)
        and gpt4.leave_one_out > gpt4.log_rms
    )


def test_a_prediction_is_the_laws_value_with_an_interval_around_it(gpt4):
    found = gpt4.predict(n=65_536, k=32)
    c = {name: each.value for name, each in gpt4.coefficients.items()}
    assert found.value == pytest.approx(
        float(published.eq3(c, np.array([65_536.0]), np.array([32.0]))[0])
    )
    assert found.run_low < found.low < found.value < found.high < found.run_high
    far = gpt4.predict(n=2**24, k=32)
    assert math.log(far.high / far.low) > 2 * math.log(found.high / found.low)


def test_the_law_read_back_from_json_says_the_same(gpt4):
    at = {"n": np.array([3_000.0, 1e6]), "k": np.array([32.0, 100.0])}
    assert np.allclose(laws.evaluate(gpt4.to_dict(), at), gpt4.curve(at))


def n_points(e: float = 0.1, count: int = 9, noise: float = 0.0) -> dict[str, np.ndarray]:
    n = np.geomspace(2**11, 2**19, count)
    return {
        "n": n,
        "loss": (2.5 * n**-0.25 + e)
        * (1 + noise * np.random.default_rng(0).standard_normal(count)),
    }


def test_size_and_compute_laws_have_an_irreducible_term_that_is_not_negative():
    law = laws.fit(n_points(), "n", draws=0)
    assert {name: round(each.value, 3) for name, each in law.coefficients.items()} == {
        "alpha": 2.5,
        "beta": -0.25,
        "e": 0.1,
    }
    bent_down = n_points(e=0.0)
    bent_down["loss"] = bent_down["loss"] * np.exp(-0.002 * np.log(bent_down["n"]) ** 2)
    none = laws.fit(bent_down, "n", draws=0)
    assert none.coefficients["e"].value == none.coefficients["e"].low == 0.0
    assert any("the points do not ask for it" in sentence for sentence in none.summary())
    compute = laws.fit(
        {
            "c": np.geomspace(1e-10, 1e-4, 12),
            "loss": published.L_OF_C["alpha"] * np.geomspace(1e-10, 1e-4, 12) ** -0.084 + 0.09,
        },
        "c",
        draws=0,
    )
    assert (
        compute.coefficients["e"].value == pytest.approx(0.09, rel=1e-3)
        and compute.extrapolation.error < 1e-4
    )


def test_points_of_several_k_have_a_law_each_or_one_exponent_for_all():
    points = published.gpt4()
    each = laws.fit(points, "n", draws=0)
    assert [name for name in each.coefficients if name.startswith("beta")] == [
        f"beta_{k}" for k in (32, 64, 128, 256, 512)
    ]
    tokens = laws.fit(
        {"n": points["n"], "k": points["k"], "tokens": 1e4 * points["k"] * points["n"] ** 0.6},
        "tokens",
        draws=0,
    )
    assert tokens.coefficients["beta"].value == pytest.approx(0.6) and tokens.coefficients[
        "alpha_64"
    ].value == pytest.approx(64e4)
    rates = laws.fit({"n": n_points()["n"], "lr": 0.1 * n_points()["n"] ** -0.5}, "lr", draws=0)
    assert list(rates.coefficients) == ["alpha", "beta"] and rates.coefficients[
        "beta"
    ].value == pytest.approx(-0.5)


def test_rows_that_agree_in_the_variables_are_seeds_of_one_point():
    points = n_points(noise=0.002)
    seeds = {
        "n": np.repeat(points["n"], 3),
        "loss": (points["loss"][:, None] * np.array([0.99, 1.0, 1 / 0.99])).ravel(),
    }
    law = laws.fit(seeds, "n", draws=0)
    assert len(law.cells) == 9 and law.cells.seed_scatter == pytest.approx(0.01, rel=0.02)
    once = laws.fit(points, "n", draws=0)
    assert law.coefficients["beta"].value == pytest.approx(
        once.coefficients["beta"].value, abs=1e-6
    )
    assert law.coefficients["beta"].low == pytest.approx(once.coefficients["beta"].low, rel=1e-3)
    assert [point["runs"] for point in law.to_dict()["points"]] == [3] * 9


def test_points_of_one_run_count_together_as_one():
    c = np.geomspace(1e10, 1e14, 60)
    points = {
        "c": c,
        "loss": (30 * c**-0.2 + 0.1) * (1 + 0.01 * np.random.default_rng(0).standard_normal(60)),
    }
    alone = laws.fit(points, "c", draws=0)
    runs = laws.fit(points | {"run": np.repeat([f"r{i}" for i in range(10)], 6)}, "c", draws=0)
    assert runs.fit.freedom == pytest.approx(7) and alone.fit.freedom == 57
    assert runs.coefficients["beta"].high - runs.coefficients["beta"].low > 1.5 * (
        alone.coefficients["beta"].high - alone.coefficients["beta"].low
    )


@pytest.mark.parametrize(
    "law, points, message",
    [
        (
            "nk",
            {"n": [1, 2, 4], "k": [8, 8, 8], "loss": [3, 2, 1]},
            r"too few points for L\(N, k\): eq3 has 6 coefficients and needs at least 7 different points; there are 3 \(3 n, 1 k\); with a single k the law is L\(N\): --law n",
        ),
        (
            "nk",
            {"n": [1, 2, 4, 8] * 2, "k": [8] * 8, "loss": [4, 3, 2, 1] * 2},
            "with a single k the law is L",
        ),
        (
            "nk",
            {"n": [1, 2] * 4, "k": [1, 1, 2, 2, 4, 4, 8, 8], "loss": range(1, 9)},
            "eq3 needs at least 3 n to tell an irreducible term from a power at each k",
        ),
        (
            "n",
            {"n": [1, 2, 4], "loss": [3, 2, 1]},
            "power_floor has 3 coefficients and needs at least 4 different points; there are 3.*ask for another form",
        ),
        ("n", {"n": [5], "loss": [3]}, "there is 1 .1 n.; add points"),
        (
            "tokens",
            {"n": [5, 5, 5], "tokens": [3, 3, 3]},
            "power has 2 coefficients and needs at least 3 different points; there is 1",
        ),
        (
            "n",
            {"n": [1, 2, 4, 8], "loss": [3, 2, 1, math.nan]},
            "loss of the law n has values that are not above 0",
        ),
        (
            "n",
            {"n": [1, 2, 4, 8], "loss": [3, 2, 1, -1]},
            "loss of the law n has values that are not above 0",
        ),
        ("n", {"n": [1, 2, 4, 8]}, "the law n needs n, loss; 'loss' is missing"),
        (
            "n",
            {"n": [1, 2], "loss": [1]},
            "the columns of a law have one length; got {'n': 2, 'loss': 1}",
        ),
        ("tokns", {}, "there is no law 'tokns'; did you mean 'tokens'?"),
        ("zzz", {}, "there is no law 'zzz'; there are nk, n, c"),
    ],
)
def test_points_that_do_not_suffice_say_which_would(law, points, message):
    with pytest.raises(InputError, match=message):
        laws.fit(
            {name: np.array(list(column), float) for name, column in points.items()}, law, draws=0
        )


def test_a_form_that_is_not_there_lists_those_that_are():
    with pytest.raises(
        InputError,
        match="the law n has no form 'cubic' for these points; there are paper, best, power_floor, power",
    ):
        laws.fit(n_points(), "n", form="cubic", draws=0)


@pytest.mark.parametrize(
    "at, message",
    [
        ({"n": 5}, "the law nk is predicted at n=, k=; 'k' is missing"),
        ({"n": 5, "k": 3, "lm": "x"}, "it does not depend on 'lm'"),
        ({"n": -5, "k": 3}, "n=-5 is not a number above 0"),
        ({"n": math.inf, "k": 3}, "n=inf is not"),
        ({"n": 10**400, "k": 3}, "n is larger than any float"),
    ],
)
def test_a_prediction_without_its_place_is_refused(gpt4, at, message):
    with pytest.raises(InputError, match=message):
        gpt4.predict(**at)


def test_a_form_of_each_k_says_nothing_of_a_k_in_between():
    law = laws.fit(published.gpt2(), "n", draws=0)
    assert law.predict(n=8_192, k=32).value == pytest.approx(0.184, rel=0.02)
    with pytest.raises(
        InputError, match="knows nothing of k=48; its points have 8, 16, 32, 64, 128"
    ):
        law.predict(n=8_192, k=48)


def test_a_law_of_one_k_says_nothing_of_another():
    points = n_points() | {"k": np.full(9, 32)}
    law = laws.fit(points, "n", draws=0)
    assert law.predict(n=5_000, k=32).value > 0
    with pytest.raises(InputError, match="knows nothing of k=64; its points have 32"):
        law.predict(n=5_000, k=64)


def test_the_cost_of_a_fit_with_unequal_weights_is_that_which_intervals_compare_with():
    points = n_points(noise=0.01)
    points["loss"][3] *= 1.3
    columns = {
        name: np.concatenate([column, column[:3], column[:3]]) for name, column in points.items()
    }
    fitted = laws.fit(columns, "n", draws=0).fit
    assert fitted.weights.max() > 2 * fitted.weights.min()
    assert fitted.cost == pytest.approx(
        float(solver.loss(fitted.residuals, fitted.weights, fitted.delta)), rel=1e-9
    )
