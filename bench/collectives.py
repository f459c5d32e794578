"""Collectives by Gloo on this machine, against what the plan assumes: the bytes that a rank sends, and seconds linear in them. Prints tables; `--json FILE` writes the numbers.

    python bench/collectives.py                    2 and 4 processes of one thread
    python bench/collectives.py --processes 2 --most 16777216

The bytes are those that the loopback interface carried, by the kernel's counter: other programs that use it meanwhile are counted too, so the smallest of several
rounds is taken; about 2 kB of each round are the barriers around it. Seconds are wall-clock and CPU seconds of a process, the smallest of the rounds: on a shared machine only the latter mean much.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh import fork

OPERATIONS = ("all_reduce", "all_reduce_bfloat16", "all_gather", "broadcast")
ROUNDS = 5


def carried() -> int:
    """Return the bytes that the loopback interface has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    raise SystemExit("no loopback interface in /proc/net/dev")


def planned(operation: str, ranks: int, size: int) -> float:
    """Return the bytes that a rank sends, by the plan's formula, for `size` bytes that it gives."""
    from ksparse.planning.costs import Collective

    kind: Any = operation.removesuffix("_bfloat16")
    return Collective("", kind, "all", ranks, size).sent


def run(mesh: Any, operation: str, size: int) -> Callable[[], object]:
    """Return what makes one call, in which each rank gives `size` bytes in all."""
    import torch

    if operation == "all_gather":
        part = torch.ones(size // 4)
        return lambda: mesh.all_gather("x", part, "latent")
    if operation == "broadcast":  # in turn by all ranks, as activations are
        parts = torch.ones(mesh.size, size // 4)
        return lambda: [mesh.broadcast("x", part, rank) for rank, part in enumerate(parts)]
    whole = torch.ones(size // (2 if operation.endswith("bfloat16") else 4))
    whole = whole.bfloat16() if operation.endswith("bfloat16") else whole
    return lambda: mesh.all_reduce_sum("x", whole.zero_(), "latent")


def measure(sizes: list[int], out: Path) -> None:
    """Be one process: call each collective at each size, and write what was found."""
    import torch
    import torch.distributed as dist

    from ksparse.distributed import Mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = Mesh(1, dist.get_world_size())
    rows = []
    for operation in OPERATIONS:
        for size in sizes:
            call, found = run(mesh, operation, size), []
            calls = max(1, min(20, 2**22 // size))
            call()
            for _ in range(ROUNDS):
                mesh.all_reduce_max_ints("begin", [0])
                before = carried()
                mesh.all_reduce_max_ints("counted", [0])
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(calls):
                    call()
                found.append((time.perf_counter() - wall, time.process_time() - cpu))
                mesh.all_reduce_max_ints("end", [0])
                found[-1] += (carried() - before,)
            wall, cpu, total = (min(column) / calls for column in zip(*found))
            rows.append(
                {
                    "processes": mesh.size,
                    "operation": operation,
                    "given": size,
                    "planned": planned(operation, mesh.size, size),
                    "carried": total / mesh.size,
                    "seconds": wall,
                    "cpu_seconds": cpu,
                }
            )
    if mesh.is_rank0:
        out.write_text(json.dumps(rows))
    mesh.close()
    dist.destroy_process_group()


def line(rows: list[dict[str, Any]], key: str) -> tuple[float, float, float]:
    """Return the latency and the seconds per byte sent that fit rows best relative to each, and the largest relative error of that line."""
    points = [(row["planned"], row[key]) for row in rows]
    best = (0.0, 0.0, float("inf"))
    slopes = [
        (two - one) / (more - less)
        for at, (less, one) in enumerate(points)
        for more, two in points[at + 1 :]
    ]
    for slope in slopes:
        base = statistics.median(seconds - slope * sent for sent, seconds in points)
        error = max(abs((base + slope * sent) / seconds - 1) for sent, seconds in points)
        best = min(best, (base, slope, error), key=lambda found: found[2])
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--least", type=int, default=2**12, help="bytes")
    parser.add_argument("--most", type=int, default=2**24, help="bytes")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = [options.least]
    while sizes[-1] * 4 <= options.most:
        sizes.append(sizes[-1] * 4)
    rows: list[dict[str, Any]] = []
    for processes in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            fork(processes, lambda file=file: measure(sizes, file))
            rows += json.loads(file.read_text())
    print(f"torch.distributed by Gloo, processes of one thread; load {os.getloadavg()[0]:.1f}")
    print(
        "processes  operation             given      sent, planned  carried / planned   ms    CPU ms"
    )
    for row in rows:
        print(
            f"{row['processes']:>9}  {row['operation']:<19} {row['given']:>10,} {row['planned']:>14,.0f} "
            f"{row['carried'] / row['planned']:>14.3f} {1000 * row['seconds']:>12.3f} {1000 * row['cpu_seconds']:>8.3f}"
        )
    print("seconds = latency + bytes sent / rate, and the largest relative error of that line")
    for processes in options.processes:
        for operation in OPERATIONS:
            chosen = [
                row
                for row in rows
                if (row["processes"], row["operation"]) == (processes, operation)
            ]
            for key in ("seconds", "cpu_seconds"):
                base, slope, error = line(chosen, key)
                print(
                    f"{processes:>9}  {operation:<19} {key:<12} {1e6 * base:>10,.0f} us "
                    f"{1e-9 / slope if slope > 0 else float('inf'):>8.2f} GB/s {error:>6.0%}"
                )
    if options.json:
        Path(options.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
