"""What a mesh of processes changes: nothing but rounding. Prints tables; `--json FILE` writes the numbers.

    python bench/mesh.py                 200 steps on 4x1, 2x2, 1x4 Gloo processes against one process, each kind of step and loss; checkpoints across meshes
    python bench/mesh.py --steps 24      the same, shorter

One process with the rows of each batch in the opposite order is the measure: there too, nothing but the order of sums differs. A token whose k-th
and next value are equal up to rounding may be given either; from there on two runs go apart. `near tie` is the smallest such gap, relative to the value, in
the step where that happened: of the size of float32's rounding (1e-7), or it is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

MESHES = [(4, 1), (2, 2), (1, 4)]
D, N, K, BATCH = 32, 1024, 8, 256
ROUNDING = 2e-6  # of a loss
AUXK_TOKENS = 77  # of a batch, where AuxK's share is 0.3
TORCH, EXACT, INT8 = (
    {"run.kernels": "torch"},
    {"run.kernels": "native", "optim.approx_topk": "off"},
    {"run.kernels": "native", "optim.approx_topk": "int8"},
)
AUXK = {"sae.k_aux": 16}
KINDS: dict[str, dict[str, Any]] = {
    "topk": TORCH | AUXK,
    "multi_topk": AUXK | {"sae.multi_topk": 0.125},
    "batch_norm": TORCH | AUXK | {"sae.auxk_norm": "batch", "sae.auxk_share": 0.3},
    "no_b_enc": TORCH | AUXK | {"sae.b_enc": False},
    "native": EXACT | AUXK,
    "native_int8": INT8 | AUXK,
    "native_no_clip": INT8 | AUXK | {"optim.clip": 0.0, "sae.b_enc": False},
    "batch_topk": AUXK | {"sae.activation": {"kind": "batch_topk"}},
    "jump_relu": AUXK | {"sae.activation": {"kind": "jump_relu"}},
    "relu": {"sae.activation": {"kind": "relu", "l1": 0.02, "resample": 2}},
    "gated": {"sae.activation": {"kind": "gated", "l1": 0.02}},
    "prolu": {"sae.activation": {"kind": "prolu", "l1": 0.02}},
    "matryoshka": AUXK | {"sae.prefixes": [100, 300]},
    "drawn_prefixes": AUXK | {"sae.prefix_draws": 3},
}
"""Kinds of steps and losses, as keys of a recipe."""
BRIEF = 4  # steps of the kinds that are done for a few steps alone


def recipe(
    steps: int,
    kind: str = "topk",
    mesh: tuple[int, int] = (1, 1),
    capacity: float = 0.0,
    save_every: int = 0,
) -> Any:
    """Return a run whose latents die early, more of them than AuxK takes."""
    from ksparse.config import from_dict

    table: dict[str, Any] = {
        "sae": {"n_latents": N, "k": K, "dead_after": BATCH},
        "optim": {"lr": 1e-3, "ema": 0.9, "ema_span": 1.0, "clip": 1.0},
        "tokens": steps * BATCH,
        "batch": BATCH,
        "threads": 1,
        "run": {
            "device": "cpu",
            "log_every": 1,
            "save_every": save_every or steps // 2,
            "keep": 2,
        },
        "mesh": {"data": mesh[0], "latent": mesh[1], "capacity": capacity, "timeout": 300.0},
    }
    for key, value in KINDS[kind].items():
        section, _, name = key.partition(".")
        table[section][name] = value
    return from_dict(table)


class Stream:
    """Batches of sparse sums of random directions: a function of the step alone."""

    def __init__(self, mesh: Any, *, reverse: bool = False):
        import torch

        self.d_model, self.mesh, self.reverse, self.cancel = D, mesh, reverse, threading.Event()
        self.directions = torch.nn.functional.normalize(
            torch.randn(4 * D, D, generator=torch.Generator().manual_seed(1)), dim=1
        )

    def rows(self, number: int, rows: int) -> Any:
        import torch

        draw = torch.Generator().manual_seed(number)
        code = torch.rand(rows, 4 * D, generator=draw) * (
            torch.rand(rows, 4 * D, generator=draw) < 0.05
        )
        return code @ self.directions + 0.01 * torch.randn(rows, D, generator=draw) + 0.1

    def batches(self, cursor: Any = None) -> Any:
        import torch

        from ksparse.data.base import ActivationBatch

        step = cursor["step"] if cursor else 0
        while True:
            x = self.rows(step + 1, BATCH)
            x = (
                torch.cat([part.flip(0) for part in (x[:AUXK_TOKENS], x[AUXK_TOKENS:])])
                if self.reverse
                else x
            )[self.mesh.batch_range(BATCH)]
            step += 1
            yield ActivationBatch(x, torch.zeros(len(x), dtype=torch.long), {"step": step})

    def sample(self, rows: int) -> Any:
        return self.rows(0, 2048)

    def document_names(self, documents: Any) -> list[str]:
        return ["synthetic"]

    def same_context_fraction(self) -> float:
        return 0.0


def feed(reverse: bool = False) -> Any:
    """Return what makes a Feed of `Stream`."""
    from ksparse.distributed import SINGLE_PROCESS
    from ksparse.training.source import ActivationSource

    class Synthetic(ActivationSource):
        def __init__(self, recipe: Any, device: Any, mesh: Any = SINGLE_PROCESS):
            self.recipe, self.device, self.mesh, self.policy, self.seconds_waited, self._centers = (
                recipe,
                device,
                mesh,
                {},
                0.0,
                {},
            )
            self.source = self.stream = Stream(mesh, reverse=reverse)

    return Synthetic


def train(task: dict[str, Any], rank: int = 0) -> None:
    """Do one run; leave the latents chosen in its first step, and the bytes sent, beside it."""
    from safetensors.torch import save_file

    from ksparse.training import train, trainer

    asked = recipe(
        task["steps"],
        task["kind"],
        tuple(task["mesh"]),
        task.get("capacity", 0.0),
        task.get("save_every", 0),
    )
    own, out = trainer.train_step, Path(task["out"])

    def seen(optimizer: Any, x: Any, state: Any, recipe: Any, dead: Any) -> Any:
        if tuple(task["mesh"]) == (1, 1):
            with out.with_name(f"{out.name}.gaps").open("a") as file:
                file.write(f"{nearest_tie(optimizer.sae, x, recipe, dead.indices(state.since))}\n")
        part, grad_norm = own(optimizer, x, state, recipe, dead)
        if state.step == 1:
            out.mkdir(parents=True, exist_ok=True)
            first = optimizer.mesh.latent_range(N).start
            save_file(
                {"values": part.code.values.contiguous(), "indices": part.code.indices + first},
                out.with_name(f"{out.name}.chosen-{rank}"),
            )
        if die == [rank, state.step]:
            os.kill(os.getpid(), signal.SIGKILL)
        if state.step == 2:
            optimizer.mesh.sent.clear()
        if state.step == 3:
            out.with_name(f"{out.name}.sent-{rank}").write_text(
                json.dumps(dict(optimizer.mesh.sent))
            )
        return part, grad_norm

    trainer.train_step = seen
    stop, die = (
        task.get("stop", 0),
        task.get("die") if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" else None,
    )

    def observe(run: Any, row: dict[str, Any]) -> None:
        if row["step"] == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    from ksparse.errors import Interrupted

    try:
        train.train_many(
            [asked], [out], observe=observe, open_source=feed(task.get("reverse", False))
        )
    except Interrupted:
        pass
    finally:
        trainer.train_step = own


def nearest_tie(sae: Any, x: Any, recipe: Any, dead: Any) -> float:
    """Return the smallest difference between a value that is kept and one that is not, relative to the largest; 1 where nothing is chosen."""
    import torch

    kind, options = sae.shape.activation, recipe.sae
    with torch.no_grad():
        values = sae.pre_acts_normalized(x)
        if kind == "jump_relu":
            return ((values - sae.threshold).abs().min() / values.abs().max()).item()
        if kind == "batch_topk":
            chosen = [(values.flatten()[None], len(x) * sae.k)]
        else:
            chosen = [(values, sae.k)] if kind == "topk" else []
        if options.multi_topk:
            chosen.append((values, 4 * sae.k))
        if options.uses_auxk:
            chosen.append((values[:, dead], options.k_aux))
        gaps = [1.0]
        for among, k in chosen:
            if 0 < k < among.shape[1]:
                best = among.topk(k + 1, dim=1).values
                close = ((best[:, -2] - best[:, -1]) / best[:, 0].abs())[best[:, -2] > 0]
                gaps += [close.min().item()] if len(close) else []
        return min(gaps)


def resave(task: dict[str, Any]) -> None:
    """Load a run that another mesh wrote, and save what was loaded elsewhere."""
    import torch

    from ksparse.distributed import open_mesh
    from ksparse.storage.run_folder import RunFolder
    from ksparse.training import checkpoint, resume

    asked = recipe(task["steps"], task["kind"], tuple(task["mesh"]))
    with open_mesh(asked, "cpu") as mesh:
        state, optimizer = resume.restore(
            RunFolder(Path(task["load"])), asked, torch.device("cpu"), mesh
        )
        checkpoint.save(RunFolder(Path(task["out"])), state, optimizer)


def work(tasks: list[dict[str, Any]]) -> None:
    """Be one of several processes: do the tasks in their order."""
    import torch
    import torch.distributed as dist

    from ksparse.distributed import connect

    torch.set_num_threads(1)
    connect("cpu", 300.0)
    for task in tasks:
        if dist.get_rank() == 0:
            Path(task["out"]).parent.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        resave(task) if "load" in task else train(task, dist.get_rank())
        dist.barrier()
    dist.destroy_process_group()


def together(tasks: list[dict[str, Any]], processes: int = 4) -> None:
    """Do tasks in several processes of one group; raise RuntimeError, with what they said, where one of them fails."""
    command = [sys.executable, __file__, "--work", json.dumps(tasks), "--ranks", str(processes)]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)


def fork(processes: int, action: Callable[[], None]) -> None:
    """Do an action in several processes, forked once everything is imported; raise RuntimeError where one of them fails.

    This process must not have computed a gradient before.
    """
    import traceback

    import ksparse.training.train  # noqa: F401

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["WORLD_SIZE"] = str(processes)
    children = []
    for rank in range(processes):
        if not (child := os.fork()):
            os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
            try:
                action()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise RuntimeError("a process failed; what it said stands above")


def elastic(task: dict[str, Any], processes: int) -> str:
    """Do a task under torchrun, which starts all processes again where one is lost; return what was said."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "--max-restarts",
        "2",
        __file__,
        "--work",
        json.dumps([task]),
    ]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


