"""What a run is, as frozen data: sections of plain values, read from TOML, overridden by flags of
the same names.

    Recipe
      acts   where activations come from: LM, site, text, contexts, normalisation
      sae    the autoencoder: latents, k, AuxK, initialisation; sae.activation: one of several
             kinds, each with its own keys
      optim  how it is trained: learning rate, Adam, EMA, schedule
      curve  the held-out loss along the way, and whether the run ends where it no longer falls
      run    what does not change the result: device, log, how often to save
      mesh   how many processes share the work: parts of the batch, slices of the latents
      tokens, batch, seed, order

The defaults are the demo: the built-in LM of Python source, small enough for two cores. `recipes/`
has the paper's. Nothing here opens a file of the run, imports torch, or prints.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ksparse.config.activations import ActivationConfig, TopKConfig
from ksparse.config.options import Config, UnknownKeyError, flat, plain, preview
from ksparse.errors import InputError, nearest_name
from ksparse.storage.rows import has_half

_log = logging.getLogger("ksparse")


@dataclass(frozen=True)
class ActsConfig(Config):
    """Where activations come from."""

    SECTION = "acts."

    lm: str = "pylm/1.9m"
    """Causal LM: a Hub name, a local folder, or the built-in pylm (pylm/0.3m, pylm/1.9m, pylm/7.6m;
    pylm is 1.9m)."""
    revision: str = "main"
    """Revision of a Hub model."""
    tokenizer: str = ""
    """Tokenizer, if it is not the LM's own: a Hub name or a folder."""
    site: str = "resid_post.3"
    """resid_pre.I, resid_mid.I, resid_post.I, attn_out.I, mlp_out.I, or a module's name (its
    output; NAME:in for its input)."""
    text: str = "pylm"
    """A file or folder (.txt .jsonl .parquet, also .xz .gz .zst), a Hub data set, or the built-in
    pylm."""
    text_config: str = ""
    """Configuration of a Hub data set."""
    text_split: str = "train"
    """Split of a Hub data set; the held-out documents are taken from it by a hash of each."""
    text_field: str = "text"
    """Column of a .jsonl or .parquet file or a Hub data set that holds the text."""
    context: int = 64
    """Tokens in a context, BOS included. The paper's is 64."""
    bos: Literal["auto", "none"] = "auto"
    """auto: each context begins with the tokenizer's BOS, if it has one. none: never."""
    borders: Literal["pack", "split"] = "pack"
    """pack: documents follow one another, a separator between. split: no context spans two
    documents; ends are padded."""
    keep: Literal["text", "all"] = "text"
    """text: leave out the first position, BOS, separators and padding. all: leave out padding
    only."""
    normalize: Literal["unit_norm", "layer_norm", "dataset", "none"] = "unit_norm"
    """unit_norm (paper) and layer_norm: per activation, after subtracting its mean over d_model.
    dataset: one scale, so that the mean squared norm is d_model. none: as they are."""
    mix: int = 65_536
    """Activations that are shuffled together; each batch is drawn from so many."""
    lm_batch: int = 64
    """Contexts in one forward pass of the LM."""
    lm_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the LM."""
    store: Literal["float32", "bfloat16"] = "float32"
    """How the `mix` activations wait in memory. bfloat16 takes half of it and rounds them to 8
    bits; of an LM in bfloat16 nothing is lost."""
    shards: str = ""
    """A folder written by `ksparse shard`; activations are read from it instead of running the
    LM."""


@dataclass(frozen=True)
class SAEConfig(Config):
    """The autoencoder (Gao et al. 2024, section 2 and appendix A)."""

    SECTION = "sae."

    n_latents: int = 4096
    """Latents."""
    k: int = 32
    """Latents that may be active for one activation. Of batch_topk: on average over a batch. Of
    jump_relu: the L0 at the start, and the one aimed at. Of relu, gated and prolu: no bound; the
    number chosen where one is asked for, as in the codes at other k."""
    activation: ActivationConfig = field(default_factory=TopKConfig)
    """What becomes of pre-activations."""
    auxk_coef: float = 1 / 32
    """Weight of the AuxK loss, of topk, batch_topk and jump_relu; 0 turns it off. The other kinds
    have no AuxK: they resample."""
    k_aux: int = 0
    """Dead latents that reconstruct the error; 0: the power of two nearest to d_model / 2."""
    auxk_share: float = 1.0
    """Share of a batch's tokens, its first ones, that AuxK is computed on. Batches are mixed, so
    these are a random sample; the loss is their mean, its cost in proportion. The paper: 1, all."""
    auxk_norm: Literal["token", "batch"] = "token"
    """AuxK's error is divided by the error's own square, per token (paper) or by its variance over
    the batch (official code)."""
    dead_after: int = 0
    """Tokens without activation after which a latent is dead; 0: the paper's 10 M, or a
    thirty-second of a shorter run's tokens."""
    multi_topk: float = 0.0
    """Weight of a second loss at 4k (Multi-TopK, section 5.3; the paper's is 1/8); 0 turns it
    off."""
    b_enc: bool = True
    """Train a bias inside the TopK."""
    init: Literal["tied", "independent"] = "tied"
    """tied: encoder rows start as the decoder's. independent: both random."""
    init_scale: Literal["recon", "unit"] = "recon"
    """recon: the encoder is scaled so that reconstructions start with the norm of their input.
    unit: rows of norm 1."""
    b_pre_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Where b_pre starts, from a sample of activations."""
    unit_norm: bool = True
    """Keep decoder rows at norm 1, and remove the gradient along them."""

    @property
    def bound(self) -> str:
        """How many latents are active, in words, as far as the recipe bounds them."""
        return self.activation.BOUND.format(k=self.k)

    @property
    def uses_auxk(self) -> bool:
        """Whether the AuxK loss revives dead latents."""
        return self.auxk_coef > 0 and self.activation.REVIVAL == "auxk"


@dataclass(frozen=True)
class OptimConfig(Config):
    """Adam as in appendix A.3-A.6."""

    SECTION = "optim."

    lr: float = 0.0
    """Learning rate; 0: the law lr_at_32k x sqrt(32,768 / n_latents)."""
    lr_at_32k: float = 8e-4
    """Learning rate of the law at 32,768 latents. The paper's rates at convergence are about 2e-4
    to 4e-4 there, those for a given amount of compute some four times as large; ours is of the
    second kind."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 6.25e-10
    """The paper's: gradients, averaged over a batch, are tiny."""
    warmup: int = 0
    """Steps over which the rate rises linearly."""
    decay: float = 0.0
    """Last share of the steps over which the rate falls linearly to 0. The paper: 0."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no clipping (the paper's GPT-2 runs)."""
    ema: float = 0.999
    """Decay of the average of the weights, bias-corrected; 0 turns it off. The average is what is
    evaluated and used."""
    ema_span: float = 0.1
    """Largest share of the run that the average spans: with fewer than 1 / (1 - ema) / ema_span
    steps the decay is lower, because an average over a short run's beginning is worse than no
    average. 1: the decay as given (the paper)."""
    screen: Literal["off", "auto", "int8", "bfloat16"] = "off"
    """Choose candidates by a product in low precision, their values and the final choice being
    exact; tokens that are not clear are computed in full. auto: whichever is fastest here (on a GPU
    int8). Needs the compiled kernels. The log says how often the choice differs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What the sparse parts of a step read weights, activations and errors in, on a GPU: bfloat16
    copies are read in half the time. Weights, moments, gradients and sums stay float32."""


