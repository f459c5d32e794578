"""Memory, communication and time of a training step on each device of a mesh, from sizes alone.
Arithmetic; needs no torch.

    PlanInput(recipe, subject, card)     a recipe for an LM on one type of device
    memory(case, mesh)                   bytes of one rank's device, by part
    communication(case, mesh)            bytes that a rank passes to each collective
    seconds(case, mesh)                  seconds of a step, by part
    estimate(case, mesh)                 all three, whether it fits, and tokens/s
    best(case, devices)                  the mesh to use
    schemes(case, devices)               the best one that sums gradients, and the one that does not
    largest(case, devices)               how many latents fit
    disk_bytes(recipe, parameters)       checkpoints on disk
    sae_memory(case), add_memory(…)      memory of several SAEs that share a stream
    site_memory(case)                    what each further site of the stream takes

With n latents, d = d_model, k, and a batch of b tokens on D x L ranks, each rank has n / L latents
and b / D tokens. docs/scaling-out.md explains the formulas line by line. Memory is the sum of all
parts, as if they existed at the same time; time is the sum of all parts, as if nothing overlapped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ksparse.config import ActsConfig, Config, MeshConfig, Recipe, auxk_tokens, k_aux
from ksparse.errors import InputError
from ksparse.limits import COMPARED, PRE_ACTS, SAMPLE, first_offer, values_per_shard, widest
from ksparse.planning import flops, hardware
from ksparse.planning.hardware import Device
from ksparse.planning.steps import StepKind, prefilters

DENSE = 5
"""Dense [b, n] matrices that an activation other than TopK holds at once, at most: pre-activations,
masks, values and their gradients."""
GATHERED = 2_048
"""Tokens whose gathered decoder rows a GPU holds at once."""
CONTEXTS = 12
"""Widths of d_model that an LM holds for each token, the hidden layer of its MLP included."""
LIBRARIES = 0.57e9
"""Bytes of Python, torch, transformers, a tokenizer and the current text: measured on Linux with
torch for CPUs, docs/lab-book.md."""
CONTEXT = 1.5e9
"""Bytes of a CUDA context, cuBLAS workspaces and NCCL buffers. An assumption."""
TOPK_PASSES = 6
"""Times that torch.topk reads a float32 matrix on a GPU: radix selection, 8 bits at a time, and the
gathering. From publications, not measured here."""
COMPARED_BYTES = 16
"""Bytes per value while the values of all shards are compared: the value, masks, and ranks among
ties."""

Operation = Literal["all_reduce", "all_gather", "broadcast"]
Axis = Literal["data", "latent", "all"]


@dataclass(frozen=True)
class LMSpec:
    """The sizes of an LM that planning needs."""

    d_model: int
    parameters: int
    before_site: int
    """Parameters of the matrices up to the site."""
    body: int = 0
    """Parameters without the embeddings and the head."""
    vocabulary: int = 0
    """Tokens of the vocabulary, each with a logit."""


@dataclass(frozen=True)
class UnseenLM(Config):
    """The sizes of an LM that is not on this machine; without a d_model the recipe's LM is read."""

    SECTION = "subject."

    d_model: int = 0
    """Width of its activations."""
    parameters: int = 0
    """All of its parameters: each rank holds the whole LM."""
    before_site: int = 0
    """Parameters of the matrices up to the site; 0: all."""

    def subject(self) -> LMSpec | None:
        """Return the sizes, or None if none were given.

        Raises:
            InputError: for a negative size, and for sizes without a d_model.
        """
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
    """A recipe for an LM on devices of one type."""

    recipe: Recipe
    subject: LMSpec
    card: Device
    step: StepKind = "torch"
    ahead: bool = False
    """Whether activations are prefetched, into a second shuffle buffer."""
    dead: float = 0.1
    """Share of the latents that are dead; AuxK's cost is proportional to it."""

    @property
    def live(self) -> bool:
        """Whether the LM runs during training; False where shards are read."""
        return not self.recipe.acts.shards

    @property
    def lm_flops(self) -> int:
        """FLOPs of the LM for an activation: to the site, and with `sae.lm_loss` behind it."""
        subject = self.subject
        if not self.live:
            return 0
        before = flops.lm(subject.before_site)
        if not self.recipe.sae.uses_lm:
            return before
        matrices = (subject.body or subject.parameters) + subject.d_model * subject.vocabulary
        return before + flops.lm_loss(max(matrices, subject.before_site), subject.before_site)

    @property
    def parameters(self) -> int:
        """Parameters of the SAE: W_enc, W_dec, b_enc and b_pre."""
        n, d = self.recipe.sae.n_latents, self.subject.d_model
        return 2 * n * d + n + d


