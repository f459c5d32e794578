"""What every pipeline shares: its arguments, the text, and the line it prints. Needs torch only, whatever else the library brings."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch


def arguments() -> argparse.Namespace:
    """Parse what end_to_end.py hands to each pipeline."""
    parser = argparse.ArgumentParser()
    for name in ("lm", "text", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in (
        "d",
        "layer",
        "context",
        "lm-batch",
        "mix",
        "n",
        "k",
        "batch",
        "tokens",
        "seed",
        "threads",
    ):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def texts(args: argparse.Namespace) -> Iterator[str]:
    """Yield the documents, again and again."""
    while True:
        with args.text.open(encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)


class Clock:
    """Begins when it is made: after the imports, before the LM is loaded. `stop` is called when the SAE is on disk."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), os.times()

    def stop(self, args: argparse.Namespace, package: str, tokens: int, **defaults: object) -> None:
        """Print what was measured, as the last line; defaults: what the library chose by itself."""
        now = os.times()
        cpu = sum(
            getattr(now, name) - getattr(self.cpu, name)
            for name in ("user", "system", "children_user", "children_system")
        )
        print(
            "\n"
            + json.dumps(
                {
                    "seconds": time.monotonic() - self.wall,
                    "cpu_seconds": cpu,
                    "tokens": tokens,
                    "package": package,
                    "version": version(package),
                    "defaults": {key: str(value) for key, value in defaults.items()},
                }
            )
        )
