"""Kill a training run with SIGKILL at random moments, go on with it each time, and compare it with an undisturbed one, bit for bit.

    python bench/faults.py --kills 200                                   one process
    python bench/faults.py --kills 200 --ranks 4 --mesh.data 2 --mesh.latent 2    one rank or all of them, by turns of a coin
    python bench/faults.py --kills 20 --ranks 2 --through torchrun ...   each life is a whole `torchrun`
    python bench/faults.py --kills 100 --only eval report export labels shard convert

The last kills those commands instead (writers.py), and prints a line of JSON for each: kills, those that
left something half written, what was wrong and what was left over in the end (there must be none).

A life is `ksparse train`, the same command each time, in a process forked from one that has imported everything, since importing takes
longer than training; with several ranks, as many processes with torchrun's environment. Those that have lost a rank are to end by themselves, with an
error of their own; after 20 seconds they are killed. Moments: a seventh while it starts, else some random fraction of a step after a random step. Prints, as JSON:

    kills, of_all_ranks, while_starting, in_checkpoint   moments; in_checkpoint: a temporary folder of a checkpoint was there
    left_alone, ended           ranks that lost another one; those of them that ended by themselves, with the exit code 6
    steps, steps_again          of the run; that were taken more than once, since they came after the last checkpoint
    steps_lost                  by which a life began before the newest checkpoint that had been seen whole: must be 0
    corrupt                     checkpoints whose sums were wrong after a kill: must be 0
    seconds, seconds_undisturbed
    same_files, same_metrics    against the undisturbed run: weights, moments, averages as bytes, and every line of metrics

Exit code 1 unless nothing was lost, nothing corrupt, and all is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads would not survive the fork
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import writers

from ksparse import cli
from ksparse.errors import CorruptError
from ksparse.storage import atomic, checksums
from ksparse.storage.run_folder import RunFolder

BEGUN = re.compile(r"going on after step ([\d,]+)")
GRACE = 20.0  # seconds
SAME = ("step", "nmse", "auxk", "dead", "grad_norm", "l0")


class Life:
    """One attempt at the run: its processes, and what they said."""

    def __init__(self, options: argparse.Namespace, out: Path, log: Path):
        self.log, self.failed = log, 0.0
        log.touch()
        words = [*options.words, "--out", str(out)]
        self.pids = (
            torchrun(options, words, log)
            if options.through == "torchrun"
            else forked(options, words, log)
        )
        self.codes: dict[int, int] = {}

    def over(self) -> bool:
        """Reap who has ended; some time after one has failed, end the others."""
        for pid in set(self.pids) - set(self.codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        if any(self.codes.values()):
            self.failed = self.failed or time.monotonic()
            if time.monotonic() - self.failed > GRACE:
                self.end()
        return len(self.codes) == len(self.pids)

    def kill(self, pids: list[int]) -> None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left, and wait for it."""
        left = [pid for pid in self.pids if pid not in self.codes]
        self.kill([*left, *(child for pid in left for child in children(pid))])
        for pid in left:
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def ranks(self) -> list[int]:
        """Return the processes that train."""
        return [child for pid in self.pids for child in children(pid)] or self.pids

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def began_at(self) -> int | None:
        """Return the step after which this life went on, 0 for a new run, None if it was not said yet."""
        found = BEGUN.search(self.said())
        return int(found[1].replace(",", "")) if found else None


def forked(options: argparse.Namespace, words: list[str], log: Path) -> list[int]:
    """Start the command in as many forked processes as there are ranks."""
    port, pids = free_port(), []
    for rank in range(options.ranks):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            if options.ranks > 1:
                os.environ |= {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(options.ranks),
                    "LOCAL_WORLD_SIZE": str(options.ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for handle in (1, 2):
                os.dup2(stream, handle)
            cli.main(words)
            code = 0
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pids


def torchrun(options: argparse.Namespace, words: list[str], log: Path) -> list[int]:
    """Start the command under torchrun; return the one process that the others are children of."""
    with log.open("ab") as stream:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(options.ranks),
            "--master-port",
            str(free_port()),
            "-m",
            "ksparse",
            *words,
        ]
        return [subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True).pid]


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def last_step(run: RunFolder) -> int:
    """Return the step of the last whole line of metrics, 0 where there is none."""
    try:
        lines = run.metrics_file.read_bytes()[-2000:].split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def newest(run: RunFolder) -> int:
    return max((int(path.name.removeprefix("step-")) for path in run.checkpoints()), default=0)


