"""Which library finds planted features, kind by kind: ours at its defaults, the others tuned.

    python bench/kinds.py --sae-lens ENV/bin/python --sparsify ENV/bin/python --out kinds.json

The same command goes on where it stopped; `--libraries` runs some of them.

All libraries train on the same rows in the same order (ksparse.data.planted), with the same n, k,
tokens and batch, once for each seed; features, start values and rows are new with each seed. Each
SAE is saved in its library's format, read by ksparse, and measured by one function
(ksparse.evals.planted). SAELens gets what its benchmark does not set: centred rows, a dead window
that fits the run, and of several rates and penalties the one with the best mean of MCC and F1 on
another seed (--tune), which TUNED below has. sparsify trains by its own rule.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import ksparse
from ksparse.config import Planted, Recipe, from_dict
from ksparse.data.planted import PlantedFeatures, PlantedStream
from ksparse.evals.planted import measure
from ksparse.training.train import train_many

HERE = Path(__file__).resolve().parent
WORLDS = {
    "plain": {"features": 128, "d_model": 48, "probability": 0.03, "apart": 100},
    "natural": {
        "features": 128,
        "d_model": 48,
        "probability": 0.3,
        "least": 0.01,
        "exponent": 0.7,
        "rank": 8,
        "correlation": 0.2,
        "spread": (0.2, 0.1),
        "bias": 2.0,
        "apart": 100,
    },
    "trees": {
        "features": 128,
        "d_model": 48,
        "probability": 0.4,
        "least": 0.01,
        "exponent": 0.5,
        "roots": 8,
        "children": 4,
        "depth": 2,
        "exclusive": 1.0,
        "scaled": True,
        "rank": 8,
        "correlation": 0.1,
        "sizes": (5.0, 4.0),
        "spread": (0.5, 0.5),
        "bias": 0.5,
        "apart": 100,
    },
}
"""Features of equal frequency; a power law, correlated, with a bias; and trees of features as in
SAELens' own benchmark, at a 128th of its size."""
K = 4
BATCH = 512
TUNING_SEED = 9
ROWS = 16_384
LIBRARIES = ("ksparse", "SAELens", "sparsify")
KINDS = ("topk", "batch_topk", "jump_relu", "matryoshka")
THEIRS = {
    "topk": "topk",
    "batch_topk": "batchtopk",
    "jump_relu": "jumprelu",
    "matryoshka": "matryoshka_batchtopk",
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PENALTIES = (0.03, 0.3, 3.0)
TUNED: dict[str, dict[str, dict[str, float]]] = {
    "plain": {},
    "natural": {
        "topk": {"lr": 2e-2},
        "batch_topk": {"lr": 1e-2},
        "jump_relu": {"lr": 3e-3, "penalty": 0.03},
        "matryoshka": {"lr": 1e-2},
    },
    "trees": {},
}
"""What was found for SAELens: learning rate, and for JumpReLU the weight of the penalty. Where nothing
is given it has its own 3e-4, and is not tuned: run --tune first."""
SHOWN = ("mcc", "f1", "precision", "recall", "uniqueness", "dead", "duplicated", "nmse", "l0")


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    rows = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    done = {(row["world"], row["library"], row["kind"], row["seed"]) for row in rows}
    with tempfile.TemporaryDirectory(prefix="kinds-") as folder:
        for row in tune(args, Path(folder)) if args.tune else compare(args, done, Path(folder)):
            rows.append(row)
            args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table(rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sae-lens", help="Python of an environment with sae-lens")
    parser.add_argument("--sparsify", help="Python of an environment with eai-sparsify")
    parser.add_argument("--world", default="natural", choices=WORLDS)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[3, 4, 5, 6])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--libraries", nargs="+", default=LIBRARIES, choices=LIBRARIES)
    parser.add_argument("--tune", action="store_true", help="SAELens alone, over rates, on seed 9")
    parser.add_argument("--out", type=Path, default=Path("kinds.json"))
    return parser.parse_args()


def compare(
    args: argparse.Namespace, done: set[tuple[str, str, str, int]], folder: Path
) -> Iterator[dict[str, Any]]:
    worlds = [World(args.world, seed, args.tokens, folder / str(seed)) for seed in args.seeds]

    def left(library: str, world: World) -> list[str]:
        return [k for k in args.kinds if (args.world, library, k, world.seed) not in done]

    if "ksparse" in args.libraries:
        for world in worlds:
            kinds = left("ksparse", world)
            for kind, path in zip(kinds, ours(world, kinds)):
                yield judged(world, "ksparse", kind, path)
    if "SAELens" in args.libraries:
        tuned = TUNED[args.world]
        jobs = [Job(w, kind, tuned.get(kind, {})) for w in worlds for kind in left("SAELens", w)]
        for job, path in zip(jobs, sae_lens(args.sae_lens, jobs, folder)):
            yield judged(job.world, "SAELens", job.kind, path)
    if "sparsify" in args.libraries:
        for world in worlds:
            if "topk" in left("sparsify", world):
                yield judged(world, "sparsify", "topk", sparsify(args.sparsify, world))


def tune(args: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    world = World(args.world, TUNING_SEED, args.tokens, folder / "tune")
    jobs = []
    for kind in args.kinds:
        penalties = [{"penalty": p} for p in PENALTIES] if kind == "jump_relu" else [{}]
        jobs += [Job(world, kind, {"lr": lr} | penalty) for lr in RATES for penalty in penalties]
    for job, path in zip(jobs, sae_lens(args.sae_lens, jobs, folder)):
        name = " ".join([job.kind, *(f"{key} {value:g}" for key, value in job.chosen.items())])
        yield judged(world, "SAELens", name, path)


class World:
    """Planted features of one seed, and the rows that all libraries train on."""

    def __init__(self, name: str, seed: int, tokens: int, folder: Path):
        self.name, self.seed, self.folder = name, seed, folder
        self.options = Planted(**WORLDS[name], seed=seed)
        self.truth = PlantedFeatures(self.options)
        self.n, self.steps = self.options.features, math.ceil(tokens / BATCH)
        self.widths = [self.n // 8, self.n // 4, self.n // 2, self.n]
        stream = PlantedStream(self.truth, batch=BATCH, seed=seed, device=torch.device("cpu"))
        folder.mkdir(parents=True, exist_ok=True)
        steps = range(1, self.steps + 1)
        np.save(folder / "train.npy", torch.cat([stream.rows(BATCH, s) for s in steps]).numpy())


def judged(world: World, library: str, kind: str, path: Path) -> dict[str, Any]:
    """Return the numbers of one SAE, and say them."""
    result = measure(ksparse.load(path), world.truth, ROWS)
    row = {"world": world.name, "library": library, "kind": kind, "seed": world.seed}
    row |= {name: result[name]["value"] for name in (*SHOWN, "true_l0")}
    numbers = " ".join(f"{name} {row[name]:.3f}" for name in SHOWN)
    print(
        f"{world.name} {world.seed} {library:8s} {kind:12s} {numbers}", file=sys.stderr, flush=True
    )
    return row


def ours(world: World, kinds: list[str]) -> list[Path]:
    """Train ksparse's kinds at their defaults on one stream."""
    if not kinds:
        return []
    outs = [world.folder / "ours" / kind for kind in kinds]
    train_many([recipe(world, kind) for kind in kinds], outs)
    return outs


def recipe(world: World, kind: str) -> Recipe:
    """Return the defaults of a kind; Matryoshka is BatchTopK with prefixes."""
    nested = kind == "matryoshka"
    return from_dict(
        {
            "acts": {"text": world.options.to_text(), "normalize": "none"},
            "sae": {
                "n_latents": world.n,
                "k": K,
                "activation": {"kind": "batch_topk" if nested else kind},
                "prefixes": world.widths[:-1] if nested else [],
            },
            "run": {"device": "cpu", "save_minutes": 1e6, "log_every": 10**6},
            "tokens": world.steps * BATCH,
            "batch": BATCH,
            "seed": world.seed,
            "threads": 1,
        }
    )


class Job(NamedTuple):
    """One SAE for SAELens to train."""

    world: World
    kind: str
    chosen: dict[str, float]
    """What is changed of its defaults: `lr`, and of JumpReLU `penalty`."""


def sae_lens(python: str, jobs: list[Job], folder: Path) -> list[Path]:
    """Train all jobs in one process of SAELens' environment."""
    orders = []
    for number, (world, kind, chosen) in enumerate(jobs):
        sae: dict[str, Any] = {"k": K}
        if kind == "jump_relu":
            sae = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": K}
            sae |= {"l0_coefficient": chosen.get("penalty", 1.0)}
        if kind == "matryoshka":
            sae["matryoshka_widths"] = world.widths
        orders.append(
            {
                "out": str(folder / "sae_lens" / str(number)),
                "rows": str(world.folder / "train.npy"),
                "kind": THEIRS[kind],
                "n": world.n,
                "batch": BATCH,
                "seed": world.seed,
                "sae": sae,
                "trainer": {"dead_feature_window": 100, "lr": chosen.get("lr", 3e-4)},
                "center": True,
            }
        )
    call(python, HERE / "peers" / "sae_lens_kinds.py", [], json.dumps(orders))
    return [Path(order["out"]) for order in orders]


def sparsify(python: str, world: World) -> Path:
    """Train sparsify's TopK by its own rate law."""
    out = world.folder / "sparsify"
    numbers = {"n": world.n, "k": K, "tokens": world.steps * BATCH, "batch": BATCH}
    numbers |= {"seed": world.seed, "threads": 1}
    options = [text for key, value in numbers.items() for text in (f"--{key}", str(value))]
    options += ["--data", str(world.folder), "--out", str(out), "--save", str(out / "sae")]
    call(python, HERE / "peers" / "sparsify_topk.py", [*options, "--belongs", '{"factor": 1.0}'])
    return out / "sae"


def call(python: str, script: Path, options: list[str], text: str = "") -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [python, str(script), *options],
        input=text,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{script.name} failed:\n{done.stderr[-2000:]}")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mean and standard error over seeds, as a table in Markdown."""
    lines = [f"| kind | library | seeds | {' | '.join(SHOWN)} |", "|---" * (3 + len(SHOWN)) + "|"]
    names = dict.fromkeys((row["kind"], row["library"]) for row in rows)
    for kind, library in sorted(names, key=lambda pair: pair[0]):
        of = [row for row in rows if (row["kind"], row["library"]) == (kind, library)]
        cells = [spread([row[name] for row in of]) for name in SHOWN]
        lines.append(f"| {kind} | {library} | {len(of)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
