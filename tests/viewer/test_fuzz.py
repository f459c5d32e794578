"""Requests at random, over labels at random, end in an answer: bench/fuzz.py, a short version of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("starlette", reason="the extra `serve` is not installed")

BENCH = Path(__file__).resolve().parents[2] / "bench" / "fuzz.py"


def test_no_request_makes_the_server_crash_or_lose_a_label(run):
    bench = importlib.util.module_from_spec(
        spec := importlib.util.spec_from_file_location("fuzz", BENCH)
    )
    spec.loader.exec_module(bench)
    found = bench.requests(run, 250, seed=1)
    assert found["bad"] == []
    assert {"200", "400", "403", "404", "405"} <= {*found["statuses"]} and found["statuses"][
        "200"
    ] > 50