def disturbed(options: argparse.Namespace, out: Path, steps: int) -> dict[str, int]:
    """Run to the end, killed `kills` times."""
    run, draw = RunFolder(out), random.Random(options.seed)
    counts = dict.fromkeys(
        (
            "kills",
            "of_all_ranks",
            "left_alone",
            "ended",
            "while_starting",
            "in_checkpoint",
            "steps_again",
            "steps_lost",
            "corrupt",
        ),
        0,
    )
    saved = 0  # the newest checkpoint that has been seen
    began = time.monotonic()
    while True:
        life = Life(options, out, out.parent / f"life-{counts['kills']}.log")
        left = options.kills - counts["kills"]
        starting, room = draw.random() < 1 / 7, (steps - 1 - saved) / max(1, left)
        aim = min(steps - 2, saved + draw.randint(1, max(1, round(2 * room))))
        every = options.ranks == 1 or draw.random() < 0.5
        until = time.monotonic() + draw.uniform(0, options.start)
        began_at = None if saved else 0
        while not life.over() and (
            left == 0
            or (time.monotonic() < until if starting else began_at is None or last_step(run) < aim)
        ):
            began_at = life.began_at() if began_at is None else began_at
            saved = max(saved, newest(run))
            time.sleep(0.001)
        if left and not life.codes:
            time.sleep(
                draw.uniform(0, options.phase)
            )  # any moment of a step, or of the writing after it
            saved = max(saved, newest(run))
            life.kill(life.ranks() if every else [draw.choice(life.ranks())])
            if every:
                life.end()
            while not life.over():
                time.sleep(0.001)
        if not any(life.codes.values()):
            if left:
                sys.exit(f"the run ended after {counts['kills']} kills; give more --steps")
        elif (
            not left
            or not any(code == -signal.SIGKILL for code in life.codes.values())
            and options.through == "fork"
        ):
            sys.exit(f"the run failed by itself:\n{life.said()}")
        began_at = life.began_at()
        if began_at is not None:
            counts["steps_lost"] += max(0, counts.get("newest", 0) - began_at)
        if not left:
            return {key: value for key, value in counts.items() if key != "newest"}
        counts["kills"] += 1
        counts["of_all_ranks"] += options.ranks > 1 and every
        counts["left_alone"] += (
            0
            if every
            else sum(
                code != -signal.SIGKILL or time.monotonic() - life.failed > GRACE
                for code in life.codes.values()
            )
        )
        counts["ended"] += sum(code == 6 for code in life.codes.values())
        counts["while_starting"] += starting
        counts["in_checkpoint"] += any((out / "checkpoints").glob(".tmp-*"))
        counts["corrupt"] += sum(map(corrupt, run.checkpoints()))
        counts["newest"] = newest(run)
        counts["steps_lost"] += max(0, saved - counts["newest"])
        counts["steps_again"] += max(0, last_step(run) - counts["newest"])
        if counts["kills"] % 10 == 0:
            spent = time.monotonic() - began
            print(
                f"{counts['kills']} of {options.kills} kills, step {last_step(run):,} of {steps:,}, {spent:.0f} s, about "
                f"{spent / counts['kills'] * (options.kills - counts['kills']):.0f} s to go",
                file=sys.stderr,
                flush=True,
            )


def corrupt(path: Path) -> bool:
    try:
        checksums.verify(path)
    except CorruptError as error:
        print(error, file=sys.stderr)
        return True
    return False


def state_of(out: Path) -> dict[str, str]:
    path, wrong = RunFolder(out).newest_intact()
    if path is None or wrong:
        sys.exit(f"damaged checkpoints in {out}: {wrong}")
    return {file.name: atomic.sha256(file) for file in sorted(path.glob("*.safetensors"))}


