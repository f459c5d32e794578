"""Progress: who is told, and how long the rest takes. The clock is a number that tests move."""

import contextvars
import io
import sys
import threading

import pytest

from ksparse import progress
from ksparse.display import ProgressBar
from ksparse.progress import Expected, Forecast, Stage


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def take(self, seconds):
        self.now += seconds


@pytest.fixture
def clock():
    return Clock()


# ---- who is told


def test_a_report_reaches_the_nearest_observer_alone():
    inner, outer = [], []
    with progress.observed(lambda *report: outer.append(report)):
        with progress.observed(lambda *report: inner.append(report)):
            progress.report("reading", 1, 2)
        with progress.observed(progress.no_progress):
            progress.report("fitting", 0, 3)
    progress.report("nobody hears this")
    assert (inner, outer) == ([("reading", 1, 2)], [("fitting", 0, 3)])


def test_stages_nest_and_are_named_in_reports():
    heard = []
    with (
        progress.observed(lambda what, done, total: heard.append(what)),
        progress.stage("evaluating a"),
    ):
        with progress.stage("n2g", 3, 6):
            progress.report("suffixes")
        progress.report("reading")
    assert heard == ["3 of 6: evaluating a: n2g: suffixes", "evaluating a: reading"]


def test_expectations_are_named_like_the_reports_of_their_stage():
    forecast = Forecast()

    class Bar(progress.Observer):
        def expect(self, parts):
            forecast.expect(parts)

        def report(self, what, done, total, stage=Stage()):
            forecast.report(stage.key(what), done, total)

    with progress.observed(Bar()), progress.stage("outer"):
        progress.expect({"n2g: suffixes": Expected(1.0)})
        with progress.stage("n2g", 1, 1):
            progress.report("suffixes", 4, 4)
    assert forecast.seconds_left() == 0.0


def test_a_thread_that_is_given_the_context_reports_to_the_same_observer():
    heard = []
    with progress.observed(lambda *report: heard.append(report)):
        thread = threading.Thread(
            target=contextvars.copy_context().run, args=(progress.report, "filling", 1, 2)
        )
        thread.start()
        thread.join()
    assert heard == [("filling", 1, 2)]


# ---- how long it takes


def test_without_expectations_the_estimate_is_of_the_part_under_way(clock):
    forecast = Forecast(clock)
    assert forecast.seconds_left() is None
    forecast.report("loading", 0, 0)
    clock.take(60)
    forecast.report("reading", 0, 10)
    assert forecast.seconds_left() is None
    clock.take(2)
    forecast.report("reading", 4, 10)
    assert forecast.seconds_left() == pytest.approx(3.0)
    assert not forecast.is_overall


def test_parts_that_take_turns_are_estimated_from_whole_blocks(clock):
    """The LM computes blocks of 40 rows at 2 s a row, 8 steps of 5 tokens take 1 s each."""
    forecast, blocks = Forecast(clock), 10
    forecast.expect({"LM": Expected(4.0, 40 * blocks), "steps": Expected(1.0, 40 * blocks)})
    truth = (80.0 + 8.0) * blocks
    forecast.report("steps", 0, 40 * blocks)
    for block in range(blocks):
        forecast.report("LM", 0, 40)
        for rows in range(10, 41, 10):
            clock.take(20)
            forecast.report("LM", rows, 40)
            if block:
                assert forecast.seconds_left() == pytest.approx(truth - (clock.now - 100))
        for step in range(1, 9):
            clock.take(1)
            forecast.report("steps", 40 * block + 5 * step, 40 * blocks)
            assert forecast.seconds_left() == pytest.approx(truth - (clock.now - 100))
    assert forecast.seconds_left() == 0.0


