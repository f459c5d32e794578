"""One run on several processes: started by torchrun on this machine, or as jobs of a Slurm cluster.

    local_command(…)   the torchrun command for this machine
    in_jobs(…)         submit a job with a task for each process, again and again until the run ends

Neither is an engine: torchrun and submitit start the processes, and the run's folder is the only
state. Processes find each other by the variables that torchrun sets; in a job, submitit's
`TorchDistributedEnvironment` sets them.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ksparse.config import Config, Recipe, to_toml
from ksparse.errors import InputError, KsparseError
from ksparse.scaling.sweeps import launch as launching
from ksparse.scaling.sweeps.grid import finished
from ksparse.storage import atomic
from ksparse.storage.run_folder import RunFolder
from ksparse.trust import FLAG, code_is_trusted


@dataclass(frozen=True)
class Processes(Config):
    """Where the processes of one run are started."""

    OWNER = "a launched run"

    launch: Literal["here", "local", "slurm"] = "here"
    """here: this process, or those that torchrun has started. local: processes of this machine, by
    torchrun. slurm: tasks of a Slurm job, through submitit (pip install 'ksparse[slurm]')."""
    nodes: int = 1
    """slurm: machines of the job."""
    processes_per_node: int = 1
    """Processes on each machine; with GPUs, one for each."""
    retries: int = 2
    """How often processes that died are started again."""
    minutes: int = 24 * 60
    """slurm: time limit of a job; the run goes on in a new one."""
    slurm: tuple[str, ...] = ()
    """slurm: other parameters by submitit's names, such as slurm_partition=gpu gpus_per_node=8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("nodes", "processes_per_node", "minutes", at_least=1)
        self.check_range("retries", at_least=0)
        launching.check_parameters(self.slurm)
        if self.launch == "here" and self.number > 1:
            raise InputError(
                f"nodes x processes_per_node is {self.nodes} x {self.processes_per_node}, but "
                "nothing starts them; give --launch local or --launch slurm"
            )
        if self.launch == "local" and self.nodes > 1:
            raise InputError(
                f"nodes is {self.nodes}, but --launch local starts processes of this machine; give "
                "--nodes 1, --launch slurm, or the torchrun command on each machine "
                "(docs/scaling-out.md)"
            )

    @property
    def number(self) -> int:
        """How many processes there are."""
        return self.nodes * self.processes_per_node


def check_mesh(recipe: Recipe, options: Processes) -> None:
    """Raise InputError, before anything is started, for a mesh that is not of these processes."""
    from ksparse import distributed

    if recipe.mesh.data or recipe.mesh.latent:
        mesh = distributed.sized(recipe.mesh, options.number)
        distributed.check(dataclasses.replace(recipe, mesh=mesh), mesh.data, options.number)


def home_of(run: RunFolder) -> Path:
    """Return the folder beside a run for its recipe and the logs of its jobs."""
    return run.path.with_name(f"{run.path.name}.launch")


def _command(recipe: Recipe, run: RunFolder) -> list[str]:
    """Write the recipe beside the run; return the words of the command that trains it."""
    home = home_of(run)
    with atomic.translate_oserrors(home):
        home.mkdir(parents=True, exist_ok=True)
    file = atomic.inside(home, "recipe.toml")
    atomic.write_text(file, to_toml(recipe))
    trust = [FLAG, "True"] if code_is_trusted() else []
    return ["-m", "ksparse", "train", str(file), "--out", str(run.path), *trust]


def local_command(
    recipe: Recipe, run: RunFolder, options: Processes
) -> tuple[list[str], dict[str, str]]:
    """Return the torchrun command that trains a run on this machine, and its environment: each
    process has its share of the cores.

    Args:
        recipe: what to train; it is written to a folder beside the run.
        run: the run's folder.
        options: how many processes, and how often they are started again.
    """
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone"]
    sizes = ["--nproc-per-node", str(options.number), "--max-restarts", str(options.retries)]
    cores = str(max(1, launching.cores() // options.number))
    environment = {"OMP_NUM_THREADS": cores} | os.environ | launching.SAFE
    return [*torchrun, *sizes, *_command(recipe, run)], environment


class Task:
    """What each task of a job does: take its place among the others, and run a command."""

    def __init__(self, command: list[str]):
        self.command = command

    def __call__(self) -> Any:
        from submitit import helpers

        # every task sees all GPUs of its machine; LOCAL_RANK picks one
        place = helpers.TorchDistributedEnvironment()
        place.export(set_cuda_visible_devices=False, overwrite=True)
        return helpers.CommandFunction(self.command)()


def in_jobs(
    recipe: Recipe,
    run: RunFolder,
    options: Processes,
    *,
    observe: Callable[[], None] = lambda: None,
    warn: Callable[[str], None] = lambda text: None,
    cluster: str = "slurm",
) -> None:
    """Train a run in jobs of a cluster, one after another, until it has finished. A job that is out
    of time has saved, and the next one goes on.

    Args:
        recipe: what to train; it is written to a folder beside the run.
        run: the run's folder, which all machines see.
        options: the job's size and limits.
        observe: called while the job waits or runs.
        warn: called with a message when a job has ended too early.
        cluster: submitit's name for where jobs run.

    Raises:
        InputError: if submitit is not installed.
        KsparseError: if jobs ended more than `retries` times without a new checkpoint.
    """
    command = [sys.executable, "-P", *_command(recipe, run)]
    more: dict[str, Any] = {"nodes": options.nodes, "tasks_per_node": options.processes_per_node}
    if cluster == "slurm":
        # ksparse saves on SIGTERM; one task that dies ends the others, which would wait for it
        more["slurm_additional_parameters"] = {"signal": "TERM@120"}
        more["slurm_srun_args"] = ["--kill-on-bad-exit=1"]
    submit = launching.submitter(home_of(run), cluster, options.minutes, options.slurm, more)

    def start(names: list[str], slot: int) -> launching.Worker:
        return submit(Task(command))

    def unfinished(names: list[str]) -> list[str]:
        return [] if finished(run) else names

    tries = 0
    while True:
        before = run.checkpoints()[-1:]
        ended = launching.run(
            [[run.name]], start, unfinished, workers=1, retries=0, observe=observe
        )
        if not ended:
            return
        tries = 0 if run.checkpoints()[-1:] != before else tries + 1
        why = ended[run.name]
        if tries > options.retries:
            raise KsparseError(
                f"{run.path}: {tries} jobs in a row ended without a new checkpoint; the last one: "
                f"{why}; logs are in {home_of(run)}"
            )
        warn(f"the job ended before the run did ({why}); submitting it again")
