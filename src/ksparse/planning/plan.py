"""The costs of a recipe before anything runs: parameters, memory, FLOPs, disk and time, on this
machine or on a mesh of other devices.

`planning.flops` has the formula for FLOPs; `planning.costs` has those for memory, communication and
time.
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

from ksparse.config import ActsConfig, Recipe, k_aux
from ksparse.config.evaluation import EvalConfig
from ksparse.data.sharded import open_shards
from ksparse.device import resolve_device
from ksparse.errors import InputError
from ksparse.limits import LOGITS_BYTES
from ksparse.lm.hooks import ModuleEnd
from ksparse.lm.loading import find_model, read_config, without_weights
from ksparse.lm.model import check_length, longest_context
from ksparse.lm.sites import outline
from ksparse.planning import costs, evaluation, flops, hardware
from ksparse.planning.costs import LMSpec, PlanInput, StepCost
from ksparse.planning.hardware import DEVICES, Device
from ksparse.planning.steps import choose_step, prefetches
from ksparse.progress import format_duration
from ksparse.trust import code_is_trusted

FORMAT = 1


@dataclass(frozen=True)
class RunPlan:
    """What a recipe costs: on the recipe's own mesh (`requested`), and on the best mesh of each
    number of devices (`meshes`)."""

    case: PlanInput
    subject: str
    device: str
    requested: StepCost
    meshes: list[StepCost]
    free: int
    """Free bytes on the disk of the working folder."""

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints that are kept, and of the one being written."""
        return costs.disk_bytes(self.case.recipe, self.case.parameters)


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

    Args:
        recipe: what to train.
        devices: numbers of devices; the best mesh is found for each.
        card: a key of `hardware.DEVICES`, or "here" for the recipe's device on this machine.
        figures: figures that replace the device's own.
        dead: the share of latents to assume dead, from 0 to 1.
        unseen: the sizes of an LM that is not on this machine, in place of the recipe's.

    Raises:
        InputError: if the LM cannot be read, or the recipe cannot run on the device.
    """
    case = make_case(recipe, card, figures, dead, unseen.subject() or read_lm_spec(recipe))
    return RunPlan(
        case,
        "an LM that is not at hand"
        if unseen.d_model
        else f"{recipe.acts.lm} at {recipe.acts.site}",
        resolve_device(recipe.run.device) if card == "here" else card,
        costs.estimate(case, costs.mesh_of(recipe)),
        [costs.best(case, count) for count in devices],
        free_bytes(),
    )


def free_bytes() -> int:
    """Return the free bytes on the disk of the working folder."""
    folder = next(path for path in [Path.cwd(), *Path.cwd().parents] if path.exists())
    return shutil.disk_usage(folder).free


def make_case(
    recipe: Recipe, card: str, figures: hardware.Hardware, dead: float, subject: LMSpec
) -> PlanInput:
    """Return what `costs` needs to know of a recipe on a card of `hardware.DEVICES`, or "here".

    Raises:
        InputError: `dead` is no share, or the recipe cannot run on the device.
    """
    if not 0 <= dead <= 1:
        raise InputError(f"dead is {dead}; it is the share of latents that are dead, from 0 to 1")
    if card == "here":
        device = resolve_device(recipe.run.device)
        return plan_input(
            recipe, subject, device, card=figures.replace_figures(measure_device(device)), dead=dead
        )
    return plan_input(
        recipe,
        subject,
        "cpu" if DEVICES[card].host else "cuda",
        card=figures.replace_figures(DEVICES[card]),
        dead=dead,
        elsewhere=True,
    )


def plan_input(
    recipe: Recipe,
    subject: LMSpec,
    device: str,
    *,
    card: Device | None = None,
    dead: float = 0.1,
    elsewhere: bool = False,
) -> PlanInput:
    """Return what `costs` needs to know of a recipe on a device.

    Args:
        recipe: what to train.
        subject: the LM's sizes.
        device: a device as torch names it.
        card: the device's figures; a typical device by default, whose memory and speed may differ.
        dead: the share of latents to assume dead.
        elsewhere: the device is in another machine, with all kernels installed.
    """
    step = choose_step(recipe, device, elsewhere=elsewhere)
    if recipe.acts.lm_dtype == "auto" and device != "cpu":  # most LMs are stored in it
        acts = dataclasses.replace(recipe.acts, lm_dtype="bfloat16")
        recipe = dataclasses.replace(recipe, acts=acts)
    card = card or typical_device(device)
    return PlanInput(recipe, subject, card, step, prefetches(recipe, device), dead)


def typical_device(device: str) -> Device:
    """Return the figures of a device like it: a laptop's or an H100's."""
    return DEVICES["laptop" if device == "cpu" else "h100"]


def lines(plan: RunPlan) -> list[str]:
    """Return the lines that `ksparse plan` prints."""
    case, requested = plan.case, plan.requested
    recipe, subject = case.recipe, case.subject
    d, n, kind = subject.d_model, recipe.sae.n_latents, recipe.sae.activation.kind
    aux, tokens = k_aux(recipe.sae, d), recipe.steps * recipe.batch
    per_token = flops_per_token(case)
    devices = f" on each of {requested.devices} devices" if requested.devices > 1 else ""
    return [
        f"subject      {plan.subject}: d_model {d:,}, {subject.parameters / 1e6:,.1f} M "
        "parameters, "
        f"{subject.before_site / 1e6:,.1f} M up to the site",
        f"SAE          {n:,} latents, {kind}, k = {recipe.sae.k}, k_aux = {aux}: "
        f"{case.parameters / 1e6:,.1f} M parameters; lr {recipe.lr:.2g}",
        f"training     {tokens:,} activations in {recipe.steps:,} steps of {recipe.batch:,}; dead "
        f"after {recipe.dead_after:,} tokens",
        f"memory       {format_bytes(requested.bytes)}{devices}, while {case.dead:.0%} of the "
        "latents are dead: " + by_part(requested.memory),
        f"smaller by   {advice(requested.memory)}",
        f"FLOPs        {tokens * sum(per_token.values()):.3g}; per activation: "
        + ", ".join(f"{name} {size:.3g}" for name, size in per_token.items()),
        f"disk         {format_bytes(plan.disk)} for {recipe.run.keep} checkpoints and one "
        f"being written; {format_bytes(plan.free)} free here",
        f"time         about {format_duration(tokens / requested.tokens_per_s)} on {plan.device} "
        f"({requested.tokens_per_s:,.0f} tokens/s), within a factor of 2; of a step "
        + ", ".join(f"{name} {1000 * spent:,.1f} ms" for name, spent in requested.seconds.items()),
        *_evaluation_lines(plan),
        *_warnings(plan),
    ]


def eval_case(case: PlanInput) -> evaluation.EvalCase:
    """Return what a recipe's SAE costs to evaluate with the default options."""
    recipe = case.recipe
    return evaluation.EvalCase(
        case.subject, recipe.acts, EvalConfig(), recipe.sae.n_latents, recipe.sae.k
    )