def test_a_part_that_has_not_begun_is_estimated_from_its_work_and_its_kind(clock):
    forecast = Forecast(clock)
    forecast.expect(
        {
            "pass 1: reading": Expected(100.0, 10),
            "n2g: suffixes": Expected(10.0),
            "explained: suffixes": Expected(30.0),
            "explained: counting": Expected(0.0, 0, 7.0),
        }
    )
    forecast.report("pass 1: reading", 0, 10)
    clock.take(50)
    forecast.report("pass 1: reading", 10, 10)
    assert forecast.seconds_left() == pytest.approx(0.5 * 40 + 7)
    forecast.report("n2g: suffixes", 0, 2)
    clock.take(20)  # four times as long as its work says
    forecast.report("n2g: suffixes", 2, 2)
    assert forecast.seconds_left() == pytest.approx(2 * 30 + 7)


def test_a_part_of_two_rounds_is_half_done_after_the_first(clock):
    forecast = Forecast(clock)
    forecast.expect({"fitting": Expected(1.0, rounds=2)})
    for expected in (40.0, 0.0):
        forecast.report("fitting", 0, 10)
        clock.take(40)
        forecast.report("fitting", 10, 10)
        assert forecast.seconds_left() == pytest.approx(expected)


def test_a_stage_that_ends_early_leaves_nothing_to_wait_for(clock):
    forecast = Forecast(clock)
    forecast.expect({"n2g: a": Expected(1.0, 10), "n2g: b": Expected(1.0), "x: a": Expected(2.0)})
    forecast.report("n2g: a", 0, 10)
    clock.take(3)
    forecast.report("n2g: a", 3, 10)
    forecast.finish("n2g: ")
    assert forecast.seconds_left() == pytest.approx(20.0)


def test_a_resumed_part_counts_only_what_is_done_since(clock):
    forecast = Forecast(clock)
    forecast.expect({"steps": Expected(1.0, 1000)})
    forecast.report("steps", 900, 1000)
    clock.take(5)
    forecast.report("steps", 950, 1000)
    assert forecast.seconds_left() == pytest.approx(5.0)


# ---- what is shown


@pytest.fixture
def log(capsys):
    return lambda: capsys.readouterr().err.splitlines()


def test_the_line_says_which_evaluation_and_how_long_all_take(clock, log):
    with ProgressBar("evaluating", clock) as bar:
        progress.expect({"n2g: suffixes": Expected(1.0), "ablation: sites": Expected(3.0)})
        with progress.stage("n2g", 3, 6):
            progress.report("suffixes", 0, 400)
            clock.take(30)
            progress.report("suffixes", 200, 400)
            assert bar.line() == (
                "evaluating 3 of 6: n2g · suffixes 200 of 400 · about 4 min left, 4 min in all"
            )


def test_the_line_of_training_has_the_steps_and_what_happens_between_them(clock, log):
    with ProgressBar("training", clock) as bar:
        progress.expect({"training": Expected(1.0, 80), "computing": Expected(1.0, 80)})
        bar.note("nmse 0.5")
        progress.report("computing", 0, 40)
        clock.take(40)
        progress.report("computing", 40, 40)
        progress.report("training", 0, 80)
        clock.take(10)
        progress.report("training", 40, 80)
        progress.report("computing", 0, 40)
        assert bar.line() == (
            "training 40 of 80 · computing 0 of 40 · about 50 s left, 2 min in all · nmse 0.5"
        )


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(clock, log):
    with ProgressBar("training", clock):
        for done in range(101):
            clock.take(0.5)
            progress.report("training", done, 100)
    lines = log()
    assert 10 <= len(lines) <= 14
    assert lines[-1].startswith("training 100 of 100")


def test_a_phase_that_reports_nothing_is_shown_nevertheless(clock, log, monkeypatch):
    monkeypatch.setattr(ProgressBar, "_TICK", 0.001)
    said = threading.Event()
    monkeypatch.setattr(
        "ksparse.display.print_status", lambda text: (lines.append(text), said.set())
    )
    lines = []
    with ProgressBar("training", clock):
        progress.report("loading the LM")
        for _ in range(3):
            said.clear()
            clock.take(4.1)
            assert said.wait(10)
    assert lines[:2] == [
        "training · loading the LM · 4 s so far",
        "training · loading the LM · 8 s so far",
    ]


def test_a_terminal_gets_a_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with ProgressBar("evaluating [x]", clock):
        progress.report("reading", 3, 4)
    assert "evaluating [x] · reading 3 of 4" in stream.getvalue()
