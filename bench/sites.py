"""Several sites of an LM in one pass against a run for each: the same bits, and how much less time.

    python bench/sites.py --lm pylm/1.9m --site 'resid_post.*' --n 512 4096 --out DIR

Trains the sites together, then each alone, in turn, `--rounds` times in one process, and compares
every tensor of the last checkpoints and every number of metrics.jsonl that is no time. Times are
those of the processor (`time.process_time`), since a machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import ksparse
from ksparse.storage.run_folder import RunFolder

TIMES = ("seconds", "tokens_per_s", "waiting")


def main() -> None:
    """Measure, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lm", default="pylm/1.9m")
    parser.add_argument("--site", nargs="+", default=["resid_post.*"])
    parser.add_argument("--n", nargs="+", type=int, default=[512, 4096])
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--mix", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [measure(args, n) for n in args.n]
    print(f"{'latents':>8}{'together':>10}{'apart':>10}{'ratio':>8}  same bits")
    for row in results:
        print(
            f"{row['n']:>8,}{row['together']:>9.1f}s{row['apart']:>9.1f}s{row['ratio']:>8.2f}  "
            f"{row['same']} of {row['sites']} sites"
        )
    machine = {"torch": torch.__version__, "processor": platform.machine()}
    table = {"arguments": {**vars(args), "out": ""}, "machine": machine, "results": results}
    (args.out / "sites.json").write_text(json.dumps(table, indent=1) + "\n")


def measure(args: argparse.Namespace, n: int) -> dict[str, Any]:
    """Train together and apart, in turn; return the least times and how many sites agree."""
    together, apart, same = [], [], []
    for number in range(args.rounds):
        folder = args.out / f"n{n}-{number}"
        began = time.process_time()
        runs = train(args, n, folder / "together", args.site)
        together.append(time.process_time() - began)
        began = time.process_time()
        alone = {site: train(args, n, folder / "apart" / site, site) for site in runs}
        apart.append(time.process_time() - began)
        same.append(sum(held(runs[site]) == held(alone[site]) for site in runs))
        shutil.rmtree(folder)
    return {
        "n": n,
        "sites": len(runs),
        "same": min(same),
        "together": min(together),
        "apart": min(apart),
        "ratio": min(apart) / min(together),
        "rounds": {"together": together, "apart": apart},
    }


def train(args: argparse.Namespace, n: int, out: Path, site: Any) -> Any:
    """Train at one site or several."""
    keys = {"n_latents": n, "k": args.k, "tokens": args.tokens, "mix": args.mix}
    keys |= {"threads": args.threads, "held_out": 2048, "octaves": 3, "device": "cpu"}
    return ksparse.train(lm=args.lm, site=site, out=out, progress=False, **keys)


def held(run: RunFolder) -> tuple[Any, ...]:
    """Return all that a run holds but times, tensors as bytes."""
    last = run.checkpoints()[-1]
    tensors = {
        f"{name}/{key}": tensor.numpy().tobytes()
        for name in ("sae.safetensors", "optim.safetensors")
        for key, tensor in load_file(last / name).items()
    }
    rows = [
        [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
        for rows in (run.metrics(), run.curve())
    ]
    state = json.loads((last / "state.json").read_text())
    return tensors, rows, {key: value for key, value in state.items() if key not in TIMES}


if __name__ == "__main__":
    main()
