"""Processes that share one run: a grid of data x latent, and the few collectives that training
needs.

    data     each holds a part of every batch          gradients, losses and fired latents are
             summed over it
    latent   each holds a slice of the latents         offered values are compared, reconstructions
             summed over it

Process r is part r // latent of the batch and slice r % latent. `ALONE` is one process: whatever is
asked for is what was given. What is sent is counted by name, so that a plan can be held against it.
"""

from __future__ import annotations

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

from ksparse.config import Recipe
from ksparse.errors import InputError, KsparseError, PeerError

AXES = ("data", "latent")


class Mesh:
    """The grid as one process sees it."""

    def __init__(
        self, data: int = 1, latent: int = 1, *, device: str = "cpu", timeout: float = 600.0
    ):
        """Find this process's place among data x latent; torch.distributed has to be set up where
        these are more than one."""
        self.data, self.latent, self.timeout = data, latent, timeout
        self.rank = 0
        self.sent: Counter[str] = Counter()
        self.groups: dict[str, Any] = {}
        self._lock = threading.Lock()
        if self.size > 1:
            self._join(device)
        self.data_rank, self.latent_rank = divmod(self.rank, latent)

    def _join(self, device: str) -> None:
        """Make the groups of processes: along each axis, and of all of them, for activations, for
        numbers, and for the thread that saves."""
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

    @property
    def size(self) -> int:
        return self.data * self.latent

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    # ---- who has what

    def latent_range(self, n: int) -> slice:
        """Return which of n latents this process holds."""
        own = n // self.latent
        return slice(self.latent_rank * own, (self.latent_rank + 1) * own)

    def batch_range(self, rows: int) -> slice:
        """Return which rows of a batch this process takes."""
        own = rows // self.data
        return slice(self.data_rank * own, (self.data_rank + 1) * own)

    # ---- collectives: in place, over an axis or a group of all

    def axis_size(self, over: str) -> int:
        """Return how many processes there are along an axis."""
        return {"data": self.data, "latent": self.latent}.get(over, self.size)

    def all_reduce_sum(self, name: str, value: Tensor, over: str) -> Tensor:
        """Sum over an axis, in place; the same bits on all of its processes."""
        self.start_all_reduce_sum(name, value, over)()
        return value

    def start_all_reduce_sum(self, name: str, value: Tensor, over: str) -> Callable[[], None]:
        """Begin a sum; what is returned waits for it."""
        if self.axis_size(over) == 1 or not value.numel():
            return lambda: None
        with self._explained(name):
            work = dist.all_reduce(
                self._counted(name, value), group=self.groups[over], async_op=True
            )

        def wait() -> None:
            with self._explained(name):
                work.wait()

        return wait

    def all_reduce_max(self, name: str, value: Tensor, over: str) -> Tensor:
        """Take the largest over an axis, in place."""
        if self.axis_size(over) > 1:
            with self._explained(name):
                dist.all_reduce(
                    self._counted(name, value), dist.ReduceOp.MAX, group=self.groups[over]
                )
        return value

    def all_gather(self, name: str, value: Tensor, over: str) -> Tensor:
        """Return [p, ...]: the value of each process along an axis, all of one shape."""
        if self.axis_size(over) == 1:
            return value[None]
        out = value.new_empty(self.axis_size(over), *value.shape)
        with self._explained(name):
            dist.all_gather(
                list(out.unbind(0)),
                self._counted(name, value).contiguous(),
                group=self.groups[over],
            )
        return out

    def broadcast(self, name: str, value: Tensor, source: int, over: str = "stream") -> Tensor:
        """Give all processes what process `source` has, in place."""
        if self.size > 1 and value.numel():
            with self._explained(name):
                dist.broadcast(
                    self._counted(name, value) if self.rank == source else value,
                    source,
                    group=self.groups[over],
                )
        return value

    # ---- decisions that all processes take alike, by numbers on the CPU

    def all_reduce_max_ints(
        self, name: str, numbers: Sequence[int], over: str = "all"
    ) -> list[int]:
        """Return the largest of each number over all processes."""
        return (
            self.all_reduce_max(name, torch.tensor(numbers), over).tolist()
            if self.size > 1
            else list(numbers)
        )

    def broadcast_str(self, name: str, text: str, over: str = "all") -> str:
        """Return the text that the first process gives."""
        if self.size == 1:
            return text
        letters = torch.zeros(1024, dtype=torch.uint8)
        letters[: len(text.encode())] = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return bytes(self.broadcast(name, letters, 0, over).tolist()).rstrip(b"\0").decode()

    def on_rank0(self, name: str, action: Callable[[], None]) -> None:
        """Have the first process do something that the others wait for; where it fails, all do."""
        wrong = None
        if self.is_rank0:
            try:
                action()
            except KsparseError as error:
                wrong = error
        if self.all_reduce_max_ints(name, [int(wrong is not None)])[0]:
            raise wrong or PeerError(
                f"process 0 of {self.size} could not go on; its own message says why"
            )

    def _counted(self, name: str, value: Tensor) -> Tensor:
        with self._lock:  # threads count too
            self.sent[name] += value.numel() * value.element_size()
        return value

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (
            RuntimeError,
            ValueError,
        ) as error:  # what torch.distributed raises, of many kinds, has no type of its own on Gloo
            raise PeerError(
                f"process {self.rank} of {self.size} waited for the others at {name!r}: one of "
                f"them is gone, or did not answer within {self.timeout:g} s "
                "(mesh.timeout). Its own message says why; the same command goes on from the last "
                f"checkpoint ({str(error).splitlines()[0]})"
            ) from error


