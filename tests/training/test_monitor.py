"""A gradient out of the ordinary and latents that die call for attention: once, in the log and in alarms.jsonl, and nothing else changes."""

import json
import logging

import pytest

from ksparse.config import Recipe, RunConfig, from_dict
from ksparse.training.monitor import QUIET, Monitor
from ksparse.training.steps.explicit import ExplicitStep
from ksparse.training.train import train


def watch(**options) -> Monitor:
    return Monitor(Recipe(run=RunConfig(**options)))


def names(found):
    return [row["alarm"] for row in found]


def test_a_gradient_ten_times_its_running_median_calls_and_one_nine_times_does_not():
    alarms = watch()
    for step in range(1, 41):
        assert alarms.see(step, step, 2.0 if step % 3 else 1.0) == []
    assert alarms.see(41, 41, 2.0 * 9.9) == []
    [row] = alarms.see(42, 42, 2.0 * 10.1)
    assert (
        row["alarm"] == "grad_norm"
        and row["step"] == 42
        and row["value"] == 20.2
        and row["limit"] == 20
        and row["kept_back"] == 0
    )
    assert "times its usual" in row["says"]


def test_a_gradient_that_rises_slowly_does_not_call():
    alarms = watch()
    assert all(alarms.see(step, step, 1.01**step) == [] for step in range(1, 1000))


def test_the_first_steps_have_no_usual_norm_and_a_norm_that_is_not_finite_is_passed_over():
    alarms = watch()
    assert all(
        alarms.see(step, step, norm) == []
        for step, norm in enumerate([1.0, 1e6, float("nan"), None, float("inf"), 1.0], 1)
    )
    assert list(alarms.norms) == [1.0, 1e6, 1.0]


def test_alarms_of_a_kind_are_a_hundred_steps_apart_and_count_those_kept_back():
    alarms, called = watch(), []
    for step in range(1, 600):
        called += alarms.see(step, step, 1.0 if step < 50 or step % 7 else 100.0)
    assert [row["step"] for row in called] == [56, 161, 266, 371, 476, 581]
    assert [row["kept_back"] for row in called] == [0, *[14] * 5]


def test_dead_latents_above_the_limit_call_once_and_again_after_they_had_come_below():
    alarms = watch(alarm_dead_growth=0.0)
    first = alarms.from_tokens
    shares = [0.4, 0.51, 0.6, 0.7, 0.4, 0.55]
    assert [
        names(alarms.see(QUIET * i, first + i, 1.0, share)) for i, share in enumerate(shares, 1)
    ] == [[], ["dead"], [], [], [], ["dead"]]


def test_dead_latents_that_grow_call_each_time_they_have_grown_by_the_limit():
    alarms = watch(alarm_dead=0.0)
    shares = [0.05, 0.02, 0.1, 0.21, 0.23, 0.4, 0.44]
    assert [
        names(alarms.see(QUIET * i, alarms.from_tokens + i, 1.0, share))
        for i, share in enumerate(shares, 1)
    ] == [[], [], [], [], ["dead_growth"], [], ["dead_growth"]]


def test_dead_latents_do_not_call_while_the_count_begins():
    alarms = watch()
    assert alarms.see(1, alarms.from_tokens - 1, 1.0, 0.99) == []
    assert names(alarms.see(2, alarms.from_tokens, 1.0, 0.99)) == ["dead"]


def test_zero_turns_each_alarm_off():
    alarms = watch(alarm_grad_norm=0.0, alarm_dead=0.0, alarm_dead_growth=0.0)
    assert all(
        alarms.see(step, 10**9, 1.0 if step < 40 else 1e9, 0.01 * (step % 99)) == []
        for step in range(1, 200)
    )


def test_a_run_that_goes_on_knows_what_was_usual():
    alarms = Monitor(
        Recipe(),
        [{"step": step, "tokens": step, "grad_norm": 1.0, "dead": None} for step in range(1, 31)],
    )
    assert names(alarms.see(31, 31, 11.0)) == ["grad_norm"]


def plant(monkeypatch, *, at, times):
    """Let the gradient's norm of step `at` be reported `times` too large."""
    own, calls = ExplicitStep.constrain_gradient, []

    def planted(optimizer):
        calls.append(1)
        return own(optimizer) * (times if len(calls) == at else 1)

    monkeypatch.setattr(ExplicitStep, "constrain_gradient", planted)


def test_a_planted_gradient_is_in_the_log_and_in_alarms_and_a_resumed_run_forgets_those_of_steps_it_takes_again(
    small_recipe, tmp_path, monkeypatch, caplog
):
    recipe = small_recipe(
        {"tokens": 40 * 64, "run.log_every": 10, "run.save_every": 20, "run.alarm_dead": 0.01}
    )
    plant(monkeypatch, at=33, times=1e4)
    with caplog.at_level(logging.WARNING, "ksparse"):
        run = train(recipe, tmp_path / "run")
    found = {row["alarm"]: row for row in run.alarms()}
    assert (
        found["grad_norm"]["step"] == 33
        and found["dead"]["step"] in (10, 20, 30, 40)
        and found["dead"]["value"] > 0.01
    )
    assert (
        "step 33: the gradient's norm is" in caplog.text
        and "latents are dead, more than 1%" in caplog.text
    )
    for line in run.alarms_file.read_text().splitlines():
        assert set(json.loads(line)) == {
            "step",
            "tokens",
            "alarm",
            "value",
            "limit",
            "says",
            "kept_back",
        }
    run.drop_lines_after(32)
    assert "grad_norm" not in {row["alarm"] for row in run.alarms()} and {
        row["alarm"] for row in run.alarms()
    } >= {"dead"}


def test_alarms_change_nothing_of_the_result(small_recipe, tmp_path):
    quiet, loud = (
        train(
            small_recipe({"run.alarm_grad_norm": norm, "run.alarm_dead": dead}), tmp_path / name
        ).checkpoints()[-1]
        for name, norm, dead in (("quiet", 0.0, 0.0), ("loud", 0.01, 0.001))
    )
    assert (quiet / "optim.safetensors").read_bytes() == (loud / "optim.safetensors").read_bytes()


@pytest.mark.parametrize(
    "key, value", [("alarm_dead", 1.0), ("alarm_dead_growth", -0.1), ("alarm_grad_norm", -1.0)]
)
def test_a_limit_that_cannot_be_is_refused(key, value):
    from ksparse.errors import InputError

    with pytest.raises(InputError, match=f"run.{key} is {value}"):
        from_dict({"run": {key: value}})
