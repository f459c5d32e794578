"""What a training step asks of each device of a mesh, from sizes alone: memory, communication,
time. Arithmetic, no torch.

    Case(recipe, subject, card)          what is asked about
    memory(case, mesh)                   bytes of a rank, by part
    communication(case, mesh)            what a rank gives to each collective, in bytes
    seconds(case, mesh)                  of a step, by part
    estimate(case, mesh)                 all three, whether it fits, and tokens/s
    best(case, devices)                  the mesh to take
    largest(case, devices)               how many latents fit

n latents, d = d_model, k, a batch of b tokens on D x L ranks: each has n / L latents and b / D
tokens. The formulas are in docs/scaling-out.md, line by line; memory is added up as if all parts
were there at once, and time as if nothing overlapped.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from ksparse.config import WITH_AUXK, Config, MeshConfig, Recipe, auxk_tokens, k_aux
from ksparse.errors import InputError
from ksparse.planning import flops, hardware
from ksparse.planning.hardware import Device

PIECE = 2**27  # numbers of the product in memory at once
DENSE = 5
"""Matrices of a batch's products, at most, that another activation than TopK has in memory at once:
products, which count, values, their gradients."""
SAMPLE = 32_768  # activations that the run starts from
GATHERED = 2_048  # tokens whose gathered rows a GPU has in memory at once
# widths of d_model that an LM has in memory for a token, the hidden layer of its MLP among them
CONTEXTS = 12
LIBRARIES = 0.57e9
"""Python, torch, transformers, a tokenizer and the text at hand: measured on Linux with torch for
CPUs, docs/lab-book.md."""
CONTEXT = 1.5e9
"""A CUDA context, the workspaces of cuBLAS and the buffers of NCCL. An assumption."""
TOPK_PASSES = 6
"""Times that torch.topk reads a float32 matrix on a GPU: radix selection, 8 bits at a time, and the
gathering. Published, not measured here."""

COMPARED, COMPARED_BYTES = 2**26, 16
"""Values of all slices that are compared at a time, and the bytes of each meanwhile: itself, masks,
and ranks among equals."""

StepKind = Literal["native", "torch", "triton", "autograd"]
Operation = Literal["all_reduce", "all_gather", "broadcast"]
Axis = Literal["data", "latent", "all"]
"""Which of the training steps is taken: compiled, written out in torch, by Triton, or by
autograd."""


@dataclass(frozen=True)
class LMSpec:
    """What the plan needs to know of the LM."""

    d_model: int
    parameters: int
    before_site: int
    body: int = 0
    """Parameters that are not of embeddings or the head."""


@dataclass(frozen=True)
class UnseenLM(Config):
    """A subject that is not at hand, by its sizes; without a d_model it is the recipe's."""

    SECTION = "subject."

    d_model: int = 0
    """Width of its activations."""
    parameters: int = 0
    """Its parameters, all of them: each rank has the LM whole."""
    before_site: int = 0
    """Those of matrices up to the site; 0: all."""

    def subject(self) -> LMSpec | None:
        """Return it, or None where none is described."""
        for name in ("d_model", "parameters", "before_site"):
            if getattr(self, name) < 0 or (not self.d_model and getattr(self, name)):
                raise InputError(
                    f"subject.{name} is {getattr(self, name)}; a subject that is not at hand needs "
                    "a d_model above 0, the rest at least 0"
                )
        return (
            LMSpec(self.d_model, self.parameters, self.before_site or self.parameters)
            if self.d_model
            else None
        )


@dataclass(frozen=True)
class PlanInput:
    """A recipe for an LM on devices of one kind."""

    recipe: Recipe
    subject: LMSpec
    card: Device
    step: StepKind = "torch"
    ahead: bool = False
    """Whether activations are computed ahead, in a second block."""
    dead: float = 0.1
    """Share of the latents that are dead: AuxK costs only then, and in proportion."""

    @property
    def live(self) -> bool:
        """Whether the LM runs, rather than shards being read."""
        return not self.recipe.acts.shards

    @property
    def parameters(self) -> int:
        n, d = self.recipe.sae.n_latents, self.subject.d_model
        return 2 * n * d + n + d


