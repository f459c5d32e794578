"""Kill a training run at random moments, resume it each time, and compare it with an undisturbed one, bit for bit.

    python bench/faults.py --kills 20 [--lm FOLDER --site SITE --text FILE]

Prints how often the run was killed, how many of the kills fell into the writing of a checkpoint, how many steps were done
twice, and whether the final weights, moments and averages are the same bytes. Exit code 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ksparse.files import sha256
from ksparse.runs import RunFolder


def command(options: argparse.Namespace, out: Path) -> list[str]:
    words = [sys.executable, "-m", "ksparse", "train", "--acts.lm", options.lm, "--acts.site", options.site, "--acts.text", options.text,
             "--acts.mix", "16384", "--sae.n-latents", "1024", "--sae.k", "16", "--tokens", str(options.tokens), "--batch", "512",
             "--run.save-every", "10", "--run.log-every", "1", "--run.device", "cpu", "--out", str(out)]
    return words


def start(options: argparse.Namespace, out: Path) -> subprocess.Popen:
    return subprocess.Popen(command(options, out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_training(process: subprocess.Popen, run: RunFolder) -> None:
    """Wait until the process has done a step of its own, or has ended."""
    size = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
    seen_smaller = False
    while process.poll() is None:
        now = run.metrics_file.stat().st_size if run.metrics_file.exists() else 0
        seen_smaller |= now < size  # a resumed run first drops the lines of steps that it will do again
        if now > size or (seen_smaller and now > 0):
            return
        time.sleep(0.01)


def disturbed(options: argparse.Namespace, out: Path) -> dict[str, int]:
    """Run to the end, killed `kills` times: some moments after a start, before training or in it."""
    run, counts = RunFolder(out), {"kills": 0, "in_checkpoint": 0, "before_first_step": 0, "steps_again": 0}
    draw = random.Random(options.seed)
    while True:
        process = start(options, out)
        if counts["kills"] == options.kills:
            _, errors = process.communicate()
            if process.returncode:
                sys.exit(f"the resumed run failed:\n{errors}")
            return counts
        if draw.random() < 0.15:
            time.sleep(draw.uniform(0, 6))  # while it starts
        else:
            wait_for_training(process, run)
            time.sleep(draw.uniform(0, options.longest))
        if process.poll() == 0:
            sys.exit(f"the run ended after {counts['kills']} kills; give more --tokens or a smaller --longest")
        process.kill()
        process.wait()
        counts["kills"] += 1
        counts["in_checkpoint"] += any((out / "checkpoints").glob(".tmp-*")) if out.exists() else 0
        rows = run.metrics()
        saved = run.newest_intact()[0]
        done = rows[-1]["step"] if rows else 0
        counts["before_first_step"] += not rows
        counts["steps_again"] += done - (int(saved.name.removeprefix("step-")) if saved else 0)


def state_of(out: Path) -> dict[str, str]:
    newest, wrong = RunFolder(out).newest_intact()
    if newest is None or wrong:
        sys.exit(f"damaged checkpoints in {out}: {wrong}")
    return {name: sha256(newest / name) for name in ("sae.safetensors", "optim.safetensors")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds of training before a kill, at most")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm", default="pylm/0.3m")
    parser.add_argument("--site", default="resid_post.2")
    parser.add_argument("--text", default="pylm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        _, errors = (process := start(options, whole)).communicate()
        if process.returncode:
            sys.exit(f"the undisturbed run failed:\n{errors}")
        counts = disturbed(options, killed)
        strip = [{key: row[key] for key in ("step", "nmse", "auxk", "dead", "grad_norm")} for row in RunFolder(whole).metrics()]
        again = [{key: row[key] for key in ("step", "nmse", "auxk", "dead", "grad_norm")} for row in RunFolder(killed).metrics()]
        result = counts | {"steps": strip[-1]["step"], "same_files": state_of(whole) == state_of(killed), "same_metrics": strip == again}
    print(json.dumps(result))
    sys.exit(0 if result["same_files"] and result["same_metrics"] else 1)


if __name__ == "__main__":
    main()