# ---- what is compared


def held(out: str, step: int | None = None) -> dict[str, Any]:
    """Return all tensors of a run's newest checkpoint, or of one step, joined from whatever files hold them."""
    from ksparse.sae.serialization import rows_of
    from ksparse.storage.run_folder import RunFolder

    run = RunFolder(Path(out))
    path = run.checkpoint(step) if step else run.newest_intact()[0]
    parts = {stem: rows_of(path, stem) for stem in ("sae", "optim")}
    return {
        f"{stem}/{key}": weights.stored(key).read()
        for stem, weights in parts.items()
        for key in weights
    }


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the worst relative difference of any raw or averaged tensor of weights: norm of the difference to norm."""
    return max(
        ((one[key] - other[key]).norm() / other[key].norm()).item()
        for key in other
        if key.startswith(("optim/raw", "sae/"))
    )


def element(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Return the largest difference of a single weight, to the largest of its tensor; Adam divides by a gradient's own size, so rounding of one near 0 counts in full."""
    return max(
        ((one[key] - other[key]).abs().max() / other[key].abs().max()).item()
        for key in other
        if key.startswith(("optim/raw", "sae/"))
    )


def curves_apart(one: str, other: str) -> list[float]:
    """Return the worst relative difference of loss, AuxK and gradient norm at each step."""
    from ksparse.storage.run_folder import RunFolder

    pairs = zip(RunFolder(Path(one)).metrics(), RunFolder(Path(other)).metrics(), strict=True)
    return [
        max(abs(a[key] - b[key]) / abs(b[key]) for key in ("nmse", "auxk", "grad_norm") if b[key])
        for a, b in pairs
    ]


