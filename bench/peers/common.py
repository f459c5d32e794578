"""What every adapter shares: its arguments, the saved batches, and the file that it leaves. Needs numpy and torch only.

An adapter trains one library's TopK autoencoder on data/train.npy (rows in order, `batch` of them a step), encodes and
decodes data/held_out.npy, and calls `finish`. It measures nothing itself: quality.py does that, with one function.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHUNK = 4096


def arguments() -> argparse.Namespace:
    """Parse what quality.py hands to each adapter."""
    parser = argparse.ArgumentParser()
    for name in ("data", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("n", "k", "tokens", "batch", "seed", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        help="changes of the library's defaults, for explanations",
    )
    parser.add_argument(
        "--save", type=Path, help="save the SAE there, in the library's format, and measure nothing"
    )
    parser.add_argument(
        "--belongs",
        type=json.loads,
        default={},
        help="with --save: LM, site, context, and the factor that inputs are multiplied by",
    )
    args = parser.parse_args()
    args.steps = args.tokens // args.batch
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def training_rows(args: argparse.Namespace) -> torch.Tensor:
    """Return x[steps * batch, d] in memory, so that reading the disk is in nobody's time."""
    rows = np.load(args.data / "train.npy", mmap_mode="r")[: args.steps * args.batch]
    assert len(rows) == args.steps * args.batch, "too few rows were prepared"
    return torch.from_numpy(np.array(rows))


def batches(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    yield from training_rows(args).split(args.batch)


def write_facts(folder: Path, seconds: float, defaults: dict[str, Any], package: str) -> None:
    """Write what was run: facts.json."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "seconds": seconds,
        "defaults": defaults,
        "versions": {
            package: version(package),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1, default=str), encoding="utf-8")


@torch.no_grad()
def finish(
    args: argparse.Namespace,
    encode: Callable[[torch.Tensor], torch.Tensor],
    decode: Callable[[torch.Tensor], torch.Tensor],
    *,
    seconds: float,
    defaults: dict[str, Any],
    package: str,
    **arrays: np.ndarray,
) -> None:
    """Write reconstructions, active latents per row, and firings per latent of the held-out rows; and what was run.

    encode: x[b, d] -> acts[b, n], dense. decode: acts[b, n] -> recon[b, d].
    """
    rows = torch.from_numpy(np.load(args.data / "held_out.npy"))
    recon, active, fired = [], [], torch.zeros(args.n, dtype=torch.long)
    for x in rows.split(CHUNK):
        acts = encode(x)
        assert acts.shape == (len(x), args.n), acts.shape
        recon.append(decode(acts).float())
        active.append((acts > 0).sum(1))
        fired += (acts > 0).sum(0)
    args.out.mkdir(parents=True, exist_ok=True)
    np.savez(
        args.out / "held_out.npz",
        recon=torch.cat(recon).numpy(),
        active=torch.cat(active).numpy(),
        fired=fired.numpy(),
        **arrays,
    )
    write_facts(args.out, seconds, defaults, package)