@dataclass(frozen=True)
class Collective:
    """The calls of one collective in a step, as one rank makes them.

    `name` is the name by which `distributed.Mesh` counts. `bytes` is the size of the rank's own
    tensors, over all `calls`. Of a broadcast, each of the `ranks` sends its own, in turn.
    """

    name: str
    kind: Operation
    axis: Axis
    ranks: int
    bytes: int
    calls: int = 1

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, and receives, in a ring."""
        return self.bytes * (
            2 * (self.ranks - 1) / self.ranks if self.kind == "all_reduce" else self.ranks - 1
        )


@dataclass(frozen=True)
class StepCost:
    """The costs of a step on a mesh; `memory` and `communication` are those of one rank."""

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
        """Bytes of one rank's device."""
        return sum(self.memory.values())


class Exchange(NamedTuple):
    """The values of a code that latent-parallel shards compare: of `tokens`, `first` values each;
    and of `again` of these tokens, as many as are expected not to be settled, `offer`."""

    tokens: int
    first: int
    again: int
    offer: int

    @classmethod
    def of(cls, tokens: int, k: int, offer: int, shards: int) -> Exchange:
        """Return what is exchanged to find the k largest, where a shard has `offer` values."""
        first, share = first_offer(k, shards)
        if offer < k or first >= offer:
            return cls(tokens, offer, 0, offer)
        return cls(tokens, first, round(share * tokens), offer)

    @property
    def values(self) -> int:
        """Values that a rank gives."""
        return self.tokens * self.first + self.again * self.offer


