"""How does a step's cost grow with the number of latents? Runs `ksparse bench` for each and draws docs/figures/step-cost.svg.

python bench/sizes.py [--latents 1536 6144 24576 98304] [--rounds 5] [--from FOLDER of nN.json that there are already]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ksparse.bench import Setting, bench

NAMES = {
    "torch": "plain torch",
    "exact": "compiled, exact",
    "product": "encoder product alone",
    "screened": "compiled, screened",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latents", type=int, nargs="+", default=[1536, 6144, 24_576, 98_304])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--from", dest="folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/step-cost.svg"))
    asked = parser.parse_args()
    found = [
        json.loads((asked.folder / f"n{n}.json").read_text())
        if asked.folder
        else bench(Setting(n=n, rounds=asked.rounds), only=tuple(NAMES))
        for n in asked.latents
    ]
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    draw(found, asked.out)


def draw(found: list[dict], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, words in NAMES.items():
        points = [
            (row["n"], 1000 * row["contestants"][name]["best_seconds"])
            for row in found
            if name in row["contestants"]
        ]
        axes.plot(
            *zip(*points),
            marker="o",
            markersize=4,
            linestyle="--" if name == "product" else "-",
            label=words,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([row["n"] for row in found], [f"{row['n']:,}" for row in found])
    axes.minorticks_off()
    axes.set_xlabel("latents")
    axes.set_ylabel("milliseconds of a step")
    first = found[0]
    axes.set_title(
        f"d {first['d']:,} · k {first['k']} · batch {first['batch']:,} · {first['threads']} threads",
        fontsize=10,
        loc="left",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main()
