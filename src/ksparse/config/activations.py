"""The options of each activation: one class for each kind. See `ksparse.sae.activations`."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from typing import Any, Literal

from ksparse.config.options import Config, choose_class


@dataclass(frozen=True)
class TopKConfig(Config):
    """The k largest pre-activations of each token, then ReLU (Gao et al. 2024, section 2.3)."""

    SECTION = "sae.activation."

    kind: Literal["topk"] = "topk"
    """What becomes of pre-activations: topk, batch_topk, relu, jump_relu, gated, prolu.
    `--sae.activation.kind KIND --help` lists the keys of a kind."""


@dataclass(frozen=True)
class BatchTopKConfig(Config):
    """The k x b largest pre-activations of a batch of b tokens, then ReLU; in use, those above a
    threshold (Bussmann et al. 2024)."""

    SECTION = "sae.activation."

    kind: Literal["batch_topk"] = "batch_topk"
    """The kind."""
    threshold_decay: float = 0.99
    """Decay of the running average, over steps, of the smallest value that a batch keeps, from
    which training looks for the largest. The threshold in use is another: it is set at each
    checkpoint, so that the saved weights have an L0 of k on the last batch."""


@dataclass(frozen=True)
class ReLUConfig(Config):
    """ReLU with an L1 penalty (Gao et al. 2024, sections 2.2 and B.2; Conerly et al. 2024)."""

    SECTION = "sae.activation."

    kind: Literal["relu"] = "relu"
    """The kind."""
    l1: float = 5e-3
    """Weight of the penalty. The paper's are 1.7e-3 to 1.7e-2."""
    penalty: Literal["paper", "decoder_norm"] = "paper"
    """paper: the sum of a token's values by the norm of its input. decoder_norm: each value times
    its decoder row's norm, for sae.unit_norm = false."""
    warmup: float = 0.05
    """First share of the steps over which the penalty rises linearly (the paper's, for GPT-4)."""
    resample: int = 4
    """How often dead latents start anew on badly reconstructed activations, evenly over the first
    half of the run; 0: never. The paper: 4."""


@dataclass(frozen=True)
class JumpReLUConfig(Config):
    """Values above a threshold of their latent, trained through kernel estimates of the gradient
    (Rajamanoharan et al. 2024b)."""

    SECTION = "sae.activation."

    kind: Literal["jump_relu"] = "jump_relu"
    """The kind."""
    penalty: Literal["target", "l0"] = "target"
    """target: coef x (L0 / k - 1)^2, so that sae.k is the L0 aimed at. l0: coef x L0 / k."""
    coef: float = 1.0
    """Weight of the penalty."""
    bandwidth: float = 0.001
    """Width of the window around a threshold in which its gradient is seen, for inputs of norm 1
    (the original's); it grows with the input."""
    threshold: float = 0.0
    """Where all thresholds start, for inputs of norm 1; 0: where sae.k latents are active, on a
    sample."""
    warmup: float = 0.05
    """First share of the steps over which the penalty rises linearly."""


@dataclass(frozen=True)
class GatedConfig(Config):
    """Gates say which latents are active, magnitudes how much; L1 and an auxiliary loss on the
    gates (Rajamanoharan et al. 2024a)."""

    SECTION = "sae.activation."

    kind: Literal["gated"] = "gated"
    """The kind."""
    l1: float = 5e-3
    """Weight of the penalty on the gates' pre-activations. The paper's are 1e-3 to 2e-2."""
    aux: float = 1.0
    """Weight of the error of reconstructing from the gates' pre-activations, with a decoder that
    gets no gradient from it."""
    warmup: float = 0.05
    """First share of the steps over which the penalty rises linearly."""
    resample: int = 4
    """How often dead latents start anew on badly reconstructed activations, evenly over the first
    half of the run; 0: never. The paper: 4."""


@dataclass(frozen=True)
class ProLUConfig(Config):
    """The product itself where product and biased product are positive, with one of two made-up
    gradients (Taggart 2024)."""

    SECTION = "sae.activation."

    kind: Literal["prolu"] = "prolu"
    """The kind."""
    gradient: Literal["ste", "relu"] = "ste"
    """How the bias gets a gradient. ste: straight through the step. relu: as if it were added."""
    l1: float = 5e-3
    """Weight of the penalty. The paper's are 5e-4 to 2e-2."""
    warmup: float = 0.05
    """First share of the steps over which the penalty rises linearly."""
    resample: int = 4
    """How often dead latents start anew on badly reconstructed activations, evenly over the first
    half of the run; 0: never. The paper: 4."""


_SPOKEN = {
    "topk": "{k} of them active at a time",
    "batch_topk": "{k} of them active on average",
    "jump_relu": "about {k} of them active at a time",
}
ActivationConfig = (
    TopKConfig | BatchTopKConfig | ReLUConfig | JumpReLUConfig | GatedConfig | ProLUConfig
)
ACTIVATION_CONFIGS: dict[str, type[ActivationConfig]] = {
    kind.kind: kind for kind in typing.get_args(ActivationConfig)
}
WITH_AUXK = ("topk", "batch_topk", "jump_relu")
"""Kinds whose dead latents are revived by AuxK; the others resample them."""


def activation_kind(
    table: dict[str, Any], prefix: str = "sae.activation.", where: str = ""
) -> type:
    """Return the option class that a table names by its key `kind`, `TopKConfig` if it has none.

    Raises:
        InputError: for an unknown kind, and for keys that this kind does not have.
    """
    return choose_class(ActivationConfig, table, prefix, where)