@dataclass(frozen=True)
class Collective:
    """What one rank gives to the collectives of one name in a step, in bytes of its own tensors,
    among `ranks` ranks of an axis.

    Names are those by which `distributed.Mesh` counts. A broadcast is each rank's own, one after
    the other.
    """

    name: str
    kind: Operation
    axis: Axis
    ranks: int
    bytes: int
    calls: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a rank sends (and gets) in a ring."""
        return self.bytes * (
            2 * (self.ranks - 1) / self.ranks if self.kind == "all_reduce" else self.ranks - 1
        )


@dataclass(frozen=True)
class StepCost:
    """What a step costs on a mesh."""

    devices: int
    data: int
    latent: int
    memory: dict[str, float]
    main_memory: dict[str, float]
    communication: list[Collective]
    seconds: dict[str, float]
    fits: bool
    tokens_per_s: float

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


class RankShape:
    """What the first rank of a mesh has: tokens, latents, how many values it offers for a token,
    and AuxK's share of them. It has the most."""

    def __init__(self, case: PlanInput, mesh: MeshConfig):
        recipe = case.recipe
        sae = recipe.sae
        self.mesh, self.ranks, self.d = mesh, mesh.data * mesh.latent, case.subject.d_model
        self.rows, self.n = (
            math.ceil(recipe.batch / mesh.data),
            math.ceil(sae.n_latents / mesh.latent),
        )
        self.weights = 2 * self.n * self.d + self.n + self.d
        self.step = (
            "torch" if self.ranks > 1 and case.step != "autograd" else case.step
        )  # what several processes can take
        self.ks = [sae.k, 4 * sae.k] if sae.multi_topk else [sae.k]
        self.offers = [self.offer(k, recipe.mesh.capacity) for k in self.ks]
        on = sae.auxk_coef and sae.activation.kind in WITH_AUXK
        self.auxk = bool(on)
        self.dead = round(case.dead * self.n) if on else 0
        self.auxk_rows = (
            min(self.rows, auxk_tokens(sae, recipe.batch)) if self.dead else 0
        )  # the first tokens of the batch: the first ranks'
        self.k_aux = k_aux(sae, self.d)

    def offer(self, k: int, capacity: float = 0.0) -> int:
        """Return how many values of a token a slice offers: k, or as many as it has, or as the
        capacity allows."""
        return (
            min(k, self.n, math.ceil(capacity * k / self.mesh.latent) or k)
            if self.mesh.latent > 1
            else k
        )

    @property
    def exchanged(self) -> list[tuple[int, int]]:
        """Tokens, and values of each that slices compare, of each choice; none where all that is
        offered is kept."""
        latent = self.mesh.latent
        choices = [
            (self.rows, offer) for k, offer in zip(self.ks, self.offers) if offer * latent > k
        ]
        offer = min(self.k_aux, self.dead)
        compared = (
            self.k_aux < self.dead * latent if self.step == "torch" else offer * latent > self.k_aux
        )
        return choices + (
            [(self.auxk_rows, offer)]
            if self.auxk_rows and compared and offer * latent > self.k_aux
            else []
        )


# ---- memory --------------------------------------------------------------------------------------

SMALLER = {
    "weights": "--mesh.latent",
    "moments": "--mesh.latent",
    "average": "--optim.ema 0",
    "low-precision copies": "--optim.approx-topk off",
    "gradients": "--mesh.latent",
    "copy for a checkpoint": "--mesh.latent",
    "pre-activations": "--batch",
    "codes": "--batch",
    "values of all slices": "--mesh.capacity",
    "batch": "--batch",
    "gathered rows": "--run.kernels triton",
    "AuxK": "--sae.auxk-share",
    "activations block": "--acts.mix",
    "first activations": "",
    "held-out activations": "--curve.held-out",
    "LM": "--acts.lm-dtype bfloat16",
    "LM at work": "--acts.lm-batch",
    "libraries": "",
}
"""What makes each part of the memory smaller; nothing does of some."""


