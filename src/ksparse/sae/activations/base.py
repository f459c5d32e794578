"""The protocol of activations, and what several of them share.

    products p = W_enc (x - b_pre), without bias
      -> a mask of the latents that count: in use `active_mask`, in training `trainable_mask`
      -> `values` of those latents, with gradient -> decoder, penalty, auxiliary losses

Selection has no gradient, values do. In training more latents may count than are active: a whole
batch decides for BatchTopK, and JumpReLU's thresholds also see values just below them.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from ksparse import kernels
from ksparse.config.activations import ActivationOptions
from ksparse.sae.code import Code
from ksparse.sae.joint import Joint
from ksparse.sae.terms import LossTerm

SPARSE_RATIO = 8
"""Training lists latents where no token has more than n / SPARSE_RATIO of them; above that, dense
products are faster (docs/lab-book.md)."""
_PRE_ACTS = 2**24  # pre-activations in memory at once while a threshold is chosen


class Host(Protocol):
    """What an activation reads of the `SAE` that holds it; `SAE` documents the members."""

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_pre: nn.Parameter
    joint: Joint

    @property
    def k(self) -> int: ...
    @property
    def input_norm(self) -> float: ...

    def products(self, x: Tensor) -> Tensor: ...
    def pre_acts_normalized(self, x: Tensor) -> Tensor: ...
    def code(self, x: Tensor, pre_acts: Tensor) -> Code: ...
    def decode_normalized(self, code: Code) -> Tensor: ...


class SparsePreActs(NamedTuple):
    """Products of the latents that count for each token.

    Args:
        products: [b, n] of all latents, or [b, m] of those listed in `indices`.
        indices: [b, m], or None where products are of all latents.
        mask: which of them count, in the shape of the products.
    """

    products: Tensor
    indices: Tensor | None
    mask: Tensor

    def gather(self, per_latent: Tensor) -> Tensor:
        """Return a tensor per latent [n], or one value for all [1], so that it broadcasts with the
        products."""
        if self.indices is None or len(per_latent) == 1:
            return per_latent
        return per_latent[self.indices]

    def decode_without_bias(self, values: Tensor, W_dec: Tensor) -> Tensor:
        """Return W_dec^T z, [b, d], of values in the shape of the products."""
        if self.indices is None:
            return values @ W_dec
        return kernels.gather_sum(values, self.indices, W_dec)

    def all_indices(self) -> Tensor:
        """Return the latent of each product, in their shape."""
        if self.indices is not None:
            return self.indices
        b, n = self.products.shape
        return torch.arange(n, device=self.products.device).expand(b, n)


class TrainingPass(NamedTuple):
    """A forward pass in training.

    Args:
        code: the latents that count and their values, with gradient.
        recon: the reconstruction [b, d].
        pre_acts: pre-activations [b, n] without gradient, where AuxK selects among them.
        listed: the products behind the values; None for TopK, whose values are its code.
    """

    code: Code
    recon: Tensor
    pre_acts: Tensor | None
    listed: SparsePreActs | None = None


Options_co = TypeVar("Options_co", bound=ActivationOptions, covariant=True)
"""The option class of one activation."""


class Activation(nn.Module, Generic[Options_co]):
    """One activation: its tensors, which latents count, their values, and its losses.

    A subclass registers its trained tensors as parameters and its followed statistics as buffers;
    files list them beside `W_enc`, under the same names. Each method is given the SAE that holds
    the activation, x[b, d] being normalised activations.

    Args:
        options: the options of a recipe; the defaults for an SAE in use, which needs none.
        n_latents: number of latents.
    """

    SCALE_FREE: ClassVar[tuple[str, ...]] = ()
    """Its parameters whose learning rate does not depend on the scale of the inputs."""

    def __init__(self, options: Options_co, n_latents: int):
        super().__init__()
        self.options = options

    def configured(self, options: ActivationOptions) -> Activation[Options_co]:
        """Return this activation, sharing its tensors, with the options of a recipe."""
        if options.kind != self.options.kind:
            raise ValueError(f"options of {options.kind!r} for an SAE with {self.options.kind!r}")
        if options == self.options:
            return self
        configured = copy.copy(self)
        configured.options = cast(Any, options)
        return configured

    @property
    def followed(self) -> tuple[str, ...]:
        """Names of its followed statistics: tensors that are updated after a step, not trained."""
        return tuple(name for name, _ in self.named_buffers())

    # ---- which latents count, and their values

    def active_mask(self, sae: Host, products: Tensor) -> Tensor:
        """Return which latents have a value above 0 in use, as bool[b, n]."""
        raise NotImplementedError

    def trainable_mask(self, sae: Host, products: Tensor) -> Tensor:
        """Return which latents have a value or a gradient other than 0 in training, bool[b, n]."""
        return self.active_mask(sae, products)

    def values(self, sae: Host, listed: SparsePreActs) -> Tensor:
        """Return the values >= 0, with gradient, in the shape of the products; 0 outside the
        mask."""
        raise NotImplementedError

    def encode(self, sae: Host, x: Tensor) -> Code:
        """Return the code of x[b, d] in use, as wide as the largest number of active latents."""
        with torch.no_grad():
            products = sae.products(x)
            indices, mask = list_columns(self.active_mask(sae, products))
        selected = kernels.selected_pre_acts(x, sae.b_pre, sae.W_enc, None, indices, products)
        return Code(self.values(sae, SparsePreActs(selected, indices, mask)), indices)

    def forward(self, sae: Host, x: Tensor) -> TrainingPass:
        """Return the forward pass of x[b, d] in training."""
        products = sae.products(x)
        listed = self._list_trainable(sae, x, products)
        values = self.values(sae, listed)
        recon = sae.joint.sum("recon", listed.decode_without_bias(values, sae.W_dec)) + sae.b_pre
        pre_acts = None
        if self.options.REVIVAL == "auxk":
            pre_acts = products.detach() + sae.b_enc.detach()
        return TrainingPass(Code(values, listed.all_indices()), recon, pre_acts, listed)

    def _list_trainable(self, sae: Host, x: Tensor, products: Tensor) -> SparsePreActs:
        """Return the products that count in training: listed where they are few, else all."""
        with torch.no_grad():
            mask = self.trainable_mask(sae, products)
            width = max(1, int(mask.sum(1).max()))
        if width > products.shape[1] // SPARSE_RATIO:
            return SparsePreActs(products, None, mask)
        indices, mask = list_columns(mask, width)
        selected = kernels.selected_pre_acts(
            x, sae.joint.b_pre(sae.b_pre), sae.W_enc, None, indices, products.detach()
        )
        return SparsePreActs(selected, indices, mask)

    # ---- what it adds to the loss

    def loss_terms(
        self, sae: Host, x: Tensor, result: TrainingPass, *, baseline: float, penalty_share: float
    ) -> dict[str, LossTerm]:
        """Return its own loss terms by name: penalties and auxiliary losses.

        Args:
            sae: the SAE that holds it.
            x: normalised activations [b, d].
            result: the forward pass of x.
            baseline: the squared error of predicting the mean, which squared errors are divided by.
            penalty_share: the share of its full weight that a penalty has in this step.
        """
        return {}

    # ---- start, and what happens after a step

    def start_(self, sae: Host, sample: Tensor) -> None:
        """Set its tensors, which are 0, to their start values, in place. All weights of the SAE
        have theirs by then.

        Args:
            sae: the SAE that holds it.
            sample: normalised activations [s, d].
        """

    def start_code(self, sae: Host, x: Tensor) -> Code:
        """Return the code of x[b, d] by which initialisation scales the encoder, while biases and
        its own tensors are 0."""
        return self.encode(sae, x)

    def constrain_(self) -> None:
        """Bring its tensors back into their domain after a step, in place."""

    def revive_(self, dead: Tensor) -> None:
        """Let dead latents fire more easily after a step, in place.

        Args:
            dead: Indices of the latents that were dead in the step.
        """

    def follow_(self, sae: Host, code: Code, updates: int) -> None:
        """Update its followed statistics from the code of a step, in place.

        Args:
            sae: the SAE that holds it.
            code: the code of the step's batch, without gradient.
            updates: number of updates, this one included.
        """

    def calibrate_(self, sae: Host, x: Tensor) -> None:
        """Set its followed statistics for the SAE's current weights on x[b, d], in place."""

    # ---- for evaluations

    def positive_values(self, sae: Host, x: Tensor) -> Tensor:
        """Return the values [b, n] that the latents of x[b, d] have if none is left out for being
        small."""
        return torch.relu(sae.pre_acts_normalized(x))

    def value_at(self, sae: Host, latent: int, product: float) -> float:
        """Return the value that a latent has where its product is `product`, if none is left out
        for being small."""
        return max(0.0, product + float(sae.b_enc[latent]))


