"""The recipe: everything that defines a run, as frozen, validated sections of plain values.

    Recipe
      acts    where activations come from: LM, site, text, contexts, normalization
      sae     the autoencoder: latents, k, AuxK, initialization, and sae.activation,
              one of several kinds with options of its own
      optim   how it is trained: learning rate, Adam, weight averaging, schedule
      curve   the held-out loss during training, and stopping at convergence
      run     what does not change the result: device, logging, checkpoints
      mesh    how several processes share the work
      tokens, batch, seed, order, threads

Each section checks its own values when it is made; `Recipe` checks the rules between sections. The
defaults are the demo: the built-in LM of Python source, small enough for two cores. The folder
`recipes/` holds the paper's settings. Nothing here opens a file, imports torch or prints.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ksparse import html
from ksparse.config.activations import ActivationConfig, TopKConfig
from ksparse.config.options import Config, UnknownKeyError, flat, plain, preview
from ksparse.errors import InputError, nearest_name
from ksparse.storage.rows import has_lone_surrogate

CONTROLS = {
    "acts": ("lm_weights", "shuffle_tokens"),
    "sae": ("freeze", "decoder_cosine_min"),
}
"""Keys of controls, with which an SAE learns less than it could, to be compared with."""
LATER_ACTS = (
    *("lm_device_map", "lm_quantize", *CONTROLS["acts"]),
    *("chat", "roles", "pretokenized", "shard_window"),
)
"""Keys of `acts` that older runs and shards do not have: they are left out of names at their
defaults."""
SEVERAL_SITES = ",*?["
"""What `acts.site` has in it where it is a list or a pattern; no name of a site does."""


@dataclass(frozen=True)
class ActsConfig(Config):
    """Where activations come from: a language model, a site in it, and a text.

    Example:
        >>> from ksparse.config import ActsConfig
        >>> acts = ActsConfig(lm="gpt2", site="resid_post.8", text="texts/", context=128)
        >>> acts.normalize
        'unit_norm'
    """

    SECTION = "acts."
    JOINED = ("site",)

    lm: str = "pylm/1.9m"
    """Causal language model: a name on the Hugging Face Hub, a local folder, a GGUF file (read with
    the extra gguf), or the built-in pylm in one of its sizes, pylm/0.3m, pylm/1.9m (also called
    pylm) or pylm/7.6m."""
    revision: str = "main"
    """Revision of a model on the Hub."""
    tokenizer: str = ""
    """Tokenizer to use instead of the LM's own: a name on the Hub or a local folder."""
    site: str = "resid_post.3"
    """Where in the LM activations are read (the hook point): resid_pre.I, resid_mid.I,
    resid_post.I, attn_out.I or mlp_out.I for layer I, or the name of a module for its output
    (NAME:in for its input). `train`, `shard`, `sweep` and `plan` also take several, by a list or a
    pattern (`resid_post.*`): one SAE or set of shards for each, from one pass of the LM."""
    text: str = "pylm"
    """Text to run the LM on: a file or folder (.txt, .jsonl, .parquet, also compressed as .xz, .gz
    or .zst), a data set on the Hub, or the built-in text pylm."""
    text_config: str = ""
    """Configuration of a data set on the Hub."""
    text_split: str = "train"
    """Split of a data set on the Hub. Held-out documents are taken from the same split, chosen by a
    hash of each document."""
    text_field: str = "text"
    """Column that holds the text, in a .jsonl or .parquet file or a data set on the Hub. With
    `chat` the column of the messages, `messages` if this is not given."""
    pretokenized: bool = False
    """The column holds lists of token ids by this LM's own tokenizer (`input_ids`), not text."""
    chat: Literal["none", "template"] = "none"
    """template: the column holds conversations, lists of messages with `role` and `content`. They
    are rendered by the tokenizer's chat template, whose own tokens are never trained on."""
    roles: tuple[str, ...] = ()
    """With `chat`, roles whose tokens are trained on, such as assistant or user, as the messages
    name them. None: all."""
    context: int = 64
    """Tokens per context, BOS included (paper: 64)."""
    bos: Literal["auto", "none"] = "auto"
    """auto: start each context with the tokenizer's BOS token, if it has one. none: never."""
    borders: Literal["pack", "split"] = "pack"
    """How documents fill contexts. pack: documents follow one another with a separator token
    between them. split: a context never spans two documents, and the end of a document is
    padded."""
    keep: Literal["text", "all"] = "text"
    """Positions to train on. text: all but the first of a context, BOS, separators and padding.
    all: all but padding."""
    normalize: Literal["unit_norm", "layer_norm", "dataset", "none"] = "unit_norm"
    """Normalization of each activation. unit_norm (paper): subtract its mean over d_model and scale
    to norm 1. layer_norm: subtract its mean and divide by its standard deviation. dataset:
    multiply all by one constant, so that the mean squared norm is d_model. none: leave as it is."""
    mix: int = 65_536
    """Size of the shuffle buffer: activations are shuffled in blocks of this many, and batches are
    drawn from a block. With `sae.lm_loss`, whole contexts are shuffled."""
    lm_batch: int = 64
    """Contexts per forward pass of the LM. 0: the fastest, measured at the start of a run and kept
    in its checkpoints; evaluations then take 64. Results differ by rounding only, but two runs of
    such a recipe may not have the same bits."""
    lm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type in which the LM runs. auto: float32 on a CPU, on a GPU the one it is stored in. A
    run's recipe keeps the one that was taken."""
    lm_device_map: Literal["one", "auto", "balanced", "sequential"] = "one"
    """How an LM larger than one device is spread (with the extra large). one: not at all. Others:
    over all GPUs, then main memory, as accelerate does."""
    lm_quantize: Literal["none", "8bit", "4bit"] = "none"
    """Quantize the LM's weights as they are loaded (with the extra large, by bitsandbytes). Its
    activations are then not those of the LM as it is stored."""
    lm_weights: Literal["trained", "redrawn_keep_embedding", "redrawn"] = "trained"
    """A control (Heap et al. 2025): weights of the LM drawn anew. redrawn: every tensor from a
    Gaussian of its own mean and variance. redrawn_keep_embedding: all but the embeddings. The draw
    is the same each time."""
    shuffle_tokens: bool = False
    """A control: put the text tokens of each context in another order, so that a context keeps its
    words and loses what they say together."""
    store: Literal["float32", "bfloat16"] = "float32"
    """Data type of the shuffle buffer. bfloat16 halves its memory; for an LM that runs in bfloat16
    nothing is lost."""
    shards: str = ""
    """Folder of activations to read instead of running the LM: written by `ksparse shard`, or made
    by anybody and indexed by `ksparse shard --from`. s3://… or gs://… is in an object store."""
    shard_window: int = 0
    """With `shards`, how many activations are shuffled together, at least: those of whole files,
    which come in another order each epoch. 0: all. For sets that are larger than the disk."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("mix", at_least=1)
        self.check_range("lm_batch", at_least=0)
        self.check_range("shard_window", at_least=0)
        if self.lm_weights != "trained" and self.lm_quantize != "none":
            raise InputError(
                f"acts.lm_weights is {self.lm_weights!r} and acts.lm_quantize is "
                f"{self.lm_quantize!r}; quantized weights cannot be drawn anew: give one of them"
            )
        self._check_kind_of_text()
        if self.shards and self.names_several_sites:
            raise InputError(
                f"acts.site is {preview(self.site)}, which may name several sites, and acts.shards "
                f"is {preview(self.shards)}; a set of shards is of one site: give its own, and "
                "call once for each set"
            )
        if self.context < 3:
            raise InputError(
                f"acts.context is {self.context}; a context needs at least 3 tokens to predict "
                "one from text"
            )

    def _check_kind_of_text(self) -> None:
        if self.roles and self.chat == "none":
            raise InputError(
                f"acts.roles is {list(self.roles)} and acts.chat is 'none'; only conversations "
                "have roles: give acts.chat 'template', or leave acts.roles out"
            )
        if self.chat != "none" and self.pretokenized:
            raise InputError(
                "acts.chat is 'template' and acts.pretokenized is true; token ids have no roles: "
                "give one of them"
            )

    @property
    def site_patterns(self) -> tuple[str, ...]:
        """The names and patterns of sites that `site` lists.

        Example:
            >>> from ksparse.config import ActsConfig
            >>> ActsConfig(site=["resid_post.*", "mlp_out.3"]).site_patterns
            ('resid_post.*', 'mlp_out.3')
        """
        return tuple(filter(None, (part.strip() for part in self.site.split(","))))

    @property
    def names_several_sites(self) -> bool:
        """Whether `site` is a list or a pattern, of which only some verbs make one SAE each."""
        return any(letter in self.site for letter in SEVERAL_SITES)

    @property
    def column(self) -> str:
        """The column that is read: `text_field`, or `messages` for conversations."""
        is_default = self.chat != "none" and self.text_field == ActsConfig.text_field
        return "messages" if is_default else self.text_field


@dataclass(frozen=True)
class SAEConfig(Config):
    """The autoencoder: its size, activation, losses and initialization (Gao et al. 2024, section 2
    and appendix A).

    Example:
        >>> from ksparse.config import BatchTopKConfig, SAEConfig
        >>> SAEConfig(n_latents=32_768, k=64, activation=BatchTopKConfig()).bound
        '64 of them active on average'
        >>> SAEConfig(n_latents=16, k=32)
        Traceback (most recent call last):
        ksparse.errors.InputError: sae.k is 32, more than the 16 latents of sae.n_latents; ...
    """

    SECTION = "sae."

    n_latents: int = 4096
    """Number of latents."""
    k: int = 32
    """Active latents per token. For batch_topk this is the average over a batch; for jump_relu the
    L0 that training aims at. For relu, gated and prolu it does not limit training, and is
    the k used by analyses that need one."""
    activation: ActivationConfig = field(default_factory=TopKConfig)
    """Activation function, with options of its own."""
    start: str = ""
    """SAE to begin from: a run, a folder or file of any format that `ksparse.load` reads, or a name
    on the Hub. Its weights are the start values; `n_latents` may be larger, k another one; moments,
    averages and dead counters begin anew."""
    k_start: int = 0
    """Active latents per token at the first step, from which the number goes to `k` in equal ratios
    over `k_anneal`; 0: `k` from the start, and with jump_relu sae.activation.start_l0 times
    as many (not where `start` names an SAE)."""
    k_anneal: float = 0.5
    """Share of the steps, from the first, over which `k_start` becomes `k`."""
    auxk_coef: float = 1 / 32
    """Weight of the AuxK loss, which revives dead latents of topk, batch_topk and jump_relu; 0
    turns it off. The other kinds resample dead latents instead."""
    k_aux: int = 0
    """Dead latents that reconstruct the error in AuxK; 0: the power of two nearest to
    d_model / 2."""
    auxk_share: float = 1.0
    """Share of a batch on which AuxK is computed, from its start. Batches are shuffled, so this is
    a random sample; AuxK's cost falls in proportion (paper: 1)."""
    auxk_norm: Literal["auto", "token", "batch"] = "auto"
    """Normalization of the AuxK error. token (paper): divide by the squared norm of the error, per
    token. batch (official code): divide by the variance of the error over the batch, so that tokens
    that are badly reconstructed count more. auto: token for topk, batch for the other kinds."""
    dead_after: int = 0
    """Tokens without activation after which a latent counts as dead; 0: 10 million as in the
    paper, or 1/32 of the tokens of a shorter run."""
    multi_topk: float = 0.0
    """Weight of a second reconstruction loss at 4k (Multi-TopK, section 5.3; paper: 1/8); 0 turns
    it off."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka (Bussmann et al. 2025): sizes of nested prefixes of the latents, rising, each of
    which reconstructs alone, as do all latents. None: an ordinary SAE."""
    prefix_draws: int = 0
    """Matryoshka with random prefixes: number of sizes drawn anew for each step, instead of fixed
    `prefixes`; small ones are more frequent (Nabeshima 2024: 9)."""
    prefix_loss: Literal["sum", "mean"] = "sum"
    """How the errors of the prefixes and of all latents add up. sum: the paper's. mean: on the
    scale of an ordinary SAE, so that AuxK weighs as much as there."""
    lm_loss: Literal["none", "kl", "ce"] = "none"
    """Second loss, of the LM with the reconstructions in place of the activations (Karvonen 2025).
    kl: its divergence from the unchanged LM. ce: its cross-entropy. Runs the whole LM in each
    step."""
    lm_share: float = 0.5
    """Share of `lm_loss` in the sum with the reconstruction error; 1: it alone."""
    lm_balance: bool = True
    """Scale `lm_loss` anew in each step so that the KL of the batch counts as much as its
    reconstruction error. Without it a nat counts as much as a normalised MSE of 1."""
    b_enc: bool = True
    """Train an encoder bias."""
    init: Literal["tied", "independent"] = "tied"
    """tied: start the encoder rows as a copy of the decoder rows. independent: start both at
    random."""
    init_scale: Literal["recon", "unit"] = "recon"
    """recon: scale the encoder so that reconstructions start with the norm of their input. unit:
    start encoder rows at norm 1."""
    b_pre_init: Literal["geometric_median", "mean", "zero"] = "geometric_median"
    """Initial value of b_pre, the bias subtracted from the input, from a sample of activations."""
    unit_norm: bool = True
    """Keep decoder rows at norm 1, and remove the gradient component parallel to them."""
    freeze: Literal["none", "decoder", "encoder"] = "none"
    """A control (arXiv 2602.14111): weights that stay at their start values. decoder: the rows of
    W_dec. encoder: W_enc and b_enc."""
    decoder_cosine_min: float = 0.0
    """A control (arXiv 2602.14111: 0.8): smallest cosine of each decoder row with its start value,
    to which a row that has gone further is brought back after every step; 0: no limit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("n_latents", "k", at_least=1)
        self.check_range("auxk_coef", "k_aux", "dead_after", "multi_topk", at_least=0)
        self.check_range("auxk_share", "lm_share", above=0, at_most=1)
        self.check_range("decoder_cosine_min", at_least=0, below=1)
        if self.freeze == "decoder" and self.decoder_cosine_min:
            raise InputError(
                f"sae.freeze is 'decoder' and sae.decoder_cosine_min is {self.decoder_cosine_min}; "
                "a frozen decoder stays at cosine 1: give one of them"
            )
        if self.k > self.n_latents:
            raise InputError(
                f"sae.k is {self.k}, more than the {self.n_latents} latents of sae.n_latents; "
                "give a smaller k"
            )
        widest = max(self.k, self.k_start)
        if self.multi_topk and 4 * widest > self.n_latents:
            key = "k" if widest == self.k else "k_start"
            raise InputError(
                f"Multi-TopK needs 4 x sae.{key} = {4 * widest} latents, sae.n_latents is "
                f"{self.n_latents}"
            )
        if self.k_start and not 0 < self.k_start <= self.n_latents:
            raise InputError(
                f"sae.k_start is {self.k_start}; it must be from 1 to the {self.n_latents} latents "
                "of sae.n_latents, or 0 for sae.k from the start"
            )
        self.check_range("k_anneal", above=0, at_most=1)
        self.activation.check(self)
        _check_prefixes(self)

    def k_at(self, step: int, steps: int) -> int:
        """Return the active latents per token of step `step` (from 1) of `steps`.

        Between `k_start` and `k` it stays for a twentieth of the way at a time.

        Example:
            >>> options = SAEConfig(n_latents=512, k=8, k_start=128, k_anneal=0.5)
            >>> [options.k_at(step, 100) for step in (1, 25, 50, 51, 100)]
            [128, 32, 8, 8, 8]
        """
        first = self.k_first
        if first == self.k:
            return self.k
        stages = 20
        done = step / max(1.0, self.k_anneal * steps)
        share = min(1.0, math.floor(done * stages) / stages)
        k: float = first * (self.k / first) ** share
        return round(k)

    @property
    def k_first(self) -> int:
        """Active latents per token at the first step: `k_start`, or what the activation begins
        with."""
        if self.k_start or self.start:
            return self.k_start or self.k
        return min(self.n_latents, self.activation.first_k(self.k))

    @property
    def bound(self) -> str:
        """How many latents are active, in words, as far as the options determine it."""
        return self.activation.BOUND.format(k=self.k)

    @property
    def nested_sizes(self) -> tuple[int, ...]:
        """The prefixes that a Matryoshka SAE is judged by: the fixed ones, or n / 16 to n / 2."""
        drawn = {self.n_latents // share for share in (16, 8, 4, 2)} - {0}
        return self.prefixes or (tuple(sorted(drawn)) if self.prefix_draws else ())

    @property
    def limits_weights(self) -> bool:
        """Whether some weights are frozen or held near their start values, which the compiled steps
        cannot do."""
        return self.freeze != "none" or self.decoder_cosine_min > 0

    @property
    def auxk_divisor(self) -> Literal["token", "batch"]:
        """What the AuxK error is divided by: `auxk_norm`, or what it is for this activation.

        Example:
            >>> from ksparse.config import BatchTopKConfig
            >>> SAEConfig().auxk_divisor, SAEConfig(activation=BatchTopKConfig()).auxk_divisor
            ('token', 'batch')
        """
        if self.auxk_norm != "auto":
            return self.auxk_norm
        return "token" if self.activation.kind == "topk" else "batch"

    @property
    def uses_auxk(self) -> bool:
        """Whether the AuxK loss revives dead latents."""
        return self.auxk_coef > 0 and self.activation.REVIVAL == "auxk"

    @property
    def uses_lm(self) -> bool:
        """Whether the loss has a term of the LM behind the site, for which batches are whole
        contexts."""
        return self.lm_loss != "none"


@dataclass(frozen=True)
class OptimConfig(Config):
    """The optimizer: Adam with weight averaging, as in appendix A.3 to A.6.

    Example:
        >>> from ksparse.config import OptimConfig
        >>> OptimConfig(lr=3e-4, warmup=1_000, decay=0.2).beta2
        0.999
    """

    SECTION = "optim."

    lr: float = 0.0
    """Learning rate; 0: lr_at_32k x sqrt(32,768 / n_latents), the law of section 3.2, times
    sae.activation.rate for batch_topk and jump_relu."""
    lr_at_32k: float = 8e-4
    """Learning rate of that law at 32,768 latents. The paper's is 2e-4 to 4e-4 for training to
    convergence, and about four times as large for a fixed amount of compute, as here."""
    beta1: float = 0.9
    """Adam's decay of the average of gradients."""
    beta2: float = 0.999
    """Adam's decay of the average of squared gradients."""
    eps: float = 6.25e-10
    """Adam's epsilon. It is the paper's; it is small because gradients are averaged over a large
    batch."""
    warmup: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    decay: float = 0.0
    """Share of the steps, at the end, over which the learning rate falls linearly to 0 (paper:
    0)."""
    clip: float = 0.0
    """Largest norm of the gradient; larger ones are scaled down to it. 0: no clipping (the paper's
    GPT-2 runs)."""
    ema: float = 0.999
    """Decay of the exponential moving average (EMA) of the weights, with bias correction; 0 turns
    it off. Evaluations and exports use the average."""
    ema_span: float = 0.1
    """Largest share of the run that the average may span. Where the run has fewer than
    1 / (1 - ema) / ema_span steps, the decay is lowered, because averaging over the start of a
    short run is worse than not averaging. 1: use the decay as it is (paper)."""
    approx_topk: Literal["off", "auto", "int8", "bfloat16"] = "off"
    """Select candidate latents with a low-precision encoder product, then compute their values and
    the top k exactly; uncertain tokens are recomputed in full. auto: the fastest choice on this
    machine (int8 on a GPU). Needs compiled kernels. The log reports how often the selection
    differs from the exact one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Data type in which the sparse parts of a step read weights, activations and errors, on a GPU.
    bfloat16 halves the memory traffic; weights, moments, gradients and sums stay float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("lr", "warmup", "clip", at_least=0)
        self.check_range("lr_at_32k", "eps", above=0)
        self.check_range("ema", "beta1", "beta2", at_least=0, below=1)
        self.check_range("ema_span", above=0, at_most=1)
        self.check_range("decay", at_least=0, at_most=1)


@dataclass(frozen=True)
class CurveConfig(Config):
    """The held-out loss during training, from which scaling laws are fitted (section 3), and
    stopping at convergence.

    Example:
        >>> from ksparse.config import CurveConfig
        >>> CurveConfig(held_out=16_384, converged=0.01).per_octave
        2
    """

    SECTION = "curve."

    held_out: int = 0
    """Activations, from the validation side of the text, on which the loss is measured at
    log-spaced steps, with the raw and with the averaged weights; 0: do not measure."""
    per_octave: int = 2
    """Measurements per doubling of the tokens."""
    octaves: int = 8
    """Doublings before the last step over which the loss is measured."""
    converged: float = 0.0
    """Stop once the loss falls by less than this share per doubling of the tokens, estimated as the
    log-log slope over the last `window` octaves; 0: stop after `tokens`. The paper trains to
    convergence but does not define it."""
    window: float = 1.5
    """Octaves over which that slope is estimated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("held_out", at_least=0)
        self.check_range("per_octave", "octaves", at_least=1)
        self.check_range("window", above=0)
        if not 0 <= self.converged < 1:
            raise InputError(
                f"curve.converged is {self.converged}; it is the share by which the loss still "
                "falls, from 0 up to, but not including, 1"
            )
        if self.converged and not self.held_out:
            raise InputError(
                "curve.converged needs a held-out loss: give curve.held_out, such as 16384"
            )
        if self.converged and self.window * self.per_octave < 2:
            raise InputError(
                f"curve.window is {self.window} octaves with {self.per_octave} points each; a "
                "slope needs at least 3 points, 2 intervals"
            )


