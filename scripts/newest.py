"""Does it still work with the newest versions of everything? The wheel, a clean environment, every verb, the demo.

    python scripts/newest.py [--keep-torch VERSION]

torch is installed first, at the version of constraints.txt unless another is named, so that a machine without a GPU does
not download gigabytes for one; all else is unpinned.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("demo", "train", "resume", "eval", "report", "view", "shard", "plan", "doctor")


def run(*command: object, cwd: Path) -> None:
    began = time.monotonic()
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True)
    print(
        f"{'ok  ' if done.returncode == 0 else 'FAIL'} {time.monotonic() - began:6.1f} s  {' '.join(words[1:])}",
        flush=True,
    )
    if done.returncode:
        sys.exit(done.stdout[-4000:] + done.stderr[-4000:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    parser.add_argument("--keep-torch", default=pinned, help="version of torch; '' for the newest")
    torch = parser.parse_args().keep_torch
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        venv.create(work / "env", with_pip=True)
        python, ksparse = work / "env/bin/python", work / "env/bin/ksparse"
        os.environ.pop("PYTHONPATH", None)
        run(
            python,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--wheel-dir",
            work,
            ROOT,
            cwd=work,
        )
        run(
            python,
            "-m",
            "pip",
            "install",
            "--quiet",
            f"torch=={torch}" if torch else "torch",
            cwd=work,
        )
        run(python, "-m", "pip", "install", "--quiet", *work.glob("ksparse-*.whl"), cwd=work)
        run(ksparse, "--help", cwd=work)
        for verb in VERBS:
            run(ksparse, verb, "--help", cwd=work)
        run(ksparse, "doctor", cwd=work)
        run(ksparse, "demo", cwd=work)


if __name__ == "__main__":
    main()
