"""Several devices: which mesh to use, as `ksparse plan` says it and as a run takes it.

    fit_mesh(recipe, device, processes)   the mesh of a run that leaves it to the plan
    lines(plan)                           the two ways to use the recipe's own number of processes
    tables(plan)                          the best mesh of each number of devices, part by part

More devices than the latents need are used in one of two ways. Each has a part of the batch, and
gradients are summed; or each has the whole batch and latents of its own, so that no gradient is
summed, and reconstructions are summed over more of them. The second is a mesh of 1 x N.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from ksparse import distributed
from ksparse.config import Recipe
from ksparse.planning import costs
from ksparse.planning.costs import PlanInput, StepCost
from ksparse.planning.plan import (
    RunPlan,
    device_memory,
    format_bytes,
    plan_input,
    read_lm_spec,
    typical_device,
)
from ksparse.progress import format_duration


def fit_mesh(recipe: Recipe, device: str, processes: int) -> Recipe:
    """Return a recipe with numbers in place of a mesh's 0; where both are 0, the fastest mesh that
    fits, by the plan.

    All processes come to the same mesh if their devices are alike: nothing is timed.

    Args:
        recipe: what to train.
        device: the type of device of each process, as torch names it.
        processes: how many there are.

    Raises:
        InputError: if no mesh of so many processes divides the batch and the latents.
    """
    sizes = recipe.mesh
    if processes > 1 and not sizes.data and not sizes.latent:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
        memory = device_memory(device) / (local if device == "cpu" else 1)
        card = dataclasses.replace(typical_device(device), memory=memory, per_node=local)
        case = plan_input(recipe, read_lm_spec(recipe), device, card=card)
        found = costs.best(case, processes)
        sizes = dataclasses.replace(sizes, data=found.data, latent=found.latent)
    return dataclasses.replace(recipe, mesh=distributed.sized(sizes, processes))


def lines(plan: RunPlan) -> list[str]:
    """Say which is cheaper with as many processes, to sum gradients or to give each the whole batch
    and latents of its own, and why."""
    asked = plan.requested
    if asked.devices == 1:
        return []
    found = costs.schemes(plan.case, asked.devices)
    fastest = costs.best(plan.case, asked.devices)
    summed = asked if asked.data > 1 else found.summed
    words = [
        f"{_mesh_name(cost)}, {what}: a rank sends {_sent(cost)}; {cost.tokens_per_s:,.0f} tokens/s"
        + ("" if cost.fits else ", does not fit")
        for cost, what in (
            (summed, "gradients summed"),
            (found.gathered, "the whole batch on each rank"),
        )
        if cost is not None
    ]
    words.append(
        f"the fastest of {asked.devices} that fits is {_mesh_name(fastest)}: --mesh.data "
        f"{fastest.data} --mesh.latent {fastest.latent}"
        if fastest.fits
        else f"no mesh of {asked.devices} fits"
    )
    if _refused(plan.case.recipe):
        words.append(_refused(plan.case.recipe))
    return [f"{'' if i else 'mesh':<13}{line}" for i, line in enumerate(words)]


def _refused(recipe: Recipe) -> str:
    """Say what of a recipe several processes refuse, so that its plan for them is without it."""
    asked = ["run.kernels triton"] if recipe.run.kernels == "triton" else []
    if recipe.optim.precision != "float32":
        asked.append(f"optim.precision {recipe.optim.precision}")
    return f"several processes refuse {' and '.join(asked)}: planned without" if asked else ""


def _mesh_name(cost: StepCost) -> str:
    return f"{cost.data} x {cost.latent}"


def _sent(cost: StepCost) -> str:
    """Say what a rank sends along each axis in a step, and how long that takes."""
    parts = []
    for axis, name in (("data", "of gradients"), ("latent", "of values and reconstructions")):
        size = sum(call.sent for call in cost.communication if call.axis == axis)
        spent = cost.seconds.get(costs.EXCHANGE[axis], 0.0)
        if size:
            parts.append(f"{format_bytes(size)} {name} ({1000 * spent:,.1f} ms)")
    return " and ".join(parts)


def _scheme_rows(case: PlanInput, meshes: list[StepCost]) -> list[tuple[str, list[str]]]:
    """Return the rows that compare the two ways to use several devices, where there are several."""
    found = [costs.schemes(case, cost.devices) for cost in meshes]
    if all(cost.devices == 1 for cost in meshes):
        return []

    def show(cost: StepCost | None) -> str:
        if cost is None or cost.devices == 1:
            return "-"
        speed = f"{_mesh_name(cost)}: {cost.tokens_per_s:,.0f}"
        return speed if cost.fits else f"({speed})"

    return [
        ("gradients summed", [show(each.summed) for each in found]),
        ("whole batch on each", [show(each.gathered) for each in found]),
    ]


def tables(plan: RunPlan) -> list[str]:
    """Return tables of the best meshes: their sizes, then memory, communication and time by
    part."""
    case, meshes = plan.case, plan.meshes
    tokens = case.recipe.steps * case.recipe.batch
    rows = [
        ("devices", [f"{cost.devices}" for cost in meshes]),
        ("mesh, data x latent", [f"{cost.data} x {cost.latent}" for cost in meshes]),
        ("fits", ["yes" if cost.fits else "no" for cost in meshes]),
        ("tokens/s", [f"{cost.tokens_per_s:,.0f}" for cost in meshes]),
        ("the run", [format_duration(tokens / cost.tokens_per_s) for cost in meshes]),
        *_scheme_rows(case, meshes),
        ("most latents that fit", [f"{costs.largest(case, cost.devices):,}" for cost in meshes]),
    ]
    memory = _rows_by_name([cost.memory for cost in meshes], format_bytes)
    main_memory = _rows_by_name([cost.main_memory for cost in meshes], format_bytes)
    lines = [
        *_heading(case),
        "",
        *_align(rows),
        *["", "memory of a rank", *_align(memory)],
        # The two moments do not overlap, so they have no sum.
        *["", "main memory of a rank, for a while", *_align(main_memory[:-1])],
    ]
    if any(cost.communication for cost in meshes):
        sizes = _rows_by_name([_bytes_by_collective(cost) for cost in meshes], format_bytes)
        lines += ["", "given by a rank to each collective in a step", *_align(sizes)]
    spent = _rows_by_name([cost.seconds for cost in meshes], lambda s: f"{1000 * s:,.1f}")
    return [*lines, "", "milliseconds of a step", *_align(spent)]


def _heading(case: PlanInput) -> list[str]:
    """Say what the devices are, which step they take, and what several refuse."""
    card, refused = case.card, _refused(case.recipe)
    several = "plain torch" if case.step == "triton" else case.step
    return [
        f"devices      {card.name}: {format_bytes(card.memory)}, {card.float32 / 1e12:,.4g} "
        f"TFLOP/s float32, {card.bfloat16 / 1e12:,.4g} bfloat16, "
        f"{card.bandwidth / 1e9:,.0f} GB/s; {card.per_node} to a node, {card.link / 1e9:,.4g} GB/s "
        f"there and {card.network / 1e9:,.4g} between nodes, each way",
        f"a step       {case.step} on one device, {several} on several; {case.dead:.0%} of the "
        "latents dead",
        *([f"{'':<13}{refused}"] if refused else []),
    ]


def _bytes_by_collective(cost: StepCost) -> dict[str, float]:
    """Return the bytes of each collective; those below 1 kB are added up."""
    sizes: dict[str, float] = {}
    for call in cost.communication:
        name = f"{call.name} ({call.kind}, {call.axis})" if call.bytes >= 1000 else "small ones"
        sizes[name] = sizes.get(name, 0) + call.bytes
    return sizes


def _rows_by_name(
    columns: list[dict[str, float]], format_value: Callable[[float], str]
) -> list[tuple[str, list[str]]]:
    """Return a table row for each name that occurs in the columns, and one of their sums."""
    names = sorted(
        dict.fromkeys(name for column in columns for name in column),
        key=lambda name: name == "small ones",
    )
    return [
        *(
            (name, [format_value(column[name]) if name in column else "-" for column in columns])
            for name in names
        ),
        ("in all", [format_value(sum(column.values())) for column in columns]),
    ]


def _align(rows: list[tuple[str, list[str]]]) -> list[str]:
    first = max(len(name) for name, _ in rows) + 2
    widths = [max(len(cells[i]) for _, cells in rows) + 2 for i in range(len(rows[0][1]))]
    return [
        f"  {name:<{first}}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))
        for name, cells in rows
    ]
