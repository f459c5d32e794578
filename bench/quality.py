"""Trained side by side on the same activations, in the same order, with the same n, k, tokens and batch: whose error is lowest?

    python bench/quality.py                              ksparse, SAELens, dictionary_learning, sparsify
    python bench/quality.py --ours-only --lr-sweep       ksparse alone, over learning rates

Activations are computed once, with ksparse, normalised per activation to mean 0 and norm sqrt(d), and saved; every library
reads that file. Each trains in a process and a virtual environment of its own, through its own training step and with its own
defaults (peers/*.py). This file alone measures: errors, L0 and dead latents on held-out text.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"
TORCH = "torch==2.13.0"
HELD_OUT = 65_536
RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where activations come from."""

    lm: str
    site: str
    text: str


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all libraries have in common in one comparison."""

    source: str
    n: int
    k: int
    tokens: int = 1_000_000
    batch: int = 2048

    def name(self) -> str:
        return (
            f"{self.source} n={self.n} k={self.k} tokens={self.tokens / 1e6:g}M batch={self.batch}"
        )


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library: its adapter, its distribution on the package index, and a distribution that must not stay."""

    name: str
    adapter: str
    package: str = ""
    unwanted: str = ""


OURS = Peer("ksparse", "ours.py")
PEERS = (
    Peer("SAELens", "sae_lens_topk.py", "sae-lens"),
    Peer(
        "dictionary_learning", "dictionary_learning_topk.py", "dictionary-learning", "torchvision"
    ),
    Peer("sparsify", "sparsify_topk.py", "eai-sparsify", "torchvision"),
)
SETTINGS = (
    Setting("stories260k", 1024, 16),
    Setting("stories260k", 4096, 32),
    Setting("pylm/0.3m", 1024, 16),
)


