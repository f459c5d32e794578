"""The options of each activation: one frozen class per kind, with the rules that they obey.

`ksparse.sae.activations` has the module that computes each kind. What other rooms must know about
a kind without importing torch is said here: how its dead latents are revived, whether the step
with a written-out gradient computes it, and how it bounds the number of active latents.
"""

from __future__ import annotations

import math
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from ksparse.config.options import Config, choose_class
from ksparse.errors import InputError


class SAEKeys(Protocol):
    """What the rules of activations read of a recipe's section `sae`; `SAEConfig` documents it."""

    @property
    def auxk_coef(self) -> float: ...
    @property
    def multi_topk(self) -> float: ...
    @property
    def b_enc(self) -> bool: ...
    @property
    def unit_norm(self) -> bool: ...


class ActivationOptions(Config):
    """What the options of every activation have in common.

    A new activation is an option class in this file (add it to the union `ActivationConfig`), a
    module in `ksparse.sae.activations`, and a line in that package's registry.
    """

    SECTION = "sae.activation."
    kind: Any
    """The recipe's key that names the activation; each class declares it as a Literal."""

    REVIVAL: ClassVar[Literal["auxk", "resample"] | None] = None
    """How dead latents are revived: by the AuxK loss, by resampling, or not at all."""
    BEFORE: ClassVar[dict[str, float]] = {}
    """Keys that runs of earlier versions do not have, with the values that they were trained by."""
    WRITTEN_OUT: ClassVar[bool] = False
    """Whether the explicit, native and triton steps compute it; any other needs autograd."""
    BOUND: ClassVar[str] = "as many of them active as its penalty leaves"
    """How many latents are active, in words; {k} stands for sae.k."""

    def check(self, sae: SAEKeys) -> None:
        """Raise InputError for options that cannot be right, and for keys of `sae` that this
        activation does not use."""
        if sae.multi_topk:
            raise InputError(
                f"sae.multi_topk is {sae.multi_topk}; it is for sae.activation.kind = 'topk', not "
                f"{self.kind!r}; leave it at 0"
            )
        if self.REVIVAL != "auxk" and sae.auxk_coef not in (0, type(sae).auxk_coef):
            raise InputError(
                f"sae.auxk_coef is {sae.auxk_coef}; sae.activation.kind = {self.kind!r} has no "
                "AuxK but sae.activation.resample; leave it out"
            )

    def law_factor(self) -> float:
        """Return the learning rate by the law of `optim.lr_at_32k`, as a multiple of TopK's."""
        return 1.0

    def first_k(self, k: int) -> int:
        """Return the active latents per token at the first step, where `sae.k_start` is 0."""
        return k

    def penalty_share(self, step: int, steps: int) -> float:
        """Return the share of its full weight that the penalty has in a step (from 1) of a run."""
        return 1.0

    def resample_steps(self, steps: int) -> tuple[int, ...]:
        """Return the steps (from 1) after which a run of `steps` resamples dead latents."""
        return ()

    def _check_not_negative(self, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) < 0:
                raise InputError(f"sae.activation.{name} is {value}; it must not be negative")

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if (value := getattr(self, name)) <= 0:
                raise InputError(f"sae.activation.{name} is {value}; it must be above 0")

    def _check_share(self, name: str, *, below_1: bool = False) -> None:
        self._check_not_negative(name)
        value = getattr(self, name)
        if value > 1 or (below_1 and value == 1):
            raise InputError(
                f"sae.activation.{name} is {value}; it must be from 0 to 1"
                + (", and less than 1" if below_1 else "")
            )

    def _check_unit_norm(self, sae: SAEKeys, alternative: str = "") -> None:
        """Raise InputError where an L1 penalty could be evaded by longer decoder rows."""
        if not sae.unit_norm:
            raise InputError(
                "sae.unit_norm is false; decoder rows of free norm would evade the L1 penalty of "
                f"sae.activation.kind = {self.kind!r}; leave it true{alternative}"
            )

    def _check_biases(self, sae: SAEKeys) -> None:
        if not sae.b_enc:
            raise InputError(
                f"sae.b_enc is false; sae.activation.kind = {self.kind!r} is sparse by its biases, "
                "and needs them"
            )


