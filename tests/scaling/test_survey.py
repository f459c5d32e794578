"""A sweep's folder: the laws behind made-up runs come back, and what the points do not allow is said with the runs that would add it."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from ksparse.errors import InputError
from ksparse.scaling.laws import survey as surveys
from ksparse.scaling.laws.survey import Survey, best_rates, crossings, fit_sweep, frontier_of

from .conftest import LMS, LR_EXPONENT, MAIN, TOKENS_EXPONENT, build, cost, limit, rows_of, write


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Survey:
    return fit_sweep(build(tmp_path_factory.mktemp("sweep"), lms=tuple(LMS)), draws=50)


def test_a_whole_sweep_gives_every_law(whole):
    assert list(whole.laws) == list(surveys.LAWS) and whole.absent == {}
    found = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert found["runs"] == 6 * 4 * 3 + 2 * 6 and set(found["laws"]) == set(surveys.LAWS)
    assert found["subject"] == {"lm": MAIN, "activation": "topk", "k of L_s(N)": "32"}


def test_the_laws_behind_the_runs_come_back(whole):
    assert whole.laws["nk"].predict(n=4_096, k=32).value == pytest.approx(
        limit(4_096, 32), rel=0.005
    )
    assert whole.laws["nk"].predict(n=65_536, k=32).value == pytest.approx(
        limit(65_536, 32), rel=0.03
    )
    for name, exponent in (("tokens", TOKENS_EXPONENT), ("lr", LR_EXPONENT)):
        beta = whole.laws[name].coefficients["beta"]
        assert (
            beta.value == pytest.approx(exponent, abs=0.05)
            and beta.low < exponent + 0.02
            and beta.high > exponent - 0.02
        )
    assert whole.laws["s"].predict(n=2_048, lm="pylm/7.6m").value == pytest.approx(
        limit(2_048, 32, "pylm/7.6m"), rel=0.01
    )
    assert (
        whole.laws["nk"].extrapolation.error < 0.03
        and whole.laws["nk"].extrapolation.value == 16_384
    )


def test_runs_count_at_their_best_learning_rate(whole):
    points = whole.laws["nk"].to_dict()["points"]
    assert len(points) == 24 and all(point["runs"] == 1 for point in points)
    assert all(
        point["loss"] == pytest.approx(limit(point["n"], point["k"]), rel=0.012) for point in points
    )


def test_the_frontier_is_what_no_other_point_beats(whole):
    for k in (8, 64):
        of = whole.frontier["k"] == k
        assert (np.diff(whole.frontier["c"][of]) > 0).all() and (
            np.diff(whole.frontier["loss"][of]) < 0
        ).all()
    curves = {
        "k": np.ones(4),
        "c": np.array([1.0, 2, 3, 4]),
        "loss": np.array([0.5, 0.6, 0.4, 0.4]),
        "n": np.array([1.0, 2, 1, 2]),
        "run": np.array(list("abab")),
    }
    assert frontier_of(curves)["c"].tolist() == [1, 3]


def test_the_best_n_changes_between_the_last_point_of_one_and_the_first_of_the_next():
    frontier = {"k": np.ones(4), "c": np.array([1.0, 4, 16, 64]), "n": np.array([8.0, 8, 32, 32])}
    found = crossings(frontier)
    assert found["c"].tolist() == pytest.approx([8.0]) and found["n"].tolist() == pytest.approx(
        [16.0]
    )
    back_and_forth = frontier | {"n": np.array([8.0, 32, 8, 32])}
    assert crossings(back_and_forth)["c"].tolist() == pytest.approx([8.0])


def test_the_best_rate_is_the_vertex_of_a_parabola_in_logs_and_not_an_edge():
    lr = np.array([1e-3, 2e-3, 4e-3])
    rows = {
        "n": np.full(3, 64.0),
        "k": np.full(3, 8.0),
        "lr": lr,
        "loss": np.exp(0.3 * np.log(lr / 2.5e-3) ** 2),
    }
    assert best_rates(rows, [])["lr"].tolist() == pytest.approx([2.5e-3])
    notes: list[str] = []
    assert best_rates(rows | {"loss": np.array([1.0, 2, 3])}, notes) == {}
    assert notes == [
        "The best learning rate is at the edge of those tried for n = 64, k = 8: rates beyond it would place it."
    ]


def test_a_budget_is_answered_with_size_tokens_and_loss(whole):
    line = whole.budgeted(1e13, {"k": 32})
    assert (
        len(line) == 1
        and "1e+13 FLOPs at k = 32: n = " in line[0]
        and "tokens = " in line[0]
        and "loss 0." in line[0]
    )
    n = whole.laws["optimal"].predict(c=1e13, k=32).value
    assert cost(round(n), 32) * 0.95 < whole.cost(n, 32) < cost(round(n), 32) * 1.05
    assert len(whole.budgeted(1e13, {})) == 4 and whole.budgeted(0, {}) == []
    losses = {
        size: min(
            row["loss"]
            for row in rows_of(
                size,
                32,
                lr=3e-3 * (size / 2048) ** -0.5,
                seed=0,
                lm=MAIN,
                noise=np.random.default_rng(0),
            )[1]
            if row["flops"] <= 1e13
        )
        for size in (512, 2_048, 8_192, 16_384)
    }
    assert min(losses, key=losses.get) in (8_192, 16_384) and n > 4_096


@pytest.mark.parametrize(
    "flops, at, message",
    [
        (-1.0, {}, "--budget is -1.0"),
        (1e12, {"k": 9.0}, "no curves at k=9; it has them at 8, 16, 32, 64"),
    ],
)
def test_a_budget_that_cannot_be_answered_says_why(whole, flops, at, message):
    with pytest.raises(InputError, match=message):
        whole.budgeted(flops, at)


def test_predictions_are_those_of_every_law_that_the_place_decides(whole):
    said = whole.predictions({"n": 65_536.0, "k": 32.0})
    assert [line.split(" at ")[0] for line in said] == ["loss", "tokens", "lr"]
    assert (
        len(whole.predictions({"n": 65_536.0, "k": 48.0})) == 1
    )  # tokens and lr have prefactors of the k that there are
    with pytest.raises(InputError, match="no law of this sweep is predicted at k alone"):
        whole.predictions({"k": 32.0})


def test_one_k_one_rate_and_no_curves_leave_laws_out_and_say_what_would_add_them(make_sweep):
    found = fit_sweep(make_sweep(ks=[16], rates=(1.0,), curves=False), draws=0)
    assert set(found.laws) == {"n", "tokens"} and list(found.laws["n"].coefficients) == [
        "alpha",
        "beta",
        "e",
    ]
    assert "runs at another k would add it" in found.absent["nk"]
    assert "runs of at least three rates at each n would add it" in found.absent["lr"]
    assert "the same n and k on another LM would add it" in found.absent["s"]
    assert "runs with curves.csv would add it" in found.absent["c"]
    with pytest.raises(
        InputError, match="no compute-optimal size can be said: No law Compute-optimal n"
    ):
        found.budgeted(1e12, {})


def test_runs_that_did_not_converge_count_for_compute_and_rate_alone(make_sweep):
    def change(row):
        return row | (
            {"converged": "false", "tokens_to_convergence": ""} if row["n"] == 512 else {}
        )

    found = fit_sweep(make_sweep(change=change), draws=0)
    assert (
        min(found.laws["nk"].cells.columns["n"]) == 1_024
        and min(found.laws["lr"].cells.columns["n"]) == 512
    )
    assert (
        "12 of 72 runs did not converge and count only for L(C) and the learning rate."
        in found.notes
    )


def test_where_too_few_converged_to_fit_alone_all_runs_count_and_the_note_says_so(make_sweep):
    def change(row):
        return row | (
            {"converged": "false", "tokens_to_convergence": ""} if row["n"] > 1_024 else {}
        )

    found = fit_sweep(make_sweep(rates=(1.0,), change=change), draws=0)
    assert len(found.laws["nk"].cells) == 24 and len(found.laws["n"].cells) == 24
    assert max(found.laws["tokens"].cells.columns["n"]) == 1_024
    assert any(
        note.startswith("8 of 24 runs converged, too few to fit alone") for note in found.notes
    )


def test_where_none_converged_the_laws_are_of_the_budgets_end_and_say_so(make_sweep):
    found = fit_sweep(
        make_sweep(
            rates=(1.0,),
            change=lambda row: row | {"converged": "false", "tokens_to_convergence": ""},
        ),
        draws=0,
    )
    assert len(found.laws["nk"].cells) == 24 and any(
        "No run has converged" in note for note in found.notes
    )
    assert "runs that train to convergence would add it" in found.absent["tokens"]


def test_runs_without_a_finite_loss_are_left_out_by_name_and_negative_ones_refused(make_sweep):
    folder = make_sweep(
        rates=(1.0,),
        change=lambda row: row | ({"loss": "nan"} if row["n"] == 512 and row["k"] == 8 else {}),
    )
    found = fit_sweep(folder, draws=0)
    assert (
        len(found.laws["nk"].cells) == 23
        and "1 of 24 runs have no finite loss and are left out: pylm-1.9m-512-8-" in found.notes[0]
    )
    with (folder / "points.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    write(folder / "points.csv", [row | {"loss": "-0.5"} for row in rows])
    with pytest.raises(
        InputError, match="points.csv: the loss of pylm-1.9m-512-8-.* is -0.5; a loss is above 0"
    ):
        fit_sweep(folder, draws=0)


def test_seeds_are_put_together_and_other_activations_left_out(make_sweep):
    found = fit_sweep(
        make_sweep(
            rates=(1.0,),
            ks=[8, 16],
            seeds=3,
            change=lambda row: row | ({"activation": "relu"} if row["seed"] == 2 else {}),
        ),
        draws=0,
    )
    assert {point["runs"] for point in found.laws["nk"].to_dict()["points"]} == {2}
    assert found.laws["nk"].cells.seed_scatter == pytest.approx(0.003, rel=0.6)
    assert any("with activation topk; those with relu are left out" in note for note in found.notes)


def test_a_folder_without_points_or_with_too_few_says_so(tmp_path, make_sweep):
    with pytest.raises(InputError, match="holds no points.csv; `ksparse sweep` writes it"):
        fit_sweep(tmp_path)
    with pytest.raises(
        InputError,
        match="allows no law: No law L.N, k.: all runs have one k; .*needs at least 4 different points; there are 2",
    ):
        fit_sweep(make_sweep(sizes=[512, 1024], ks=[8], rates=(1.0,)), draws=0)
