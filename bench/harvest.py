"""How fast do libraries read an LM's activations? The same contexts, in turn, each library in a process and environment of its own.

python bench/harvest.py --lm FOLDER --layer 12 --python sae_lens_store=VENV/bin/python

Contestants are the files of bench/harvesters/. --python names the interpreter of one; the others run with this one. Ratios are
the median, over rounds, of a contestant's time over ours in the same round, by wall and by processor time. A contestant whose
activations differ from ours is an error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
NAMES = ("ours", "hooked_base", "sae_lens_store")


class Contestant:
    """An adapter's process."""

    def __init__(self, python: str, name: str, words: list[str]):
        self.name = name
        env = dict(os.environ, HF_HUB_OFFLINE="1")
        self.process = subprocess.Popen(
            [python, str(HERE / "harvesters" / f"{name}.py"), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    def answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended; its error is above")
        return json.loads(line)

    def ask(self) -> dict[str, float]:
        print(file=self.process.stdin, flush=True)
        return self.answer()


def contexts(lm: str, text: str, count: int, length: int) -> np.ndarray:
    """Return ids [count, length] of packed text."""
    from ksparse.config import ActsConfig
    from ksparse.data.contexts import Corpus
    from ksparse.lm.loading import load_tokenizer

    acts = ActsConfig(lm=lm, text=text, context=length)
    corpus = Corpus(acts, load_tokenizer(lm, {}), "train")
    return corpus.batch(list(itertools.islice(corpus.contexts(), count))).tokens.numpy()


def measure(contestants: list[Contestant], rounds: int) -> dict[str, dict[str, Any]]:
    squares = {each.name: each.answer()["ready"] for each in contestants}
    for name, value in squares.items():
        if abs(value / squares["ours"] - 1) > 1e-4:
            raise SystemExit(
                f"{name} reads other activations: {value} instead of {squares['ours']}"
            )
    times: dict[str, list[dict[str, float]]] = {each.name: [] for each in contestants}
    for number in range(rounds):
        for each in (
            contestants[number % len(contestants) :] + contestants[: number % len(contestants)]
        ):
            times[each.name].append(each.ask())
    return {
        name: {
            f"{clock}_ratio": statistics.median(
                one[clock] / ours[clock] for one, ours in zip(each, times["ours"])
            )
            for clock in ("wall", "processor")
        }
        | {f"best_{clock}": min(one[clock] for one in each) for clock in ("wall", "processor")}
        for name, each in times.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lm", required=True, help="a folder of transformers")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--text", default="pylm")
    parser.add_argument("--contexts", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=NAMES)
    parser.add_argument("--python", nargs="*", default=[], help="NAME=INTERPRETER")
    args = parser.parse_args()
    pythons = dict(each.split("=", 1) for each in args.python)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokens.npy"
        np.save(file, contexts(args.lm, args.text, args.contexts, args.context))
        words = ["--lm", args.lm, "--tokens", str(file), "--layer", str(args.layer)]
        words += ["--threads", str(args.threads)]
        names = ["ours", *(name for name in args.only if name != "ours")]
        contestants = [Contestant(pythons.get(name, sys.executable), name, words) for name in names]
        try:
            found = measure(contestants, args.rounds)
        finally:
            for each in contestants:
                each.process.kill()
    print(json.dumps({**vars(args), "contestants": found}, indent=1))


if __name__ == "__main__":
    main()