@dataclass(frozen=True)
class TopKConfig(ActivationOptions):
    """The k largest pre-activations of each token, then ReLU (Gao et al. 2024, section 2.3).

    Example:
        >>> from ksparse.config import SAEConfig, TopKConfig
        >>> SAEConfig(k=16, activation=TopKConfig()).bound
        '16 of them active at a time'
    """

    REVIVAL = "auxk"
    WRITTEN_OUT = True
    BOUND = "{k} of them active at a time"

    kind: Literal["topk"] = "topk"
    """What becomes of pre-activations: topk, batch_topk, relu, jump_relu, gated, prolu.
    `--sae.activation.kind KIND --help` lists the keys of a kind."""

    def check(self, sae: SAEKeys) -> None:
        """Accept every recipe: TopK has no options, and uses all keys of `sae`."""


@dataclass(frozen=True)
class BatchTopKConfig(ActivationOptions):
    """The k x b largest pre-activations of a batch of b tokens, then ReLU; in use, those above a
    threshold (Bussmann et al. 2024).

    Example:
        >>> from ksparse.config import BatchTopKConfig, SAEConfig
        >>> SAEConfig(k=16, activation=BatchTopKConfig()).bound
        '16 of them active on average'
    """

    REVIVAL = "auxk"
    BEFORE: ClassVar[dict[str, float]] = {"rate": 1.0}
    BOUND = "{k} of them active on average"

    kind: Literal["batch_topk"] = "batch_topk"
    """The kind."""
    threshold_decay: float = 0.99
    """Decay of the running average, over steps, of the smallest value that a batch keeps. Training
    uses it only to find the largest values faster. The threshold in use is set at each checkpoint,
    so that the saved weights have an L0 of k on the last batch."""
    rate: float = 1.5
    """Learning rate by the law of optim.lr_at_32k, as a multiple of TopK's (docs/lab-book.md)."""

    def check(self, sae: SAEKeys) -> None:
        """Raise InputError for a decay outside [0, 1), and a rate of 0."""
        self._check_share("threshold_decay", below_1=True)
        self._check_positive("rate")
        super().check(sae)

    def law_factor(self) -> float:
        return self.rate


@dataclass(frozen=True)
class ReLUConfig(ActivationOptions):
    """ReLU with an L1 penalty (Gao et al. 2024, sections 2.2 and B.2; Conerly et al. 2024).

    Example:
        >>> from ksparse.config import Recipe, ReLUConfig, SAEConfig
        >>> recipe = Recipe(sae=SAEConfig(activation=ReLUConfig(l1=0.01, resample=2)))
        >>> recipe.sae.activation.resample_steps(80)
        (20, 40)
    """

    REVIVAL = "resample"

    kind: Literal["relu"] = "relu"
    """The kind."""
    l1: float = 5e-3
    """Weight of the penalty. The paper's are 1.7e-3 to 1.7e-2."""
    penalty: Literal["paper", "decoder_norm"] = "paper"
    """paper: the sum of a token's values over the norm of its input. decoder_norm: each value times
    its decoder row's norm, for sae.unit_norm = false."""
    warmup: float = 0.05
    """Share of the steps over which the penalty rises linearly from 0 (the paper's, for GPT-4)."""
    resample: int = 4
    """Number of times that dead latents are resampled on badly reconstructed activations, evenly
    over the first half of the run; 0: never. The paper: 4."""

    def check(self, sae: SAEKeys) -> None:
        """Raise InputError for numbers out of range, or a penalty that does not fit unit_norm."""
        self._check_not_negative("l1", "resample")
        self._check_share("warmup")
        super().check(sae)
        if self.penalty == "paper":
            self._check_unit_norm(sae, ", or give sae.activation.penalty = 'decoder_norm'")
        elif sae.unit_norm:
            raise InputError(
                "sae.activation.penalty is 'decoder_norm', which is for decoder rows of free norm; "
                "give sae.unit_norm = false, or the penalty 'paper'"
            )

    def penalty_share(self, step: int, steps: int) -> float:
        return _linear_rise(self.warmup, step, steps)

    def resample_steps(self, steps: int) -> tuple[int, ...]:
        return _even_steps(self.resample, steps)


