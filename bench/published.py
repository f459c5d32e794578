"""Does ksparse compute what the makers' registry computes, for every kind of published SAE?

    python bench/published.py --python ENV/bin/python

ENV has sae-lens==6.54.12 and dictionary-learning==0.1.0 (`pip install torch==2.13.0` first). peers/formats_published.py makes small files in a local mirror of
the Hub's layout and lets SAELens' loaders read them; here `ksparse.load` reads the same names. Printed: the largest differences, and the site and LM that were read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

BOUND = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--python", required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        script = Path(__file__).resolve().parent / "peers" / "formats_published.py"
        subprocess.run(
            [args.python, str(script), folder], check=True, env=os.environ | {"PYTHONPATH": ""}
        )
        os.environ |= {"HF_HUB_CACHE": f"{folder}/hub", "HF_HUB_OFFLINE": "1"}
        failed = compare(Path(folder))
    sys.exit(failed)


@torch.no_grad()
def compare(folder: Path) -> int:
    import ksparse  # after HF_HUB_CACHE is set

    failed = 0
    for number, name in enumerate(json.loads((folder / "names.json").read_text())):
        expected = {
            key: torch.from_numpy(value)
            for key, value in np.load(folder / "expected" / f"{number}.npz").items()
        }
        sae = ksparse.load(name)
        latents = sae.encode(expected["x"]).dense(sae.shape.n_latents)
        scale = max(1.0, expected["latents"].abs().max().item())
        differences = (
            (latents - expected["latents"]).abs().max() / scale,
            (sae(expected["x"]) - expected["recon"]).abs().max() / scale,
        )
        sets = int(((latents > 0) != (expected["latents"] > 0)).sum())
        good = max(differences) <= BOUND and sets == 0
        failed += not good
        origin = sae.metadata["origin"]
        print(
            f"{'ok  ' if good else 'FAIL'} {differences[0]:.1e} {differences[1]:.1e} {sets:3d}  {name:<82} {origin['format']:<19} {origin.get('site')} {origin.get('lm')}"
        )
    return failed


if __name__ == "__main__":
    main()
