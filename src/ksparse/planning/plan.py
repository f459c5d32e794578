"""What a recipe costs, before anything runs: parameters, memory, FLOPs, disk, time; on this machine
or on a mesh of other devices.

The formula for FLOPs is that of `planning.flops`; those for memory, communication and time are
`planning.costs`'.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ksparse.config import WITH_AUXK, Recipe, k_aux
from ksparse.data.shards import Shards
from ksparse.device import resolve_device
from ksparse.errors import InputError
from ksparse.kernels import native
from ksparse.lm.loading import find_model, read_config, without_weights
from ksparse.lm.model import check_length, longest_context
from ksparse.lm.sites import outline
from ksparse.planning import costs, flops, hardware
from ksparse.planning.costs import LMSpec, PlanInput, StepCost, StepKind
from ksparse.planning.hardware import DEVICES, Device
from ksparse.planning.steps import prefetches
from ksparse.trust import code_is_trusted

FORMAT = 1


@dataclass(frozen=True)
class RunPlan:
    """What a recipe costs: as one process or one mesh as the recipe says (`asked`), and on the best
    mesh of each number of devices."""

    case: PlanInput
    subject: str
    device: str
    asked: StepCost
    meshes: list[StepCost]
    free: int
    """Bytes of disk."""

    @property
    def disk(self) -> int:
        recipe = self.case.recipe
        return (
            4 * self.case.parameters * (5 if recipe.ema else 4) * (recipe.run.keep + 1)
        )  # the weights to use beside the raw ones


def plan(
    recipe: Recipe,
    *,
    devices: Sequence[int] = (),
    card: str = "here",
    figures: hardware.Hardware = hardware.Hardware(),
    dead: float = 0.1,
    unseen: costs.UnseenLM = costs.UnseenLM(),
) -> RunPlan:
    """Work out what a recipe costs.

    devices: numbers of devices, for each of which the best mesh is sought. card: here, or a key of
    `hardware.CARDS`. figures: replace the card's.
    dead: the share of latents that are dead. unseen: the size of an LM that is not at hand, in the
    place of the recipe's.
    """
    if not 0 <= dead <= 1:
        raise InputError(f"dead is {dead}; it is the share of latents that are dead, from 0 to 1")
    case = _case(recipe, card, figures, dead, unseen.subject() or read_lm_spec(recipe))
    free = shutil.disk_usage(next(p for p in [Path.cwd(), *Path.cwd().parents] if p.exists())).free
    return RunPlan(
        case,
        "an LM that is not at hand"
        if unseen.d_model
        else f"{recipe.acts.lm} at {recipe.acts.site}",
        resolve_device(recipe.run.device) if card == "here" else card,
        costs.estimate(case, costs.mesh_of(recipe)),
        [costs.best(case, each) for each in devices],
        free,
    )


def _case(
    recipe: Recipe, card: str, figures: hardware.Hardware, dead: float, subject: LMSpec
) -> PlanInput:
    device = (
        resolve_device(recipe.run.device)
        if card == "here"
        else "cpu"
        if DEVICES[card].host
        else "cuda"
    )
    chosen = figures.applied(here(device) if card == "here" else DEVICES[card])
    return PlanInput(
        recipe, subject, chosen, _step(recipe, device), prefetches(recipe, device), dead
    )


def _step(recipe: Recipe, device: str) -> StepKind:
    """Return which training step a device takes, as `member.open_optimizer` chooses it."""
    if recipe.sae.activation.kind != "topk" or recipe.sae.multi_topk or device == "mps":
        return "autograd"
    if recipe.run.kernels == "triton" or (device == "cuda" and recipe.run.kernels == "auto"):
        return "triton"
    return (
        "native"
        if device == "cpu" and recipe.run.kernels != "torch" and native.load() is not None
        else "torch"
    )


def lines(plan: RunPlan) -> list[str]:
    """Return lines to show."""
    case, recipe, subject, asked = plan.case, plan.case.recipe, plan.case.subject, plan.asked
    d, n, tokens, kind = (
        subject.d_model,
        recipe.sae.n_latents,
        recipe.steps * recipe.batch,
        recipe.sae.activation.kind,
    )
    aux = k_aux(recipe.sae, d)
    sae_flops = {
        "encoder product": flops.encoder(recipe, d),
        "sparse parts": flops.decoder(recipe, d),
        "AuxK, if latents are dead": int(flops.auxk(aux, d) * recipe.sae.auxk_share)
        if recipe.sae.auxk_coef and kind in WITH_AUXK
        else 0,
    }
    lm_flops = flops.lm(subject.before_site) if case.live else 0
    each = f" on each of {asked.devices} devices" if asked.devices > 1 else ""
    return [
        f"subject      {plan.subject}: d_model {d:,}, {subject.parameters / 1e6:,.1f} M "
        "parameters, "
        f"{subject.before_site / 1e6:,.1f} M up to the site",
        f"SAE          {n:,} latents, {kind}, k = {recipe.sae.k}, k_aux = {aux}: "
        f"{case.parameters / 1e6:,.1f} M parameters; lr {recipe.lr:.2g}",
        f"training     {tokens:,} activations in {recipe.steps:,} steps of {recipe.batch:,}; dead "
        f"after {recipe.dead_after:,} tokens",
        f"memory       {amount_of_bytes(asked.bytes)}{each}, while {case.dead:.0%} of the latents "
        "are dead: " + by_part(asked.memory),
        f"smaller by   {advice(asked.memory)}",
        f"FLOPs        {tokens * (sum(sae_flops.values()) + lm_flops):.3g}; per activation: "
        + ", ".join(
            f"{name} {size:.3g}" for name, size in [*sae_flops.items(), ("LM", lm_flops)] if size
        ),
        f"disk         {amount_of_bytes(plan.disk)} for {recipe.run.keep} checkpoints and one "
        f"being written; {amount_of_bytes(plan.free)} free here",
        f"time         about {duration(tokens / asked.tokens_per_s)} on {plan.device} "
        f"({asked.tokens_per_s:,.0f} tokens/s), within a factor of 2; of a step "
        + ", ".join(f"{name} {1000 * spent:,.1f} ms" for name, spent in asked.seconds.items()),
        *(
            []
            if kind == "topk"
            else [
                f"note         the sparse parts are those of k active latents; while {kind} leaves "
                "many more active, a step is some six dense products"
            ]
        ),
        *(["warning      the disk is too small"] if plan.disk > plan.free else []),
        *(
            []
            if asked.fits
            else [
                f"warning      {case.card.name} has {amount_of_bytes(case.card.memory)} of memory"
            ]
        ),
    ]


def by_part(memory: dict[str, float]) -> str:
    """Return the parts of a memory, the large ones first."""
    return ", ".join(
        f"{name} {amount_of_bytes(size)}"
        for name, size in sorted(memory.items(), key=lambda item: -item[1])
        if size >= 1e6
    )


def advice(memory: dict[str, float]) -> str:
    """Say which options make memory smaller, those first that act on most of it."""
    acts: dict[str, list[str]] = {}
    for name, _ in sorted(memory.items(), key=lambda item: -item[1]):
        if costs.SMALLER[name]:
            acts.setdefault(costs.SMALLER[name], []).append(name)
    return ", ".join(f"{flag} ({', '.join(names)})" for flag, names in list(acts.items())[:4])


def explain_memory(recipe: Recipe) -> str:
    """Say what the plan for a recipe here puts into memory, and what makes that smaller."""
    device = resolve_device(recipe.run.device)
    case = PlanInput(
        recipe,
        read_lm_spec(recipe),
        DEVICES["laptop" if device == "cpu" else "h100"],
        _step(recipe, device),
        prefetches(recipe, device),
    )
    parts = costs.memory(case, costs.mesh_of(recipe))
    return (
        f"`ksparse plan` counts {amount_of_bytes(sum(parts.values()))} for this recipe; smaller "
        f"by {advice(parts)}"
    )


# ---- on other devices ----------------------------------------------------------------------------


def tables(plan: RunPlan) -> list[str]:
    """Return the tables of the meshes: what to take, and below it memory, communication and time by
    part."""
    case, meshes, recipe = plan.case, plan.meshes, plan.case.recipe
    card = case.card
    days = [recipe.steps * recipe.batch / each.tokens_per_s for each in meshes]
    found = [
        f"devices      {card.name}: {amount_of_bytes(card.memory)}, {card.float32 / 1e12:,.4g} "
        f"TFLOP/s float32, {card.bfloat16 / 1e12:,.4g} bfloat16, "
        f"{card.bandwidth / 1e9:,.0f} GB/s; {card.per_node} to a node, {card.link / 1e9:,.4g} GB/s "
        f"there and {card.network / 1e9:,.4g} between nodes, each way",
        f"a step       {case.step} on one device, plain torch on several; {case.dead:.0%} of the "
        "latents dead",
        "",
    ]
    rows = [
        ("devices", [f"{each.devices}" for each in meshes]),
        ("mesh, data x latent", [f"{each.data} x {each.latent}" for each in meshes]),
        ("fits", ["yes" if each.fits else "no" for each in meshes]),
        ("tokens/s", [f"{each.tokens_per_s:,.0f}" for each in meshes]),
        ("the run", [duration(each) for each in days]),
        ("most latents that fit", [f"{costs.largest(case, each.devices):,}" for each in meshes]),
    ]
    found += _aligned(rows)
    found += [
        "",
        "memory of a rank",
        *_aligned(_by_name([each.memory for each in meshes], amount_of_bytes)),
    ]
    found += [
        "",
        "main memory of a rank, for a while",
        *_aligned(_by_name([each.main_memory for each in meshes], amount_of_bytes)[:-1]),
    ]
    if any(each.communication for each in meshes):
        given = [_given(each) for each in meshes]
        found += [
            "",
            "given by a rank to each collective in a step",
            *_aligned(_by_name(given, amount_of_bytes)),
        ]
    found += [
        "",
        "milliseconds of a step",
        *_aligned(
            _by_name([each.seconds for each in meshes], lambda spent: f"{1000 * spent:,.1f}")
        ),
    ]
    return found


def _given(estimate: StepCost) -> dict[str, float]:
    """Return the bytes of each collective; those below 1 kB in one."""
    given: dict[str, float] = {}
    for one in estimate.communication:
        name = f"{one.name} ({one.kind}, {one.axis})" if one.bytes >= 1000 else "small ones"
        given[name] = given.get(name, 0) + one.bytes
    return given


def _by_name(columns: list[dict[str, float]], written: Any) -> list[tuple[str, list[str]]]:
    names = sorted(
        dict.fromkeys(name for column in columns for name in column),
        key=lambda name: name == "small ones",
    )
    return [
        *(
            (name, [written(column[name]) if name in column else "-" for column in columns])
            for name in names
        ),
        ("in all", [written(sum(column.values())) for column in columns]),
    ]


def _aligned(rows: list[tuple[str, list[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows) + 2
    widths = [max(len(cells[i]) for _, cells in rows) + 2 for i in range(len(rows[0][1]))]
    return [
        f"  {name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        for name, cells in rows
    ]


def to_dict(plan: RunPlan) -> dict[str, Any]:
    """Return the plan as JSON."""
    case, recipe = plan.case, plan.case.recipe
    return {
        "format": FORMAT,
        "n_latents": recipe.sae.n_latents,
        "k": recipe.sae.k,
        "k_aux": k_aux(recipe.sae, case.subject.d_model),
        "batch": recipe.batch,
        "tokens": recipe.steps * recipe.batch,
        "parameters": case.parameters,
        "disk": plan.disk,
        "subject": dataclasses.asdict(case.subject),
        "card": dataclasses.asdict(case.card),
        "step": case.step,
        "dead": case.dead,
        "asked": _mesh(plan.asked),
        "meshes": [
            _mesh(each) | {"most_latents": costs.largest(case, each.devices)}
            for each in plan.meshes
        ],
    }


def _mesh(estimate: StepCost) -> dict[str, Any]:
    table = dataclasses.asdict(estimate)
    table["communication"] = [
        one | {"sent": each.sent}
        for one, each in zip(table["communication"], estimate.communication)
    ]
    return table | {"bytes": estimate.bytes}


# ---- the subject and this machine ----------------------------------------------------------------


def here(device: str) -> Device:
    """Return this machine's device: its memory, its speed and its bandwidth measured in a fraction
    of a second; its links are a laptop's, or an H100's."""
    host = device == "cpu"
    kind = DEVICES["laptop" if host else "h100"]
    memory = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if not device.startswith("cuda")
        else torch.cuda.get_device_properties(device).total_memory
    )
    rate = measure_flops(device) / hardware.PRODUCT
    return dataclasses.replace(
        kind,
        name=device,
        memory=float(memory),
        float32=rate,
        bfloat16=rate if host else kind.bfloat16 * rate / kind.float32,
        bandwidth=measure_bandwidth(device) / hardware.MEMORY,
    )


def read_lm_spec(recipe: Recipe) -> LMSpec:
    """Read the LM's shape without its weights."""
    if recipe.acts.shards:
        return LMSpec(Shards(recipe.acts.shards).d_model, 0, 0)
    source, options = find_model(recipe.acts.lm), {"trust_remote_code": code_is_trusted()}
    try:
        config = read_config(source, options)
        model = without_weights(config, source, options)
    except InputError as error:
        raise InputError(
            f"{error}. Without the model, give its sizes: --subject.d-model, "
            "--subject.parameters, --subject.before-site"
        ) from error
    check_length(recipe.acts.context, longest_context(config), recipe.acts.lm, "acts.context")
    module, at = outline(model, recipe.acts.site)
    everything = sum(p.numel() for p in model.parameters())
    ends = {
        id(p): p.numel()
        for part in (model.get_input_embeddings(), model.get_output_embeddings())
        if part is not None
        for p in part.parameters()
    }
    return LMSpec(
        _width(module, config),
        everything,
        flops.before_site(model, module, at),
        everything - sum(ends.values()),
    )


def _width(module: torch.nn.Module, config) -> int:
    return getattr(module, "out_features", None) or config.get_text_config().hidden_size


def measure_flops(device: str, size: int = 2048) -> float:
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


def measure_bandwidth(device: str, size: int = 2**26) -> float:
    """Measure the bytes per second of reading and writing memory, together."""
    a = torch.zeros(size // 4, device=device)
    b = torch.zeros_like(a)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        b.copy_(a)
        float(b[0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def amount_of_bytes(size: float) -> str:
    for unit, name, digits in ((1e9, "GB", 1), (1e6, "MB", 0), (1e3, "kB", 0)):
        if size >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / 86400:,.0f} days"
