"""What the adapters of bench/interop.py share: SAEs that a library made go out, SAEs in its format come in. Needs numpy and torch only.

python formats_LIBRARY.py make  FOLDER ACTS.npy     FOLDER/KIND/sae: as the library saves it; FOLDER/KIND/expected.npz: x, its latents, its reconstruction
python formats_LIBRARY.py check FOLDER ACTS.npy     reads FOLDER/KIND/sae as the library does; the same expected.npz
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

Both = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""encode: x[b, d] -> latents[b, n], dense. decode: (latents, x) -> recon[b, d]."""


def run(
    make: dict[str, Callable[[Tensor, Path, int, int], Both]], load: Callable[[Path], Both]
) -> None:
    """Do what the command line asks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["make", "check"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("acts", type=Path)
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument(
        "--rows", type=int, default=0, help="rows of the acts that go into expected.npz; 0: all"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.from_numpy(np.load(args.acts))
    if args.what == "make":
        for kind, function in make.items():
            torch.manual_seed(0)
            folder = args.folder / kind / "sae"
            folder.mkdir(parents=True)
            save(args.folder / kind, x[: args.rows or len(x)], function(x, folder, args.n, args.k))
    else:
        for folder in sorted(path for path in args.folder.iterdir() if path.is_dir()):
            save(folder, x[: args.rows or len(x)], load(folder / "sae"))


@torch.no_grad()
def save(folder: Path, x: Tensor, both: Both) -> None:
    encode, decode = both
    latents = encode(x)
    np.savez_compressed(
        folder / "expected.npz",
        x=x.numpy(),
        latents=latents.numpy(),
        recon=decode(latents, x).detach().numpy(),
    )


def fit(
    parameters: Iterable[Tensor], recon: Callable[[Tensor], Tensor], x: Tensor, steps: int = 60
) -> None:
    """Train a little, from biases that are not 0, so that every number of the file matters."""
    parameters = [each for each in parameters if each.requires_grad]
    with torch.no_grad():
        for each in parameters:
            if each.ndim == 1:
                each.add_(0.05 * x.std() * torch.randn_like(each))
    optimizer = torch.optim.Adam(parameters, lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        (recon(x) - x).square().mean().backward()
        optimizer.step()