def memory(case: PlanInput, mesh: MeshConfig) -> dict[str, float]:
    """Return the bytes of one rank's device, by part."""
    recipe, rank = case.recipe, RankShape(case, mesh)
    own, d, acts, host = rank.weights, rank.d, case.recipe.acts, case.card.host
    parts = {
        "weights": 4 * own,
        "moments": 8 * own,
        "average": 4 * own if recipe.ema else 0,
        "low-precision copies": _copies(case, rank),
        "gradients": 4 * own if rank.step != "native" else 0,
        "copy for a checkpoint": _copy(case, rank) if host else 0,
        "pre-activations": _product(case, rank),
        "codes": 12 * rank.rows * sum(rank.offers),
        "values of all slices": COMPARED_BYTES
        * min(
            COMPARED, mesh.latent * max((rows * offer for rows, offer in rank.exchanged), default=0)
        )
        if mesh.latent > 1
        else 0,
        "batch": (24 if _halves(case, rank) else 20) * rank.rows * d,
        "gathered rows": 4 * min(rank.rows, GATHERED) * max(rank.offers) * d
        if rank.step == "torch" and not host
        else 0,
        "AuxK": 4
        * (
            4 * rank.dead * d + 2 * rank.auxk_rows * rank.dead
        ),  # their rows of both matrices and of both gradients, and two products
        "activations block": _block(case, rank),
        "first activations": 4 * SAMPLE * d,
        "held-out activations": 4 * recipe.curve.held_out * d,
        "LM": case.subject.parameters * _size(acts.lm_dtype) if case.live else 0,
        "LM at work": CONTEXTS * acts.lm_batch * acts.context * d * _size(acts.lm_dtype)
        if case.live
        else 0,
        "libraries": LIBRARIES if host else CONTEXT,
    }
    return {name: float(size) for name, size in parts.items() if size}


def main_memory(case: PlanInput, mesh: MeshConfig) -> dict[str, float]:
    """Return the bytes that a rank has in main memory for a while: the whole SAE and its random
    rows when it starts, and what it saves."""
    rank = RankShape(case, mesh)
    return {
        "at the start": 4.0 * (case.parameters + case.recipe.sae.n_latents * rank.d),
        "at a checkpoint": float(_copy(case, rank)),
    }


def _copy(case: PlanInput, rank: RankShape) -> int:
    """Return the bytes of a checkpoint's copies: the averaged weights, and all else where it is
    written while training goes on.

    One process on a CPU writes before it goes on: of other steps than the compiled one the
    gradients are gone by then.
    """
    if rank.ranks > 1 or not case.card.host:
        return 4 * rank.weights * (5 if case.recipe.ema else 4)
    return 4 * rank.weights if rank.step == "native" else 0