@dataclass(frozen=True)
class CurveConfig(Config):
    """The held-out loss along a run, from which scaling laws are fitted (section 3)."""

    SECTION = "curve."

    held_out: int = 0
    """Activations of the validation side of the text on which the loss is measured at log-spaced
    points, with raw and with averaged weights; 0: not at all."""
    per_octave: int = 2
    """Points for each doubling of the tokens."""
    octaves: int = 8
    """Doublings before the last step from which on there are points."""
    converged: float = 0.0
    """The run ends once the loss falls by less than this share for a doubling of the tokens: the
    slope of the logarithms over the last `window` octaves. 0: it ends after `tokens`. The paper
    trains "to convergence" without saying how that is told."""
    window: float = 1.5
    """Octaves over which the slope is taken."""


@dataclass(frozen=True)
class RunConfig(Config):
    """What may change between a run and its resumption, because it does not change the result."""

    SECTION = "run."

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    kernels: Literal["auto", "torch", "native", "triton"] = "auto"
    """native: the compiled training step, on a CPU with a C++ compiler; triton: Triton's kernels,
    on a CUDA GPU; torch: plain torch;
    auto: one of the first two where it can be, else torch."""
    ahead: Literal["auto", "on", "off"] = "auto"
    """Compute activations in a thread of their own while the step before is taken: the same
    batches, and up to `acts.mix` more of them in memory. auto: on a GPU, where reading and
    tokenising would keep it waiting."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 0
    """Steps between checkpoints; 0: every save_minutes."""
    save_minutes: float = 5.0
    """Minutes between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a batch whose loss is NaN or infinite; skip counts it in the metrics."""
    alarm_grad_norm: float = 10.0
    """Warn, and write a line of alarms.jsonl, where the gradient's norm is more than so many times
    its running median; 0: never."""
    alarm_dead: float = 0.5
    """Warn where the share of dead latents comes above this; 0: never."""
    alarm_dead_growth: float = 0.2
    """Warn where the share of dead latents has risen by more than this; 0: never."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where to send the metrics besides metrics.jsonl."""