def differences(out: str, alone: str) -> dict[str, Any]:
    """Return how far a run is from that of one process, and where they went apart, with the nearest tie in that step."""
    curve = curves_apart(out, alone)
    forked = next((step for step, each in enumerate(curve) if each > ROUNDING), None)
    gaps = [float(line) for line in Path(f"{alone}.gaps").read_text().split()]
    return {
        "parameters": apart(held(out), held(alone)),
        "element": element(held(out), held(alone)),
        "curve": max(curve),
        "before": max(curve[:forked], default=0.0),
        "forked": forked and forked + 1,
        "gap": None if forked is None else min(gaps[max(0, forked - 1) : forked + 1]),
    }


def chosen(out: str, mesh: tuple[int, int]) -> list[set[int]]:
    """Return the active latents of each token of the first step."""
    from safetensors.torch import load_file

    found: list[set[int]] = []
    for data in range(mesh[0]):
        parts = [load_file(f"{out}.chosen-{data * mesh[1] + latent}") for latent in range(mesh[1])]
        for token in range(BATCH // mesh[0]):
            found.append(
                {
                    int(i)
                    for part in parts
                    for i, value in zip(part["indices"][token], part["values"][token])
                    if value > 0
                }
            )
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool((one[key] == other[key]).all()) for key in one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--brief", nargs="*", default=[], help=f"kinds that take {BRIEF} steps")
    parser.add_argument("--json", default="")
    parser.add_argument(
        "--elastic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="kill a process under torchrun, and go on with other numbers of them",
    )
    parser.add_argument("--work", default="", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        do = lambda: work(json.loads(options.work))  # noqa: E731
        return fork(options.ranks, do) if options.ranks else do()
    import logging

    import torch

    from ksparse.storage.run_folder import RunFolder

    logging.getLogger("ksparse").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    steps, half = options.steps, options.steps // 2
    base = Path(tempfile.mkdtemp(prefix="mesh-"))
    name = lambda *parts: str(base / "-".join(map(str, parts)))  # noqa: E731
    lengths = dict.fromkeys(options.kinds, steps) | dict.fromkeys(options.brief, BRIEF)
    tasks = [
        {"kind": kind, "mesh": mesh, "steps": length, "out": name(kind, *mesh)}
        for kind, length in lengths.items()
        for mesh in MESHES
    ]
    for mesh in MESHES:
        tasks.append(
            {
                "kind": options.kinds[0],
                "mesh": mesh,
                "steps": steps,
                "out": name("stopped", *mesh),
                "stop": half - 3,
                "save_every": 10**6,
            }
        )
        tasks.append(
            {"kind": options.kinds[0], "mesh": mesh, "steps": steps, "out": name("stopped", *mesh)}
        )
        tasks.append(
            {
                "kind": options.kinds[0],
                "mesh": mesh,
                "steps": steps,
                "out": name("capacity", *mesh),
                "capacity": 1.25,
            }
        )
        tasks.append(
            {
                "kind": options.kinds[0],
                "mesh": mesh,
                "steps": steps,
                "out": name("loaded", *mesh),
                "load": name(options.kinds[0], 2, 2),
            }
        )
    for kind, length in lengths.items():
        train({"kind": kind, "mesh": (1, 1), "steps": length, "out": name(kind, 1, 1)})
        train(
            {
                "kind": kind,
                "mesh": (1, 1),
                "steps": length,
                "out": name(kind, "reversed"),
                "reverse": True,
            }
        )
    together(tasks)

    rows = []
    for kind in lengths:
        alone, order = name(kind, 1, 1), name(kind, "reversed")
        dead = max(row["dead"] for row in RunFolder(Path(alone)).metrics())
        rows.append({"kind": kind, "mesh": "reversed", **differences(order, alone), "dead": dead})
        for mesh in MESHES:
            out = name(kind, *mesh)
            rows.append(
                {
                    "kind": kind,
                    "mesh": f"{mesh[0]}x{mesh[1]}",
                    **differences(out, alone),
                    "same_choice": chosen(out, mesh) == chosen(alone, (1, 1)),
                    "sent": json.loads(Path(f"{out}.sent-0").read_text()),
                }
            )
    print(
        f"{steps} steps against one process: worst relative difference of a tensor at the end (bound without a near tie: steps x 2^-23 = {steps * 2**-23:.1e}), of the curve"
    )
    for row in rows:
        print(
            f"  {row['kind']:<12} {row['mesh']:<9} parameters {row['parameters']:.1e}  one weight {row['element']:.1e}  curve {row['curve']:.1e}  "
            + (
                f"near tie in step {row['forked']}, gap {row['gap']:.0e}; curve before {row['before']:.1e}  "
                if row["forked"]
                else ""
            )
            + (
                f"same latents at step 1: {row['same_choice']}"
                if "same_choice" in row
                else f"(order of rows; up to {row['dead']:.0%} dead)"
            )
        )
    alone = name("loaded", 1, 1)
    resave(
        {
            "kind": options.kinds[0],
            "mesh": (1, 1),
            "steps": steps,
            "out": alone,
            "load": name(options.kinds[0], 2, 2),
        }
    )
    loaded = {
        f"{m[0]}x{m[1]}": same(held(name("loaded", *m)), held(name(options.kinds[0], 2, 2)))
        for m in [*MESHES, (1, 1)]
    }
    print("written on 2x2, loaded and written again, bit for bit:", loaded)
    resumed = {
        f"{m[0]}x{m[1]}": same(held(name("stopped", *m)), held(name(options.kinds[0], *m)))
        for m in MESHES
    }
    print("stopped at", half - 3, "and gone on with, bit for bit:", resumed)
    capacity = {
        f"{m[0]}x{m[1]}": {
            "nmse": RunFolder(Path(name("capacity", *m))).metrics()[-1]["nmse"],
            "used_up": RunFolder(Path(name("capacity", *m))).metrics()[-1].get("capacity_used_up"),
        }
        for m in MESHES
    }
    print(
        "capacity 1.25:",
        capacity,
        "exact",
        RunFolder(Path(name(options.kinds[0], 1, 1))).metrics()[-1]["nmse"],
    )
    restarted: dict[str, Any] = {}
    if options.elastic:
        kind, out = options.kinds[0], name("killed")
        elastic(
            {
                "kind": kind,
                "mesh": (2, 2),
                "steps": steps,
                "out": out,
                "die": (3, half + 5),
                "save_every": half // 2,
            },
            4,
        )
        restarted["2x2, process 3 killed, bit for bit"] = same(held(out), held(name(kind, 2, 2)))
        out = name("fewer")
        together([{"kind": kind, "mesh": (2, 2), "steps": steps, "out": out, "stop": half}])
        elastic(
            {
                "kind": kind,
                "mesh": (1, 2),
                "steps": steps,
                "out": out,
                "die": (0, half + 5),
                "save_every": half // 2,
            },
            2,
        )
        restarted["2x2, then 1x2 with process 0 killed, against one process"] = {
            "parameters": apart(held(out), held(name(kind, 1, 1))),
            "curve": max(curves_apart(out, name(kind, 1, 1))),
        }
        print("restarted:", restarted)
    if options.json:
        Path(options.json).write_text(
            json.dumps(
                {
                    "rows": rows,
                    "loaded": loaded,
                    "resumed": resumed,
                    "capacity": capacity,
                    "restarted": restarted,
                    "folder": str(base),
                }
            )
        )


if __name__ == "__main__":
    main()
