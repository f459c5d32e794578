"""Train one autoencoder. Read `train` as the method section."""

from __future__ import annotations

import logging
import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ksparse import files
from ksparse.acts.lm import LM, resolve_device
from ksparse.acts.shards import Shards
from ksparse.acts.stream import Batch, LiveStream, ShardStream, Stream
from ksparse.acts.text import Corpus
from ksparse.errors import InputError, Interrupted, NonFiniteError, OutOfMemoryError
from ksparse.kernels import native
from ksparse.recipe import Recipe, k_aux, to_toml
from ksparse.runs import RunFolder
from ksparse.sae.init import initialize_
from ksparse.sae.loss import Losses
from ksparse.sae.model import SAE, Shape
from ksparse.sae.normalize import dataset_factor, normalize
from ksparse.training import checkpoint
from ksparse.training.checkpoint import State
from ksparse.training.fused import ExplicitOptimizer, FusedOptimizer, fastest_screen
from ksparse.training.loggers import open_loggers
from ksparse.training.optim import Optimizer, rate_share

log = logging.getLogger("ksparse")

AUDITED = 64  # tokens of a logged step on which a screen is held against the exact choice
SAMPLE = 32_768  # activations for b_pre and the constants, as in the official code

Observer = Callable[[dict[str, Any]], None]


def train(recipe: Recipe, out: Path | str | None = None, *, observe: Observer = lambda row: None) -> RunFolder:
    """Train one SAE and leave a run in the folder `out`; if a run with the same recipe is there, go on with it.

    out: runs/<a hash of the recipe> if not given.
    observe: called with each row of metrics. Raises Interrupted, once all is saved, on Ctrl-C and SIGTERM.
    """
    run = RunFolder(Path(out or f"runs/{files.digest(recipe.identity())}"))
    with run.locked(), _signals() as stop, _memory_explained(recipe):
        checkpoint.check_same(run, recipe) if run.exists() else begin(run, recipe)
        device = torch.device(resolve_device(recipe.run.device))
        threads(recipe.threads)
        state, optimizer, stream = restore(run, recipe, device) or start(recipe, device)
        sae = optimizer.sae
        checkpoint.check_room(run, optimizer, recipe.run.keep)
        send = [run.append_metrics, observe, *open_loggers(recipe, run)]
        saved = began = time.monotonic()
        spent, first = state.seconds, state.tokens

        batches = stream.batches(state.cursor)
        while state.step < recipe.steps:
            batch = next(batches)
            state.step += 1
            part = backward(optimizer, batch, state, recipe)
            grad_norm = optimizer.step(state.step) if math.isfinite(part.total) else math.nan
            if math.isfinite(grad_norm):
                count(state, part, len(batch.x))
            else:
                skip(batch, state, optimizer, stream, run, recipe)
            state.tokens += len(batch.x)
            state.cursor = batch.cursor

            if state.step % recipe.run.log_every == 0 or state.step in (1, recipe.steps):
                now = time.monotonic()
                state.seconds = spent + now - began
                row = metrics(part, grad_norm, state, recipe, stream) | optimizer.audit(sae.normalize(batch.x[:AUDITED]).x) | {
                    "tokens_per_s": (state.tokens - first) / (now - began), "seconds": state.seconds}
                for each in send:
                    each(row)
            if stop or state.step == recipe.steps or due(state.step, saved, recipe):
                state.seconds = spent + time.monotonic() - began
                checkpoint.save(run, state, optimizer)
                saved = time.monotonic()
            if stop and state.step < recipe.steps:
                raise Interrupted(f"stopped at step {state.step:,} of {recipe.steps:,}; everything is saved. "
                                  f"Go on with: ksparse resume {run.path}", stop[0])
    return run


# ---- the parts, in the order of their use ------------------------------------------------------------------------


def begin(run: RunFolder, recipe: Recipe) -> None:
    """Write what the run is, before anything else."""
    begun = (".lock", "environment.json")  # what a process that was killed in here leaves
    if any(file.name not in begun and not file.name.startswith(".tmp-") for file in run.path.iterdir()):
        raise InputError(f"{run.path} is not empty and not a run; give another --out, or empty it")
    files.remove_leftovers(run.path)
    files.write_json(run.path / "environment.json", environment())
    files.write_text(run.recipe_file, to_toml(recipe))


