"""Where cohorts run: in processes of this machine, or as jobs of a cluster. A worker that dies is
started again, and goes on from its checkpoints.

run(jobs, start, …)     keep up to so many workers busy until every job is done or has failed too
                        often
processes(…)            start = a process of this machine       submitted(…)   start = a job through
                        submitit (Slurm, or its local executor)
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from ksparse.config import Config
from ksparse.errors import InputError
from ksparse.storage import atomic
from ksparse.trust import FLAG, code_is_trusted

POLL = 0.5  # seconds
SAFE = {"PYTHONSAFEPATH": "1"}
"""What keeps `python -m` from looking for modules in the working folder, which may be anybody's."""


@dataclass(frozen=True)
class Launch(Config):
    """Where and how a sweep's cohorts run."""

    launcher: Literal["here", "processes", "local", "slurm"] = "here"
    """here: one cohort after another in this process. processes: in processes of this machine.
    slurm: as jobs of a Slurm cluster, through submitit (pip install 'ksparse[slurm]'). local:
    submitit's own stand-in for a cluster, on this machine."""
    workers: int = 1
    """Cohorts that run at the same time; runs are dealt to at least so many. Not for `here`."""
    memory_gb: float = 0.0
    """Largest size of a cohort; 0: half of this machine's memory, shared by the workers of this
    machine."""
    retries: int = 2
    """How often a cohort whose worker died is started again."""
    minutes: int = 24 * 60
    """slurm: time limit of a job; what is not done by then goes on in a new one."""
    slurm: tuple[str, ...] = ()
    """slurm: more parameters as submitit names them, such as slurm_partition=gpu
    gpus_per_node=1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least("a sweep", minutes=1)
        if self.workers < 1 or self.retries < 0 or self.memory_gb < 0:
            raise InputError(
                "a sweep needs workers of at least 1, retries and memory_gb of at least 0; got "
                f"{self.workers}, {self.retries}, {self.memory_gb}"
            )
        if self.launcher == "here" and self.workers > 1:
            raise InputError(
                f"the launcher 'here' is one process, but there are to be {self.workers} workers; "
                "give --launcher processes"
            )
        wrong = [item for item in self.slurm if "=" not in item]
        if wrong:
            raise InputError(
                f"the parameter {wrong[0]!r} of --slurm is not name=value, such as "
                "slurm_partition=gpu"
            )


class Worker(Protocol):
    """One job at work somewhere."""

    def done(self) -> bool: ...

    def why(self) -> str:
        """Return how it ended."""

    def stop(self) -> None:
        """Ask it to save and end."""


Start = Callable[[list[str], int], Worker]
"""Begins a job of run names; the number is its place among the workers."""


def run(
    jobs: Sequence[list[str]],
    start: Start,
    left: Callable[[list[str]], list[str]],
    *,
    workers: int,
    retries: int,
    observe: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, str]:
    """Run all jobs; return {run: why} of the runs that were not finished though their worker was
    started 1 + retries times.

    left: of a job's runs, those that are not finished, asked when its worker has ended.
    """
    waiting = deque((list(names), 0) for names in jobs)
    running: dict[int, tuple[list[str], int, Worker]] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            for place in [place for place in range(workers) if place not in running][
                : len(waiting)
            ]:
                names, tries = waiting.popleft()
                running[place] = names, tries, start(names, place)
            time.sleep(POLL)
            for place, (names, tries, worker) in list(running.items()):
                if not worker.done():
                    continue
                del running[place]
                unfinished = left(names)
                if unfinished and tries < retries:
                    warn(
                        f"a worker ended with {len(unfinished)} runs to do ({worker.why()}); "
                        "starting it again"
                    )
                    waiting.append((unfinished, tries + 1))
                else:
                    failed |= {name: worker.why() for name in unfinished}
            observe()
    finally:
        for _, _, worker in running.values():
            worker.stop()
    return failed


# ---- processes of this machine


class Process:
    """`command` as a process that writes to a log; it leads a session of its own, so that Ctrl-C
    reaches it through us alone."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]):
        self.log = log
        with atomic.translate_oserrors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            stream = log.open("ab")
        with stream:
            self.process = subprocess.Popen(
                command,
                stdout=stream,
                stderr=stream,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )

    def done(self) -> bool:
        return self.process.poll() is not None

    def why(self) -> str:
        code = self.process.returncode
        ended = (
            f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        )
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{ended}: {lines[-1]}" if lines else ended

    def stop(self) -> None:
        if not self.done():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def processes(folder: Path, workers: int) -> Start:
    """Return a start that gives each worker its share of the cores, and a GPU of its own where
    there are several."""
    cores = (
        max(1, len(os.sched_getaffinity(0)) // workers)
        if hasattr(os, "sched_getaffinity")
        else max(1, (os.cpu_count() or 1) // workers)
    )

    def start(names: list[str], place: int) -> Worker:
        environment = os.environ | SAFE | {"OMP_NUM_THREADS": str(cores)}
        log = atomic.inside(folder, "logs", f"{names[0]}.log")
        gpus = _gpus()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)]
        return Process(command(folder, names), log, environment)

    return start


def command(folder: Path, names: list[str]) -> list[str]:
    """Return the command line that trains some runs of a sweep as one cohort."""
    trust = [FLAG, "True"] if code_is_trusted() else []
    return [sys.executable, "-P", "-m", "ksparse", "sweep", str(folder), "--only", *names, *trust]


def _gpus() -> list[str]:
    """Return the GPUs that this process may use."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


# ---- a cluster


class Submitted:
    """A job of submitit."""

    def __init__(self, job: Any):
        self.job = job

    def done(self) -> bool:
        return bool(self.job.done())

    def why(self) -> str:
        lines = [line for line in (self.job.stderr() or "").splitlines() if line.strip()]
        return f"job {self.job.job_id} ended as {self.job.state}" + (
            f": {lines[-1].strip()}" if lines else ""
        )

    def stop(self) -> None:
        self.job.cancel()


def submitted(folder: Path, options: Launch) -> Start:
    """Return a start that submits a job to the cluster."""
    try:
        import submitit
    except ModuleNotFoundError:
        raise InputError(
            f"the launcher {options.launcher!r} needs the package submitit: pip install "
            "'ksparse[slurm]'"
        ) from None
    # pickles in there are run, so nobody else is to know the name
    home = atomic.inside(folder, "logs", f"jobs-{secrets.token_hex(8)}")
    executor = submitit.AutoExecutor(folder=home, cluster=options.launcher)
    more = {
        name: int(value) if value.lstrip("-").isdigit() else value
        for name, _, value in (item.partition("=") for item in options.slurm)
    }
    safe = {"slurm_setup": [f"export {name}={value}" for name, value in SAFE.items()]}
    executor.update_parameters(name="ksparse", timeout_min=options.minutes, **safe | more)

    def start(names: list[str], place: int) -> Worker:
        before = dict(os.environ)
        os.environ |= SAFE  # submitit starts `python -m` with it
        try:
            work = submitit.helpers.CommandFunction(command(folder.resolve(), names))
            return Submitted(executor.submit(work))
        finally:
            os.environ.clear()
            os.environ |= before

    return start
