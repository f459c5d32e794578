"""Memory and time of processes that share a large SAE, against the plan. Prints a line for each process; `--json FILE` writes the numbers.

    python bench/mesh_scale.py --n 262144 --d 768 --processes 4               memory at the start and in a step
    python bench/mesh_scale.py --n 98304 --d 768 --batch 4096 --processes 2   two processes of one thread …
    python bench/mesh_scale.py --n 98304 --d 768 --batch 4096 --threads 2     … and one of two: compare tokens/s, or CPU seconds where others use the cores
    python bench/mesh_scale.py --n 1048576 --d 256 --processes 4 --checkpoint DIR   with a checkpoint, which is then read
    python bench/mesh_scale.py --n 1048576 --d 256 --processes 2 --read DIR   that checkpoint on another mesh: are the bits the same?

Activations are random. The processes are forked once everything is imported.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from mesh import fork

MB = 1e6


def memory(peak: bool = False) -> float:
    """Return this process's own resident bytes in MB, without shared libraries and files; or their peak since `forget_peak`, files included."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM" if peak else "RssAnon"].split()[0]) * 1024 / MB


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(options: argparse.Namespace, out: Path) -> None:
    """Be one process: start, take the steps, and write what was found."""
    import torch

    from ksparse.config import MeshConfig, from_dict
    from ksparse.distributed import open_mesh
    from ksparse.planning import costs
    from ksparse.planning.hardware import DEVICES
    from ksparse.planning.steps import choose_step
    from ksparse.sae.init import initialize_
    from ksparse.sae.model import Shape
    from ksparse.sae.sharded import new_sae
    from ksparse.storage.run_folder import RunFolder
    from ksparse.training.checkpoint import TrainState
    from ksparse.training.steps.select import build_step
    from ksparse.training.trainer import train_step

    torch.set_num_threads(options.threads)
    recipe = from_dict(
        {
            "sae": {"n_latents": options.n, "k": options.k, "dead_after": 10**9},
            "optim": {"approx_topk": options.screen},
            "batch": options.batch,
            "tokens": options.steps * options.batch,
            "run": {"device": "cpu", "kernels": options.kernels, "log_every": 10**6},
            "mesh": {"data": options.data, "latent": options.processes // options.data},
        }
    )
    d = options.d
    draw = torch.Generator().manual_seed(1)
    with open_mesh(recipe, "cpu") as mesh:
        small = new_sae(Shape(d, 128 * options.processes, options.k), {}, mesh)
        x = torch.nn.functional.normalize(torch.randn(64, d, generator=draw), dim=1)
        initialize_(small, x, recipe.sae, torch.Generator().manual_seed(0))
        state = TrainState(torch.zeros(small.n_latents, dtype=torch.long), 1 / d, step=1)
        train_step(build_step(small, recipe, mesh), x[: 64 // mesh.data], state, recipe)
        del small
        before = memory()
        forget_peak()
        floor, began = memory(peak=True), time.perf_counter()
        sae = new_sae(Shape(d, options.n, options.k), {}, mesh)
        sample = torch.nn.functional.normalize(torch.randn(4096, d, generator=draw), dim=1)
        initialize_(sae, sample, recipe.sae, torch.Generator().manual_seed(0))
        step = build_step(sae, recipe, mesh)
        state = TrainState(torch.zeros(sae.n_latents, dtype=torch.long), 1 / d)
        found: dict[str, Any] = {
            "start_seconds": time.perf_counter() - began,
            "start_peak": memory(peak=True) - floor,
        }
        if options.read:
            forget_peak()
            found |= read(RunFolder(Path(options.read)), state, step, floor)
            (out / f"{mesh.rank}.json").write_text(json.dumps(found))
            return
        times, own = [], mesh.batch_range(options.batch)
        for number in range(1, options.steps + 1):
            x = torch.nn.functional.normalize(torch.randn(options.batch, d, generator=draw), dim=1)
            state.step = number
            mesh.sent.clear()
            mesh.all_reduce_max_ints("begin", [0])
            wall, cpu = time.perf_counter(), time.process_time()
            train_step(step, x[own].contiguous(), state, recipe)
            times.append((time.perf_counter() - wall, time.process_time() - cpu))
            if number == 1:  # buffers exist from now on
                found["first_peak"] = memory(peak=True) - floor
                forget_peak()
        best = min(times[1:] or times)
        found |= {
            "step": type(step).__name__,
            "steady": memory() - before,
            "step_peak": memory(peak=True) - floor,
            "seconds": best[0],
            "cpu_seconds": min(cpu for _, cpu in times[1:] or times),
            "tokens_per_s": options.batch / best[0],
            "sent": dict(mesh.sent),
        }
        case = costs.PlanInput(
            recipe, costs.LMSpec(d, 0, 0), DEVICES["laptop"], choose_step(recipe, "cpu"), dead=0.0
        )
        sizes = MeshConfig(mesh.data, mesh.latent)
        left_out = {"libraries", "activations block", "first activations", "LM", "LM at work"}
        parts = {
            name: size / MB
            for name, size in costs.memory(case, sizes).items()
            if name not in left_out
        }
        copies = {"copy for a checkpoint"}
        found["planned"] = sum(size for name, size in parts.items() if name not in copies)
        found["planned_bytes"] = {
            each.name: each.bytes for each in costs.communication(case, sizes)
        }
        if options.checkpoint:
            run = RunFolder(Path(options.checkpoint))
            found |= save(run, state, step, floor) | read(run, state, step, floor)
        found["cpu_seconds_in_all"] = time.process_time()
        (out / f"{mesh.rank}.json").write_text(json.dumps(found))


def save(run: Any, state: Any, step: Any, floor: float) -> dict[str, Any]:
    """Save a checkpoint, and the digests of what was saved; return seconds and peak."""
    from ksparse.training import checkpoint

    run.path.mkdir(parents=True, exist_ok=True)
    forget_peak()
    began = time.perf_counter()
    checkpoint.save(run, state, step)
    found = {
        "save_seconds": time.perf_counter() - began,
        "save_peak": memory(peak=True) - floor,
    }
    name = f"digests-{step.mesh.rank}-of-{step.mesh.latent}.json"
    (run.path / name).write_text(json.dumps(digests(step)))
    step.mesh.all_reduce_max_ints("saved", [0])
    return found


def read(run: Any, state: Any, step: Any, floor: float) -> dict[str, Any]:
    """Read the newest checkpoint into a step; return seconds, peak, and whether the bits are those saved."""
    from ksparse.training import resume

    [newest, *_] = run.checkpoints()[::-1]
    forget_peak()
    began = time.perf_counter()
    resume.load(newest, step)
    found = {"load_seconds": time.perf_counter() - began, "load_peak": memory(peak=True) - floor}
    files = sorted(
        run.path.glob("digests-*-of-*.json"), key=lambda file: int(file.stem.split("-")[1])
    )
    saved = [json.loads(file.read_text()) for file in files]
    rank, shards = step.mesh.latent_rank, step.mesh.latent
    same = []
    for key, own in digests(step).items():
        whole = (
            [digest for part in saved for digest in part[key]] if len(own) > 1 else saved[0][key]
        )
        size = len(whole) // shards if len(own) > 1 else 1
        at = rank * size if len(own) > 1 else 0
        same.append(whole[at : at + size] == own)
    return found | {"tensors_read": len(same), "same_bits": all(same)}


def digests(step: Any) -> dict[str, list[str]]:
    """Return a hash of each 64th of the rows of all latents, for every tensor; of other tensors one."""
    rows = step.sae.n_latents
    blocks = 64 // step.mesh.latent
    found = {}
    for key, tensor in step.tensors().items():
        parts = tensor.chunk(blocks) if tensor.ndim and len(tensor) == rows else [tensor]
        found[key] = [hashlib.sha256(part.contiguous().numpy()).hexdigest() for part in parts]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=262_144)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--screen", default="int8")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--checkpoint", default="", help="a new folder")
    parser.add_argument("--read", default="", help="a folder that --checkpoint made")
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        fork(options.processes, lambda: measure(options, Path(folder)))
        rows = [
            json.loads((Path(folder) / f"{rank}.json").read_text())
            for rank in range(options.processes)
        ]
    print(
        f"n {options.n:,}, d {options.d}, k {options.k}, batch {options.batch:,}; {options.processes} processes of "
        f"{options.threads} threads, {rows[0].get('step', 'reading')}; load {os.getloadavg()[0]:.1f}; MB above a process that has trained a small SAE"
    )
    for rank, row in enumerate(rows):
        shown = {key: value for key, value in row.items() if key not in ("sent", "planned_bytes")}
        words = (
            f"{key} {value:,.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in shown.items()
        )
        print(f"  {rank}: {'; '.join(words)}")
    if options.read:
        return
    sent, planned = rows[0]["sent"], rows[0]["planned_bytes"]
    print("  bytes given (planned):", {k: (v, planned.get(k)) for k, v in sent.items()})
    if options.json:
        Path(options.json).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