SINGLE_PROCESS = Mesh()


@contextmanager
def open_mesh(recipe: Recipe, device: str) -> Iterator[Mesh]:
    """Yield the mesh of a recipe among the processes that torchrun started; raise InputError where
    they are not as many, or do not divide the work."""
    asked, already = recipe.mesh, dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if already else int(os.environ.get("WORLD_SIZE", 1))
    data = asked.data or world // asked.latent
    check(recipe, data, world)
    if world == 1:
        yield SINGLE_PROCESS
        return
    if not already:
        connect(device, asked.timeout)
    try:
        yield Mesh(data, asked.latent, device=device.partition(":")[0], timeout=asked.timeout)
    finally:
        if not already:
            dist.destroy_process_group()


def connect(device: str, timeout: float) -> None:
    """Meet the other processes that torchrun started. Where it starts them again, what the lost
    ones left in its store is not looked at."""
    cuda = device.startswith("cuda")
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
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
    """Raise InputError unless `world` processes make the mesh of a recipe, and it divides what they
    share."""
    latent, n = recipe.mesh.latent, recipe.sae.n_latents
    if data * latent != world or not data:
        raise InputError(
            f"mesh.data x mesh.latent is {data} x {latent} = {data * latent}, but there "
            f"{'is' if world == 1 else 'are'} {world} process{'' if world == 1 else 'es'}; "
            f"start `torchrun --nproc-per-node {max(1, data) * latent} -m ksparse …`, or give keys "
            f"whose product is {world}"
        )
    if world == 1:
        return
    if n % latent:
        raise InputError(
            f"sae.n_latents is {n}, which mesh.latent = {latent} does not divide; give a multiple "
            f"of {latent}"
        )
    if recipe.sae.k > n // latent:
        raise InputError(
            f"sae.k is {recipe.sae.k}, more than the {n // latent} latents of a slice; give a "
            "smaller mesh.latent"
        )
    if recipe.batch % data:
        raise InputError(
            f"batch is {recipe.batch}, which mesh.data = {data} does not divide; give a multiple "
            f"of {data}"
        )
    if recipe.sae.activation.kind != "topk":
        raise InputError(
            f"sae.activation.kind is {recipe.sae.activation.kind!r}; several processes can share "
            "'topk' alone so far; train it in one process"
        )
    if data > 1 and recipe.sae.multi_topk and recipe.sae.auxk_norm == "batch":
        raise InputError(
            "sae.auxk_norm is 'batch', which with sae.multi_topk is not summed over mesh.data; "
            "give 'token', or mesh.data 1"
        )
    if recipe.run.ahead == "on" and not recipe.acts.shards:
        raise InputError(
            "run.ahead is 'on'; several processes compute a block of activations together, between "
            "two steps: leave it at 'auto', or read shards"
        )
    if (
        recipe.run.kernels in ("native", "triton")
        or recipe.optim.approx_topk not in ("off", "auto")
        or recipe.optim.precision != "float32"
    ):
        raise InputError(
            f"run.kernels is {recipe.run.kernels!r}, optim.approx_topk "
            f"{recipe.optim.approx_topk!r} and optim.precision {recipe.optim.precision!r}; "
            "several processes take the step in plain torch: leave them at 'auto', 'off' and "
            "'float32'"
        )


def local_device(name: str) -> str:
    """Return the device of this process where a machine has one for each: cuda:3 for its fourth."""
    return (
        f"cuda:{os.environ['LOCAL_RANK']}"
        if name == "cuda" and "LOCAL_RANK" in os.environ
        else name
    )
