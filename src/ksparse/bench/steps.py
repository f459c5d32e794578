"""Measure the speed of a training step on this machine.

Each contestant runs in a process of its own, and they take single steps in turn. Times are given as
a ratio to the float32 encoder product.

    product     x[b, d] times W_enc^T[d, n] into a reused buffer: the floor of an exact step
    selection   the product and torch.topk
    dense       autograd with dense codes, which is what most libraries compute
    torch       our step in plain PyTorch
    exact       our compiled step
    screened    our compiled step with approximate top k, in the fastest low precision

A ratio is the median, over rounds, of a contestant's time over the product's in the same round.
Other libraries take part through a file with make(cfg) -> step(x); bench/step.py is an example.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import platform
import re
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ksparse.config import Config
from ksparse.errors import InputError, unknown

_WARMUP_STEPS = 2
Step = Callable[[Any], None]


@dataclass(frozen=True)
class Setting(Config):
    """The sizes of the step to time.

    Example:
        >>> Setting(d=64, n=512, k=8, batch=256).rounds
        7
    """

    OWNER = "a benchmark"

    d: int = 768
    """Dimension of an activation (d_model)."""
    n: int = 24_576
    """Number of latents."""
    k: int = 32
    """Active latents per token."""
    batch: int = 4_096
    """Activations per step."""
    dead: float = 0.0
    """Share of the latents that are dead, which AuxK then has to reconstruct with."""
    rounds: int = 7
    """Steps of each contestant to time."""
    threads: int = 0
    """CPU threads; 0: torch's default."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("d", "n", "k", "batch", "rounds", at_least=1)
        self.check_range("threads", at_least=0)
        self.check_range("dead", at_least=0, below=1)
        if self.k > self.n:
            raise InputError(f"k of a benchmark is {self.k}, more than the {self.n} latents")


