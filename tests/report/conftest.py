"""A made-up run folder with every file that the report reads, as docs/formats.md says; no torch, the same bytes each time."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ksparse import config as recipes
from ksparse.storage.run_folder import RunFolder

N, K, M, CONTEXTS, LENGTH, BEFORE, AFTER = 64, 4, 8, 12, 20, 6, 3
DEAD = (5, 17, 40)
WORDS = [
    "<|endoftext|>",
    "def",
    " return",
    "\n    ",
    " self",
    ".",
    " ",
    "\t",
    "naïve",
    " x",
    "(",
    ")",
    ":",
    "€",
    "مرحبا",
    "if",
]

POLICY = {
    "context": LENGTH,
    "bos_token": 0,
    "separator_token": 0,
    "borders": "pack",
    "keep": "text",
    "split": "held-out",
    "tokens_per_document": 512,
}
OPTIONS = {
    "tokens": 100_000,
    "per_document": 512,
    "split": "held-out",
    "text": "",
    "loss_table": "",
    "examples": M,
    "seed": 0,
}
COMMON = {
    "options": OPTIONS,
    "policy": POLICY,
    "lm": "pylm",
    "site": "resid_post.6",
    "text": "pylm",
    "n_tokens": 29_289,
    "n_documents": 70,
    "checkpoint": 50,
    "notes": ["only 70 documents"],
    "seconds": 12.5,
}
STATS = {
    "name": "stats",
    **COMMON,
    "nmse": {"value": 0.09613430212489554, "se": 0.0009009415092937941},
    "explained_variance": {"value": 0.9053851136532111, "se": 0.0008803740486215017},
    "l0": {"value": 3.75, "se": 0.0},
    "dead_fraction": {"value": 3 / 64, "se": 0.026},
    "dead_fraction_training": {"value": 1 / 64, "se": 0.0155},
    "density_histogram": {
        "edges": np.linspace(-6, 0, 13).tolist(),
        "counts": [0, 0, 0, 2, 5, 9, 15, 20, 8, 2, 0, 0],
    },
    "cosine": 0.8656,
    "window": {"before": BEFORE, "after": AFTER},
}
DOWNSTREAM = {
    "name": "downstream",
    **COMMON,
    "ce_clean": {"value": 1.972, "se": 0.023},
    "ce_spliced": {"value": 2.135, "se": 0.024},
    "ce_zero": {"value": 8.999, "se": 0.033},
    "ce_mean": {"value": 5.437, "se": 0.013},
    "ce_delta": {"value": 0.163, "se": 0.0065},
    "kl": {"value": 0.1936, "se": 0.0032},
    "recovered": {"value": 0.97681, "se": 0.00091},
    "compute_fraction": {"value": 0.41, "se": 0.02},
    "loss_table": {"points": [[1e12, 3.0], [1e13, 2.0]], "shift": -0.028},
}


TASKS, SCORED, TABLES = 12, 40, 30


def estimate(value: float | None, se: float | None = 0.01) -> dict[str, float | None]:
    return {"value": value, "se": se if value is not None else None}


def tasks(count: int = TASKS, *, latents: int = N) -> dict[str, dict[str, Any]]:
    """Return the tasks of probes.json: their gains fall, the latents are different ones."""
    return {
        f"task_{i:02}": {
            "latent": (11 * i + 1) % latents,
            "loss": estimate(0.3 + 0.02 * i),
            "channel_loss": estimate(0.5),
            "random_sae_loss": estimate(0.52),
            "dense_probe_loss": estimate(0.1),
            "prior_loss": estimate(0.693, 0.0),
            "loss_in_sample": estimate(0.28),
            "n_train": 500,
            "n_test": 498,
            "positive": 0.5,
            "best_latents": [{"latent": (11 * i + 1) % latents, "loss_in_sample": 0.28}],
        }
        for i in range(count)
    }


PROBES = {
    "name": "probes",
    **{
        key: value
        for key, value in COMMON.items()
        if key not in ("policy", "n_tokens", "n_documents", "text")
    },
    "options": OPTIONS | {"suite": "suites/demo"},
    "probe_loss": estimate(0.41, 0.003),
    "probe_loss_in_sample": estimate(0.28, 0.003),
    "channel_loss": estimate(0.5, 0.003),
    "random_sae_loss": estimate(0.52, 0.003),
    "dense_probe_loss": estimate(0.1, 0.003),
    "prior_loss": estimate(0.693, 0.0),
    "gain_over_channels": estimate(0.09, 0.004),
    "gain_over_random_sae": estimate(0.11, 0.004),
    "suite": "demo",
    "n_tasks": TASKS,
    "tasks": tasks(),
}
N2G = {
    "name": "n2g",
    **COMMON,
    "recall": estimate(0.31),
    "precision": estimate(0.73),
    "f1": estimate(0.38),
    "shuffled_recall": estimate(0.014, 0.005),
    "shuffled_precision": estimate(0.008, 0.002),
    "shuffled_f1": estimate(0.0013, 0.0005),
    "precision_pooled": estimate(0.15, None),
    "n_latents": SCORED,
    "n_tokens_scored": 20_000,
    "too_few": [1],
    "pad": {"id": 4, "text": " _"},
    "patterns_per_latent": 6.0,
}
EXPLAINED_LOSS = {
    "name": "explained_loss",
    **COMMON,
    **{
        f"ce_{name}": estimate(value, 0.05)
        for name, value in (
            ("clean", 1.97),
            ("spliced", 2.14),
            ("n2g", 4.1),
            ("bigram", 4.3),
            ("unigram", 6.4),
            ("bias", 8.1),
            ("zero", 9.0),
        )
    },
    "delta_to_bigram": estimate(-0.2, 0.04),
    "n_explained": 61,
}
EDGES = np.linspace(0, 1, 41).tolist()
ABLATION = {
    "name": "ablation",
    **COMMON,
    "ablation_sparsity": estimate(0.12),
    "ablation_sparsity_per_position": estimate(0.12),
    "ablation_sparsity_weighted": estimate(0.1),
    "channel_sparsity": estimate(0.4),
    "difference": estimate(0.28),
    "sparsity_here": estimate(0.3),
    "channel_sparsity_here": estimate(0.6),
    "difference_here": estimate(0.3),
    "later": estimate(0.16),
    "channel_later": estimate(0.14),
    "effective_tokens": estimate(3840.0, 320.0),
    "kl": estimate(0.002, 0.0001),
    "channel_kl": estimate(0.001, 0.0001),
    "loss_difference": estimate(0.001, 0.0001),
    "horizon": 16,
    "histogram": {"edges": EDGES, "counts": [0, 3, 9, 12, 8, 4, 1, *[0] * 33]},
    "channel_histogram": {"edges": EDGES, "counts": [*[0] * 12, 4, 9, 11, 7, 2, *[0] * 23]},
}
RESULTS = {
    "stats": STATS,
    "downstream": DOWNSTREAM,
    "probes": PROBES,
    "n2g": N2G,
    "explained_loss": EXPLAINED_LOSS,
    "ablation": ABLATION,
}


def n2g_arrays() -> dict[str, np.ndarray]:
    """Return the arrays of n2g.safetensors: patterns of every latent but the dead, and scores of some, of which one has no precision."""
    random = np.random.default_rng(8)
    scored = random.permutation(N)[:SCORED].astype(np.int64)
    recall, precision = (
        random.random(SCORED).astype(np.float32),
        random.random(SCORED).astype(np.float32),
    )
    precision[0] = np.nan
    latents = np.repeat([i for i in range(N) if i not in DEAD], 6).astype(np.int32)
    lengths = random.integers(1, 9, len(latents))
    tokens = random.integers(-1, len(WORDS), lengths.sum()).astype(np.int32)
    return {
        "scored": scored,
        "recall": recall,
        "precision": precision,
        "f1": 2 * recall * precision / (recall + precision),
        "pattern_latent": latents,
        "pattern_start": np.array([0, *np.cumsum(lengths)], np.int32),
        "pattern_tokens": tokens,
        "pattern_anchored": random.random(len(latents)) < 0.3,
        "pattern_value": random.random(len(latents)).astype(np.float32),
        "pattern_support": random.integers(1, 12, len(latents)).astype(np.int32),
    }


def ablation_arrays() -> dict[str, np.ndarray]:
    """Return the arrays of ablation.safetensors that pages read, for some latents in no order."""
    random = np.random.default_rng(9)
    shape = (TABLES, 16, 5)
    return {
        "latent": random.permutation(N)[:TABLES].astype(np.int32),
        "sparsity": random.random(TABLES).astype(np.float32),
        "up_tokens": random.integers(0, len(WORDS), shape).astype(np.int32),
        "up_values": random.random(shape).astype(np.float32) + 0.1,
        "down_tokens": random.integers(0, len(WORDS), shape).astype(np.int32),
        "down_values": -random.random(shape).astype(np.float32) - 0.1,
    }


def arrays() -> dict[str, np.ndarray]:
    """Return the arrays of stats.safetensors, with examples for every latent but the dead ones."""
    random = np.random.default_rng(7)
    density = 10 ** random.uniform(-4, -0.5, N).astype(np.float32)
    largest = random.uniform(1, 9, N).astype(np.float32)
    density[list(DEAD)], largest[list(DEAD)] = 0, 0
    contexts = random.integers(0, len(WORDS), (CONTEXTS, LENGTH), np.int32)
    contexts[-1, LENGTH // 2 :] = -1
    made = {
        "density": density,
        "mean_act": largest / 2,
        "max_act": largest,
        "encoder_norm": np.ones(N, np.float32),
        "cosine": random.uniform(0.2, 1, N).astype(np.float32),
        "contexts": contexts,
    }
    for kind in ("top", "random"):
        context = random.integers(0, CONTEXTS, (N, M), np.int32)
        position = random.integers(0, LENGTH // 2, (N, M), np.int32)
        acts = (
            random.random((N, M, BEFORE + 1 + AFTER))
            * largest[:, None, None]
            * (random.random((N, M, BEFORE + 1 + AFTER)) < 0.4)
        )
        acts[:, :, BEFORE] = largest[:, None] * np.linspace(1, 0.3, M)
        context[list(DEAD)] = -1
        context[3, 2:] = -1  # a latent with fewer examples than there is room for
        made |= {
            f"{kind}_context": context,
            f"{kind}_position": position,
            f"{kind}_acts": acts.astype(np.float16),
            f"{kind}_value": acts[:, :, BEFORE].astype(np.float32),
        }
    return made


def metrics(steps: int = 50) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "tokens": 1024 * step,
            "nmse": 0.4 * step**-0.3 if step != 20 else None,
            "auxk": 0.5,
            "l0": K - 0.25,
            "dead": max(0, step - 10) / 400,
            "lr": 3e-3,
            "grad_norm": 0.2 / step,
            "skipped": 1 if step > 20 else 0,
            "neighbours_in_batch": 0.03,
            "tokens_per_s": 48_000.5,
            "seconds": 0.1 * step,
        }
        for step in range(1, steps + 1)
    ]


def build(
    folder: Path,
    *,
    evals: Collection[str] = tuple(RESULTS),
    vocabulary: list[str] | None = None,
    changes: dict[str, Any] | None = None,
    lines: list[dict[str, Any]] | None = None,
    environment: dict[str, Any] | None = None,
) -> RunFolder:
    """Write a run folder with the results of some evaluations, all if none are named."""
    (folder / "evals").mkdir(parents=True)
    table: dict[str, Any] = {
        "sae": {"n_latents": N, "k": K},
        "tokens": 51_200,
        "batch": 1024,
        "acts": {},
    }
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        (table[section] if section else table)[name] = value
    run = RunFolder(folder)
    run.recipe_file.write_text(recipes.to_toml(recipes.from_dict(table)), encoding="utf-8")
    run.metrics_file.write_text(
        "".join(json.dumps(line) + "\n" for line in (metrics() if lines is None else lines))
    )
    (folder / "environment.json").write_text(
        json.dumps(
            environment
            or {
                "versions": {"python": "3.11.7", "ksparse": "0.1.0", "torch": "2.13.0"},
                "platform": "Linux",
                "processor": "x86_64",
                "threads": 2,
                "gpus": [],
                "arguments": [],
            }
        )
    )
    for name in evals:
        run.eval_file(name).write_text(json.dumps(RESULTS[name]))
    if "stats" in evals:
        run.eval_file("vocabulary").write_text(
            json.dumps(WORDS if vocabulary is None else vocabulary)
        )
    for name, made in (("stats", arrays), ("n2g", n2g_arrays), ("ablation", ablation_arrays)):
        if name in evals:
            save_file(made(), run.eval_file(name).with_suffix(".safetensors"))
    return run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    """Return make_run(name="demo", **options of build)."""
    return lambda name="demo", **options: build(tmp_path / name, **options)
