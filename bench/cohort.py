"""How much faster do many SAEs train on one stream than one after another? The grid of recipes/sweeps/pylm.toml, both ways in one run.

    python bench/cohort.py [--tokens 300000] [--sweep recipes/sweeps/pylm.toml]

Both ways are whole runs: the LM is loaded, the SAEs initialised, trained, measured and saved. Their final held-out losses are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ksparse.config import CurveConfig, Recipe
from ksparse.scaling.sweeps.grid import read
from ksparse.training.train import train, train_many

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT = 2_048  # activations: what is compared is training, and a short run's losses on more would take as long


def recipes(file: Path, tokens: int) -> list[Recipe]:
    """Return the sweep's recipes, shortened, with dead latents as in the whole sweep and a loss at the end."""
    found = read(file).recipes.values()
    return [
        dataclasses.replace(
            recipe,
            tokens=tokens,
            sae=dataclasses.replace(recipe.sae, dead_after=recipe.dead_after),
            curve=CurveConfig(held_out=HELD_OUT, per_octave=1, octaves=1),
        )
        for recipe in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--sweep", type=Path, default=ROOT / "recipes/sweeps/pylm.toml")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    members = recipes(asked.sweep, asked.tokens)
    folder = Path(tempfile.mkdtemp())
    try:
        began = time.monotonic()
        together = [
            run.curve()[-1]["loss"]
            for run in train_many(
                members, [folder / "together" / str(i) for i in range(len(members))]
            )
        ]
        cohort = time.monotonic() - began
        shutil.rmtree(folder / "together")
        began, alone = time.monotonic(), []
        for i, recipe in enumerate(members):
            alone.append(train(recipe, folder / str(i)).curve()[-1]["loss"])
            shutil.rmtree(folder / str(i))
            print(
                f"alone {i + 1} of {len(members)}: n {recipe.sae.n_latents}, k {recipe.sae.k}, loss {alone[-1]:.4f}, {time.monotonic() - began:.0f} s so far",
                flush=True,
            )
        single = time.monotonic() - began
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tokens = members[0].steps * members[0].batch * len(members)
    found = {
        "members": len(members),
        "tokens_each": members[0].steps * members[0].batch,
        "cohort_seconds": cohort,
        "single_seconds": single,
        "cohort_tokens_per_s": tokens / cohort,
        "single_tokens_per_s": tokens / single,
        "ratio": single / cohort,
        "worst_loss_difference": max(
            abs(one - other) / other for one, other in zip(together, alone)
        ),
    }
    print(
        f"{len(members)} SAEs, {found['tokens_each']:,} tokens each: together {cohort:.0f} s, one after another {single:.0f} s, {found['ratio']:.2f} times as fast; "
        f"final losses differ by {found['worst_loss_difference']:.2%} at most"
    )
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1))


main()