@dataclass(frozen=True)
class RunConfig(Config):
    """Device, logging and checkpoints: options that do not change the result, so that a resumed
    run may use others.

    Example:
        >>> from ksparse.config import RunConfig
        >>> RunConfig(device="cuda:1", save_every=1_000, loggers=["tensorboard"]).loggers
        ('tensorboard',)
    """

    SECTION = "run."

    device: str = "auto"
    """Device to train on: auto, cpu, cuda, cuda:1, mps. auto takes an accelerator if there is
    one."""
    kernels: Literal["auto", "torch", "native", "triton"] = "auto"
    """Implementation of the training step. native: compiled C++, on a CPU with a C++ compiler.
    triton: Triton kernels, on a CUDA GPU. torch: plain PyTorch. auto: native or triton where
    available, else torch."""
    ahead: Literal["auto", "on", "off"] = "auto"
    """Prefetch: compute activations in a background thread while steps run. The batches are the
    same; up to `acts.mix` more activations are held in memory. auto: on for a GPU, which would
    otherwise wait for reading and tokenizing."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 0
    """Steps between checkpoints; 0: save by time (save_minutes)."""
    save_minutes: float = 5.0
    """Minutes between checkpoints, where save_every is 0."""
    keep: int = 2
    """Number of checkpoints to keep."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do with a batch whose loss is NaN or infinite: stop the run, or skip the batch and
    count it in the metrics."""
    alarm_grad_norm: float = 10.0
    """Warn, and write a line of alarms.jsonl, when the norm of the gradient exceeds its running
    median by this factor; 0: never."""
    alarm_dead: float = 0.5
    """Warn when the share of dead latents exceeds this; 0: never."""
    alarm_dead_growth: float = 0.2
    """Warn when the share of dead latents has grown by more than this; 0: never."""
    loggers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Where to send metrics, besides metrics.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("log_every", "keep", at_least=1)
        self.check_range("save_every", "save_minutes", "alarm_grad_norm", at_least=0)
        self.check_range(
            "alarm_dead",
            "alarm_dead_growth",
            at_least=0,
            below=1,
            note=": it is a share of the latents, or 0 for never",
        )


@dataclass(frozen=True)
class MeshConfig(Config):
    """How the processes started by torchrun share one run: `data` x `latent` of them. A run may be
    resumed on another mesh; results agree up to rounding.

    Example:
        >>> from ksparse.config import MeshConfig
        >>> MeshConfig(data=2, latent=4).capacity
        0.0
    """

    SECTION = "mesh."

    data: int = 1
    """Parts that each batch is split into (data parallelism); 0: number of processes / latent. Both
    0: the fastest mesh that fits, by the plan for the processes' devices, which must be alike."""
    latent: int = 1
    """Shards that the latents are split into (latent parallelism); 0: number of processes / data.
    With data 1 each process has the whole batch and latents of its own: no gradient is summed."""
    capacity: float = 0.0
    """Candidates that each shard of the latents offers per token, as a multiple of k / latent. 0:
    as many as the same selection as that of one process takes. A bound, as in the paper, can miss
    latents where those of a token are concentrated in one shard; the log reports how often."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Precision in which the shards' reconstructions are summed. bfloat16 halves the bytes of that
    sum, and rounds it: each addition by up to 2^-9."""
    timeout: float = 600.0
    """Seconds that a process waits for the others before the run fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_range("data", at_least=0)
        self.check_range("latent", at_least=0)
        self.check_range("timeout", above=0, note=" seconds")
        if self.capacity and self.capacity < 1:
            raise InputError(
                f"mesh.capacity is {self.capacity}; below 1 the shards offer fewer than k values "
                "together; give 0 (exact) or at least 1"
            )


@dataclass(frozen=True)
class Recipe(Config):
    """Everything that defines a run.

    Sections may be given as option classes or as dictionaries of their keys.

    Raises:
        InputError: for a key that does not exist, and for a value of the wrong type, out of range,
            or at odds with another one.

    Example:
        >>> from ksparse import Recipe
        >>> recipe = Recipe(sae={"n_latents": 8192, "k": 64}, tokens=10_000_000)
        >>> recipe.steps, f"{recipe.lr:.1e}"
        (9766, '1.6e-03')
        >>> Recipe(sae={"kk": 64})
        Traceback (most recent call last):
        ksparse.errors.InputError: unknown key 'sae.kk'; did you mean 'sae.k'?
    """

    acts: ActsConfig = field(default_factory=ActsConfig)
    """Where activations come from."""
    sae: SAEConfig = field(default_factory=SAEConfig)
    """The autoencoder."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    curve: CurveConfig = field(default_factory=CurveConfig)
    """The held-out loss during training."""
    run: RunConfig = field(default_factory=RunConfig)
    """Device, logging and checkpoints."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How processes share the work."""
    tokens: int = 800_000
    """Activations to train on; each is that of one token."""
    batch: int = 1024
    """Activations per step (paper: 131,072)."""
    seed: int = 0
    """Seed of the initial weights, and of the order of the data unless `order` is given."""
    order: int = -1
    """Seed of the order of the data alone, so that SAEs with different seeds can share a stream of
    activations; -1: the same as `seed`."""
    threads: int = 0
    """CPU threads; 0: all cores. It is recorded with the run, because sums depend on it in the last
    digit."""

    def __post_init__(self) -> None:
        with suggesting_keys():
            super().__post_init__()
        self.check_range("tokens", "batch", at_least=1)
        self.check_range("threads", "seed", at_least=0)
        if self.order < -1:
            raise InputError(f"order is {self.order}; it must be -1, as seed, or not be negative")
        if self.curve.converged and self.optim.decay:
            raise InputError(
                "optim.decay needs to know where the run ends, which curve.converged leaves open; "
                "give one of them"
            )
        _check_lm_loss(self)
        for key, value in flat(dataclasses.asdict(self)).items():
            if isinstance(value, str) and has_lone_surrogate(
                value
            ):  # file names may be so, TOML cannot
                raise InputError(
                    f"{key} is {preview(value)}, which is not UTF-8; give another name"
                )

    def differences(self) -> dict[str, Any]:
        """Return the keys that differ from the defaults, in their sections, as plain values."""
        return _changed(plain(dataclasses.asdict(self)), plain(dataclasses.asdict(Recipe())))

    def __repr__(self) -> str:
        changed = ", ".join(f"{key}={value!r}" for key, value in self.differences().items())
        return f"Recipe({changed})"

    def _repr_html_(self) -> str:
        return html.table("Recipe: what differs from the defaults", flat(self.differences()))

    @property
    def steps(self) -> int:
        """Number of steps: tokens / batch, rounded up."""
        return math.ceil(self.tokens / self.batch)

    @property
    def lr(self) -> float:
        """The learning rate: `optim.lr`, or the 1 / sqrt(n) law of section 3.2, times what the
        activation takes of it."""
        law = self.optim.lr_at_32k * math.sqrt(32_768 / self.sae.n_latents)
        return self.optim.lr or self.sae.activation.law_factor() * law

    @property
    def data_seed(self) -> int:
        """Seed of the order of the data."""
        return self.seed if self.order < 0 else self.order

    @property
    def ema(self) -> float:
        """Decay of the average of the weights: `optim.ema`, or less in a short run."""
        return max(0.0, min(self.optim.ema, 1 - 1 / max(1.0, self.optim.ema_span * self.steps)))

    @property
    def dead_after(self) -> int:
        """Tokens without activation after which a latent counts as dead."""
        return self.sae.dead_after or min(10_000_000, max(1, self.tokens // 32))

    @property
    def needs_autograd(self) -> bool:
        """Whether only the autograd step computes this recipe's losses: the explicit, native and
        triton steps write out the gradient of TopK with AuxK."""
        return (
            not self.sae.activation.WRITTEN_OUT
            or self.sae.multi_topk > 0
            or bool(self.sae.nested_sizes)
            or self.sae.uses_lm
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return what the result depends on: all but the sections `run` and `mesh` and `threads`.

        Two recipes with the same fingerprint train the same SAE, up to rounding. Checkpoints store
        it, and folders of a sweep are named by its hash.

        Returns:
            Nested dictionaries of plain values; `order` is the resolved one.
        """
        table = {
            key: value
            for key, value in plain(dataclasses.asdict(self)).items()
            if key not in ("run", "mesh", "threads")
        }
        # The old name of the key: checkpoints and the names of sweep folders were made with it.
        table["optim"]["screen"] = table["optim"].pop("approx_topk")
        # Later keys are left out at their defaults, so that older runs keep their names.
        table["sae"]["auxk_norm"] = self.sae.auxk_divisor
        for key, before in self.sae.activation.BEFORE.items():
            if table["sae"]["activation"][key] == before:
                del table["sae"]["activation"][key]
        later = ("prefixes", "prefix_draws", "prefix_loss", "start", "k_start", "k_anneal")
        lm_keys = ("lm_loss", "lm_share", "lm_balance")
        for key in (*later, *lm_keys, *CONTROLS["sae"]):
            if getattr(self.sae, key) == getattr(SAEConfig, key):
                del table["sae"][key]
        for key in LATER_ACTS:
            if getattr(self.acts, key) == getattr(ActsConfig, key):
                del table["acts"][key]
        if self.acts.lm_dtype == "auto":  # what it was before there was a choice by device
            table["acts"]["lm_dtype"] = "float32"
        return table | {"order": self.data_seed}


def _changed(table: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the part of nested dictionaries that differs; an activation of another kind whole."""
    changed = {}
    for key, value in table.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            of_one_kind = value.get("kind") == default.get("kind")
            value = _changed(value, default) if of_one_kind else value
            if value:
                changed[key] = value
        elif value != default:
            changed[key] = value
    return changed


def k_aux(recipe: SAEConfig, d_model: int) -> int:
    """Return the number of dead latents in AuxK: `sae.k_aux`, or the power of two nearest to
    d_model / 2 (appendix A.2)."""
    return recipe.k_aux or 2 ** round(math.log2(max(2, d_model / 2)))


def auxk_tokens(recipe: SAEConfig, tokens: int) -> int:
    """Return on how many of a batch's `tokens`, from its start, AuxK is computed: at least one."""
    return math.ceil(recipe.auxk_share * tokens)


def _check_prefixes(sae: SAEConfig) -> None:
    """Raise InputError for prefixes of a Matryoshka SAE that cannot be right."""
    ends = (0, *sae.prefixes, sae.n_latents)
    if any(size >= larger for size, larger in itertools.pairwise(ends)):
        raise InputError(
            f"sae.prefixes is {list(sae.prefixes)}; give rising numbers of latents from 1 to "
            f"{sae.n_latents - 1}, below sae.n_latents, which is always a prefix itself"
        )
    if sae.prefixes and sae.prefix_draws:
        raise InputError(
            "sae.prefixes and sae.prefix_draws are both given; prefixes are fixed or drawn: give "
            "one of them"
        )
    if not 0 <= sae.prefix_draws < sae.n_latents:
        raise InputError(
            f"sae.prefix_draws is {sae.prefix_draws}; it must be from 0 to "
            f"{sae.n_latents - 1}, below sae.n_latents"
        )


def _check_lm_loss(recipe: Recipe) -> None:
    """Raise InputError for a loss of the LM where a batch cannot be whole contexts of an LM."""
    if not recipe.sae.uses_lm:
        return
    asked = f"sae.lm_loss is {recipe.sae.lm_loss!r}"
    if recipe.acts.shards:
        raise InputError(
            f"{asked} and acts.shards is {preview(recipe.acts.shards)}; shards hold single "
            "activations, and this loss runs the LM on the contexts that they come from: leave "
            "acts.shards out and give acts.lm, acts.site and acts.text, or sae.lm_loss 'none'"
        )
    if recipe.mesh.data != 1 or recipe.mesh.latent != 1:
        raise InputError(
            f"{asked} and the mesh is {recipe.mesh.data} x {recipe.mesh.latent}; a batch of whole "
            "contexts is not split over processes: give mesh.data 1 and mesh.latent 1"
        )
    if recipe.run.ahead == "on":
        raise InputError(
            f"{asked} and run.ahead is 'on'; the step itself runs the LM, which cannot compute "
            "activations at the same time: leave run.ahead at 'auto'"
        )


def check_schedule(recipe: Recipe) -> None:
    """Raise InputError if no step of the run has the full learning rate.

    This is checked when a run starts, not when a recipe is made: older runs can still be read.
    """
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
    """Add a suggestion to an error about an unknown key: the nearest key of a recipe, or all."""
    try:
        yield
    except UnknownKeyError as error:
        raise InputError(f"{error}{_suggest_key(error.key)}") from None


def _suggest_key(key: str) -> str:
    keys = list(flat(dataclasses.asdict(Recipe())))
    by_last_part = {name.rpartition(".")[2]: name for name in keys}
    nearest = nearest_name(key, keys) or by_last_part.get(
        nearest_name(key.rpartition(".")[2], by_last_part) or ""
    )
    return f"; did you mean '{nearest}'?" if nearest else f"; the keys are {', '.join(keys)}"
