"""Rates and remaining time of training: averages over whole shuffle buffers, on a clock that only
a slow LM and slow steps move."""

import time
from types import SimpleNamespace

import pytest

from ksparse import progress
from ksparse.config import Recipe
from ksparse.data import live
from ksparse.lm.model import LM
from ksparse.progress import Forecast, Observer, Stage
from ksparse.training import source, trainer
from ksparse.training import train as train_module
from ksparse.training.train import train

LM_SECONDS, STEP_SECONDS = 0.02, 1.0
"""For an activation; for a step."""
BATCH, BUFFER = 256, 1024


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A clock moved by the LM (for each activation) and by each step."""
    clock = Clock()
    acts, step = LM.acts, trainer.train_step

    def slow_acts(self, tokens, attention):
        clock.now += LM_SECONDS * (tokens.shape[1] - 1) * tokens.shape[0]
        return acts(self, tokens, attention)

    def slow_step(*args, **options):
        clock.now += STEP_SECONDS
        return step(*args, **options)

    # In these modules alone: other threads of the tests, such as a server's, need the real clock.
    fake = SimpleNamespace(**vars(time) | {"monotonic": clock})
    for module in (live, source, train_module, trainer):
        monkeypatch.setattr(module, "time", fake)
    monkeypatch.setattr(LM, "acts", slow_acts)
    monkeypatch.setattr(trainer, "train_step", slow_step)
    return clock


def recipe(steps, small_acts):
    return Recipe(
        acts=small_acts(mix=BUFFER, lm_batch=8),
        sae={"n_latents": 64, "k": 4},
        tokens=steps * BATCH,
        batch=BATCH,
        run={"log_every": 1, "kernels": "torch", "save_minutes": 1e6},
    )


def test_the_rate_is_that_of_whole_buffers_wherever_in_a_buffer_it_is_taken(
    clock, tmp_path, small_acts
):
    rows = train(recipe(12, small_acts), tmp_path / "run").metrics()
    truth = 1 / (LM_SECONDS + STEP_SECONDS / BATCH)
    assert len(rows) == 12
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(truth, rel=0.15)


def test_the_remaining_time_is_right_after_the_first_tenth(clock, tmp_path, small_acts):
    class Watch(Observer):
        def __init__(self):
            self.forecast, self.seen = Forecast(clock), []

        def expect(self, parts):
            self.began = clock.now
            self.forecast.expect(parts)

        def report(self, what, done, total, stage=Stage()):
            self.forecast.report(stage.key(what), done, total)
            self.seen.append((clock.now, self.forecast.seconds_left()))

    watch = Watch()
    with progress.observed(watch):
        train(recipe(40, small_acts), tmp_path / "run")
    whole = clock.now - watch.began
    later = [(now, left) for now, left in watch.seen if now - watch.began >= whole / 10]
    assert len(later) > 40
    for now, left in later:
        assert left == pytest.approx(clock.now - now, abs=0.3 * whole)
    for now, left in later[: len(later) // 2]:
        assert left == pytest.approx(clock.now - now, rel=0.3)


def test_what_a_run_does_is_reported_from_the_start(clock, tmp_path, small_acts):
    heard = []
    with progress.observed(lambda what, done, total: heard.append((what, done, total))):
        train(recipe(8, small_acts), tmp_path / "run")
    names = list(dict.fromkeys(what for what, *_ in heard))
    assert names[:2] == ["loading the LM", "computing activations"] and "training" in names
    filling = [done for what, done, total in heard if what == "computing activations"]
    assert filling[0] == 0 and filling.count(0) == filling.count(BUFFER) == 2
    assert [done for what, done, _ in heard if what == "training"] == [
        step * BATCH for step in range(9)
    ]