@dataclass(frozen=True)
class JumpReLUConfig(ActivationOptions):
    """Values above a threshold of their latent, trained through kernel estimates of the gradient
    (Rajamanoharan et al. 2024b).

    Example:
        >>> from ksparse.config import JumpReLUConfig, SAEConfig
        >>> SAEConfig(k=16, activation=JumpReLUConfig(bandwidth=0.03)).bound
        'about 16 of them active at a time'
    """

    REVIVAL = "auxk"
    BEFORE: ClassVar[dict[str, float]] = {"rate": 1.0, "release": 0.0, "start_l0": 1.0}
    BOUND = "about {k} of them active at a time"

    kind: Literal["jump_relu"] = "jump_relu"
    """The kind."""
    penalty: Literal["target", "l0"] = "target"
    """target: coef x (L0 / k - 1)^2, so that training aims at an L0 of sae.k. l0: coef x L0 / k."""
    coef: float = 1.0
    """Weight of the penalty."""
    bandwidth: float = 0.0
    """Width of the window around a threshold within which it gets a gradient, for inputs of norm 1;
    it scales with the norm of the input. 0: 0.4 / sqrt(k), near half the size of a value. Into the
    original's 0.001 too few values of a batch of thousands fall for thresholds to move
    (docs/lab-book.md)."""
    threshold: float = 0.0
    """Where all thresholds start, for inputs of norm 1; 0: where as many latents are active, on
    a sample, as at the first step."""
    warmup: float = 0.05
    """Share of the steps over which the penalty rises linearly from 0."""
    release: float = 0.05
    """Share by which the threshold of a dead latent falls in every step until the latent fires:
    AuxK trains its weights, but its threshold has no gradient. 0: it stays."""
    start_l0: float = 3.0
    """L0 at the first step as a multiple of k, where sae.k_start is 0; it goes to k over
    sae.k_anneal."""
    rate: float = 1.5
    """Learning rate by the law of optim.lr_at_32k, as a multiple of TopK's (docs/lab-book.md)."""

    def check(self, sae: SAEKeys) -> None:
        """Raise InputError for numbers out of range."""
        self._check_not_negative("bandwidth", "coef", "threshold")
        self._check_share("release", below_1=True)
        self._check_positive("start_l0", "rate")
        self._check_share("warmup")
        super().check(sae)

    def penalty_share(self, step: int, steps: int) -> float:
        return _linear_rise(self.warmup, step, steps)

    def law_factor(self) -> float:
        return self.rate

    def first_k(self, k: int) -> int:
        return max(1, round(self.start_l0 * k))

    def window(self, k: int) -> float:
        """Return the width of the window, for inputs of norm 1 and an L0 of k.

        Example:
            >>> round(JumpReLUConfig().window(k=36), 3), JumpReLUConfig(bandwidth=0.02).window(36)
            (0.067, 0.02)
        """
        return self.bandwidth or 0.4 / math.sqrt(k)


