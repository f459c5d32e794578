"""Random damage is detected with a message or does no harm, and input at random is read or refused: bench/fuzz.py, a short version of it."""

import importlib.util
import logging
import random
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench" / "fuzz.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("fuzz", BENCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world(bench, tmp_path_factory):
    """Return the folders that are damaged; only copies of them are."""
    base = tmp_path_factory.mktemp("fuzz")
    (base / "whole").mkdir()
    level = logging.getLogger("ksparse").level
    logging.getLogger("ksparse").setLevel(logging.CRITICAL)
    yield bench.World(base / "whole", bench.small_recipe(base))
    logging.getLogger("ksparse").setLevel(level)


def test_no_damage_makes_a_reader_crash_or_gives_other_weights_without_a_word(bench, world):
    found = bench.fuzz(world, 150, seed=int.from_bytes(b"short"), pages=2)
    assert found["bad"] == [] and found["wrong"] == found["crash"] == 0
    assert found["detected"] > 40 and found["older"] > 5 and found["harmless"] > 20, (
        "the damage is of all kinds"
    )


def test_undamaged_files_are_read_as_they_were_written_and_a_stopped_run_ends_like_an_undisturbed_one(
    world,
):
    for name, read in world.stations.items():
        assert read(world.base / name) == "harmless", name


def test_other_weights_would_be_noticed(bench, world, tmp_path, monkeypatch):
    """The sums are what notices them: without, the same damage goes through, and is counted as wrong."""
    (tmp_path / "outside").write_bytes(b"outside")
    monkeypatch.setattr(bench.checksums, "verify", lambda path, *names: {})
    assert "wrong" in {
        bench.attempt(world, "export", tmp_path / "outside", random.Random(seed))[0]
        for seed in range(40)
    }


@pytest.mark.parametrize(
    "kind, count",
    [
        ("text", 60),
        ("suites", 60),
        ("recipes", 60),
        ("flags", 15),
        ("labels", 40),
        ("results", 3),
        ("shards", 40),
        ("sae", 30),
        ("state", 6),
    ],
)
def test_inputs_at_random_are_read_or_refused(bench, world, kind, count):
    found = bench.try_inputs(world, [kind], seed=int.from_bytes(kind.encode()), each=count)
    assert found["bad"] == [] and sum(found["inputs"][kind].values()) == count


def test_every_kind_of_input_has_a_short_test(bench):
    marks = {mark.name: mark.args for mark in test_inputs_at_random_are_read_or_refused.pytestmark}
    assert [kind for kind, _ in marks["parametrize"][1]] == list(bench.KINDS)


def test_an_input_that_is_no_error_of_ours_or_takes_too_long_is_counted_and_can_be_had_again(
    bench, world, monkeypatch
):
    def odd(world, folder, draw):
        number = draw.randrange(100)

        def read():
            if number < 50:
                raise KeyError(number)
            while True:
                pass

        return bench.Trial(f"number {number}", read)

    monkeypatch.setitem(bench.KINDS, "odd", odd)
    monkeypatch.setattr(
        bench.signal,
        "setitimer",
        lambda which, seconds: bench.signal.raise_signal(bench.signal.SIGALRM) if seconds else None,
    )
    found = bench.try_inputs(world, ["odd"], seed=0, each=4, limit=9.0)
    assert found["inputs"]["odd"] == {"slow": 4}, "the timer goes off at once here"
    monkeypatch.setattr(bench.signal, "setitimer", lambda which, seconds: None)
    monkeypatch.setitem(
        bench.KINDS,
        "odd",
        lambda world, folder, draw: odd(
            world, folder, type("", (), {"randrange": lambda self, n: draw.randrange(50)})()
        ),
    )
    found = bench.try_inputs(world, ["odd"], seed=0, each=4)
    assert found["inputs"]["odd"] == {"crash": 4} and "KeyError" in found["bad"][0]["why"]
    kind, seed, number = found["bad"][3]["input"].split()
    assert (
        bench.try_input(world, kind, world.base.parent / "again", int(seed), int(number))[1]
        == found["bad"][3]["said"]
    )