@dataclass(frozen=True)
class MeshConfig(Config):
    """How the processes that torchrun starts share one run; data x latent of them. Another mesh may
    go on with a run: results agree up to rounding."""

    SECTION = "mesh."

    data: int = 1
    """Parts that each batch is cut into; 0: as many as processes / latent."""
    latent: int = 1
    """Slices that the latents are cut into."""
    capacity: float = 0.0
    """Values that a slice offers for each token, as a share of k / latent. 0: k, so that the choice
    is that of one process. The paper's may miss some where a token's latents crowd into one slice;
    the log says how often."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before the run ends with an error."""


@dataclass(frozen=True)
class Recipe(Config):
    """One run, completely."""

    acts: ActsConfig = field(default_factory=ActsConfig)
    sae: SAEConfig = field(default_factory=SAEConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    curve: CurveConfig = field(default_factory=CurveConfig)
    run: RunConfig = field(default_factory=RunConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tokens: int = 800_000
    """Activations to train on."""
    batch: int = 1024
    """Activations in a step. The paper's is 131,072."""
    seed: int = 0
    """Fixes the initial weights, and the order of the data unless `order` does."""
    order: int = -1
    """Fixes the order of the data alone, so that SAEs with different seeds can share a stream; -1:
    as seed."""
    threads: int = 0
    """CPU threads; 0: as many as the machine has. Recorded, since sums depend on it in the last
    digit."""

    def __post_init__(self) -> None:
        with suggesting_keys():
            super().__post_init__()
        check(self)

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch)

    @property
    def lr(self) -> float:
        """The learning rate: the given one, or the 1 / sqrt(n) law of section 3.2."""
        return self.optim.lr or self.optim.lr_at_32k * math.sqrt(32_768 / self.sae.n_latents)

    @property
    def data_seed(self) -> int:
        """What fixes the order of the data."""
        return self.seed if self.order < 0 else self.order

    @property
    def ema(self) -> float:
        """The decay of the average of the weights: the given one, or less in a short run."""
        return max(0.0, min(self.optim.ema, 1 - 1 / max(1.0, self.optim.ema_span * self.steps)))

    @property
    def dead_after(self) -> int:
        """Tokens without activation after which a latent counts as dead."""
        return self.sae.dead_after or min(10_000_000, max(1, self.tokens // 32))

    @property
    def needs_autograd(self) -> bool:
        """Whether only the autograd step computes this recipe's losses: the explicit, native and
        triton steps write out the gradient of TopK with AuxK."""
        return not self.sae.activation.WRITTEN_OUT or self.sae.multi_topk > 0

    def identity(self) -> dict[str, Any]:
        """What the result depends on: everything but the sections `run` and `mesh` and the number
        of threads. Two spellings of one order are one."""
        return {
            key: value
            for key, value in plain(dataclasses.asdict(self)).items()
            if key not in ("run", "mesh", "threads")
        } | {"order": self.data_seed}


def k_aux(recipe: SAEConfig, d_model: int) -> int:
    """Return the number of dead latents in AuxK: given, or the power of two nearest to d_model / 2
    (appendix A.2)."""
    return recipe.k_aux or 2 ** round(math.log2(max(2, d_model / 2)))


def auxk_tokens(recipe: SAEConfig, tokens: int) -> int:
    """Return how many of a batch's tokens AuxK is computed on: the first ones, at least one."""
    return math.ceil(recipe.auxk_share * tokens)


def check(recipe: Recipe) -> None:
    """Raise InputError for values that cannot be right whatever the model."""
    sae, acts = recipe.sae, recipe.acts
    for key, value in flat(dataclasses.asdict(recipe)).items():
        if isinstance(value, str) and has_half(value):  # as names of files may; no TOML holds it
            raise InputError(f"{key} is {preview(value)}, which is not UTF-8; give another name")
    positive = {
        "sae.n_latents": sae.n_latents,
        "sae.k": sae.k,
        "tokens": recipe.tokens,
        "batch": recipe.batch,
        "acts.lm_batch": acts.lm_batch,
        "acts.mix": acts.mix,
        "run.log_every": recipe.run.log_every,
        "run.keep": recipe.run.keep,
        "curve.per_octave": recipe.curve.per_octave,
        "curve.octaves": recipe.curve.octaves,
        "mesh.latent": recipe.mesh.latent,
    }
    for key, value in positive.items():
        if value <= 0:
            raise InputError(f"{key} is {value}; it must be at least 1")
    if sae.k > sae.n_latents:
        raise InputError(
            f"sae.k is {sae.k}, more than the {sae.n_latents} latents of sae.n_latents; give a "
            "smaller k"
        )
    if sae.multi_topk and 4 * sae.k > sae.n_latents:
        raise InputError(
            f"Multi-TopK needs 4 x sae.k = {4 * sae.k} latents, sae.n_latents is {sae.n_latents}"
        )
    sae.activation.check(sae)
    if acts.context < 3:
        raise InputError(
            f"acts.context is {acts.context}; a context needs at least 3 tokens to predict one "
            "from text"
        )
    if not 0 <= recipe.curve.converged < 1:
        raise InputError(
            f"curve.converged is {recipe.curve.converged}; it is the share by which the loss still "
            "falls, from 0 up to, but not including, 1"
        )
    if recipe.curve.converged and not recipe.curve.held_out:
        raise InputError(
            "curve.converged needs a held-out loss: give curve.held_out, such as 16384"
        )
    if recipe.curve.converged and recipe.optim.decay:
        raise InputError(
            "optim.decay needs to know where the run ends, which curve.converged leaves open; give "
            "one of them"
        )
    if recipe.curve.converged and recipe.curve.window * recipe.curve.per_octave < 2:
        raise InputError(
            f"curve.window is {recipe.curve.window} octaves with {recipe.curve.per_octave} points "
            "each; a slope needs at least 3 points, 2 intervals"
        )
    if recipe.mesh.timeout <= 0:
        raise InputError(f"mesh.timeout is {recipe.mesh.timeout}; it must be above 0 seconds")
    for key, value in {
        "optim.lr_at_32k": recipe.optim.lr_at_32k,
        "optim.eps": recipe.optim.eps,
        "curve.window": recipe.curve.window,
    }.items():
        if value <= 0:
            raise InputError(f"{key} is {value}; it must be above 0")
    if recipe.order < -1:
        raise InputError(f"order is {recipe.order}; it must be -1, as seed, or not be negative")
    for key, value in {
        "optim.ema_span": recipe.optim.ema_span,
        "sae.auxk_share": sae.auxk_share,
    }.items():
        if not 0 < value <= 1:
            raise InputError(f"{key} is {value}; it must be above 0 and at most 1")
    at_least_zero = {
        "sae.auxk_coef": sae.auxk_coef,
        "sae.k_aux": sae.k_aux,
        "sae.dead_after": sae.dead_after,
        "sae.multi_topk": sae.multi_topk,
        "optim.lr": recipe.optim.lr,
        "optim.warmup": recipe.optim.warmup,
        "optim.clip": recipe.optim.clip,
        "threads": recipe.threads,
        "seed": recipe.seed,
        "run.save_every": recipe.run.save_every,
        "run.save_minutes": recipe.run.save_minutes,
        "run.alarm_grad_norm": recipe.run.alarm_grad_norm,
        "curve.held_out": recipe.curve.held_out,
        "mesh.data": recipe.mesh.data,
    }
    for key, value in at_least_zero.items():
        if value < 0:
            raise InputError(f"{key} is {value}; it must not be negative")
    for key, value in {
        "run.alarm_dead": recipe.run.alarm_dead,
        "run.alarm_dead_growth": recipe.run.alarm_dead_growth,
    }.items():
        if not 0 <= value < 1:
            raise InputError(
                f"{key} is {value}; it is a share of the latents, from 0 (never) up to, but not "
                "including, 1"
            )
    if recipe.mesh.capacity and recipe.mesh.capacity < 1:
        raise InputError(
            f"mesh.capacity is {recipe.mesh.capacity}; below 1 the slices offer fewer than k "
            "values together; give 0 (exact) or at least 1"
        )
    for key, value in {
        "optim.ema": recipe.optim.ema,
        "optim.beta1": recipe.optim.beta1,
        "optim.beta2": recipe.optim.beta2,
        "optim.decay": recipe.optim.decay,
    }.items():
        if not 0 <= value < 1 and not (key == "optim.decay" and value == 1):
            raise InputError(f"{key} is {value}; it must be from 0 up to, but not including, 1")


def check_schedule(recipe: Recipe) -> None:
    """Raise InputError where no step of the run has the whole learning rate. Runs that were begun
    without this question may go on."""
    falling = recipe.optim.decay * recipe.steps
    if recipe.optim.warmup > min(recipe.steps, recipe.steps + 1 - falling):
        raise InputError(
            f"optim.warmup is {recipe.optim.warmup:,} steps; the run has {recipe.steps:,} "
            f"({recipe.tokens:,} tokens in batches of {recipe.batch:,})"
            + (f", of which the rate falls in the last {falling:,.0f}" if falling else "")
            + ": it would never reach its learning rate. Give a shorter warm-up"
            + (", less optim.decay" if falling else "")
            + ", or more tokens"
        )


@contextmanager
def suggesting_keys() -> Iterator[None]:
    """Add the nearest key of a recipe, or all keys, to an error about an unknown one."""
    try:
        yield
    except UnknownKeyError as error:
        raise InputError(f"{error}{_suggest(error.key)}") from None


def _suggest(key: str) -> str:
    known = list(flat(dataclasses.asdict(Recipe())))
    last = {name.rpartition(".")[2]: name for name in known}
    near = nearest_name(key, known) or last.get(nearest_name(key.rpartition(".")[2], last) or "")
    return f"; did you mean '{near}'?" if near else f"; the keys are {', '.join(known)}"
