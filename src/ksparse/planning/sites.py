"""The costs of SAEs at several sites that one pass of the LM reads: the LM once, a shuffle buffer
for each site."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ksparse.config import MeshConfig, Recipe
from ksparse.device import resolve_device
from ksparse.errors import InputError
from ksparse.lm.patterns import is_pattern, sites_of
from ksparse.planning import costs, flops, hardware
from ksparse.planning.costs import PlanInput
from ksparse.planning.plan import (
    FORMAT,
    advice,
    by_part,
    flops_per_token,
    format_bytes,
    free_bytes,
    make_case,
    plan_input,
    read_lm_specs,
)
from ksparse.progress import format_duration

DEAR = 0.5
"""Share of a device's memory from which on the shuffle buffers of all sites are called dear."""


@dataclass(frozen=True)
class SitesPlan:
    """What a recipe costs at several sites, trained together."""

    cases: dict[str, PlanInput]
    """What is known of each site's run, by site."""
    subject: str
    device: str
    free: int
    """Free bytes on the disk of the working folder."""

    @property
    def first(self) -> PlanInput:
        """One of the cases, to stand for all in what they share."""
        return next(iter(self.cases.values()))

    @property
    def mesh(self) -> MeshConfig:
        """The mesh of the recipe."""
        return costs.mesh_of(self.first.recipe)

    @property
    def memory(self) -> dict[str, float]:
        """Bytes of one rank's device, by part."""
        return memory(list(self.cases.values()), self.mesh)

    @property
    def disk(self) -> int:
        """Bytes of the checkpoints of all runs."""
        return sum(costs.disk_bytes(case.recipe, case.parameters) for case in self.cases.values())

    @property
    def flops(self) -> dict[str, int]:
        """FLOPs per token, by part: of all SAEs, and the LM to the last site."""
        found: dict[str, int] = {}
        for case in self.cases.values():
            for name, size in flops_per_token(case).items():
                if name != "LM":
                    found[name] = found.get(name, 0) + size
        return found | {"LM": self._lm_flops}

    @property
    def _lm_flops(self) -> int:
        """FLOPs of the LM per activation: one pass to the last site, and `sae.lm_loss` of each."""
        cases = self.cases.values()
        passes = [flops.lm(case.subject.before_site) for case in cases]
        return max(passes) + sum(case.lm_flops - size for case, size in zip(cases, passes))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of a step of all SAEs, by part."""
        found: dict[str, float] = {}
        dearest = 0.0
        for case in self.cases.values():
            parts = costs.seconds(case, self.mesh)
            dearest = max(dearest, parts.pop("LM", 0.0) / max(1, case.lm_flops))
            for name, spent in parts.items():
                found[name] = found.get(name, 0.0) + spent
        return found | {"LM": dearest * self._lm_flops}

    @property
    def seconds_apart(self) -> float:
        """Seconds of a step of each, if the runs were trained one after another."""
        return sum(sum(costs.seconds(case, self.mesh).values()) for case in self.cases.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return sum(self.memory.values()) <= hardware.USABLE * self.first.card.memory


def plan_sites(
    recipe: Recipe,
    *,
    devices: Sequence[int] = (),
    card: str = "here",
    figures: hardware.Hardware = hardware.Hardware(),
    dead: float = 0.1,
    unseen: costs.UnseenLM = costs.UnseenLM(),
) -> SitesPlan:
    """Work out what a recipe costs at several sites that one pass reads.

    Args:
        recipe: what to train, with a list or pattern of sites.
        devices: as in `plan`; only () here.
        card: as in `plan`.
        figures: as in `plan`.
        dead: as in `plan`.
        unseen: as in `plan`; every site is taken to have these sizes.

    Raises:
        InputError: if the LM cannot be read, has no such site, or numbers of devices are given.
    """
    if devices:
        raise InputError(
            f"acts.site is {recipe.acts.site!r} and --devices is given; the best mesh is found for "
            "one site: give one, or leave --devices out"
        )
    subject = unseen.subject()
    if subject is None:
        sites = sites_of(recipe.acts)
        specs = read_lm_specs(recipe, sites)
    else:
        sites = list(dict.fromkeys(recipe.acts.site_patterns))
        if wild := list(filter(is_pattern, sites)):
            raise InputError(
                f"acts.site has the pattern {wild[0]!r}, and --subject.d-model stands for an LM "
                "that is not at hand, whose sites are not known: list them by name"
            )
        specs = [subject] * len(sites)
    case = make_case(recipe, card, figures, dead, specs[0])  # measures the device once
    cases = [
        dataclasses.replace(case, recipe=_at(case.recipe, site), subject=spec)
        for site, spec in zip(sites, specs)
    ]
    names = ", ".join(sites[:4]) + (f" … {sites[-1]}" if len(sites) > 4 else "")
    return SitesPlan(
        dict(zip(sites, cases)),
        f"{'an LM that is not at hand' if unseen.d_model else recipe.acts.lm} at {len(sites)} "
        f"site{'s' * (len(sites) > 1)}, {names}",
        resolve_device(recipe.run.device) if card == "here" else card,
        free_bytes(),
    )


def _at(recipe: Recipe, site: str) -> Recipe:
    return dataclasses.replace(recipe, acts=dataclasses.replace(recipe.acts, site=site))


def memory(cases: Sequence[PlanInput], mesh: MeshConfig) -> dict[str, float]:
    """Return the bytes of one rank's device, by part, where SAEs share a stream: parts of the
    stream once, of each site its own, and of the SAEs what they hold and the most that a step
    needs."""
    parts: dict[str, float] = {}
    for case in cases:
        for name, size in costs.memory(case, mesh).items():
            if name in costs.STREAM:
                parts[name] = max(size, parts.get(name, 0.0))
    saes = costs.add_memory(costs.sae_memory(case, mesh) for case in cases)
    by_site = {case.recipe.acts.site: costs.site_memory(case, mesh) for case in cases}
    largest = max(by_site, key=lambda site: sum(by_site[site].values()))
    for site, sizes in by_site.items():
        for name, size in sizes.items() if site != largest else ():
            if name in costs.STREAM:
                parts[name] = parts.get(name, 0.0) + size
            else:
                saes += size
    return {"SAEs": saes, **parts}


def lines(plan: SitesPlan) -> list[str]:
    """Return the lines that `ksparse plan` prints for several sites."""
    cases, first, parts = list(plan.cases.values()), plan.first, plan.memory
    recipe, sae = first.recipe, first.recipe.sae
    widths = sorted({case.subject.d_model for case in cases})
    width = f"{widths[0]:,}" + (f" to {widths[-1]:,}" if len(widths) > 1 else "")
    tokens, step = recipe.steps * recipe.batch, plan.seconds
    buffers, last = parts.get("activations block", 0.0), max(c.subject.before_site for c in cases)
    apart, together = plan.seconds_apart, sum(step.values())
    devices = plan.mesh.data * plan.mesh.latent
    return [
        f"subject      {plan.subject}: d_model {width}, {first.subject.parameters / 1e6:,.1f} M "
        f"parameters, {last / 1e6:,.1f} M up to the last site; one pass reads all",
        f"SAEs         {len(cases)} of {sae.n_latents:,} latents, {sae.activation.kind}, k = "
        f"{sae.k}: {sum(case.parameters for case in cases) / 1e6:,.1f} M parameters; lr "
        f"{recipe.lr:.2g}",
        f"training     {tokens:,} activations of each site in {recipe.steps:,} steps of "
        f"{recipe.batch:,}",
        f"memory       {format_bytes(sum(parts.values()))}"
        + (f" on each of {devices} devices" if devices > 1 else "")
        + f": {by_part(parts)}",
        f"             of it {format_bytes(buffers)} for the shuffle buffers, one for each site",
        f"smaller by   fewer sites, --acts.store bfloat16, {_advice(parts)}",
        f"FLOPs        {tokens * sum(plan.flops.values()):.3g}; per token, of all sites: "
        + ", ".join(f"{name} {size:.3g}" for name, size in plan.flops.items()),
        f"disk         {format_bytes(plan.disk)} for {recipe.run.keep} checkpoints of each SAE and "
        f"one being written; {format_bytes(plan.free)} free here",
        f"time         about {format_duration(tokens * together / recipe.batch)} on {plan.device}, "
        "within a factor of 2; a run for each site, one after another, about "
        f"{format_duration(tokens * apart / recipe.batch)}; of a step "
        + ", ".join(f"{name} {1000 * spent:,.1f} ms" for name, spent in step.items()),
        *_warnings(plan, buffers),
    ]


def _advice(parts: dict[str, float]) -> str:
    return advice({name: size for name, size in parts.items() if name in costs.SMALLER})


def _warnings(plan: SitesPlan, buffers: float) -> list[str]:
    card, messages = plan.first.card, []
    if buffers > DEAR * card.memory or (buffers and not plan.fits):
        most = card.memory * DEAR / buffers
        messages.append(
            f"note         shuffle buffers of {len(plan.cases)} sites are dear here; activations "
            "on disk need none: the same sites with `ksparse shard`, in one pass, then a run for "
            "each set" + (f"; or --acts.mix {_power(plan, most):,}" if _power(plan, most) else "")
        )
    if plan.disk > plan.free:
        messages.append("warning      the disk is too small")
    if not plan.fits:
        messages.append(f"warning      {card.name} has {format_bytes(card.memory)} of memory")
    return messages


def _power(plan: SitesPlan, share: float) -> int:
    """Return the largest power of two of at least 4 batches below a share of `acts.mix`; or 0."""
    recipe = plan.first.recipe
    mix = 2 ** math.floor(math.log2(max(1.0, min(share, 1.0) * recipe.acts.mix)))
    return mix if 4 * recipe.batch <= mix < recipe.acts.mix else 0


def to_dict(plan: SitesPlan) -> dict[str, Any]:
    """Return the plan as `ksparse plan --json` writes it for several sites."""
    recipe, parts, spent = plan.first.recipe, plan.memory, plan.seconds
    return {
        "format": FORMAT,
        "sites": {
            site: dataclasses.asdict(case.subject) | {"parameters_sae": case.parameters}
            for site, case in plan.cases.items()
        },
        "n_latents": recipe.sae.n_latents,
        "k": recipe.sae.k,
        "batch": recipe.batch,
        "tokens": recipe.steps * recipe.batch,
        "disk": plan.disk,
        "card": dataclasses.asdict(plan.first.card),
        "memory": parts,
        "bytes": sum(parts.values()),
        "fits": plan.fits,
        "flops": plan.flops,
        "seconds": spent,
        "seconds_apart": plan.seconds_apart,
        "tokens_per_s": recipe.batch / sum(spent.values()),
    }


def explain_memory(recipes: Sequence[Recipe]) -> str:
    """Say how much memory the plan of recipes that train together counts on this machine, and what
    reduces it."""
    sites = list(dict.fromkeys(recipe.acts.site for recipe in recipes))
    specs = dict(zip(sites, read_lm_specs(recipes[0], sites)))
    device = resolve_device(recipes[0].run.device)
    cases = [plan_input(recipe, specs[recipe.acts.site], device) for recipe in recipes]
    mesh = costs.mesh_of(recipes[0])
    parts = costs.memory(cases[0], mesh) if len(cases) == 1 else memory(cases, mesh)
    what = "this recipe" if len(cases) == 1 else f"these {len(cases)} SAEs at {len(sites)} site"
    return (
        f"`ksparse plan` counts {format_bytes(sum(parts.values()))} for {what}"
        f"{'s' * (len(sites) > 1)}; smaller by {_advice(parts)}"
    )
