"""Random damage to files that ksparse wrote is detected with a message or does no harm: bench/fuzz.py, a short version of it."""

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


@pytest.fixture
def world(bench, small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ksparse"), "level", logging.CRITICAL)
    (tmp_path / "whole").mkdir()
    return bench.World(tmp_path / "whole", small_recipe({"run.save_every": 3, "run.keep": 3, "curve.held_out": 64, "curve.octaves": 3}))


def test_no_damage_makes_a_reader_crash_or_gives_other_weights_without_a_word(bench, world):
    found = bench.fuzz(world, 150, seed=int.from_bytes(b"short"), pages=2)
    assert found["bad"] == [] and found["wrong"] == found["crash"] == 0
    assert found["detected"] > 40 and found["older"] > 5 and found["harmless"] > 20, "the damage is of all kinds"


def test_undamaged_files_are_read_as_they_were_written_and_a_stopped_run_ends_like_an_undisturbed_one(world):
    for name, read in world.stations.items():
        assert read(world.base / name) == "harmless", name


def test_other_weights_would_be_noticed(bench, world, tmp_path, monkeypatch):
    """The sums are what notices them: without, the same damage goes through, and is counted as wrong."""
    (tmp_path / "outside").write_bytes(b"outside")
    monkeypatch.setattr(bench.files, "verify", lambda path, *names: {})
    assert "wrong" in {bench.attempt(world, "export", tmp_path / "outside", random.Random(seed))[0] for seed in range(40)}
