"""What becomes of pre-activations: one small class of each kind, in the place of TopK.

    products = W_enc (x - b_pre), without bias ─▶ active: which latents have a value above 0 ─▶
    values of those, with gradient

Selection has no gradient, values do. In training more latents than the active ones may count
(`reach`): a whole batch decides for BatchTopK, JumpReLU's thresholds also see what is just below
them. A kind's own tensors (`own`) lie in the autoencoder beside `b_enc`, under their names.

| kind | value z of p = the product, a = p + b_enc | own tensors |
|---|---|---|
| topk | ReLU(a) of the k largest a | |
| batch_topk | ReLU(a) of the b k largest a of b tokens; in use, where a > threshold, set on a batch for the weights that are saved | threshold[1] |
| relu | ReLU(a) | |
| jump_relu | a where a > threshold | threshold[n] |
| gated | ReLU(exp(r_mag) p + b_mag) where a > 0 | r_mag[n], b_mag[n] |
| prolu | p where a > 0 and p > 0 | |
"""  # noqa: E501 (a table)

from __future__ import annotations

from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from ksparse import config, kernels

SETTLED = 4096  # activations on which a threshold is set: L0 is then known to about 1 %
_NUMBERS = 2**24  # pre-activations in memory at once
SPARSE = 8
"""Training lists latents where no token has more than one in so many of all; above that, dense
products are faster (docs/lab-book.md)."""


class HasWeights(Protocol):
    """What activations read of an autoencoder; each only its own tensors."""

    @property
    def b_enc(self) -> Tensor: ...
    @property
    def threshold(self) -> Tensor: ...
    @property
    def r_mag(self) -> Tensor: ...
    @property
    def b_mag(self) -> Tensor: ...
    @property
    def k(self) -> int: ...
    @property
    def input_norm(self) -> float: ...

    def pre_acts_normalized(self, x: Tensor) -> Tensor: ...


