"""Processes that share one run: a mesh of data x latent, and the few collectives that training
needs.

    data     each process holds a part of every batch; gradients, losses and fired latents are
             reduced along this axis
    latent   each process holds a shard of the latents; candidate values are compared and
             reconstructions summed along this axis

Process r holds part r // latent of the batch and shard r % latent of the latents. On
`SINGLE_PROCESS` all collectives return their input. Bytes are counted by the collective's name, so
that tests can compare them with a plan.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksparse.config import MeshConfig, Recipe
from ksparse.errors import InputError, KsparseError, PeerError

AXES = ("data", "latent")
ROUNDED = "recon"
"""The sum that `mesh.reduce` may round, by its name: that of the shards' reconstructions."""


class Mesh:
    """The mesh as one process sees it.

    Args:
        data: parts of the batch.
        latent: shards of the latents.
        device: the type of device whose tensors are exchanged.
        timeout: seconds to wait for other processes before a PeerError.
        reduce: precision of the sum of reconstructions, "float32" or "bfloat16".

    With more than one process torch.distributed must be initialized.
    """

    def __init__(
        self,
        data: int = 1,
        latent: int = 1,
        *,
        device: str = "cpu",
        timeout: float = 600.0,
        reduce: str = "float32",
    ):
        self.data, self.latent, self.timeout, self.reduce = data, latent, timeout, reduce
        self.rank = 0
        self.sent: Counter[str] = Counter()
        """Bytes that this process has passed to each collective, by name."""
        self.groups: dict[str, Any] = {}
        self._lock = threading.Lock()
        if self.size > 1:
            self._create_groups(device)
        self.data_rank, self.latent_rank = divmod(self.rank, latent)

    def _create_groups(self, device: str) -> None:
        """Create the process groups: one along each axis; and three of all processes, for
        activations ("stream"), for numbers on the CPU ("all"), and for the saver's thread
        ("save")."""
        from torch.distributed.device_mesh import DeviceMesh

        self.rank, wait = dist.get_rank(), timedelta(seconds=self.timeout)
        grid = torch.arange(self.size).view(self.data, self.latent)
        for axis, lines in zip(AXES, (grid.t(), grid)):
            self.groups[axis], _ = dist.new_subgroups_by_enumeration(lines.tolist(), timeout=wait)
        self.grid = DeviceMesh.from_group(
            [self.groups[axis] for axis in AXES], device, mesh=grid, mesh_dim_names=AXES
        )
        self.groups["stream"] = dist.new_group(timeout=wait)
        for name in ("all", "save"):
            self.groups[name] = dist.new_group(timeout=wait, backend="gloo")

    def close(self) -> None:
        """Give up the process groups, whose threads would go on polling."""
        for group in self.groups.values():
            dist.destroy_process_group(group)
        self.groups.clear()

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.data * self.latent

    @property
    def is_rank0(self) -> bool:
        """Whether this is process 0, which writes the run's files."""
        return self.rank == 0

    # ---- shards

    def latent_range(self, n: int) -> slice:
        """Return which of n latents this process holds."""
        return _shard_range(n, self.latent_rank, self.latent)

    def batch_range(self, rows: int) -> slice:
        """Return which rows of a batch this process takes."""
        return _shard_range(rows, self.data_rank, self.data)

    # ---- collectives: `over` is an axis ("data", "latent") or a group of all processes

    def axis_size(self, over: str) -> int:
        """Return how many processes there are along an axis, or in all."""
        return {"data": self.data, "latent": self.latent}.get(over, self.size)

    def all_reduce_sum(self, name: str, value: Tensor, over: str) -> Tensor:
        """Sum a tensor over an axis, in place; all of its processes get the same bits.

        Reconstructions are summed in the precision of `mesh.reduce`.
        """
        if name == ROUNDED and self.reduce == "bfloat16" and self.axis_size(over) > 1:
            rounded = value.bfloat16()
            self.start_all_reduce_sum(name, rounded, over)()
            return value.copy_(rounded)
        self.start_all_reduce_sum(name, value, over)()
        return value

    def start_all_reduce_sum(self, name: str, value: Tensor, over: str) -> Callable[[], None]:
        """Start to sum a tensor over an axis, in place; the returned function waits for it."""
        if self.axis_size(over) == 1 or not value.numel():
            return lambda: None
        with self._explain_errors(name):
            work = dist.all_reduce(
                self._counted(name, value), group=self.groups[over], async_op=True
            )

        def wait() -> None:
            with self._explain_errors(name):
                work.wait()

        return wait

    def all_reduce_max(self, name: str, value: Tensor, over: str) -> Tensor:
        """Take the elementwise maximum over an axis, in place."""
        if self.axis_size(over) > 1:
            with self._explain_errors(name):
                dist.all_reduce(
                    self._counted(name, value), dist.ReduceOp.MAX, group=self.groups[over]
                )
        return value

    def all_gather(self, name: str, value: Tensor, over: str) -> Tensor:
        """Return [processes, ...]: the tensors of all processes along an axis, of equal shapes."""
        if self.axis_size(over) == 1:
            return value[None]
        out = value.new_empty(self.axis_size(over), *value.shape)
        with self._explain_errors(name):
            dist.all_gather(
                list(out.unbind(0)),
                self._counted(name, value).contiguous(),
                group=self.groups[over],
            )
        return out

    def broadcast(self, name: str, value: Tensor, source: int, over: str = "stream") -> Tensor:
        """Copy a tensor from process `source` to all others, in place."""
        if self.size > 1 and value.numel():
            with self._explain_errors(name):
                dist.broadcast(
                    self._counted(name, value) if self.rank == source else value,
                    source,
                    group=self.groups[over],
                )
        return value

    # ---- decisions that all processes must share, by numbers on the CPU

    def all_reduce_max_ints(
        self, name: str, numbers: Sequence[int], over: str = "all"
    ) -> list[int]:
        """Return the maximum of each number over all processes."""
        return (
            self.all_reduce_max(name, torch.tensor(numbers), over).tolist()
            if self.size > 1
            else list(numbers)
        )

    def broadcast_str(self, name: str, text: str, over: str = "all") -> str:
        """Return process 0's text, of at most 1024 bytes."""
        if self.size == 1:
            return text
        encoded = torch.zeros(1024, dtype=torch.uint8)
        encoded[: len(text.encode())] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return bytes(self.broadcast(name, encoded, 0, over).tolist()).rstrip(b"\0").decode()

    def on_rank0(self, name: str, action: Callable[[], None]) -> None:
        """Run an action on process 0 while the others wait.

        Raises:
            KsparseError: the action's, on process 0.
            PeerError: on the other processes, if the action failed.
        """
        failure = None
        if self.is_rank0:
            try:
                action()
            except KsparseError as error:
                failure = error
        if self.all_reduce_max_ints(name, [int(failure is not None)])[0]:
            raise failure or PeerError(
                f"process 0 of {self.size} could not go on; its own message says why"
            )

    def _counted(self, name: str, value: Tensor) -> Tensor:
        with self._lock:  # the saver's thread counts too
            self.sent[name] += value.numel() * value.element_size()
        return value

    @contextmanager
    def _explain_errors(self, name: str) -> Iterator[None]:
        """Turn an error of torch.distributed into a PeerError."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # Gloo's errors have no type of their own
            raise PeerError(
                f"process {self.rank} of {self.size} waited for the others at {name!r}: one of "
                f"them is gone, or did not answer within {self.timeout:g} s "
                "(mesh.timeout). Its own message says why; the same command goes on from the last "
                f"checkpoint ({str(error).splitlines()[0]})"
            ) from error


def _shard_range(size: int, rank: int, ranks: int) -> slice:
    length = size // ranks
    return slice(rank * length, (rank + 1) * length)


SINGLE_PROCESS = Mesh()
"""The mesh of one process."""


@contextmanager
def open_mesh(recipe: Recipe, device: str) -> Iterator[Mesh]:
    """Yield the mesh of a recipe among the processes that torchrun started.

    Args:
        recipe: the recipe; with `mesh.data` = 0 as many parts as there are processes for, with
            `mesh.latent` = 0 as many shards.
        device: this process's device.

    Raises:
        InputError: if the number of processes is not that of the mesh, or the mesh does not divide
            the batch and the latents.
    """
    world = processes()
    sizes = sized(recipe.mesh, world)
    recipe = dataclasses.replace(recipe, mesh=sizes)
    check(recipe, sizes.data, world)
    if world == 1:
        yield SINGLE_PROCESS
        return
    initialized = dist.is_initialized()
    if not initialized:
        connect(device, sizes.timeout)
    mesh = Mesh(
        sizes.data,
        sizes.latent,
        device=device.partition(":")[0],
        timeout=sizes.timeout,
        reduce=sizes.reduce,
    )
    try:
        yield mesh
    finally:
        if initialized:
            mesh.close()
        else:
            dist.destroy_process_group()


def processes() -> int:
    """Return how many processes share the run: those of the process group, or that torchrun
    started."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", 1))


