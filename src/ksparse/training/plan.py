"""What a recipe costs, before anything runs: parameters, memory, FLOPs, disk, time.

The formula for FLOPs is that of `training.flops`.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ksparse.acts.lm import find_model, resolve, resolve_device
from ksparse.acts.shards import Shards
from ksparse.acts.stream import memory_bytes
from ksparse.errors import InputError
from ksparse.recipe import WITH_AUXK, Recipe, k_aux
from ksparse.training import flops
from ksparse.training.feed import ahead
from ksparse.training.optim import PRE_ACTS

DENSE = 5
"""Matrices of a batch's products, at most, that another activation than TopK has in memory at once: products, which count, values, their gradients."""


@dataclass(frozen=True)
class Subject:
    """What the plan needs to know of the LM."""

    d_model: int
    parameters: int
    before_site: int
    body: int = 0
    """Parameters that are not of embeddings or the head."""


def plan(recipe: Recipe) -> list[str]:
    """Return lines to show."""
    subject = look(recipe)
    d, n, tokens = subject.d_model, recipe.sae.n_latents, recipe.steps * recipe.batch
    weights = 2 * n * d + n + d
    aux, kind = k_aux(recipe.sae, d), recipe.sae.activation.kind
    sae_flops = {
        "encoder product": flops.encoder(recipe, d),
        "sparse parts": flops.decoder(recipe, d),
        "AuxK, if latents are dead": int(flops.auxk(aux, d) * recipe.sae.auxk_share) if recipe.sae.auxk_coef and kind in WITH_AUXK else 0,
    }
    lm_flops = 0 if recipe.acts.shards else flops.lm(subject.before_site)
    copies = 4 + (1 if recipe.ema else 0)  # weights, gradient, two moments, average
    rows = min(recipe.batch, max(1, PRE_ACTS // n))
    device = resolve_device(recipe.run.device)
    memory = {
        "weights, gradient, moments, average": 4 * weights * copies,
        "pre-activations of a step": 4 * rows * n * (1 if kind == "topk" else DENSE),
        "LM": 0 if recipe.acts.shards else subject.parameters * (4 if recipe.acts.lm_dtype == "float32" else 2),
        "block of activations": 0 if recipe.acts.shards else memory_bytes(recipe.acts, recipe.batch, d) * (2 if ahead(recipe, device) else 1),
    }
    checkpoint = 4 * weights * copies  # no gradient, but the weights to use beside the raw ones
    disk = checkpoint * (recipe.run.keep + 1)
    free = shutil.disk_usage(next(p for p in [Path.cwd(), *Path.cwd().parents] if p.exists())).free
    rate = speed(device)
    # The sparse parts read memory rather than multiply; they run at about a tenth of the product's rate.
    seconds = tokens * (sae_flops["encoder product"] + 10 * sae_flops["sparse parts"] + lm_flops) / rate
    return [
        f"subject      {recipe.acts.lm} at {recipe.acts.site}: d_model {d:,}, {subject.parameters / 1e6:,.1f} M parameters, "
        f"{subject.before_site / 1e6:,.1f} M up to the site",
        f"SAE          {n:,} latents, {kind}, k = {recipe.sae.k}, k_aux = {aux}: {weights / 1e6:,.1f} M parameters; lr {recipe.lr:.2g}",
        f"training     {tokens:,} activations in {recipe.steps:,} steps of {recipe.batch:,}; dead after {recipe.dead_after:,} tokens",
        f"memory       {amount_of_bytes(sum(memory.values()))}: " + ", ".join(f"{name} {amount_of_bytes(size)}" for name, size in memory.items() if size),
        f"FLOPs        {tokens * (sum(sae_flops.values()) + lm_flops):.3g}; per activation: "
        + ", ".join(f"{name} {size:.3g}" for name, size in [*sae_flops.items(), ("LM", lm_flops)] if size),
        f"disk         {amount_of_bytes(disk)} for {recipe.run.keep} checkpoints and one being written; {amount_of_bytes(free)} free here",
        f"time         about {duration(seconds)} on {device} at {rate / 1e9:,.0f} GFLOP/s, measured now; within a factor of 2",
        *([] if kind == "topk" else [f"note         the sparse parts are those of k active latents; while {kind} leaves many more active, a step is some six dense products"]),
        *(["warning      the disk is too small"] if disk > free else []),
    ]


def look(recipe: Recipe) -> Subject:
    """Read the LM's shape without its weights."""
    if recipe.acts.shards:
        return Subject(Shards(recipe.acts.shards).d_model, 0, 0)
    from transformers import AutoConfig, AutoModelForCausalLM

    source = find_model(recipe.acts.lm)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=recipe.run.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"model {source!r}: its configuration cannot be read: {str(error).splitlines()[0]}") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    module, at = resolve(model, recipe.acts.site)
    everything = sum(p.numel() for p in model.parameters())
    ends = {id(p): p.numel() for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None for p in part.parameters()}
    return Subject(_width(module, config), everything, flops.before_site(model, module, at), everything - sum(ends.values()))


def _width(module: torch.nn.Module, config) -> int:
    return getattr(module, "out_features", None) or config.get_text_config().hidden_size


def speed(device: str, size: int = 2048) -> float:
    """Measure a float32 product's FLOP/s, in a fraction of a second."""
    a = torch.randn(size, size, device=device)
    out = a @ a
    float(out[0, 0])
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        torch.mm(a, a, out=out)
        float(out[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def amount_of_bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
