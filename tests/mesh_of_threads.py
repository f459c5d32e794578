"""A mesh whose processes are threads of this one: what it computes is tested in milliseconds, where real processes take seconds to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ksparse.distributed import Mesh


class Hub:
    """Where threads exchange tensors."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.barriers: dict[tuple[int, ...], threading.Barrier] = {}
        self.given: dict[tuple[tuple[int, ...], int], Any] = {}

    def exchange(self, peers: tuple[int, ...], rank: int, value: Any) -> list[Any]:
        with self.lock:
            barrier = self.barriers.setdefault(peers, threading.Barrier(len(peers)))
            self.given[peers, rank] = value
        barrier.wait(240)
        found = [self.given[peers, peer] for peer in peers]
        barrier.wait(240)
        return found


class ThreadMesh(Mesh):
    """A mesh as the thread `rank` sees it."""

    def __init__(self, data: int, latent: int, rank: int, hub: Hub, reduce: str = "float32"):
        self.hub, self.own = hub, rank
        super().__init__(data, latent, reduce=reduce)

    def _create_groups(self, device: str) -> None:
        self.rank = self.own

    def exchange(self, name: str, value: torch.Tensor, over: str) -> list[torch.Tensor]:
        ranks = range(self.size)
        if over == "data":
            ranks = [rank for rank in ranks if rank % self.latent == self.latent_rank]
        elif over == "latent":
            ranks = [rank for rank in ranks if rank // self.latent == self.data_rank]
        self._counted(name, value)
        return self.hub.exchange(tuple(ranks), self.rank, value.detach().clone())

    def start_all_reduce_sum(self, name, value, over):
        if self.axis_size(over) > 1 and value.numel():
            value.copy_(torch.stack(self.exchange(name, value, over)).sum(0))
        return lambda: None

    def all_reduce_max(self, name, value, over):
        if self.axis_size(over) > 1:
            value.copy_(torch.stack(self.exchange(name, value, over)).amax(0))
        return value

    def all_gather(self, name, value, over):
        if self.axis_size(over) == 1:
            return value[None]
        return torch.stack(self.exchange(name, value, over))

    def broadcast(self, name, value, source, over="stream"):
        if self.size > 1 and value.numel():
            value.copy_(self.exchange(name, value, over)[source])
        return value


def on_mesh(
    data: int, latent: int, action: Callable[[Mesh], Any], reduce: str = "float32"
) -> list[Any]:
    """Do an action on each process of a mesh, and return what they return, in their order."""
    if data * latent == 1:
        return [action(Mesh())]
    hub = Hub()

    def run(rank: int) -> Any:
        try:
            return action(ThreadMesh(data, latent, rank, hub, reduce))
        except BaseException:
            for barrier in hub.barriers.values():
                barrier.abort()
            raise

    with ThreadPoolExecutor(data * latent) as pool:
        futures = [pool.submit(run, rank) for rank in range(data * latent)]
    errors = [error for future in futures if (error := future.exception())]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return [future.result() for future in futures]