@dataclass(frozen=True)
class GatedConfig(ActivationOptions):
    """Gates decide which latents are active, magnitudes their values; an L1 penalty and an
    auxiliary loss on the gates (Rajamanoharan et al. 2024a).

    Example:
        >>> from ksparse.config import GatedConfig, SAEConfig
        >>> GatedConfig(l1=0.01, warmup=0.1).penalty_share(step=5, steps=100)
        0.5
    """

    REVIVAL = "resample"

    kind: Literal["gated"] = "gated"
    """The kind."""
    l1: float = 5e-3
    """Weight of the penalty on the gates' pre-activations. The paper's are 1e-3 to 2e-2."""
    aux: float = 1.0
    """Weight of the error of reconstructing from the gates' pre-activations, with a decoder that
    gets no gradient from it."""
    warmup: float = 0.05
    """Share of the steps over which the penalty rises linearly from 0."""
    resample: int = 4
    """Number of times that dead latents are resampled on badly reconstructed activations, evenly
    over the first half of the run; 0: never. The paper: 4."""

    def check(self, sae: SAEKeys) -> None:
        """Raise InputError for numbers out of range, free decoder norms, or missing biases."""
        self._check_not_negative("l1", "aux", "resample")
        self._check_share("warmup")
        super().check(sae)
        self._check_unit_norm(sae)
        self._check_biases(sae)

    def penalty_share(self, step: int, steps: int) -> float:
        return _linear_rise(self.warmup, step, steps)

    def resample_steps(self, steps: int) -> tuple[int, ...]:
        return _even_steps(self.resample, steps)


@dataclass(frozen=True)
class ProLUConfig(ActivationOptions):
    """The product itself where both it and the biased product are positive, with one of two
    pseudo-gradients for the bias (Taggart 2024).

    Example:
        >>> from ksparse.config import ProLUConfig, SAEConfig
        >>> SAEConfig(activation=ProLUConfig(gradient="relu")).activation.kind
        'prolu'
    """

    REVIVAL = "resample"

    kind: Literal["prolu"] = "prolu"
    """The kind."""
    gradient: Literal["ste", "relu"] = "ste"
    """How the bias gets a gradient. ste: straight through the step. relu: as if it were added."""
    l1: float = 5e-3
    """Weight of the penalty. The paper's are 5e-4 to 2e-2."""
    warmup: float = 0.05
    """Share of the steps over which the penalty rises linearly from 0."""
    resample: int = 4
    """Number of times that dead latents are resampled on badly reconstructed activations, evenly
    over the first half of the run; 0: never. The paper: 4."""

    def check(self, sae: SAEKeys) -> None:
        """Raise InputError for numbers out of range, free decoder norms, or missing biases."""
        self._check_not_negative("l1", "resample")
        self._check_share("warmup")
        super().check(sae)
        self._check_unit_norm(sae)
        self._check_biases(sae)

    def penalty_share(self, step: int, steps: int) -> float:
        return _linear_rise(self.warmup, step, steps)

    def resample_steps(self, steps: int) -> tuple[int, ...]:
        return _even_steps(self.resample, steps)


ActivationConfig = (
    TopKConfig | BatchTopKConfig | ReLUConfig | JumpReLUConfig | GatedConfig | ProLUConfig
)
ACTIVATION_CONFIGS: dict[str, type[ActivationConfig]] = {
    member.kind: member for member in typing.get_args(ActivationConfig)
}


def activation_kind(
    table: dict[str, Any], prefix: str = "sae.activation.", where: str = ""
) -> type:
    """Return the option class that a table names by its key `kind`, `TopKConfig` if it has none.

    Raises:
        InputError: for an unknown kind, and for keys that this kind does not have.
    """
    return choose_class(ActivationConfig, table, prefix, where)


def _linear_rise(warmup: float, step: int, steps: int) -> float:
    """Return the share reached in step `step` (from 1) of a rise over `warmup` of the steps."""
    rise = warmup * steps
    return min(1.0, step / rise) if rise else 1.0


def _even_steps(times: int, steps: int) -> tuple[int, ...]:
    """Return that many steps (from 1), evenly spaced over the first half of a run."""
    return tuple(max(1, round(i * steps / (2 * times))) for i in range(1, times + 1))
