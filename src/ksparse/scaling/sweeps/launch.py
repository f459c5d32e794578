"""Run groups of runs in processes of this machine, or as jobs of a cluster. A worker that dies is
started again and continues from its checkpoints.

    run(jobs, start, …)   keep the workers busy until each job is done or has failed too often
    processes(…)          a `start` that begins a process on this machine
    submitted(…)          a `start` that submits a job through submitit (Slurm, or its local
                          executor)
    submitter(…)          the function that does it, for any work
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

POLL = 0.5
"""Seconds between looks at the workers."""
SAFE = {"PYTHONSAFEPATH": "1"}
"""Keeps `python -m` from importing modules of the working folder, which others may write to."""


@dataclass(frozen=True)
class Launch(Config):
    """Where and how the groups of a sweep run."""

    OWNER = "a sweep"

    launcher: Literal["here", "processes", "local", "slurm"] = "here"
    """here: one group of runs after another in this process. processes: in processes of this
    machine. slurm: as jobs of a Slurm cluster, through submitit (pip install 'ksparse[slurm]').
    local: submitit's stand-in for a cluster, on this machine."""
    workers: int = 1
    """Groups that run at the same time; the runs are divided into at least this many. Not for
    `here`."""
    memory_gb: float = 0.0
    """Most memory of a group's SAEs; 0: half of this machine's memory, divided among the workers
    on this machine."""
    retries: int = 2
    """How often a group is started again after its worker died."""
    minutes: int = 24 * 60
    """slurm: time limit of a job; unfinished runs continue in a new job."""
    slurm: tuple[str, ...] = ()
    """slurm: other parameters by submitit's names, such as slurm_partition=gpu gpus_per_node=1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("minutes", at_least=1)
        if self.workers < 1 or self.retries < 0 or self.memory_gb < 0:
            raise InputError(
                "a sweep needs workers of at least 1, retries and memory_gb of at least 0; got "
                f"{self.workers}, {self.retries}, {self.memory_gb}"
            )
        if self.launcher == "here" and self.workers > 1:
            raise InputError(
                f"the launcher 'here' is one process, but workers is {self.workers}; "
                "give --launcher processes"
            )
        check_parameters(self.slurm)


def check_parameters(parameters: Sequence[str]) -> None:
    """Raise InputError for a word of --slurm that is not name=value."""
    invalid = [item for item in parameters if "=" not in item]
    if invalid:
        raise InputError(
            f"the parameter {invalid[0]!r} of --slurm is not name=value, such as "
            "slurm_partition=gpu"
        )


class Worker(Protocol):
    """A running job."""

    def done(self) -> bool:
        """Return whether it has ended."""

    def why(self) -> str:
        """Say how it ended."""

    def stop(self) -> None:
        """Make it save and end."""


Start = Callable[[list[str], int], Worker]
"""Starts a job with the names of its runs and its slot among the workers."""


def run(
    jobs: Sequence[list[str]],
    start: Start,
    unfinished: Callable[[list[str]], list[str]],
    *,
    workers: int,
    retries: int,
    observe: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, str]:
    """Run all jobs.

    Args:
        jobs: the names of each job's runs.
        start: starts a worker for a job.
        unfinished: returns those of the given runs that are not finished; called when their worker
            has ended.
        workers: how many jobs run at the same time.
        retries: how often a job with unfinished runs is started again.
        observe: called after each look at the workers.
        warn: called with a message when a worker has died.

    Returns:
        {name of the run: how its last worker ended} of the runs that were not finished.
    """
    waiting = deque((list(names), 0) for names in jobs)
    running: dict[int, tuple[list[str], int, Worker]] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            free_slots = [slot for slot in range(workers) if slot not in running]
            for slot in free_slots[: len(waiting)]:
                names, tries = waiting.popleft()
                running[slot] = names, tries, start(names, slot)
            time.sleep(POLL)
            for slot, (names, tries, worker) in list(running.items()):
                if not worker.done():
                    continue
                del running[slot]
                left = unfinished(names)
                if left and tries < retries:
                    warn(
                        f"a worker ended with {len(left)} runs to do ({worker.why()}); "
                        "starting it again"
                    )
                    waiting.append((left, tries + 1))
                else:
                    failed |= {name: worker.why() for name in left}
            observe()
    finally:
        for _, _, worker in running.values():
            worker.stop()
    return failed


# ---- processes of this machine


class Process:
    """A command as a process that writes to a log. It is in a session of its own, so that Ctrl-C
    reaches it only through `stop`."""

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
        """Return whether it has ended."""
        return self.process.poll() is not None

    def why(self) -> str:
        """Say how it ended."""
        code = self.process.returncode
        ended = (
            f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        )
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{ended}: {lines[-1]}" if lines else ended

    def stop(self) -> None:
        """End it with SIGTERM, so that it saves; kill it if that takes more than a minute."""
        if not self.done():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def processes(folder: Path, workers: int) -> Start:
    """Return a `start` that gives each worker its share of the cores, and a GPU if there are
    any.

    Args:
        folder: the sweep's folder, which the logs are written to.
        workers: how many processes share the machine.
    """
    share = max(1, cores() // workers)

    def start(names: list[str], slot: int) -> Worker:
        environment = os.environ | SAFE | {"OMP_NUM_THREADS": str(share)}
        log = atomic.inside(folder, "logs", f"{names[0]}.log")
        gpus = _gpus()
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        return Process(command(folder, names), log, environment)

    return start


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def command(folder: Path, names: list[str]) -> list[str]:
    """Return the command line that trains some runs of a sweep as one group."""
    trust = [FLAG, "True"] if code_is_trusted() else []
    return [sys.executable, "-P", "-m", "ksparse", "sweep", str(folder), "--only", *names, *trust]


def _gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


# ---- a cluster


class Submitted:
    """A job that was submitted through submitit."""

    def __init__(self, job: Any):
        self.job = job

    def done(self) -> bool:
        """Return whether it has ended."""
        return bool(self.job.done())

    def why(self) -> str:
        """Say how it ended."""
        lines = [line for line in (self.job.stderr() or "").splitlines() if line.strip()]
        return f"job {self.job.job_id} ended as {self.job.state}" + (
            f": {lines[-1].strip()}" if lines else ""
        )

    def stop(self) -> None:
        """Cancel the job."""
        self.job.cancel()


def submitted(folder: Path, options: Launch) -> Start:
    """Return a `start` that submits a job to the cluster.

    Raises:
        InputError: if submitit is not installed.
    """
    submit = submitter(folder, options.launcher, options.minutes, options.slurm)

    def start(names: list[str], slot: int) -> Worker:
        from submitit import helpers

        return submit(helpers.CommandFunction(command(folder.resolve(), names)))

    return start


def submitter(
    folder: Path,
    cluster: str,
    minutes: int,
    parameters: Sequence[str],
    more: dict[str, Any] | None = None,
) -> Callable[[Callable[[], Any]], Worker]:
    """Return a function that submits a callable as a job, with its logs in folder/logs.

    Args:
        folder: where the logs are.
        cluster: "slurm", or "local" for submitit's stand-in.
        minutes: time limit of a job.
        parameters: name=value, by submitit's names; they replace those of `more`.
        more: further parameters.

    Raises:
        InputError: if submitit is not installed.
    """
    try:
        import submitit
    except ModuleNotFoundError:
        raise InputError(
            f"the launcher {cluster!r} needs the package submitit: pip install 'ksparse[slurm]'"
        ) from None
    # submitit runs the pickles in this folder, so its name must not be guessable.
    home = atomic.inside(folder, "logs", f"jobs-{secrets.token_hex(8)}")
    executor = submitit.AutoExecutor(folder=home, cluster=cluster)
    given = {
        name: int(value) if value.lstrip("-").isdigit() else value
        for name, _, value in (item.partition("=") for item in parameters)
    }
    safe = {"slurm_setup": [f"export {name}={value}" for name, value in SAFE.items()]}
    every = safe | (more or {}) | given
    executor.update_parameters(name="ksparse", timeout_min=minutes, **every)

    def submit(work: Callable[[], Any]) -> Worker:
        before = dict(os.environ)
        os.environ |= SAFE  # for the `python -m` that submitit starts
        try:
            return Submitted(executor.submit(work))
        finally:
            os.environ.clear()
            os.environ |= before

    return submit