def open_stream(recipe: Recipe, device: torch.device) -> tuple[Stream, dict[str, Any]]:
    """Return the stream of activations that a recipe names, and the policy by which they are kept."""
    acts = recipe.acts
    if acts.shards:
        shards = Shards(acts.shards)
        shards.check_fits(acts)
        return ShardStream(shards, batch=recipe.batch, seed=recipe.seed, device=device), shards.manifest["policy"]
    if acts.mix < recipe.batch:
        raise InputError(f"acts.mix is {acts.mix}, less than one batch of {recipe.batch}; give several batches")
    lm = LM(acts=acts, device=str(device), trust_remote_code=recipe.run.trust_remote_code)
    corpus = Corpus(acts, lm.tokenizer, "train")
    return LiveStream(lm, corpus, batch=recipe.batch, seed=recipe.seed), corpus.policy()


def open_optimizer(sae: SAE, recipe: Recipe) -> Optimizer:
    """Return the fastest step that can run here and is not refused: compiled, written out in plain torch, or by autograd."""
    screen, kernels = recipe.optim.screen, recipe.run.kernels
    written_out = sae.W_enc.device.type == "cpu" and sae.shape.activation == "topk" and not recipe.sae.multi_topk
    if kernels != "torch" and written_out and native.load() is not None:
        return FusedOptimizer(sae, recipe, fastest_screen() if screen == "auto" else screen)
    if kernels == "native":
        raise InputError("run.kernels is 'native', which needs a CPU, a C++ compiler (g++ or clang++) and TopK without Multi-TopK; leave it at 'auto', or give 'torch'")
    if screen not in ("off", "auto"):
        raise InputError(f"optim.screen is {screen!r}, which needs the compiled kernels (a CPU, a C++ compiler, TopK without Multi-TopK, run.kernels not 'torch'); "
                         "leave it at 'off' or 'auto'")
    return ExplicitOptimizer(sae, recipe) if written_out else Optimizer(sae, recipe)


def start(recipe: Recipe, device: torch.device) -> tuple[State, Optimizer, Stream]:
    """Initialise an SAE from a sample of the stream (which does not move the stream)."""
    log.info("reading the first activations")
    stream, policy = open_stream(recipe, device)
    raw = stream.sample(SAMPLE)
    factor = dataset_factor(raw) if recipe.acts.normalize == "dataset" else 1.0
    sample = normalize(raw, recipe.acts.normalize, factor).x
    baseline = (sample - sample.mean(0)).cpu().double().square().mean().item()
    if not baseline > 0:
        raise InputError(f"all {len(raw):,} activations at {recipe.acts.site} are the same: there is nothing to learn")
    shape = Shape(stream.d_model, recipe.sae.n_latents, recipe.sae.k, recipe.acts.normalize, factor, recipe.sae.activation.kind)
    sae = SAE(shape, {"acts": asdict(recipe.acts), "policy": policy, "dead_after": recipe.dead_after,
                      "ksparse": version("ksparse")}).to(device)
    initialize_(sae, sample, recipe.sae, torch.Generator().manual_seed(recipe.seed))
    log.info("learning rate %.2g (%s); latents are dead after %s tokens", recipe.lr,
             "given" if recipe.optim.lr else f"{recipe.optim.lr_at_32k:g} x sqrt(32,768 / n)", f"{recipe.dead_after:,}")
    state = State(since=torch.zeros(recipe.sae.n_latents, dtype=torch.long, device=device), baseline=baseline)
    return state, open_optimizer(sae, recipe), stream