def kept(out: Path) -> list[dict[str, object]]:
    return [{key: row[key] for key in SAME} for row in RunFolder(out).metrics()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mesh.data", dest="data", type=int, default=0)
    parser.add_argument("--mesh.latent", dest="latent", type=int, default=0)
    parser.add_argument("--through", choices=("fork", "torchrun"), default="fork")
    parser.add_argument("--steps", type=int, default=0, help="12 for each kill, if not given")
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument(
        "--start",
        type=float,
        default=0.8,
        help="seconds of a start, at most, after which it may be killed",
    )
    parser.add_argument(
        "--phase",
        type=float,
        default=0.05,
        help="seconds after a step, at most, after which it may be killed",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lm", default="pylm/0.3m")
    parser.add_argument("--site", default="resid_post.2")
    parser.add_argument("--text", default="", help="some Python source, if not given")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=tuple(writers.KINDS),
        default=(),
        help="kill these in the place of training",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options.text = options.text or some_text(Path(folder))
        if options.only:
            kill_writers(options, Path(folder))
        hold_against_each_other(options, Path(folder))


def some_text(folder: Path) -> str:
    """Write a small text, since looking through the built-in one takes longer than a life."""
    texts = [
        file.read_text(encoding="utf-8")[:4_000]
        for file in sorted(Path(json.__file__).parents[1].glob("*.py"))
    ]
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    return str(folder / "texts.jsonl")


def kill_writers(options: argparse.Namespace, folder: Path) -> None:
    """Kill what reads a run and writes something, print the counts of each kind, and exit."""
    run = folder / "run"
    life = writers.Life(
        lambda: cli.main(["train", *words_of(options, steps=40), "--out", str(run)]),
        folder / "train.log",
    )
    if life.end():
        sys.exit(f"the run failed:\n{life.said()}")
    import matplotlib.figure  # noqa: F401, so that they are there in each life
    import starlette.applications  # noqa: F401
    import uvicorn  # noqa: F401

    import ksparse.evals.runner
    import ksparse.interop
    import ksparse.report.page
    import ksparse.viewer  # noqa: F401
    from ksparse.lm.model import LM

    LM(acts=RunFolder(run).recipe().acts, device="cpu")  # imports what an LM of this kind needs
    words = ["eval", str(run), *"stats downstream --tokens 600 --examples 2 --device cpu".split()]
    life = writers.Life(lambda: cli.main(words), folder / "eval.log")
    if life.end():
        sys.exit(f"the evaluation failed:\n{life.said()}")
    good = True
    for kind in options.only:
        counts = writers.disturbed(kind, options.kills, options.seed, run)
        good &= not counts["wrong"] and not counts["leftovers"]
        print(json.dumps(counts), flush=True)
    sys.exit(0 if good else 1)


def words_of(options: argparse.Namespace, steps: int) -> list[str]:
    """Return the options of a small run."""
    words = [
        "--acts.lm",
        options.lm,
        "--acts.site",
        options.site,
        "--acts.text",
        options.text,
        "--acts.mix",
        "2048",
        "--sae.n-latents",
        "256",
        "--sae.k",
        "8",
        "--sae.dead-after",
        "1024",
        "--tokens",
        str(steps * 128),
        "--batch",
        "128",
        "--threads",
        "1",
        "--run.log-every",
        "1",
        "--run.save-every",
        str(options.save_every),
        "--run.device",
        "cpu",
    ]
    for axis in ("data", "latent"):
        words += [f"--mesh.{axis}", str(getattr(options, axis))] if getattr(options, axis) else []
    return words


def hold_against_each_other(options: argparse.Namespace, folder: Path) -> None:
    """Run both, print the counts, and exit."""
    steps = options.steps or 12 * options.kills + 20
    options.words = ["train", *words_of(options, steps)]
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401, so that they are there in each life

    import ksparse.report
    import ksparse.training.train  # noqa: F401

    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    life = Life(options, whole, folder / "whole.log")
    while not life.over():
        time.sleep(0.01)
    if any(life.codes.values()):
        sys.exit(f"the undisturbed run failed:\n{life.said()}")
    undisturbed, began = time.monotonic() - began, time.monotonic()
    counts = disturbed(options, killed, steps)
    result = counts | {
        "ranks": options.ranks,
        "steps": steps,
        "seconds": round(time.monotonic() - began),
        "seconds_undisturbed": round(undisturbed),
        "same_files": state_of(whole) == state_of(killed),
        "same_metrics": kept(whole) == kept(killed),
    }
    print(json.dumps(result))
    sys.exit(
        0
        if result["same_files"]
        and result["same_metrics"]
        and not result["steps_lost"]
        and not result["corrupt"]
        else 1
    )


if __name__ == "__main__":
    main()
