"""A made-up run folder with every file that the report reads, as docs/formats.md says; no torch, the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ksparse import recipe as recipes
from ksparse.runs import RunFolder

N, K, M, CONTEXTS, LENGTH, BEFORE, AFTER = 64, 4, 8, 12, 20, 6, 3
DEAD = (5, 17, 40)
WORDS = ["<|endoftext|>", "def", " return", "\n    ", " self", ".", " ", "\t", "naïve", " x", "(", ")", ":", "€", "مرحبا", "if"]

POLICY = {"context": LENGTH, "bos_token": 0, "separator_token": 0, "borders": "pack", "keep": "text", "split": "held-out",
          "tokens_per_document": 512}
OPTIONS = {"tokens": 100_000, "per_document": 512, "split": "held-out", "text": "", "loss_table": "", "examples": M, "seed": 0}
COMMON = {"options": OPTIONS, "policy": POLICY, "lm": "pylm", "site": "resid_post.6", "text": "pylm", "n_tokens": 29_289,
          "n_documents": 70, "checkpoint": 50, "notes": ["only 70 documents"], "seconds": 12.5}
STATS = {
    "name": "stats", **COMMON, "nmse": {"value": 0.09613430212489554, "se": 0.0009009415092937941},
    "explained_variance": {"value": 0.9053851136532111, "se": 0.0008803740486215017}, "l0": {"value": 3.75, "se": 0.0},
    "dead_fraction": {"value": 3 / 64, "se": 0.026}, "dead_fraction_training": {"value": 1 / 64, "se": 0.0155},
    "density_histogram": {"edges": np.linspace(-6, 0, 13).tolist(), "counts": [0, 0, 0, 2, 5, 9, 15, 20, 8, 2, 0, 0]},
    "cosine": 0.8656, "window": {"before": BEFORE, "after": AFTER}}
DOWNSTREAM = {
    "name": "downstream", **COMMON, "ce_clean": {"value": 1.972, "se": 0.023}, "ce_spliced": {"value": 2.135, "se": 0.024},
    "ce_zero": {"value": 8.999, "se": 0.033}, "ce_mean": {"value": 5.437, "se": 0.013}, "ce_delta": {"value": 0.163, "se": 0.0065},
    "kl": {"value": 0.1936, "se": 0.0032}, "recovered": {"value": 0.97681, "se": 0.00091},
    "compute_fraction": {"value": 0.41, "se": 0.02}, "loss_table": {"points": [[1e12, 3.0], [1e13, 2.0]], "shift": -0.028}}


def arrays() -> dict[str, np.ndarray]:
    """Return the arrays of stats.safetensors, with examples for every latent but the dead ones."""
    random = np.random.default_rng(7)
    density = 10 ** random.uniform(-4, -0.5, N).astype(np.float32)
    largest = random.uniform(1, 9, N).astype(np.float32)
    density[list(DEAD)], largest[list(DEAD)] = 0, 0
    contexts = random.integers(0, len(WORDS), (CONTEXTS, LENGTH), np.int32)
    contexts[-1, LENGTH // 2 :] = -1
    made = {"density": density, "mean_act": largest / 2, "max_act": largest, "encoder_norm": np.ones(N, np.float32),
            "cosine": random.uniform(0.2, 1, N).astype(np.float32), "contexts": contexts}
    for kind in ("top", "random"):
        context = random.integers(0, CONTEXTS, (N, M), np.int32)
        position = random.integers(0, LENGTH // 2, (N, M), np.int32)
        acts = (random.random((N, M, BEFORE + 1 + AFTER)) * largest[:, None, None] * (random.random((N, M, BEFORE + 1 + AFTER)) < 0.4))
        acts[:, :, BEFORE] = largest[:, None] * np.linspace(1, 0.3, M)
        context[list(DEAD)] = -1
        context[3, 2:] = -1  # a latent with fewer examples than there is room for
        made |= {f"{kind}_context": context, f"{kind}_position": position, f"{kind}_acts": acts.astype(np.float16),
                 f"{kind}_value": acts[:, :, BEFORE].astype(np.float32)}
    return made


def metrics(steps: int = 50) -> list[dict[str, Any]]:
    return [{"step": step, "tokens": 1024 * step, "nmse": 0.4 * step**-0.3 if step != 20 else None, "auxk": 0.5, "l0": K - 0.25,
             "dead": max(0, step - 10) / 400, "lr": 3e-3, "grad_norm": 0.2 / step, "skipped": 1 if step > 20 else 0,
             "neighbours_in_batch": 0.03, "tokens_per_s": 48_000.5, "seconds": 0.1 * step} for step in range(1, steps + 1)]


def build(folder: Path, *, stats: bool = True, downstream: bool = True, vocabulary: list[str] | None = None,
          changes: dict[str, Any] | None = None, lines: list[dict[str, Any]] | None = None,
          environment: dict[str, Any] | None = None) -> RunFolder:
    """Write a run folder."""
    (folder / "evals").mkdir(parents=True)
    table: dict[str, Any] = {"sae": {"n_latents": N, "k": K}, "tokens": 51_200, "batch": 1024, "acts": {}}
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (table[section] if section else table)[name] = value
    run = RunFolder(folder)
    run.recipe_file.write_text(recipes.to_toml(recipes.from_dict(table)), encoding="utf-8")
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in (metrics() if lines is None else lines)))
    (folder / "environment.json").write_text(json.dumps(environment or {
        "versions": {"python": "3.11.7", "ksparse": "0.1.0", "torch": "2.13.0"}, "platform": "Linux", "processor": "x86_64",
        "threads": 2, "gpus": [], "arguments": []}))
    if stats:
        run.eval_file("stats").write_text(json.dumps(STATS))
        run.eval_file("vocabulary").write_text(json.dumps(WORDS if vocabulary is None else vocabulary))
        save_file(arrays(), folder / "evals" / "stats.safetensors")
    if downstream:
        run.eval_file("downstream").write_text(json.dumps(DOWNSTREAM))
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Return make_run(name="demo", **options of build)."""
    return lambda name="demo", **options: build(tmp_path / name, **options)