def main() -> None:
    args = arguments()
    # threads that wait asleep: on a machine that does other work too, those that spin take its cores from everybody
    os.environ.update(
        OMP_NUM_THREADS=str(args.threads),
        MKL_NUM_THREADS=str(args.threads),
        OMP_WAIT_POLICY="PASSIVE",
    )
    settings = [
        dataclasses.replace(setting, tokens=args.tokens or setting.tokens)
        for setting in SETTINGS
        if setting.source in args.sources
    ]
    report = {"hardware": hardware(args), "rows": []}
    if args.lr_sweep:
        sweep(args, settings, report)
    else:
        compare(args, settings, report)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/ksparse-bench").expanduser(),
        help="environments and activations",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("quality.json"), help="where the results go, as JSON"
    )
    parser.add_argument(
        "--sources",
        nargs="+",
        default=["stories260k", "pylm/0.3m"],
        choices=["stories260k", "pylm/0.3m"],
    )
    parser.add_argument(
        "--stories",
        default=str(SHARED / "models" / "stories260k"),
        help="folder of the stories260k model",
    )
    parser.add_argument(
        "--text", default=str(SHARED / "text" / "tinystories.txt.xz"), help="text for it"
    )
    parser.add_argument(
        "--skip-install", action="store_true", help="use the environments that are there"
    )
    parser.add_argument("--ours-only", action="store_true", help="leave the other libraries out")
    parser.add_argument(
        "--lr-sweep", action="store_true", help="ksparse alone, over optim.lr_at_32k"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument(
        "--sweep-tokens", nargs="+", type=int, default=[250_000, 1_000_000, 4_000_000]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--tokens", type=int, help="tokens of each comparison, instead of 1,000,000"
    )
    parser.add_argument(
        "--options",
        type=json.loads,
        default={},
        metavar="JSON",
        help='changes of the defaults, to explain a difference: {"ksparse": {"optim": {"decay": 0.2}}, "SAELens": {"lr": 3e-3}}',
    )
    return parser.parse_args()


# ---- activations -------------------------------------------------------------------------------------------------


def prepare(setting: Setting, args: argparse.Namespace) -> Path:
    """Write train.npy and held_out.npy for a setting unless they are there; return their folder.

    Rows are in the order of training, so a shorter run with the same batch reads the beginning of a longer one's file.
    """
    folder = args.cache / "acts" / f"{setting.source.replace('/', '-')}-{setting.batch}"
    rows = setting.tokens // setting.batch * setting.batch
    if (folder / "train.npy").exists() and len(
        np.load(folder / "train.npy", mmap_mode="r")
    ) >= rows:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    print(f"activations of {setting.source}", file=sys.stderr)
    source = {
        "stories260k": Source(args.stories, "resid_post.3", args.text),
        "pylm/0.3m": Source("pylm/0.3m", "resid_post.2", "pylm"),
    }
    lm, acts = open_lm(source[setting.source])
    save(folder / "held_out.npy", scaled(held_out(lm, acts)))
    save(folder / "train.npy", training(lm, acts, rows, setting.batch))
    return folder


def save(path: Path, x: np.ndarray) -> None:
    """Write an array under another name first, so that a run that is stopped leaves no half of a file behind."""
    unfinished = path.with_suffix(".unfinished.npy")
    np.save(unfinished, x)
    unfinished.replace(path)


def open_lm(source: Source) -> tuple[Any, Any]:
    """Return the LM and the options of its activations."""
    from ksparse.config import ActsConfig
    from ksparse.lm.model import LM

    acts = ActsConfig(lm=source.lm, site=source.site, text=source.text)
    return LM(acts=acts, device="cpu"), acts


def scaled(raw: Any) -> np.ndarray:
    """Return activations with mean 0 and norm sqrt(d) each.

    That is unit_norm on the scale of layer_norm: the other libraries' defaults suppose inputs of unit variance.
    """
    from ksparse.sae.normalization import normalize

    return normalize(raw, "unit_norm").x.mul(math.sqrt(raw.shape[-1])).numpy()


def training(lm: Any, acts: Any, rows: int, batch: int) -> np.ndarray:
    """Return x[rows, d] in the order of a live stream; a short text is repeated, in another order each time."""
    from ksparse.data.contexts import Corpus
    from ksparse.data.live import LiveStream

    stream = LiveStream(lm, Corpus(acts, lm.tokenizer, "train"), batch=batch, seed=0)
    x = np.empty((rows, lm.d_model), np.float32)
    for at, raw in zip(range(0, rows, batch), stream.batches()):
        x[at : at + batch] = scaled(raw.x)
    return x


def held_out(lm: Any, acts: Any) -> Any:
    """Return raw activations [<= HELD_OUT, d] of text that is trained on by nobody, each once: it is not repeated."""
    import torch

    from ksparse.data.contexts import Corpus

    corpus = Corpus(acts, lm.tokenizer, "held-out")
    contexts = itertools.takewhile(lambda context: context.start.epoch == 0, corpus.contexts())
    parts, have = [], 0
    while have < HELD_OUT and (group := list(itertools.islice(contexts, acts.lm_batch))):
        batch = corpus.batch(group)
        parts.append(lm.acts(batch.tokens, batch.attention)[batch.keep])
        have += len(parts[-1])
    return torch.cat(parts)[:HELD_OUT]


# ---- libraries ---------------------------------------------------------------------------------------------------


def python_of(peer: Peer, args: argparse.Namespace) -> str | None:
    """Return the interpreter that has a library, after installing it if that is allowed; None, and one line, if not to be had."""
    if not peer.package:
        return sys.executable
    folder = args.cache / peer.package
    python = folder / "bin" / "python"
    try:
        if not args.skip_install and not (folder / "installed").exists():
            install(peer, folder, python)
        subprocess.run(
            [python, "-m", "pip", "show", "-q", peer.package],
            check=True,
            capture_output=True,
            text=True,
        )
        return str(python)
    except (subprocess.CalledProcessError, OSError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        print(f"{peer.name} is left out: {lines[-1] if lines else error}")
        return None


def install(peer: Peer, folder: Path, python: Path) -> None:
    print(f"installing {peer.package}", file=sys.stderr)
    subprocess.run(
        [sys.executable, "-m", "venv", folder], check=True, capture_output=True, text=True
    )
    # torch first and at our version: the requirement of the library is then met, and does not bring another build
    for arguments in (["install", TORCH], ["install", peer.package, TORCH]):
        subprocess.run(
            [python, "-m", "pip", "-q", *arguments], check=True, capture_output=True, text=True
        )
    if peer.unwanted:
        # pulled in by a dependency, built for another torch, used by nobody here, and fatal on import
        subprocess.run(
            [python, "-m", "pip", "-q", "uninstall", "-y", peer.unwanted],
            check=True,
            capture_output=True,
            text=True,
        )
    (folder / "installed").touch()


def train(
    peer: Peer,
    python: str,
    setting: Setting,
    seed: int,
    options: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train one library's autoencoder in a process of its own; return what it says and what we measure."""
    data = prepare(setting, args)
    with tempfile.TemporaryDirectory() as folder:
        said = run_adapter(
            peer,
            python,
            data,
            Path(folder),
            dataclasses.asdict(setting) | {"seed": seed},
            options,
            args,
        )
        return {
            "library": peer.name,
            "setting": setting.name(),
            "seed": seed,
            "changed": options,
            **measure(data, Path(folder)),
            **said,
        }


def run_adapter(
    peer: Peer,
    python: str,
    data: Path,
    out: Path,
    values: dict[str, Any],
    options: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Run one adapter; it leaves its reconstructions in `out`. Return what it says: seconds, defaults, versions."""
    values = values | {
        "data": data,
        "out": out,
        "threads": args.threads,
        "options": json.dumps(options),
    }
    flags = [f"--{key}={value}" for key, value in values.items() if key != "source"]
    command = [python, str(HERE / "peers" / peer.adapter), *flags]
    quiet = {
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "",
    }
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{peer.name} failed with exit status {done.returncode}:\n{done.stderr[-4000:]}"
        )
    return json.loads((out / "facts.json").read_text(encoding="utf-8"))


def measure(data: Path, out: Path) -> dict[str, float]:
    """Return normalised MSE, L0 and dead share on the held-out rows: for all libraries alike, in float64."""
    x = np.load(data / "held_out.npy").astype(np.float64)
    made = np.load(out / "held_out.npz")
    total = np.square(x - x.mean(0)).sum()
    numbers = {
        "nmse": np.square(x - made["recon"]).sum() / total,
        "l0": made["active"].mean(),
        "dead": (made["fired"] == 0).mean(),
    }
    if "raw_recon" in made:
        numbers["nmse_raw"] = np.square(x - made["raw_recon"]).sum() / total
    return {key: float(value) for key, value in numbers.items()}


# ---- the two questions -------------------------------------------------------------------------------------------


def compare(args: argparse.Namespace, settings: list[Setting], report: dict[str, Any]) -> None:
    """Print one table: all libraries, all settings."""
    found = [
        (peer, python_of(peer, args)) for peer in ((OURS,) if args.ours_only else (OURS, *PEERS))
    ]
    print("| setting | library | normalised MSE | L0 | dead | seconds |\n|---|---|---|---|---|---|")
    for setting, seed, (peer, python) in itertools.product(settings, args.seeds, found):
        if python is None:
            continue
        row = train(peer, python, setting, seed, args.options.get(peer.name, {}), args)
        record(row, report, args)
        name = f"{peer.name} {row['versions'][peer.package or 'ksparse']}" + (
            f" {row['changed']}" if row["changed"] else ""
        )
        print(
            f"| {row['setting']} | {name} | {row['nmse']:.4f} | {row['l0']:.1f} "
            f"| {row['dead']:.1%} | {row['seconds']:.0f} |",
            flush=True,
        )
    if any(row["library"] != OURS.name for row in report["rows"]):
        print(verdict(report["rows"]))


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say in how many comparisons nobody's error is below ours."""
    groups: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["seed"]), {})[row["library"]] = row["nmse"]
    won = sum(group[OURS.name] <= min(group.values()) for group in groups.values())
    return f"\nksparse has the lowest error in {won} of {len(groups)} comparisons."


def sweep(args: argparse.Namespace, settings: list[Setting], report: dict[str, Any]) -> None:
    """Print one table: normalised MSE, averaged weights / raw weights, by learning rate."""
    print(
        "| setting | "
        + " | ".join(f"{rate:g}" for rate in args.rates)
        + " |\n|---|"
        + "---|" * len(args.rates)
    )
    for tokens, setting in itertools.product(args.sweep_tokens, settings):
        setting, cells = dataclasses.replace(setting, tokens=tokens), []
        prepare(
            dataclasses.replace(setting, tokens=max(args.sweep_tokens)), args
        )  # once, for all lengths
        for rate in args.rates:
            options = merged(args.options.get(OURS.name, {}), rate)
            row = train(OURS, sys.executable, setting, args.seeds[0], options, args) | {
                "lr_at_32k": rate
            }
            record(row, report, args)
            cells.append(f"{row['nmse']:.4f} / {row['nmse_raw']:.4f} ({row['dead']:.0%})")
        print(f"| {setting.name()} | " + " | ".join(cells) + " |", flush=True)


def record(row: dict[str, Any], report: dict[str, Any], args: argparse.Namespace) -> None:
    """Add a row and write the report, so that a run that is stopped leaves what it has."""
    report["rows"].append(row)
    args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


def merged(options: dict[str, Any], rate: float) -> dict[str, Any]:
    return options | {"optim": options.get("optim", {}) | {"lr_at_32k": rate}}


def hardware(args: argparse.Namespace) -> dict[str, Any]:
    model = (
        next(
            (
                line.split(":")[1].strip()
                for line in Path("/proc/cpuinfo").read_text().splitlines()
                if "model name" in line
            ),
            "",
        )
        if Path("/proc/cpuinfo").exists()
        else ""
    )
    return {
        "platform": platform.platform(),
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": args.threads,
    }


if __name__ == "__main__":
    main()