def sized(mesh: MeshConfig, world: int) -> MeshConfig:
    """Return a mesh with numbers in place of 0, for `world` processes; both 0: parts of the batch.

    Example:
        >>> from ksparse.config import MeshConfig
        >>> sized(MeshConfig(data=2, latent=0), 8).latent
        4
    """
    data = mesh.data or max(1, world // max(1, mesh.latent))
    return dataclasses.replace(mesh, data=data, latent=mesh.latent or max(1, world // data))


def connect(device: str, timeout: float) -> None:
    """Initialize torch.distributed among the processes that torchrun started.

    Args:
        device: this process's device; CUDA exchanges by NCCL, and numbers on the CPU by Gloo.
        timeout: seconds to wait for the others.
    """
    cuda = device.startswith("cuda")
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # After a restart the store still holds keys of the processes that were lost.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
        device_id=torch.device(device) if cuda else None,
    )


def check(recipe: Recipe, data: int, world: int) -> None:
    """Check that a recipe can run on a mesh.

    Args:
        recipe: the recipe.
        data: parts of the batch.
        world: how many processes there are.

    Raises:
        InputError: unless `world` processes make the mesh, the mesh divides the batch and the
            latents, and several processes can train what the recipe asks for.
    """
    latent = recipe.mesh.latent
    if data * latent != world or not data:
        raise InputError(
            f"mesh.data x mesh.latent is {data} x {latent} = {data * latent}, but there "
            f"{'is' if world == 1 else 'are'} {world} process{'' if world == 1 else 'es'}; "
            f"start `torchrun --nproc-per-node {max(1, data) * latent} -m ksparse …`, or give keys "
            f"whose product is {world}"
        )
    if world > 1:
        _check_divides(recipe, data)
        _check_several(recipe)


def _check_divides(recipe: Recipe, data: int) -> None:
    """Raise InputError unless the mesh divides the latents and the batch."""
    latent, n = recipe.mesh.latent, recipe.sae.n_latents
    if n % latent:
        raise InputError(
            f"sae.n_latents is {n}, which mesh.latent = {latent} does not divide; give a multiple "
            f"of {latent}"
        )
    most = max(recipe.sae.k, recipe.sae.k_start)
    if most > n // latent:
        raise InputError(
            f"sae.{'k' if most == recipe.sae.k else 'k_start'} is {most}, more than the "
            f"{n // latent} latents of a shard; give a smaller mesh.latent"
        )
    if recipe.batch % data:
        raise InputError(
            f"batch is {recipe.batch}, which mesh.data = {data} does not divide; give a multiple "
            f"of {data}"
        )


def _check_several(recipe: Recipe) -> None:
    """Raise InputError for options that only one process can train with."""
    if recipe.run.ahead == "on" and not recipe.acts.shards:
        raise InputError(
            "run.ahead is 'on'; several processes compute a block of activations together, between "
            "two steps: leave it at 'auto', or read shards"
        )
    if recipe.run.kernels == "triton" or recipe.optim.precision != "float32":
        raise InputError(
            f"run.kernels is {recipe.run.kernels!r} and optim.precision "
            f"{recipe.optim.precision!r}; several processes cannot use the Triton kernels yet: "
            "leave them at 'auto' and 'float32'"
        )


def rank_and_size() -> tuple[int, int]:
    """Return which process this is of those that torchrun started, and how many there are.

    Raises:
        InputError: RANK and WORLD_SIZE are not two such numbers.

    Example:
        >>> rank_and_size()
        (0, 1)
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise InputError(
            f"RANK is {rank!r} and WORLD_SIZE {size!r}; torchrun sets them to the number of this "
            "process, from 0, and to how many there are"
        )
    return int(rank), int(size)


def local_device(name: str) -> str:
    """Return this process's device: torchrun's LOCAL_RANK picks one of a machine's GPUs.

    Example:
        >>> local_device("cpu")
        'cpu'
    """
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name