def bench(
    setting: Setting,
    others: dict[str, str] | None = None,
    *,
    only: Sequence[str] = (),
    observe: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Time the contestants.

    Args:
        setting: sizes of the step.
        others: further contestants by name, each a Python file with make(cfg).
        only: names of the contestants to time, besides the product; by default all.
        observe: called after each round with the number of rounds done, and of all.

    Returns:
        What `ksparse bench --json` writes: the setting, the machine, and for each contestant its
        ratio to the product, seconds, tokens per second and peak memory.

    Raises:
        InputError: for an unknown contestant, and for one whose process ends.
    """
    names = _contestants([*BUILT_IN, *(others or {})], only)
    workers = {name: _Worker(name, setting, (others or {}).get(name, "")) for name in names}
    try:
        ready = {name: worker.ask("ready") for name, worker in workers.items()}
        workers = {name: worker for name, worker in workers.items() if ready[name] is None}
        seconds = _time_rounds(workers, setting.rounds, observe)
        facts = {name: worker.ask("facts") for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.process.terminate()
    table = {
        name: _row(setting, times, seconds["product"], facts[name])
        for name, times in seconds.items()
    }
    return {
        **asdict(setting),
        "threads": facts["product"]["threads"],
        "processor": processor(),
        "versions": {name: version(name) for name in ("ksparse", "torch")},
        "contestants": table,
        "left_out": {name: reason for name, reason in ready.items() if reason is not None},
        **{
            f"{name}_ratio": table[name]["ratio"] if name in table else None
            for name in ("torch", "exact", "screened")
        },
    }


def _contestants(names: list[str], only: Sequence[str]) -> list[str]:
    """Return the names of `only`, or all, and the product; raise InputError for an unknown one."""
    for name in only:
        if name not in names:
            raise unknown("there is no contestant", name, names)
    return [name for name in names if not only or name in ("product", *only)]


def _time_rounds(
    workers: dict[str, _Worker], rounds: int, observe: Callable[[int, int], None]
) -> dict[str, list[float]]:
    """Return the seconds of each contestant's steps; every round starts with the next one."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(rounds):
        order = list(workers)
        for name in order[number % len(order) :] + order[: number % len(order)]:
            seconds[name].append(workers[name].ask("step"))
        observe(number + 1, rounds)
    return seconds


def _row(
    setting: Setting, times: list[float], product: list[float], facts: dict[str, Any]
) -> dict[str, Any]:
    """Return the measurements of one contestant."""
    seconds = statistics.median(times)
    return {
        "ratio": statistics.median(time / floor for time, floor in zip(times, product)),
        "best_ratio": min(times) / min(product),
        "seconds": seconds,
        "best_seconds": min(times),
        "tokens_per_s": setting.batch / seconds,
        **{key: value for key, value in facts.items() if key != "threads"},
    }


class _Worker:
    """A contestant in a process of its own, which takes a step when it is told to."""

    def __init__(self, name: str, setting: Setting, file: str):
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, worker_end = context.Pipe()
        self.process = context.Process(
            target=_work, args=(worker_end, name, setting, file), daemon=True
        )
        self.process.start()
        worker_end.close()

    def ask(self, request: str) -> Any:
        """Send a request and return the answer.

        Args:
            request: "ready" (answer: None, or why the contestant cannot run), "step" (seconds of
                one step), or "facts" (peak memory, threads and what the step reports).
        """
        try:
            self.pipe.send(request)
            return self.pipe.recv()
        except (EOFError, OSError):
            if request == "ready":
                return "its process ended"
            raise InputError(
                f"contestant {self.name!r} ended unexpectedly: too little memory, most likely; "
                "give a smaller --n or --batch"
            ) from None


def _work(pipe: Any, name: str, setting: Setting, file: str) -> None:
    """Build a contestant and answer the requests of `_Worker.ask`, in the worker's process."""
    import torch

    if setting.threads:
        torch.set_num_threads(setting.threads)
    pipe.recv()
    try:
        x = activations(setting)
        before = _resident("VmRSS")
        step = (_from_file(file) if file else BUILT_IN[name])(_config(setting, x))
        dead = torch.randperm(setting.n, generator=torch.Generator().manual_seed(1))[
            : int(setting.dead * setting.n)
        ]
        for _ in range(_WARMUP_STEPS):
            _prepare(step, dead)
            step(x)
    except Exception as error:  # other libraries raise anything
        pipe.send(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        )
        return
    pipe.send(None)
    while pipe.recv() == "step":
        _prepare(step, dead)
        began = time.perf_counter()
        step(x)
        pipe.send(time.perf_counter() - began)
    pipe.send(
        {
            "peak_mib": round((_resident("VmHWM") - before) / 1024),
            "threads": torch.get_num_threads(),
        }
        | getattr(step, "facts", dict)()
    )


def _prepare(step: Step, dead: Any) -> None:
    if len(dead) and hasattr(step, "set_dead"):
        step.set_dead(dead)


def _config(setting: Setting, x: Any) -> SimpleNamespace:
    return SimpleNamespace(
        d=setting.d,
        n=setting.n,
        k=setting.k,
        B=setting.batch,
        lr=1e-4,
        seed=0,
        dead_tokens=10_000_000,
        auxk_coef=1 / 32,
        mean=x.mean(0),
        var=float((x - x.mean(0)).square().mean()),
        sample=x[:4096],
        opts={},
    )


def _from_file(file: str) -> Callable[[Any], Step]:
    spec = importlib.util.spec_from_file_location("contestant", file)
    if spec is None or spec.loader is None:
        raise InputError(f"{file} is not a Python file; give one that has make(cfg)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make


def activations(setting: Setting) -> Any:
    """Return synthetic activations [b, d].

    Each is a sparse combination of features from a hidden dictionary, with a mean and noise.
    Frequencies of features follow Zipf's law, like those of words.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(4 * setting.d, setting.d, generator=generator) / setting.d**0.5
    frequency = 1 / torch.arange(1, 4 * setting.d + 1)
    chosen = torch.multinomial(
        frequency.expand(setting.batch, -1), min(24, 4 * setting.d), generator=generator
    )
    values = torch.zeros(setting.batch, len(features)).scatter_(
        1, chosen, torch.rand(chosen.shape, generator=generator).log().neg()
    )
    return (
        values @ features
        + torch.randn(setting.d, generator=generator)
        + 0.05 * torch.randn(setting.batch, setting.d, generator=generator)
    )


# ---- contestants ---------------------------------------------------------------------------------


def _product(cfg: Any, after: Callable[[Any], Any] = lambda product: None) -> Step:
    import torch

    weight, out = torch.randn(cfg.n, cfg.d), torch.empty(cfg.B, cfg.n)
    return lambda x: after(torch.mm(x, weight.t(), out=out))


def _selection(cfg: Any) -> Step:
    return _product(cfg, lambda product: product.topk(cfg.k, dim=1))


def _dense(cfg: Any) -> Step:
    """Scatter the code into [b, n] and use dense products throughout, with autograd."""
    import torch

    from ksparse.sae.model import SAE, Shape

    sae = _initialized(SAE(Shape(cfg.d, cfg.n, cfg.k, "none")), cfg)
    adam = torch.optim.Adam(sae.parameters(), lr=cfg.lr, eps=6.25e-10)

    def step(x: Any) -> None:
        values, indices = torch.addmm(sae.b_enc, x - sae.b_pre, sae.W_enc.t()).topk(cfg.k, dim=1)
        z = torch.zeros(len(x), cfg.n).scatter(1, indices, values.relu())
        ((z @ sae.W_dec + sae.b_pre - x).square().mean() / cfg.var).backward()
        sae.W_dec.grad -= (sae.W_dec.grad * sae.W_dec).sum(1, keepdim=True) * sae.W_dec.detach()
        adam.step()
        adam.zero_grad()
        sae.normalize_decoder_()

    return step


@dataclass(frozen=True)
class OwnStep:
    """One of our steps, with what benchmarks and tests need besides it."""

    step: Step
    set_dead: Callable[[Any], None]
    recon: Callable[[Any], Any]
    facts: Callable[[], dict[str, Any]]

    def __call__(self, x: Any) -> None:
        """Run the step on normalised activations x[b, d]."""
        self.step(x)


def ours(kernels: str, screen: str = "off") -> Callable[[Any], Step]:
    """Return make(cfg) of our step: a full training step without weight averaging.

    Args:
        kernels: as in `run.kernels`.
        screen: as in `optim.approx_topk`.
    """

    def make(cfg: Any) -> Step:
        import torch

        from ksparse.config import from_dict
        from ksparse.sae.model import SAE, Shape
        from ksparse.training.checkpoint import TrainState
        from ksparse.training.steps.prefilter import PrefilteredStep
        from ksparse.training.steps.select import build_step
        from ksparse.training.trainer import train_step

        recipe = from_dict(
            {
                "acts": {"normalize": "none"},
                "batch": cfg.B,
                "tokens": 1000 * cfg.B,
                "seed": cfg.seed,
                "run": {"kernels": kernels},
                "sae": {
                    "n_latents": cfg.n,
                    "k": cfg.k,
                    "auxk_coef": cfg.auxk_coef,
                    "dead_after": cfg.dead_tokens,
                },
                "optim": {"lr": cfg.lr, "ema": 0.0, "approx_topk": screen},
            }
        )
        sae = _initialized(SAE(Shape(cfg.d, cfg.n, cfg.k, "none")), cfg)
        optimizer, state = (
            build_step(sae, recipe),
            TrainState(since=torch.zeros(cfg.n, dtype=torch.long), baseline=cfg.var),
        )

        def step(x: Any) -> None:
            state.step += 1
            train_step(optimizer, x, state, recipe)

        def set_dead(latents: Any) -> None:
            state.since[latents] = cfg.dead_tokens
            sae.b_enc.data[latents] = -1e4  # keeps them dead

        def facts() -> dict[str, Any]:
            if screen == "off" or not isinstance(optimizer, PrefilteredStep):
                return {}
            return {
                "screen": optimizer.screen,
                "screen_redone": optimizer.redone / max(1, optimizer.screened),
            }

        return OwnStep(step, set_dead, lambda x: sae(x).detach(), facts)

    return make


def _initialized(sae: Any, cfg: Any) -> Any:
    import torch

    from ksparse.config import SAEConfig
    from ksparse.sae.init import initialize_

    initialize_(
        sae,
        getattr(cfg, "sample", cfg.mean.expand(2, -1)),
        SAEConfig(b_pre_init="mean"),
        torch.Generator().manual_seed(cfg.seed),
    )
    return sae


BUILT_IN: dict[str, Callable[[Any], Step]] = {
    "product": _product,
    "selection": _selection,
    "dense": _dense,
    "torch": ours("torch"),
    "exact": ours("native"),
    "screened": ours("native", "auto"),
}


# ---- the machine, and a chart --------------------------------------------------------------------


def _resident(field: str) -> int:
    """Return the memory of this process in KiB: VmRSS for now, VmHWM for the peak."""
    try:
        size = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())
    except OSError:
        size = None
    return int(size[1]) if size else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processor() -> str:
    """Return the name of the processor."""
    try:
        names = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        return names[1] if names else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def picture(result: dict[str, Any]) -> str:
    """Return a bar chart of the ratios, as SVG.

    Args:
        result: what `bench` returns.
    """
    from matplotlib.figure import Figure

    rows = sorted(result["contestants"].items(), key=lambda item: -item[1]["ratio"])
    figure = Figure(figsize=(7, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([name for name, _ in rows], [row["ratio"] for _, row in rows], color="#3a55c8")
    axes.bar_label(bars, [f"{row['ratio']:.2f}" for _, row in rows], padding=3)
    axes.axvline(1, color="#1c1d22", linewidth=0.8, linestyle="--")
    axes.set_xlabel("time of a step, in encoder products of float32")
    axes.set_title(
        f"d {result['d']:,} · n {result['n']:,} · k {result['k']} · batch {result['batch']:,} · "
        f"{result['threads']} threads",
        fontsize=10,
        loc="left",
    )
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