def list_columns(mask: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """List the True columns of each row of a mask.

    Args:
        mask: bool[b, n].
        width: number m of places per row; the largest count of a row if not given.

    Returns:
        (indices[b, m], mask[b, m]); where a row has fewer than m, index 0 and False.
    """
    counts = mask.sum(1)
    if width is None:
        width = max(1, int(counts.max())) if len(counts) else 1
    rows, columns = mask.nonzero(as_tuple=True)
    slots = torch.arange(len(rows), device=mask.device) - (counts.cumsum(0) - counts)[rows]
    indices = torch.zeros(len(mask), width, dtype=torch.long, device=mask.device)
    indices[rows, slots] = columns
    return indices, torch.arange(width, device=mask.device) < counts[:, None]


def l1_penalty(paid: Tensor, x: Tensor) -> Tensor:
    """Return the mean over tokens of the sum of paid[b, m] over the norm of x[b, d]."""
    norms: Tensor = x.norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny)
    return (paid.sum(1) / norms).mean()


def threshold_for(sae: Host, x: Tensor) -> float:
    """Return the value above which k latents are active on average on normalised activations
    x[b, d], on a mesh on those of all processes; 0 if fewer are positive."""
    most = sae.joint.tokens(len(x)) * sae.k + 1
    top = x.new_empty(0)
    for part in x.split(max(1, _PRE_ACTS // len(sae.b_enc))):
        values = torch.cat([top, sae.pre_acts_normalized(part).flatten()])
        top = values.topk(min(len(values), most)).values
    return sae.joint.border(top, most - 1)


def start_threshold(sae: Host, sample: Tensor) -> float:
    """Return the threshold at which k latents are active on average, on at most 2^24
    pre-activations of a sample."""
    return threshold_for(sae, sample[: max(1, _PRE_ACTS // sae.joint.latents(len(sae.b_enc)))])
