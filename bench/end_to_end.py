"""From text to a trained SAE, LM included: tokens per second beside other libraries, each through its own documented pipeline.

    python bench/end_to_end.py [--tokens 200000] [--rounds 3] [--environments FOLDER with saelens/, dl/, peers/] [--json FILE]

Equal for all: the LM's folder, the text, the site, contexts, n, k, batch, tokens, activations that are mixed, contexts in a pass of the LM (a library
that cannot have one of these says so in its pipeline). Everything else is each library's default: learning rate, optimiser, AuxK, what it logs
and saves. Time begins after the imports and before the LM is loaded, and ends when the SAE is on disk. Each run is a process of its own;
libraries take turns. Errors of the SAEs are not compared here: quality.py does that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PIPELINES = {
    "ksparse": ("ours.py", ""),
    "sparsify": ("sparsify_trainer.py", "peers"),
    "SAELens": ("sae_lens_runner.py", "saelens"),
    "dictionary_learning": ("dictionary_learning_buffer.py", "dl"),
}
SETTING = {
    "d": 160,
    "layer": 3,
    "context": 64,
    "lm-batch": 64,
    "mix": 65_536,
    "n": 4096,
    "k": 32,
    "batch": 1024,
}  # the demo's


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(PIPELINES), choices=PIPELINES)
    parser.add_argument(
        "--environments",
        type=Path,
        default=Path("~/.cache/sae_bench_venvs").expanduser(),
        help="a folder of virtual environments",
    )
    parser.add_argument("--json", type=Path, default=Path("end_to_end.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = write_text(Path(folder) / "text.jsonl", 12 * args.tokens)
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
        for number in range(args.rounds):
            for name in args.only[number % len(args.only) :] + args.only[: number % len(args.only)]:
                rows[name].append(run(name, text, number, args))
                args.json.write_text(
                    json.dumps(
                        {
                            "setting": SETTING,
                            "tokens": args.tokens,
                            "threads": args.threads,
                            "runs": rows,
                        },
                        indent=1,
                    ),
                    encoding="utf-8",
                )
    show({name: [row for row in each if "seconds" in row] for name, each in rows.items()})


def write_text(path: Path, characters: int) -> Path:
    """Write the beginning of the built-in text, enough for one pass of every library."""
    from ksparse import pylm

    with path.open("w", encoding="utf-8") as out:
        for _, text in pylm.documents("train"):
            out.write(json.dumps({"text": text}) + "\n")
            characters -= len(text)
            if characters < 0:
                break
    return path


def run(name: str, text: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Run one library's pipeline; return what it measured, or why there is nothing."""
    from ksparse import pylm

    file, environment = PIPELINES[name]
    python = (
        args.environments / environment / "bin" / "python" if environment else Path(sys.executable)
    )
    if not python.exists():
        return {"failed": f"no {python}"}
    with tempfile.TemporaryDirectory() as out:
        values = SETTING | {
            "lm": pylm.folder("1.9m"),
            "text": text,
            "out": out,
            "tokens": args.tokens,
            "seed": seed,
            "threads": args.threads,
        }
        threads = {key: str(args.threads) for key in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        quiet = {
            "WANDB_MODE": "disabled",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HOME": out,
        }
        ours = {"PYTHONPATH": str(HERE.parent / "src")} if not environment else {"PYTHONPATH": ""}
        done = subprocess.run(
            [
                str(python),
                str(HERE / "pipelines" / file),
                *(f"--{key}={value}" for key, value in values.items()),
            ],
            capture_output=True,
            text=True,
            cwd=out,
            env=os.environ | threads | quiet | ours,
        )
    if done.returncode:
        print(f"{name} failed:\n{done.stderr[-3000:]}", file=sys.stderr)
        return {"failed": done.stderr[-3000:]}
    row = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}: {row['tokens'] / row['seconds']:,.0f} tokens/s", file=sys.stderr, flush=True)
    return row


def show(rows: dict[str, list[dict[str, Any]]]) -> None:
    """Print a table: the best and the median round, and tokens per second of CPU time, which other work on the machine disturbs less."""
    print(
        "| library | tokens/s, best | median | per CPU second, best | defaults |\n|---|---|---|---|---|"
    )
    for name, each in rows.items():
        if each:
            speed, cpu = (
                [row["tokens"] / row["seconds"] for row in each],
                [row["tokens"] / row["cpu_seconds"] for row in each],
            )
            defaults = ", ".join(f"{key} {value}" for key, value in each[0]["defaults"].items())
            print(
                f"| {name} {each[0]['version']} | {max(speed):,.0f} | {statistics.median(speed):,.0f} | {max(cpu):,.0f} | {defaults} |"
            )


if __name__ == "__main__":
    main()