def _size(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _halves(case: PlanInput, rank: RankShape) -> bool:
    """Return whether the sparse parts read copies in bfloat16."""
    return case.recipe.optim.precision == "bfloat16" and rank.step == "triton"


def _copies(case: PlanInput, rank: RankShape) -> float:
    """Return the bytes of what the screen and the sparse parts read the weights from."""
    one, optim, half = rank.n * rank.d, case.recipe.optim, _halves(case, rank)
    screened = rank.step in ("triton", "native") and optim.approx_topk != "off"
    return (4 * one if half else 0) + (
        0
        if not screened or (half and optim.approx_topk == "bfloat16")
        else 2 * one
        if optim.approx_topk == "bfloat16"
        else one
    )


def _product(case: PlanInput, rank: RankShape) -> int:
    if rank.step == "triton":  # the 3 best of each 64 latents: value and place
        return 5 * 3 * rank.rows * math.ceil(rank.n / 64)
    return (
        4
        * min(PIECE, rank.rows * rank.n)
        * (1 if case.recipe.sae.activation.kind == "topk" else DENSE)
    )


def _block(case: PlanInput, rank: RankShape) -> int:
    """Return the bytes of the activations that are mixed, which every rank has whole, and of those
    that one process computes ahead."""
    recipe = case.recipe
    if not case.live:
        return 0
    return (
        _steps_of_block(recipe)
        * recipe.batch
        * (_size(recipe.acts.store) * rank.d + 16)
        * (2 if case.ahead and rank.ranks == 1 else 1)
    )


def _steps_of_block(recipe: Recipe) -> int:
    return max(1, recipe.acts.mix // recipe.batch)


# ---- communication -------------------------------------------------------------------------------


def communication(case: PlanInput, mesh: MeshConfig) -> list[Collective]:
    """Return what the first rank gives to each collective in a step that logs nothing and saves
    nothing."""
    recipe, rank = case.recipe, RankShape(case, mesh)
    n, d, explicit = rank.n, rank.d, rank.step == "torch"
    parts = 1 if explicit else math.ceil(rank.rows / max(1, PIECE // n))
    codes = (
        len(rank.ks) + (1 if rank.auxk_rows else 0)
    ) * parts  # those that autograd takes a gradient of
    found = [
        _sent("all_gather", "latent", "counts", 8 if rank.auxk else 0),
        _sent(
            "all_gather",
            "latent",
            "values",
            *(
                4 * offer * some
                for rows, offer in rank.exchanged
                for some in _pieces(rows, offer * mesh.latent)
            ),
        ),
        _sent(
            "all_reduce",
            "latent",
            "recon",
            *(4 * rows * d for rows in (*[rank.rows] * len(rank.ks), rank.auxk_rows)),
        ),
        _sent("all_reduce", "data", "loss", *([8] * (2 if rank.dead else 1) if explicit else [12])),
        _sent(
            "all_reduce",
            "data",
            "spread",
            *([4 * d, 4] if explicit and rank.dead and recipe.sae.auxk_norm == "batch" else []),
        ),
        _sent("all_reduce", "all", "finite", 8 if explicit else 0),
        _sent("all_reduce", "data", "W_enc", 4 * n * d),
        _sent("all_reduce", "data", "W_dec", 4 * n * d),
        _sent("all_reduce", "data", "b_enc", 4 * n if explicit or recipe.sae.b_enc else 0),
        _sent("all_reduce", "data", "b_pre", 4 * d),
        _sent("all_reduce", "latent", "b_pre_encoder", *([4 * d] * (1 if explicit else codes))),
        _sent("all_reduce", "latent", "norm", 8),
        _sent("all_reduce", "data", "fired", n),
        _sent("all_reduce", "all", "stop", 16),
        _sent(
            "broadcast",
            "all",
            "block",
            recipe.batch * d * _size(recipe.acts.store) // rank.ranks if case.live else 0,
        ),
    ]
    ranks = {"data": mesh.data, "latent": mesh.latent, "all": rank.ranks}
    return [
        dataclasses.replace(each, ranks=ranks[each.axis])
        for each in found
        if each.bytes and ranks[each.axis] > 1
    ]


def _pieces(rows: int, numbers: int) -> list[int]:
    """Return the tokens of each of the parts in which so many are compared, `numbers` values a
    token."""
    most = max(1, COMPARED // max(1, numbers))
    return [min(most, rows - at) for at in range(0, rows, most)]


def _sent(kind: Operation, axis: Axis, name: str, *sizes: int) -> Collective:
    """Return the collective that is called once for each size above 0; how many ranks there are is
    filled in by the axis."""
    return Collective(name, kind, axis, 0, sum(sizes), sum(size > 0 for size in sizes))


# ---- time ----------------------------------------------------------------------------------------

EXCHANGE = {
    "latent": "exchange over latents",
    "data": "exchange over data",
    "all": "exchange of activations",
}


def seconds(case: PlanInput, mesh: MeshConfig) -> dict[str, float]:
    """Return the seconds of a step of the first rank, by part, one after the other."""
    recipe, card, rank = case.recipe, case.card, RankShape(case, mesh)
    d, sparse = rank.d, sum(rank.offers)
    product = hardware.PRODUCT * (card.bfloat16 if _screened(case, rank) else card.float32)
    pass_over, gather = hardware.MEMORY * card.bandwidth, hardware.GATHER * card.bandwidth
    lm = hardware.LM * (card.float32 if recipe.acts.lm_dtype == "float32" else card.bfloat16)
    forwards = (
        recipe.batch * recipe.acts.context / (recipe.acts.context - 1) / rank.ranks
        if case.live
        else 0
    )
    parts = {
        "encoder product": 2 * rank.rows * rank.n * d / product,
        "selection": _selection(case, rank) / pass_over,
        "sparse parts": 4
        * rank.rows
        * sparse
        * d
        * (4 if card.host or rank.step == "triton" else 6)
        / gather,
        "AuxK": 5 * 2 * rank.auxk_rows * rank.dead * d / (hardware.PRODUCT * card.float32),
        "Adam, norms, average": 2 * rank.n * d * _row_bytes(case, rank) / pass_over,
        "LM": flops.lm(case.subject.before_site) * forwards / lm,
        **{name: _travel(case, mesh, axis) for axis, name in EXCHANGE.items()},
    }
    return {name: value for name, value in parts.items() if value}


def _screened(case: PlanInput, rank: RankShape) -> bool:
    """Whether the encoder product is in low precision: bfloat16, or int8, which a GPU's selection
    holds to about its speed."""
    screen = case.recipe.optim.approx_topk
    return (rank.step == "triton" and screen != "off") or (
        rank.step == "native" and screen == "bfloat16"
    )


def _selection(case: PlanInput, rank: RankShape) -> float:
    """Return the bytes that choosing reads and writes: the product once and its bias, then its k
    largest; the same of what all slices offer."""
    if rank.step == "triton":
        return 2 * _product(case, rank)
    passes = 2 if case.card.host else 3 + TOPK_PASSES
    compared = (
        rank.mesh.latent * sum(rows * offer for rows, offer in rank.exchanged)
        if rank.mesh.latent > 1
        else 0
    )
    return 4 * passes * (rank.rows * rank.n + compared)


def _row_bytes(case: PlanInput, rank: RankShape) -> int:
    """Return the bytes that a step reads and writes for each number of the weights."""
    average = 8 if case.recipe.ema else 0
    if rank.step == "native":
        return 24 + average  # weight and moments, read and written
    if rank.step == "triton":
        return 24 + average + 12  # and the gradient: written, read for its norm, read
    return (
        24 + average + 4 + 36
        # the average reads the weight; the gradient: written, its parallel part, norm, Adam; half
        # of the weights renormalised
    )


def _travel(case: PlanInput, mesh: MeshConfig, axis: str) -> float:
    """Return the seconds that an axis's collectives take, as rings."""
    rate = hardware.LINK * _rate(case.card, mesh, axis)
    return sum(
        each.sent / rate + each.calls * hardware.LATENCY
        for each in communication(case, mesh)
        if each.axis == axis
    )


def _rate(card: Device, mesh: MeshConfig, axis: str) -> float:
    """Return the bytes per second at which a rank of an axis's group sends: rings between nodes
    share the ports of all its ranks in a node.

    Ranks of a latent group are neighbours; those of a data group are `mesh.latent` apart.
    """
    ranks, together = {
        "latent": (mesh.latent, card.per_node),
        "data": (mesh.data, max(1, card.per_node // mesh.latent)),
        "all": (mesh.data * mesh.latent, card.per_node),
    }[axis]
    return card.link if ranks <= together else min(card.link, together * card.network)


# ---- both, and what to take ----------------------------------------------------------------------


def estimate(case: PlanInput, mesh: MeshConfig) -> StepCost:
    """Return what a step costs on a mesh."""
    parts, spent = memory(case, mesh), seconds(case, mesh)
    return StepCost(
        mesh.data * mesh.latent,
        mesh.data,
        mesh.latent,
        parts,
        main_memory(case, mesh),
        communication(case, mesh),
        spent,
        sum(parts.values()) <= hardware.USABLE * case.card.memory,
        case.recipe.batch / sum(spent.values()),
    )


def mesh_of(recipe: Recipe) -> MeshConfig:
    """Return a recipe's mesh; one part of the batch where it leaves their number to how many
    processes there are."""
    return dataclasses.replace(recipe.mesh, data=recipe.mesh.data or 1)


def best(case: PlanInput, devices: int) -> StepCost:
    """Return the fastest mesh of so many devices that fits; where none does, the one that needs
    least. Raise InputError where none divides the sizes."""
    if devices < 1:
        raise InputError(f"devices is {devices}; it must be at least 1")
    sae = case.recipe.sae
    sizes = [
        MeshConfig(devices // latent, latent)
        for latent in range(1, devices + 1)
        if devices % latent == 0
    ]
    sizes = [
        mesh
        for mesh in sizes
        if case.recipe.batch % mesh.data == 0
        and sae.n_latents % mesh.latent == 0
        and sae.k <= sae.n_latents // mesh.latent
    ]
    if not sizes:
        raise InputError(
            f"no mesh of {devices} devices divides a batch of {case.recipe.batch:,} and "
            f"{case.recipe.sae.n_latents:,} latents; take a number of devices "
            "that divides one of them, such as a power of two"
        )
    found = [estimate(case, mesh) for mesh in sizes]
    fitting = [each for each in found if each.fits]
    return (
        max(fitting, key=lambda each: each.tokens_per_s)
        if fitting
        else min(found, key=lambda each: each.bytes)
    )


def largest(case: PlanInput, devices: int) -> int:
    """Return the most latents, a power of two for each device, with which some mesh of so many
    devices fits; 0 where none does."""
    sae, n, found = case.recipe.sae, devices, 0
    while True:
        if n >= sae.k * (4 if sae.multi_topk else 1):
            wider = dataclasses.replace(case.recipe, sae=dataclasses.replace(sae, n_latents=n))
            if not best(dataclasses.replace(case, recipe=wider), devices).fits:
                return found
            found = n
        n *= 2