def restore(run: RunFolder, recipe: Recipe, device: torch.device) -> tuple[State, Optimizer, Stream] | None:
    """Return what the newest intact checkpoint holds, or None if there is none."""
    for folder in (run.path, run.path / "checkpoints"):
        files.remove_leftovers(folder)
    path, wrong = run.newest_intact()
    for message in wrong:
        log.warning("%s", message)
    if path is None:
        run.forget_metrics_after(0)
        return None
    from ksparse.sae.store import read

    used = read(path)
    sae = SAE(used.shape, used.metadata).to(device)
    optimizer = open_optimizer(sae, recipe)
    state = checkpoint.load(path, optimizer)
    threads(state.threads)
    run.forget_metrics_after(state.step)
    log.info("going on after step %s", f"{state.step:,}")
    stream, _ = open_stream(recipe, device) if state.step < recipe.steps else (_Done(), None)
    return state, optimizer, stream


def backward(optimizer: Optimizer, batch: Batch, state: State, recipe: Recipe) -> Losses:
    """Have the optimiser take in the gradients of one batch; return its losses and code."""
    dead = (state.since >= recipe.dead_after).nonzero().squeeze(1)
    x = optimizer.sae.normalize(batch.x).x
    return optimizer.backward(x, baseline=state.baseline, dead=dead, k_aux=k_aux(recipe.sae, x.shape[1]))


def count(state: State, part: Losses, tokens: int) -> None:
    """Advance the dead counters, in tokens; a latent fired if one of its values is above 0, chosen or not is not enough."""
    state.since += tokens
    state.since[part.code.indices[part.code.values > 0]] = 0


def skip(batch: Batch, state: State, optimizer: Optimizer, stream: Stream, run: RunFolder, recipe: Recipe) -> None:
    """Stop, naming the documents, or count the batch and go on without it."""
    names = stream.document_names(batch.documents)
    if recipe.run.on_nonfinite == "stop":
        last = run.newest_intact()[0]
        raise NonFiniteError(f"the loss or its gradient is NaN or infinite at step {state.step:,}, on documents {', '.join(names[:5])}"
                             f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}; the last good checkpoint is "
                             f"{last or 'none'}. A smaller --optim.lr or --optim.clip 1 may help; --run.on-nonfinite skip leaves such batches out")
    state.skipped += 1
    optimizer.forget()
    log.warning("step %s left out: its loss or gradient is not finite (%s so far)", state.step, state.skipped)


def metrics(part: Losses, grad_norm: float, state: State, recipe: Recipe, stream: Stream) -> dict[str, Any]:
    """Return one line of metrics.jsonl."""
    finite = bool(torch.isfinite(part.total))
    return {
        "step": state.step, "tokens": state.tokens,
        "nmse": part.nmse.item() if finite else None, "auxk": part.auxk.item() if finite else None,
        "l0": (part.code.values > 0).sum(1).float().mean().item(),
        "dead": checkpoint.dead_fraction(state, recipe.dead_after),
        "lr": recipe.lr * rate_share(state.step, recipe), "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "skipped": state.skipped, "neighbours_in_batch": stream.mixing(),
    }


def due(step: int, saved: float, recipe: Recipe) -> bool:
    if recipe.run.save_every:
        return step % recipe.run.save_every == 0
    return time.monotonic() - saved >= 60 * recipe.run.save_minutes


def threads(number: int) -> None:
    if number:
        torch.set_num_threads(number)


def environment() -> dict[str, Any]:
    """Return the versions and the hardware, for environment.json."""
    packages = ("ksparse", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "platform": platform.platform(), "processor": platform.machine(), "threads": torch.get_num_threads(), "gpus": gpus,
            "arguments": sys.argv[1:]}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM, so that the step is finished and saved; a second one stops at once."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def handle(signum: int, frame: Any) -> None:
        seen.append(signum)
        signal.signal(signum, before[signum])
        log.warning("stopping after this step and saving; once more to stop at once")

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


@contextmanager
def _memory_explained(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"out of memory: {str(error).splitlines()[0]} `ksparse plan` shows what the recipe needs; "
                               "a smaller --acts.mix, --acts.lm-batch or --batch needs less") from error


class _Done:
    """The stream of a run that has no step left."""

    def batches(self, cursor: Any = None) -> Iterator[Batch]:
        return iter(())