def _eval_seconds(case: PlanInput) -> dict[str, float]:
    """Return about how long each default evaluation takes alone, by name."""
    card, whole = case.card, eval_case(case)
    rate = card.float32 if costs.bytes_of(case.recipe.acts.lm_dtype) == 4 else card.bfloat16
    return {
        name: evaluation.seconds(name, whole, hardware.LM * rate) for name in evaluation.DEFAULT
    }


def _evaluation_lines(plan: RunPlan) -> list[str]:
    """Return the lines about evaluating the SAE, where the LM is at hand."""
    case = plan.case
    if not (case.live and case.subject.vocabulary):
        return []
    parts = evaluation.memory(eval_case(case), case.card.host)
    times = _eval_seconds(case)
    return [
        f"evaluation   {format_bytes(sum(parts.values()))} for downstream: {by_part(parts)}; less "
        "by --lm-batch",
        f"             roughly {format_duration(sum(times.values()))} for all: "
        + ", ".join(f"{name} {format_duration(spent)}" for name, spent in times.items()),
    ]


def flops_per_token(case: PlanInput) -> dict[str, int]:
    """Return the FLOPs of training on one activation, by part."""
    recipe, d = case.recipe, case.subject.d_model
    with_auxk = recipe.sae.uses_auxk
    auxk = int(flops.auxk(k_aux(recipe.sae, d), d) * recipe.sae.auxk_share)
    parts = {
        "encoder product": flops.encoder(recipe, d),
        "sparse parts": flops.decoder(recipe, d),
        "AuxK, if latents are dead": auxk if with_auxk else 0,
        "LM": case.lm_flops,
    }
    return {name: size for name, size in parts.items() if size}


def _warnings(plan: RunPlan) -> list[str]:
    kind, card = plan.case.recipe.sae.activation.kind, plan.case.card
    messages = []
    if kind != "topk":
        messages.append(
            f"note         the sparse parts assume k active latents; while {kind} leaves many "
            "more active, a step costs about six dense products"
        )
    if plan.case.live and plan.case.recipe.acts.chat != "none":
        messages.append(
            "note         acts.chat: the LM's part is that of a text of which every token is kept; "
            "where the kept roles have a share s of the tokens, it is 1 / s times as much (`train` "
            "logs s)"
        )
    if plan.case.recipe.sae.uses_lm:
        messages.append(
            "note         sae.lm_loss: what the LM behind the site keeps for a gradient, of "
            f"{plan.case.recipe.acts.lm_batch or ActsConfig.lm_batch} contexts at a time, and "
            f"{format_bytes(LOGITS_BYTES)} of logits are not in the memory; --acts.lm-batch"
        )
    if plan.disk > plan.free:
        messages.append("warning      the disk is too small")
    if not plan.requested.fits:
        messages.append(f"warning      {card.name} has {format_bytes(card.memory)} of memory")
    return messages