class SparsePreActs(NamedTuple):
    """Products of the latents that count for each token: of all, [b, n], or of those listed in
    indices[b, m]; `real` says which of them do."""

    products: Tensor
    indices: Tensor | None
    real: Tensor

    def of(self, per_latent: Tensor) -> Tensor:
        """Return a tensor per latent [n], or [1] for all, in the shape of the products, or one that
        spreads to it."""
        return (
            per_latent if self.indices is None or len(per_latent) == 1 else per_latent[self.indices]
        )

    def decoder(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return W_dec^T z, without bias, [b, d]."""
        return (
            values @ W_dec
            if self.indices is None
            else kernels.gather_sum(values, self.indices, W_dec)
        )

    def everywhere(self) -> Tensor:
        """Return the indices of the products, in their shape."""
        b, n = self.products.shape
        return (
            torch.arange(n, device=self.products.device).expand(b, n)
            if self.indices is None
            else self.indices
        )


def listed(mask: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the True columns of mask[b, n] as (indices[b, m], real[b, m]), m the largest count of
    a row; where a row has fewer, index 0 and False."""
    counts = mask.sum(1)
    if width is None:
        width = max(1, int(counts.max())) if len(counts) else 1
    rows, columns = mask.nonzero(as_tuple=True)
    slots = torch.arange(len(rows), device=mask.device) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(len(mask), width, dtype=torch.long, device=mask.device)
    indices[rows, slots] = columns
    return indices, torch.arange(width, device=mask.device) < counts[:, None]


Options_co = TypeVar("Options_co", bound=config.ActivationConfig, covariant=True)
"""The options of one kind."""


class Activation(Generic[Options_co]):
    """One kind, as an autoencoder in use knows it; `options` is what training also needs."""

    own: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors."""
    running: ClassVar[bool] = False
    """Whether these are followed, not trained."""

    def __init__(self, options: Options_co):
        self.options = options

    def shape(self, name: str, n: int) -> tuple[int, ...]:
        """Return the shape of one of its tensors, for n latents."""
        return (n,)

    def active(self, sae: HasWeights, products: Tensor) -> Tensor:
        """Return which latents have a value above 0 in use, as bool[b, n]."""
        raise NotImplementedError

    def reach(self, sae: HasWeights, products: Tensor) -> Tensor:
        """Return which latents have a value or a gradient other than 0 in training, as bool[b,
        n]."""
        return self.active(sae, products)

    def values(self, sae: HasWeights, chosen: SparsePreActs) -> Tensor:
        """Return the values >= 0 of chosen latents, with gradient, in the shape of the products; 0
        where they are not real."""
        raise NotImplementedError

    def constrain_(self, sae: HasWeights) -> None:
        """Bring its tensors back to where they mean something, after a step, in place."""

    def settle_(self, sae: HasWeights, x: Tensor) -> None:
        """Set tensors that are followed to what these very weights need, on normalised activations
        x[b, d], in place."""


class TopK(Activation[config.TopKConfig]):
    """z = ReLU(TopK(a)); `SAE.code` chooses, for any k."""


class ReLU(Activation[Options_co]):
    """z = ReLU(a)."""

    def active(self, sae: HasWeights, products: Tensor) -> Tensor:
        return products + sae.b_enc > 0

    def values(self, sae: HasWeights, chosen: SparsePreActs) -> Tensor:
        return torch.relu(chosen.products + chosen.of(sae.b_enc)) * chosen.real


class BatchTopK(ReLU[config.BatchTopKConfig]):
    """z = ReLU(a) of the b k largest of a batch of b tokens; in use, of those above a threshold, so
    that no token depends on another."""

    own, running = ("threshold",), True

    def shape(self, name: str, n: int) -> tuple[int, ...]:
        return (1,)

    def active(self, sae: HasWeights, products: Tensor) -> Tensor:
        return products + sae.b_enc > sae.threshold.clamp_min(0)

    def reach(self, sae: HasWeights, products: Tensor) -> Tensor:
        return largest(products + sae.b_enc, len(products) * sae.k, guess=sae.threshold.item() / 2)

    @torch.no_grad()
    def settle_(self, sae: HasWeights, x: Tensor) -> None:
        sae.threshold.fill_(threshold_for(sae, x[:SETTLED]))


class JumpReLU(Activation[config.JumpReLUConfig]):
    """z = a where a > threshold. The thresholds get gradients by a kernel estimate over a window
    (`_Jump`, `_Step`)."""

    own = ("threshold",)

    def active(self, sae: HasWeights, products: Tensor) -> Tensor:
        return products + sae.b_enc > sae.threshold.clamp_min(0)

    def reach(self, sae: HasWeights, products: Tensor) -> Tensor:
        return products + sae.b_enc > sae.threshold - self.window(sae) / 2

    def window(self, sae: HasWeights) -> float:
        """Return the width of the window, in the unit of this autoencoder's inputs."""
        return self.options.bandwidth * sae.input_norm

    def values(self, sae: HasWeights, chosen: SparsePreActs) -> Tensor:
        return (
            _Jump.apply(
                chosen.products + chosen.of(sae.b_enc), chosen.of(sae.threshold), self.window(sae)
            )
            * chosen.real
        )

    @torch.no_grad()
    def constrain_(self, sae: HasWeights) -> None:
        sae.threshold.clamp_(min=0.0)  # a value below 0 is no activation

    def count(self, sae: HasWeights, chosen: SparsePreActs) -> Tensor:
        """Return the number of active latents of each token, [b], with the thresholds' gradient."""
        return (
            _Step.apply(
                (chosen.products + chosen.of(sae.b_enc)).detach(),
                chosen.of(sae.threshold),
                self.window(sae),
            )
            * chosen.real
        ).sum(1)


class Gated(Activation[config.GatedConfig]):
    """z = ReLU(exp(r_mag) p + b_mag) where a = p + b_enc > 0: gates and magnitudes share W_enc up
    to a factor."""

    own = ("r_mag", "b_mag")

    def active(self, sae: HasWeights, products: Tensor) -> Tensor:
        return self.reach(sae, products) & (sae.r_mag.exp() * products + sae.b_mag > 0)

    def reach(self, sae: HasWeights, products: Tensor) -> Tensor:
        return products + sae.b_enc > 0

    def values(self, sae: HasWeights, chosen: SparsePreActs) -> Tensor:
        gates = chosen.real & (chosen.products.detach() + chosen.of(sae.b_enc.detach()) > 0)
        return (
            torch.relu(chosen.of(sae.r_mag).exp() * chosen.products + chosen.of(sae.b_mag)) * gates
        )

    def gates(self, sae: HasWeights, chosen: SparsePreActs) -> Tensor:
        """Return ReLU(a), what the penalty and the auxiliary loss are about."""
        return torch.relu(chosen.products + chosen.of(sae.b_enc)) * chosen.real


class ProLU(Activation[config.ProLUConfig]):
    """z = p where p > 0 and a = p + b_enc > 0: the bias decides and is not added."""

    def active(self, sae: HasWeights, products: Tensor) -> Tensor:
        return (products > 0) & (products + sae.b_enc > 0)

    def values(self, sae: HasWeights, chosen: SparsePreActs) -> Tensor:
        return (
            _ProLU.apply(chosen.products, chosen.of(sae.b_enc), self.options.gradient) * chosen.real
        )


KINDS: dict[str, type[Activation[Any]]] = {
    "topk": TopK,
    "batch_topk": BatchTopK,
    "relu": ReLU,
    "jump_relu": JumpReLU,
    "gated": Gated,
    "prolu": ProLU,
}


def build_activation(options: config.ActivationConfig) -> Activation[config.ActivationConfig]:
    """Return the activation of a recipe."""
    return KINDS[options.kind](options)


def in_use(kind: str) -> Activation[config.ActivationConfig]:
    """Return the activation of an autoencoder in use; its training options are the defaults."""
    return build_activation(config.ACTIVATION_CONFIGS[kind]())


def threshold_for(sae: HasWeights, x: Tensor) -> float:
    """Return the value above which k latents are active on average on normalised activations x[b,
    d]; 0 if fewer are positive."""
    count = len(x) * sae.k
    top = x.new_empty(0)
    for part in x.split(max(1, _NUMBERS // len(sae.b_enc))):
        values = torch.cat([top, sae.pre_acts_normalized(part).flatten()])
        top = values.topk(min(len(values), count + 1)).values
    return max(0.0, top[-2:].mean().item()) if len(top) > count else 0.0


def largest(pre_acts: Tensor, count: int, guess: float = 0.0) -> Tensor:
    """Return where pre_acts[b, n] has its `count` largest values above 0, as bool[b, n]; fewer
    where fewer are above 0.

    guess: a value that is thought to be below them; it only saves time.
    """
    flat = pre_acts.flatten()
    above = (flat > max(0.0, guess)).nonzero().squeeze(1)
    if len(above) < count and guess > 0:
        above = (flat > 0).nonzero().squeeze(1)
    if len(above) > count:
        above = above[flat[above].topk(count, sorted=False).indices]
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[above] = True
    return mask.view(pre_acts.shape)


# ---- gradients that are not derivatives ----------------------------------------------------------


def _window(a: Tensor, threshold: Tensor, width: float) -> Tensor:
    """Return 1 / width where a is within width / 2 of its threshold, else 0: the kernel estimate of
    a density."""
    return ((a - threshold).abs() < width / 2) / width


class _Jump(torch.autograd.Function):
    """a where a > threshold; dz/da = 1 there, dz/dthreshold = -threshold K((a - threshold) / width)
    / width."""

    @staticmethod
    def forward(ctx, a, threshold, width):
        ctx.save_for_backward(a, threshold)
        ctx.width = width
        return torch.where(a > threshold, a, 0.0)

    @staticmethod
    def backward(ctx, grad):
        a, threshold = ctx.saved_tensors
        to_threshold = -threshold * _window(a, threshold, ctx.width) * grad
        return grad * (a > threshold), to_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    """1 where a > threshold; d/dthreshold = -K((a - threshold) / width) / width, and nothing to
    a."""

    @staticmethod
    def forward(ctx, a, threshold, width):
        ctx.save_for_backward(a, threshold)
        ctx.width = width
        return (a > threshold).to(a.dtype)

    @staticmethod
    def backward(ctx, grad):
        a, threshold = ctx.saved_tensors
        return None, (-_window(a, threshold, ctx.width) * grad).sum_to_size(threshold.shape), None


class _ProLU(torch.autograd.Function):
    """p where p > 0 and p + b > 0. relu: dz/dp = dz/db = 1 there. ste: the step's derivative taken
    for 1, dz/dp = 1 + p, dz/db = p."""

    @staticmethod
    def forward(ctx, p, b, gradient):
        gate = (p > 0) & (p + b > 0)
        ctx.save_for_backward(p, gate)
        ctx.gradient, ctx.bias_shape = gradient, b.shape
        return torch.where(gate, p, 0.0)

    @staticmethod
    def backward(ctx, grad):
        p, gate = ctx.saved_tensors
        grad = grad * gate
        to_bias = grad * p if ctx.gradient == "ste" else grad
        return (
            (grad + to_bias if ctx.gradient == "ste" else grad),
            to_bias.sum_to_size(ctx.bias_shape),
            None,
        )
