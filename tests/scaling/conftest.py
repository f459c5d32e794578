"""A made-up sweep with points.csv and curves.csv, as docs/formats.md says: the laws behind it are known. No torch."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ksparse.scaling.laws import published

SIZES, KS = [512 * 2**i for i in range(6)], [8, 16, 32, 64]
LMS = {"pylm/0.3m": 200_000, "pylm/1.9m": 1_500_000, "pylm/7.6m": 7_000_000}
MAIN = "pylm/1.9m"
TOKENS_EXPONENT, LR_EXPONENT = 0.6, -0.5
COEFFICIENTS = {"alpha": 0.6, "b_k": 0.05, "b_n": -0.1, "g": -0.03, "zeta": -2.2, "eta": -0.1}


def limit(n: float, k: float, lm: str = MAIN) -> float:
    """Return the loss at convergence and at the best learning rate."""
    easier = (LMS[lm] / LMS[MAIN]) ** 0.03
    return easier * float(published.eq3(COEFFICIENTS, np.array([n]), np.array([k]))[0])


def cost(n: float, k: float) -> float:
    """Return training FLOPs per token."""
    return 2 * 160 * n + 8 * 160 * k


def best_lr(n: float) -> float:
    return 3e-3 * (n / 2048) ** LR_EXPONENT


def tokens_of(n: float) -> float:
    return 2e6 * (n / 2048) ** TOKENS_EXPONENT


def rows_of(
    n: float, k: float, *, lr: float, seed: int, lm: str, noise: np.random.Generator
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a run's row of points.csv and its rows of curves.csv."""
    run = f"{lm.replace('/', '-')}-{n}-{k}-{lr:.2e}-{seed}"
    worse = (1 + 0.02 * np.log(lr / best_lr(n)) ** 2) * (1 + 0.003 * noise.standard_normal())
    end = tokens_of(n) * (lr / best_lr(n)) ** -0.5 * (1 + 0.03 * noise.standard_normal())
    tokens = np.geomspace(end / 300, end, 25)
    losses = limit(n, k, lm) * worse * (1 + 0.05 * ((end / tokens) ** 0.6 - 1))
    shared = {"run": run, "n": n, "k": k, "lr": lr, "seed": seed, "lm": lm}
    point = shared | {
        "activation": "topk",
        "d_model": 160,
        "lm_parameters": LMS[lm],
        "lm_flops": "",
        "batch": 2048,
        "tokens": end,
        "tokens_to_convergence": end,
        "converged": "true",
        "flops": end * cost(n, k),
        "flops_lm": 1e12,
        "loss": losses[-1],
        "loss_raw": losses[-1] * 1.01,
        "loss_ema": losses[-1],
        "loss_se": "",
        "dead": 0.01,
    }
    curve = [
        shared
        | {
            "tokens": t,
            "flops": t * cost(n, k),
            "loss": loss,
            "loss_raw": loss * 1.01,
            "loss_ema": loss,
        }
        for t, loss in zip(tokens, losses)
    ]
    return point, curve


def build(
    folder: Path,
    *,
    sizes: list[int] = SIZES,
    ks: list[int] = KS,
    rates: tuple[float, ...] = (0.5, 1.0, 2.0),
    seeds: int = 1,
    lms: tuple[str, ...] = (MAIN,),
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
    curves: bool = True,
) -> Path:
    """Write a sweep: of the main LM every n, k, multiple of the best learning rate and seed; of the other LMs every n at the third k."""
    noise = np.random.default_rng(0)
    points, lines = [], []
    for lm in lms:
        for n in sizes:
            for k in ks if lm == MAIN else ks[2:3]:
                for rate in rates if lm == MAIN else (1.0,):
                    for seed in range(seeds):
                        point, curve = rows_of(
                            n, k, lr=rate * best_lr(n), seed=seed, lm=lm, noise=noise
                        )
                        points.append(change(point))
                        lines += curve
    write(folder / "points.csv", points)
    if curves:
        write(folder / "curves.csv", lines)
    return folder


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return file


@pytest.fixture
def make_sweep(tmp_path) -> Callable[..., Path]:
    """Return make_sweep(**options of build): the folder of a sweep."""
    return lambda **options: build(tmp_path / "sweeps" / "made", **options)
