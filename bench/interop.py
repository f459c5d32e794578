"""Do the libraries themselves agree? Their SAEs read here, ours read there, on real activations.

    python bench/interop.py --python sae_lens=ENV/bin/python --python dictionary_learning=… --python sparsify=… --python llamascopium=…
    python bench/interop.py --python … --golden tests/golden/interop      small ones, for the tests

Each library is in an environment of its own (`pip install torch==2.13.0`, then sae-lens==6.54.12, dictionary-learning==0.1.0 or eai-sparsify==1.3.3 without the
torchvision that comes along, llamascopium==2.0.0b34); those not named are left out. openai/sparse_autoencoder is not on the package index: its files are
written and read by peers/formats_openai.py, by hand. Gemma Scope's are written by hand and read by SAELens. Activations are those of pylm/0.3m at resid_post.2,
on held-out text. Differences are the largest over all of them, in units of the root mean square of the activations (latents: of the SAE's inputs).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ksparse import interop
from ksparse.config import Recipe, from_dict
from ksparse.data.contexts import Corpus
from ksparse.errors import InputError
from ksparse.lm.model import LM
from ksparse.sae.model import SAE
from ksparse.training.train import train

HERE = Path(__file__).resolve().parent
RUNS_ON = {
    "sae_lens": "sae_lens",
    "dictionary_learning": "dictionary_learning",
    "sparsify": "sparsify",
    "llamascopium": "llamascopium",
    "openai": "sae_lens",
    "gemma_scope": "sae_lens",
}
"""The library whose environment an adapter needs; openai's needs torch alone."""
BOUND = 1e-5
ROWS = 512
OURS = [
    ("topk", "none"),
    ("topk", "dataset"),
    ("topk", "layer_norm"),
    ("topk", "unit_norm"),
    ("batch_topk", "dataset"),
    ("relu", "dataset"),
    ("relu", "none"),
    ("jump_relu", "dataset"),
    ("gated", "dataset"),
]


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    pythons = dict(each.split("=", 1) for each in args.python)
    adapters = {
        adapter: pythons[library] for adapter, library in RUNS_ON.items() if library in pythons
    }
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        raw = activations()
        np.save(work / "raw.npy", raw.numpy())
        np.save(
            work / "acts.npy", (raw / raw.square().mean().sqrt()).numpy()
        )  # as all who train on them scale them
        if args.golden:
            golden(args.golden, adapters, work)
            return
        rows = theirs(adapters, work) + ours(adapters, work)
    for row in rows:
        print(
            f"{row['direction']:<7}{row['format']:<21}{row['kind']:<26}"
            + (
                f"latents {row['latents']:.1e}   recon {row['recon']:.1e}"
                if "recon" in row
                else row["refused"]
            )
        )
    worst = max(
        (max(row["latents"], row["recon"]) for row in rows if row.get("exact")), default=0.0
    )
    print(
        f"largest difference where nothing was asked to be inexact: {worst:.1e} ({'within' if worst <= BOUND else 'ABOVE'} {BOUND:.0e})"
    )
    args.out.write_text(
        json.dumps(
            {"bound": BOUND, "worst": worst, "torch": torch.__version__, "rows": rows}, indent=1
        )
        + "\n"
    )
    sys.exit(worst > BOUND)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="LIBRARY=PATH",
        help="the interpreter of the library's environment",
    )
    parser.add_argument("--out", type=Path, default=Path("interop.json"))
    parser.add_argument(
        "--golden",
        type=Path,
        help="write small files with their expected outputs there, and nothing else",
    )
    return parser.parse_args()


def activations() -> torch.Tensor:
    """Return raw held-out activations [rows, d]."""
    lm = LM("pylm/0.3m", site="resid_post.2")
    corpus = Corpus(lm.options, lm.tokenizer, "held-out", per_document=64)
    found: list[torch.Tensor] = []
    for context in corpus.contexts():
        batch = corpus.batch([context])
        found.append(lm.acts(batch.tokens, batch.attention)[batch.keep])
        if sum(map(len, found)) >= ROWS:
            break
    return torch.cat(found)[:ROWS]


def adapter(name: str, python: str, what: str, folder: Path, acts: Path, *more: str) -> None:
    """Run one adapter; stop with what it says if it fails."""
    command = [python, HERE / "peers" / f"formats_{name}.py", what, folder, acts, *more]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        sys.exit(f"{name} {what} failed:\n{done.stderr[-3000:]}")


def differences(sae: SAE, expected: Any) -> dict[str, float]:
    x = torch.from_numpy(expected["x"])
    size = x.square().mean().sqrt().item()
    with torch.no_grad():
        latents, recon = sae.encode(x).dense(sae.shape.n_latents).numpy(), sae(x).numpy()
    own = sae.normalize(x).x.square().mean().sqrt().item()
    return {
        "latents": float(abs(latents - expected["latents"]).max()) / own,
        "recon": float(abs(recon - expected["recon"]).max()) / size,
    }


def theirs(adapters: dict[str, str], work: Path) -> list[dict[str, Any]]:
    """Read what each library made of its own."""
    rows = []
    for name, python in adapters.items():
        adapter(name, python, "make", work / name, work / "acts.npy")
        for folder in sorted(work.joinpath(name).iterdir()):
            found = differences(interop.load(folder / "sae"), np.load(folder / "expected.npz"))
            rows.append(
                {"direction": "theirs", "format": name, "kind": folder.name, "exact": True, **found}
            )
    return rows


def ours(adapters: dict[str, str], work: Path) -> list[dict[str, Any]]:
    """Write what ksparse trained in each format that holds it, and let the library read it."""
    saes = {
        f"{activation}-{normalize}": trained(activation, normalize, work)
        for activation, normalize in OURS
    }
    rows = []
    for name, python in adapters.items():
        folder = work / f"to-{name}"
        for kind, sae in saes.items():
            try:
                interop.write(sae, folder / kind / "sae", name, normalization="layer_norm")
            except InputError as error:
                rows.append(
                    {
                        "direction": "ours",
                        "format": name,
                        "kind": kind,
                        "refused": str(error).partition(";")[0],
                    }
                )
        adapter(name, python, "check", folder, work / "raw.npy")
        for each in sorted(folder.iterdir()):
            found = differences(saes[each.name], np.load(each / "expected.npz"))
            rows.append(
                {
                    "direction": "ours",
                    "format": name,
                    "kind": each.name,
                    "exact": "unit_norm" not in each.name,
                    **found,
                }
            )
    return rows


def trained(activation: str, normalize: str, work: Path) -> SAE:
    """Return an SAE that ksparse trained for a little while."""
    table = {
        "acts": {"lm": "pylm/0.3m", "site": "resid_post.2", "normalize": normalize},
        "sae": {"n_latents": 256, "k": 8, "activation": {"kind": activation}},
        "tokens": 60_000,
        "threads": 1,
        "run": {"device": "cpu", "kernels": "torch"},
    }
    recipe: Recipe = from_dict(table)
    return interop.load(train(recipe, work / "runs" / f"{activation}-{normalize}").path)


def golden(folder: Path, adapters: dict[str, str], work: Path) -> None:
    """Write a few KB of each library: 16 latents on 8 channels, with what the library makes of 5 rows."""
    np.save(work / "small.npy", np.load(work / "acts.npy")[:, :8])
    for name, python in adapters.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        adapter(
            name,
            python,
            "make",
            folder / name,
            work / "small.npy",
            "--n",
            "16",
            "--k",
            "3",
            "--rows",
            "5",
        )
        print(name, ", ".join(sorted(path.name for path in (folder / name).iterdir())))


if __name__ == "__main__":
    main()