class RankShape:
    """The sizes of the first rank of a mesh, which has the largest part of everything.

    Attributes:
        rows: tokens of a batch.
        n: latents.
        weights: parameters of its shard of the SAE.
        trained: those of them that are not frozen.
        held: those of them whose start values are kept.
        ks: k of each code that is computed: the SAE's, and Multi-TopK's.
        offers: values of a token that the rank contributes to the global top k, for each of `ks`.
        active: values of a token in all codes.
        kept: those of each code that are left of the fullest token once shards were compared.
        parts: parts of the batch that autograd takes one after the other.
        dead: dead latents.
        auxk_rows: tokens that AuxK is computed on.
    """

    def __init__(self, case: PlanInput, mesh: MeshConfig):
        recipe = case.recipe
        sae = recipe.sae
        self.mesh, self.ranks, self.d = mesh, mesh.data * mesh.latent, case.subject.d_model
        self.rows = math.ceil(recipe.batch / mesh.data)
        self.n = math.ceil(sae.n_latents / mesh.latent)
        self.weights = 2 * self.n * self.d + self.n + self.d
        frozen = {"none": 0, "decoder": self.n * self.d, "encoder": self.n * (self.d + 1)}
        self.trained = self.weights - frozen[sae.freeze]
        self.held = self.n * self.d if sae.decoder_cosine_min else 0
        # Several processes use no Triton, as `choose_step` has it.
        self.step = "torch" if self.ranks > 1 and case.step == "triton" else case.step
        self.explicit = self.step != "autograd"
        self.prefilters = self.step in ("triton", "native") and prefilters(recipe, mesh.latent)
        self.ks = [sae.k, 4 * sae.k] if sae.multi_topk else [sae.k]
        if sae.activation.kind != "topk":
            self.ks = []  # every latent decides alone, or the batch does
        self.offers = [self._values_per_shard(k, recipe.mesh.capacity) for k in self.ks]
        self.active = sum(self.offers) or min(sae.k, self.n)
        self.kept = [
            min(offer, widest(k, mesh.latent, self.rows)) for k, offer in zip(self.ks, self.offers)
        ] or [self.active]
        self.parts = math.ceil(self.rows / max(1, PRE_ACTS // self.n))
        self.auxk = sae.uses_auxk
        self.dead = round(case.dead * self.n) if self.auxk else 0
        # AuxK's tokens are the batch's first, which the first ranks have.
        self.auxk_rows = min(self.rows, auxk_tokens(sae, recipe.batch)) if self.dead else 0
        self.k_aux = k_aux(sae, self.d)

    @property
    def holds_gradients(self) -> bool:
        """Whether gradients of n x d exist: not with the compiled step, unless they are summed."""
        return self.step != "native" or self.mesh.data > 1

    def _values_per_shard(self, k: int, capacity: float) -> int:
        if self.mesh.latent == 1:
            return k
        return values_per_shard(k, self.n, self.mesh.latent, capacity)

    @property
    def exchanged(self) -> list[Exchange]:
        """What shards exchange for each code; codes that keep all contributed values exchange
        none."""
        latent = self.mesh.latent
        codes = [
            Exchange.of(self.rows, k, offer, latent)
            for k, offer in zip(self.ks, self.offers)
            if offer * latent > k
        ]
        offer = min(self.k_aux, self.dead)
        compared = self.k_aux < self.dead * latent if self.explicit else offer * latent > self.k_aux
        auxk = self.auxk_rows and compared and offer * latent > self.k_aux
        return codes + ([Exchange.of(self.auxk_rows, self.k_aux, offer, latent)] if auxk else [])


# ---- memory --------------------------------------------------------------------------------------

SMALLER = {
    "weights": "--mesh.latent",
    "moments": "--mesh.latent",
    "average": "--optim.ema 0",
    "start values": "--sae.decoder-cosine-min 0",
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
"""The option that reduces each part of the memory, if there is one."""

STREAM = (
    "activations block",
    "first activations",
    "held-out activations",
    "LM",
    "LM at work",
    "libraries",
)
"""The parts that exist once, however many SAEs share the stream."""


def memory(case: PlanInput, mesh: MeshConfig) -> dict[str, float]:
    """Return the bytes of one rank's device, by part."""
    recipe, rank = case.recipe, RankShape(case, mesh)
    weights, d, acts, host = rank.weights, rank.d, case.recipe.acts, case.card.host
    most_exchanged = max((each.tokens * each.first for each in rank.exchanged), default=0)
    parts = {
        "weights": 4 * weights,
        "moments": 8 * rank.trained,
        "average": 4 * rank.trained if recipe.ema else 0,
        "start values": 4 * rank.held,
        "low-precision copies": _low_precision_copies(case, rank),
        "gradients": 4 * weights if rank.holds_gradients else 0,
        "copy for a checkpoint": _checkpoint_copies(case, rank) if host else 0,
        "pre-activations": _pre_acts(case, rank),
        "codes": 12 * rank.rows * rank.active,
        "values of all slices": COMPARED_BYTES * min(COMPARED, mesh.latent * most_exchanged)
        if mesh.latent > 1
        else 0,
        "batch": _batch_row(case, rank) * rank.rows * d,
        "gathered rows": 4 * min(rank.rows, GATHERED) * max(rank.kept) * d
        if rank.step == "torch" and not host
        else 0,
        # dead rows of both matrices and of both gradients, and two products
        "AuxK": 4 * (4 * rank.dead * d + 2 * rank.auxk_rows * rank.dead),
        "activations block": _shuffle_buffer(case, rank),
        "first activations": 4 * SAMPLE * d,
        "held-out activations": 4 * recipe.curve.held_out * d,
        "LM": case.subject.parameters * bytes_of(acts.lm_dtype) if case.live else 0,
        "LM at work": CONTEXTS
        * (acts.lm_batch or ActsConfig.lm_batch)
        * acts.context
        * d
        * bytes_of(acts.lm_dtype)
        if case.live
        else 0,
        "libraries": LIBRARIES if host else CONTEXT,
    }
    return {name: float(size) for name, size in parts.items() if size}


def main_memory(case: PlanInput, mesh: MeshConfig) -> dict[str, float]:
    """Return the bytes that a rank needs in main memory for a short time: the copies of a
    checkpoint."""
    return {"at a checkpoint": float(_checkpoint_copies(case, RankShape(case, mesh)))}


class SAEMemory(NamedTuple):
    """The memory of one SAE among several that share a stream and take their steps in turn."""

    held: float
    """Bytes held all the time."""
    working: dict[str, float]
    """Bytes by part that are needed only during its own step."""


def sae_memory(case: PlanInput, mesh: MeshConfig = MeshConfig()) -> SAEMemory:
    """Return the memory of one process that belongs to the SAE, without the stream's."""
    held_parts = {"weights", "moments", "average", "start values", "low-precision copies"}
    if case.step in ("torch", "native"):
        held_parts.add("pre-activations")  # a buffer that is used again
    if case.step == "torch" and case.card.host:
        held_parts.add("gradients")
    parts = {name: size for name, size in memory(case, mesh).items() if name not in STREAM}
    return SAEMemory(
        sum(size for name, size in parts.items() if name in held_parts),
        {name: size for name, size in parts.items() if name not in held_parts},
    )


def add_memory(saes: Iterable[SAEMemory]) -> float:
    """Return the bytes of SAEs that share a stream: what they hold, and the most that each part of
    a step needs."""
    held, working = 0.0, dict[str, float]()
    for sae in saes:
        held += sae.held
        for name, size in sae.working.items():
            working[name] = max(size, working.get(name, 0.0))
    return held + sum(working.values())


def site_memory(case: PlanInput, mesh: MeshConfig = MeshConfig()) -> dict[str, float]:
    """Return the bytes, by part, that each further site takes where one pass of the LM reads
    several: its shuffle buffer, its held-out activations, what a pass copies, and its batch."""
    recipe, rank, acts = case.recipe, RankShape(case, mesh), case.recipe.acts
    if not case.live:
        return {}
    contexts = (acts.lm_batch or ActsConfig.lm_batch) * acts.context
    parts = {
        "activations block": _shuffle_buffer(case, rank),
        "held-out activations": 4 * recipe.curve.held_out * rank.d,
        "LM at work": contexts * rank.d * (4 + bytes_of(acts.lm_dtype)),
        "batch": 8 * rank.rows * rank.d,
    }
    return {name: float(size) for name, size in parts.items() if size}


def further_sites(cases: Iterable[PlanInput]) -> float:
    """Return the bytes that runs at several sites need beyond those at one."""
    by_site = {case.recipe.acts.site: sum(site_memory(case).values()) for case in cases}
    return sum(by_site.values()) - max(by_site.values(), default=0.0)


def checkpoint_bytes(recipe: Recipe, parameters: int) -> int:
    """Return the bytes of a checkpoint, at most: the weights to use, raw weights, Adam's moments,
    the average if the recipe has one, and the start values of a decoder that is held near them."""
    start = parameters // 2 if recipe.sae.decoder_cosine_min else 0
    return 4 * (parameters * (5 if recipe.ema else 4) + start)


def disk_bytes(recipe: Recipe, parameters: int, existing: int = 0) -> int:
    """Return the bytes of disk that a run still needs for the checkpoints that it keeps and the one
    being written.

    Args:
        recipe: the recipe; `run.keep` says how many are kept.
        parameters: parameters of the SAE.
        existing: checkpoints that are on disk already.
    """
    keep = recipe.run.keep
    return checkpoint_bytes(recipe, parameters) * (keep + 1 - min(keep, existing))


def _checkpoint_copies(case: PlanInput, rank: RankShape) -> int:
    """Return the bytes of the copies that a checkpoint is written from: the averaged weights, and
    everything else where training goes on meanwhile.

    One process on a CPU waits for the write; any step but the native one has freed its gradients
    by then, which are as large.
    """
    if rank.ranks > 1 or not case.card.host:
        return checkpoint_bytes(case.recipe, rank.weights)
    return 4 * rank.weights if rank.step == "native" else 0


def bytes_of(dtype: str) -> int:
    """Return the bytes of a number of a data type; "auto", on a CPU, is float32."""
    return 4 if dtype in ("float32", "auto") else 2


def _reads_bfloat16(case: PlanInput, rank: RankShape) -> bool:
    """Return whether the sparse parts of the step read bfloat16 copies."""
    return case.recipe.optim.precision == "bfloat16" and rank.step == "triton"


def _batch_row(case: PlanInput, rank: RankShape) -> int:
    """Return the bytes held for each number of the batch: five in float32, and two bfloat16 copies
    that sparse parts read, or one that is summed."""
    summed = rank.mesh.latent > 1 and case.recipe.mesh.reduce == "bfloat16"
    return 20 + (4 if _reads_bfloat16(case, rank) else 0) + (2 if summed else 0)


def _low_precision_copies(case: PlanInput, rank: RankShape) -> float:
    """Return the bytes of the copies of the weights that preselection and the sparse parts read."""
    matrix, bfloat16 = rank.n * rank.d, _reads_bfloat16(case, rank)
    sparse = 4 * matrix if bfloat16 else 0  # both matrices
    if not rank.prefilters:
        return sparse
    if case.recipe.optim.approx_topk == "bfloat16":
        return sparse or 2 * matrix
    return sparse + matrix


def _pre_acts(case: PlanInput, rank: RankShape) -> int:
    if rank.step == "triton":  # the 3 largest of each 64 latents: value and index
        return 5 * 3 * rank.rows * math.ceil(rank.n / 64)
    matrices = 1 if case.recipe.sae.activation.kind == "topk" else DENSE
    return 4 * min(PRE_ACTS, rank.rows * rank.n) * matrices


def _shuffle_buffer(case: PlanInput, rank: RankShape) -> int:
    """Return the bytes of the shuffle buffer, which every rank holds whole, and of a second one
    where one process prefetches."""
    recipe = case.recipe
    if not case.live:
        return 0
    batches = max(1, recipe.acts.mix // recipe.batch)
    buffers = 2 if case.ahead and rank.ranks == 1 else 1
    return batches * recipe.batch * (bytes_of(recipe.acts.store) * rank.d + 16) * buffers


# ---- communication -------------------------------------------------------------------------------


def communication(case: PlanInput, mesh: MeshConfig) -> list[Collective]:
    """Return the collectives of the first rank in a step that neither logs nor saves."""
    recipe, rank = case.recipe, RankShape(case, mesh)
    ranks = {"data": mesh.data, "latent": mesh.latent, "all": rank.ranks}
    block = recipe.batch * rank.d * bytes_of(recipe.acts.store) // rank.ranks if case.live else 0
    calls = [
        *_forward_calls(case, rank),
        *_gradient_calls(case, rank),
        _call("all_reduce", "data", "fired", rank.n),
        _call("all_reduce", "all", "stop", 16),
        _call("broadcast", "all", "block", block),
    ]
    return [
        dataclasses.replace(call, ranks=ranks[call.axis])
        for call in calls
        if call.bytes and ranks[call.axis] > 1
    ]


def _forward_calls(case: PlanInput, rank: RankShape) -> list[Collective]:
    """Return the collectives of the codes, the reconstructions and the losses."""
    d, explicit, latent = rank.d, rank.explicit, rank.mesh.latent
    values = [
        4 * each.first * tokens
        for each in rank.exchanged
        for tokens in _comparison_chunks(each.tokens, each.first * latent)
    ]
    again = [4 * each.again * each.offer for each in rank.exchanged]
    sae = case.recipe.sae
    kind, prefixes = sae.activation.kind, len(sae.prefixes) or sae.prefix_draws
    codes = max(1, len(rank.ks)) + prefixes + (kind == "gated")
    number = bytes_of(case.recipe.mesh.reduce)
    recons = [number * rows * d for rows in (*[rank.rows] * codes, rank.auxk_rows)]
    # the total, the error, and each further term of the loss
    terms = 2 + bool(sae.multi_topk) + sae.uses_auxk + (len(sae.prefixes) or bool(prefixes))
    terms += (kind not in ("topk", "batch_topk")) + (kind == "gated")
    losses = [8] * (2 if rank.dead else 1) if explicit else [4 * terms]
    by_batch = sae.uses_auxk and rank.dead and sae.auxk_divisor == "batch"
    return [
        _call("all_gather", "latent", "counts", 8 if rank.auxk else 0),
        _call("all_gather", "latent", "values", *values),
        _call("all_gather", "latent", "values_again", *again),
        *_activation_calls(kind, rank),
        _call("all_reduce", "latent", "recon", *recons),
        _call("all_reduce", "data", "loss", *losses),
        _call("all_reduce", "data", "spread", *([4 * d, 4] if by_batch else [])),
        _call("all_reduce", "all", "finite", 8 if explicit else 0),
        _call("all_reduce", "all", "candidates", 8 if rank.prefilters else 0),
    ]


def _gradient_calls(case: PlanInput, rank: RankShape) -> list[Collective]:
    """Return the collectives of the gradients and their norm."""
    n, d, explicit = rank.n, rank.d, rank.explicit
    # Autograd sums b_pre's gradient for each code of each part of the batch.
    codes = max(1, len(rank.ks)) + (1 if rank.auxk_rows else 0)
    codes = 1 if explicit else codes * rank.parts
    own = {"jump_relu": ["threshold"], "gated": ["r_mag", "b_mag"]}
    tensors = own.get(case.recipe.sae.activation.kind, [])
    return [
        *(_call("all_reduce", "data", name, 4 * n) for name in tensors),
        _call("all_reduce", "data", "W_enc", 4 * n * d),
        _call("all_reduce", "data", "W_dec", 4 * n * d),
        _call("all_reduce", "data", "b_enc", 4 * n if explicit or case.recipe.sae.b_enc else 0),
        _call("all_reduce", "data", "b_pre", 4 * d),
        _call("all_reduce", "latent", "b_pre_encoder", *[4 * d] * codes),
        _call("all_reduce", "latent", "norm", 8),
    ]


def _activation_calls(kind: str, rank: RankShape) -> list[Collective]:
    """Return the collectives that an activation needs besides those of the values: BatchTopK's
    largest values, found in four rounds of 256 counts, and the penalties of others."""
    parts = rank.parts
    if kind == "batch_topk":  # before them how many values are above a guess; the smallest one kept
        return [
            _call("all_reduce", "all", "largest", *[8, *[8 * 256] * 4] * parts, 4),
            _call("all_gather", "all", "ties", *[8] * parts),
        ]
    if kind == "topk":
        return []
    mean = _call("all_reduce", "data", "penalty_mean", *[4] * parts if kind == "jump_relu" else [])
    return [_call("all_reduce", "latent", "penalty", *[4] * parts), mean]


def _comparison_chunks(rows: int, values: int) -> list[int]:
    """Return the tokens of each chunk in which shards compare `values` values a token."""
    most = max(1, COMPARED // max(1, values))
    return [min(most, rows - start) for start in range(0, rows, most)]


def _call(operation: Operation, axis: Axis, name: str, *sizes: int) -> Collective:
    """Return a collective that is called once for each size above 0; the axis gives `ranks`
    later."""
    return Collective(name, operation, axis, 0, sum(sizes), sum(size > 0 for size in sizes))


# ---- time ----------------------------------------------------------------------------------------

EXCHANGE = {
    "latent": "exchange over latents",
    "data": "exchange over data",
    "all": "exchange of activations",
}
"""The part of the time that the collectives of each axis are counted in."""


def seconds(case: PlanInput, mesh: MeshConfig) -> dict[str, float]:
    """Return the seconds of a step of the first rank, by part, one after the other."""
    recipe, card, rank = case.recipe, case.card, RankShape(case, mesh)
    d = rank.d
    bfloat16_product = _product_is_bfloat16(case, rank)
    product = hardware.PRODUCT * (card.bfloat16 if bfloat16_product else card.float32)
    stream, gather = hardware.MEMORY * card.bandwidth, hardware.GATHER * card.bandwidth
    float32 = bytes_of(recipe.acts.lm_dtype) == 4
    lm = hardware.LM * (card.float32 if float32 else card.bfloat16)
    lm_tokens = (
        recipe.batch * recipe.acts.context / (recipe.acts.context - 1) / rank.ranks
        if case.live
        else 0
    )
    parts = {
        "encoder product": 2 * rank.rows * rank.n * d / product,
        "selection": _selection_bytes(case, rank) / stream,
        "sparse parts": 4 * rank.rows * d * _rows_read(case, rank) / gather,
        "AuxK": 5 * 2 * rank.auxk_rows * rank.dead * d / (hardware.PRODUCT * card.float32),
        "Adam, norms, average": 2 * rank.n * d * _update_bytes(case, rank) / stream,
        "LM": case.lm_flops * lm_tokens / lm,
        **{name: _exchange_seconds(case, mesh, axis) for axis, name in EXCHANGE.items()},
    }
    return {name: value for name, value in parts.items() if value}


def _rows_read(case: PlanInput, rank: RankShape) -> int:
    """Return how many rows of d numbers the sparse parts read for a token."""
    times = 4 if case.card.host or rank.step == "triton" else 6
    # with a prefilter a shard computes all values that it might offer
    offered = rank.active if rank.prefilters and rank.mesh.latent > 1 else 0
    return times * sum(rank.kept) + offered


def _product_is_bfloat16(case: PlanInput, rank: RankShape) -> bool:
    """Return whether the encoder product runs at the speed of bfloat16. int8 does on a GPU, where
    selection limits it to about that speed."""
    return rank.prefilters and (
        rank.step == "triton" or case.recipe.optim.approx_topk == "bfloat16"
    )


def _selection_bytes(case: PlanInput, rank: RankShape) -> float:
    """Return the bytes that selection reads and writes: the product with its bias, then its k
    largest values; the same for the values of all shards."""
    if rank.step == "triton":
        return 2 * _pre_acts(case, rank)
    passes = 2 if case.card.host else 3 + TOPK_PASSES
    compared = (
        rank.mesh.latent * sum(each.values for each in rank.exchanged)
        if rank.mesh.latent > 1
        else 0
    )
    return 4 * passes * (rank.rows * rank.n + compared)


def _update_bytes(case: PlanInput, rank: RankShape) -> int:
    """Return the bytes that an update reads and writes for each number of the weight matrices."""
    average = 8 if case.recipe.ema else 0
    weight_and_moments = 24 + average  # read and written
    if rank.step == "native":  # summed gradients: written, read for their norm, read
        return weight_and_moments + (12 if rank.holds_gradients else 0)
    if rank.step == "triton":
        return weight_and_moments + 12  # the gradient: written, read for its norm, read
    # The average reads the weight; the gradient: written, its parallel part, norm, Adam; half of
    # the weights renormalized.
    return weight_and_moments + 4 + 36


def _exchange_seconds(case: PlanInput, mesh: MeshConfig, axis: str) -> float:
    """Return the seconds that an axis's collectives take, as rings."""
    rate = hardware.LINK * _link_rate(case.card, mesh, axis)
    return sum(
        call.sent / rate + call.calls * hardware.LATENCY
        for call in communication(case, mesh)
        if call.axis == axis
    )


def _link_rate(card: Device, mesh: MeshConfig, axis: str) -> float:
    """Return the bytes per second at which a rank sends along an axis: rings between nodes share
    the ports of all their ranks in a node.

    Ranks of a latent group are neighbours; those of a data group are `mesh.latent` apart.
    """
    ranks, in_node = {
        "latent": (mesh.latent, card.per_node),
        "data": (mesh.data, max(1, card.per_node // mesh.latent)),
        "all": (mesh.data * mesh.latent, card.per_node),
    }[axis]
    return card.link if ranks <= in_node else min(card.link, in_node * card.network)


# ---- estimates, and the mesh to use --------------------------------------------------------------


def estimate(case: PlanInput, mesh: MeshConfig) -> StepCost:
    """Return the costs of a step on a mesh."""
    memory_parts, time_parts = memory(case, mesh), seconds(case, mesh)
    return StepCost(
        mesh.data * mesh.latent,
        mesh.data,
        mesh.latent,
        memory_parts,
        main_memory(case, mesh),
        communication(case, mesh),
        time_parts,
        sum(memory_parts.values()) <= hardware.USABLE * case.card.memory,
        case.recipe.batch / sum(time_parts.values()),
    )


def mesh_of(recipe: Recipe) -> MeshConfig:
    """Return a recipe's mesh, with 1 for what is left to the number of processes."""
    mesh = recipe.mesh
    return dataclasses.replace(mesh, data=mesh.data or 1, latent=mesh.latent or 1)


class Schemes(NamedTuple):
    """The two ways to use more devices than the latents need; None where no mesh divides the batch
    and the latents."""

    summed: StepCost | None
    """The best mesh whose ranks have parts of the batch, and sum the gradients of their latents."""
    gathered: StepCost | None
    """The mesh whose ranks all have the whole batch, and latents of their own."""


def schemes(case: PlanInput, devices: int) -> Schemes:
    """Return the costs of both ways to use a number of devices."""
    estimates = [estimate(case, mesh) for mesh in _meshes(case, devices)]
    summed = [cost for cost in estimates if cost.data > 1]
    gathered = [cost for cost in estimates if cost.data == 1]
    return Schemes(_best(summed) if summed else None, gathered[0] if gathered else None)


def best(case: PlanInput, devices: int) -> StepCost:
    """Return the costs of the fastest mesh of `devices` devices that fits, or of the smallest one
    if none fits.

    Raises:
        InputError: if no mesh of this size divides the batch and the latents.
    """
    meshes = _meshes(case, devices)
    if not meshes:
        raise InputError(
            f"no mesh of {devices} devices divides a batch of {case.recipe.batch:,} and "
            f"{case.recipe.sae.n_latents:,} latents; take a number of devices "
            "that divides one of them, such as a power of two"
        )
    return _best([estimate(case, mesh) for mesh in meshes])


def _meshes(case: PlanInput, devices: int) -> list[MeshConfig]:
    """Return the meshes of a number of devices that divide the batch and the latents."""
    if devices < 1:
        raise InputError(f"devices is {devices}; it must be at least 1")
    sae = case.recipe.sae
    meshes = [
        MeshConfig(devices // latent, latent)
        for latent in range(1, devices + 1)
        if devices % latent == 0
    ]
    return [
        mesh
        for mesh in meshes
        if case.recipe.batch % mesh.data == 0
        and sae.n_latents % mesh.latent == 0
        and max(sae.k, sae.k_start) <= sae.n_latents // mesh.latent
    ]


def _best(estimates: list[StepCost]) -> StepCost:
    """Return the fastest that fits, or the smallest if none fits."""
    fitting = [cost for cost in estimates if cost.fits]
    return (
        max(fitting, key=lambda cost: cost.tokens_per_s)
        if fitting
        else min(estimates, key=lambda cost: cost.bytes)
    )


def largest(case: PlanInput, devices: int) -> int:
    """Return the most latents, a power of two for each device, that fit on some mesh of `devices`
    devices; 0 if none fit."""
    sae, n, most = case.recipe.sae, devices, 0
    while True:
        if n >= sae.k * (4 if sae.multi_topk else 1):
            wider = dataclasses.replace(case.recipe, sae=dataclasses.replace(sae, n_latents=n))
            if not best(dataclasses.replace(case, recipe=wider), devices).fits:
                return most
            most = n
        n *= 2