def by_part(memory: dict[str, float]) -> str:
    """Format the parts of a memory of at least 1 MB, the largest first."""
    return ", ".join(
        f"{name} {format_bytes(size)}"
        for name, size in sorted(memory.items(), key=lambda item: -item[1])
        if size >= 1e6
    )


def advice(memory: dict[str, float]) -> str:
    """Name the options that reduce the memory, those for its largest parts first."""
    parts_by_flag: dict[str, list[str]] = {}
    for name, _ in sorted(memory.items(), key=lambda item: -item[1]):
        if costs.SMALLER[name]:
            parts_by_flag.setdefault(costs.SMALLER[name], []).append(name)
    flags = list(parts_by_flag.items())[:4]
    return ", ".join(f"{flag} ({', '.join(names)})" for flag, names in flags)


# ---- as a file -----------------------------------------------------------------------------------


def to_dict(plan: RunPlan) -> dict[str, Any]:
    """Return the plan as `ksparse plan --json` writes it."""
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
        "asked": _cost_to_dict(plan.requested),
        "evaluation": {
            "memory": evaluation.memory(eval_case(case), case.card.host),
            "seconds": _eval_seconds(case),
        }
        if _evaluation_lines(plan)
        else None,
        "meshes": [
            _cost_to_dict(cost) | {"most_latents": costs.largest(case, cost.devices)}
            for cost in plan.meshes
        ],
    }


def _cost_to_dict(cost: StepCost) -> dict[str, Any]:
    table = dataclasses.asdict(cost)
    table["communication"] = [
        entry | {"sent": call.sent}
        for entry, call in zip(table["communication"], cost.communication)
    ]
    return table | {"bytes": cost.bytes}


# ---- the LM and this machine --------------------------------------------------------------------


def measure_device(device: str) -> Device:
    """Return the figures of one of this machine's devices: its memory, and its speed and bandwidth
    measured in a fraction of a second; its links are assumed to be a laptop's or an H100's."""
    host, typical = device == "cpu", typical_device(device)
    rate = measure_flops(device) / hardware.PRODUCT
    return dataclasses.replace(
        typical,
        name=device,
        memory=device_memory(device),
        float32=rate,
        bfloat16=rate if host else typical.bfloat16 * rate / typical.float32,
        bandwidth=measure_bandwidth(device) / hardware.MEMORY,
    )


def device_memory(device: str) -> float:
    """Return the bytes of a device's memory."""
    if device.startswith("cuda"):
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def read_lm_spec(recipe: Recipe) -> LMSpec:
    """Read the sizes of a recipe's LM, without its weights; of shards, their d_model alone.

    Raises:
        InputError: if there is no such LM, or its context is too short.
    """
    return read_lm_specs(recipe, [recipe.acts.site])[0]


def read_lm_specs(recipe: Recipe, sites: Sequence[str]) -> list[LMSpec]:
    """Read the sizes of a recipe's LM at several sites, as `read_lm_spec` does at one."""
    if recipe.acts.shards:
        return [LMSpec(open_shards(recipe.acts.shards).d_model, 0, 0)] * len(sites)
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
    ends = [outline(model, site) for site in sites]
    return [lm_spec(model, end.module, end.at, _width(end, config)) for end in ends]


def lm_spec(model: Any, module: torch.nn.Module, at: str, d_model: int) -> LMSpec:
    """Return the sizes of a model with a site, of width d_model, at the end `at` of a module."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    embeddings = {  # by id, since the head may be the embedding
        id(p): p.numel()
        for part in (embedding, head)
        if part is not None
        for p in part.parameters()
    }
    total = sum(p.numel() for p in model.parameters())
    return LMSpec(
        d_model,
        total,
        flops.before_site(model, module, at),
        total - sum(embeddings.values()),
        len(embedding.weight),
    )


def _width(end: ModuleEnd, config: Any) -> int:
    """Return the width at a module's end: that of a matrix by its sizes, else the stream's."""
    sizes = ("out_features", "nf") if end.at == "out" else ("in_features", "nx")  # Linear, Conv1D
    known = [getattr(end.module, size, None) for size in sizes]
    return next(filter(None, known), None) or config.get_text_config().hidden_size


def measure_flops(device: str, size: int = 2048) -> float:
    """Measure the FLOP/s of a float32 product, in a fraction of a second."""
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
    """Measure the bytes per second that a device reads and writes together."""
    a = torch.zeros(size // 4, device=device)
    b = torch.zeros_like(a)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        b.copy_(a)
        float(b[0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def format_bytes(size: float) -> str:
    """Format a number of bytes.

    Example:
        >>> format_bytes(1.5e9)
        '1.5 GB'
    """
    for unit, name, digits in ((1e9, "GB", 1), (1e6, "MB", 0), (1e3, "kB", 0)):
        if size >= unit:
            return f"{size / unit:,.{digits}f} {name}"
    return f"{size:.0f} B"
