"""The k-sparse autoencoder as a plain nn.Module: no mesh, no files, no logging.

Shapes: x[b, d], pre_acts[b, n], Code(values[b, k], indices[b, k]); every parameter has the latents
first. TopK is one of several activations (`ksparse.sae.activations`); codes of the others are as
wide as the batch's largest number of active latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse import kernels
from ksparse.errors import InputError
from ksparse.sae import activations
from ksparse.sae.normalization import KINDS, PER_ACTIVATION, Normalized, input_rms, normalize

KEYS = ("W_enc", "b_enc", "W_dec", "b_pre")
"""Tensors of every autoencoder; `SAE.keys` has those of its activation too."""


class Code(NamedTuple):
    """A sparse code: the activations values[..., k] >= 0 of the latents indices[..., k]. A value of
    0 is no activation."""

    values: Tensor
    indices: Tensor

    def dense(self, n_latents: int) -> Tensor:
        """Return [..., n_latents], zero where nothing is active."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], n_latents)
        return zeros.scatter_add(-1, self.indices, self.values)

    def widened(self, width: int) -> Code:
        """Return the same code with `width` entries for each token, the new ones of value 0."""
        more = width - self.values.shape[-1]
        return Code(*(nn.functional.pad(part, (0, more)) for part in self)) if more else self

    @staticmethod
    def joined(codes: Sequence[Code]) -> Code:
        """Return codes [.., k] of several widths one after another, as wide as the widest."""
        width = max(code.values.shape[-1] for code in codes)
        return Code(*(torch.cat(parts) for parts in zip(*(code.widened(width) for code in codes))))


_LEAST_FACTOR = 1e-30  # beyond it or its inverse, float32 activations become 0 or infinity


class RawCode(Code):
    """A code of raw activations. It remembers the mean and scale that their normalisation took
    off."""

    inputs: Normalized | None = None

    @classmethod
    def of(cls, code: Code, inputs: Normalized) -> RawCode:
        """Return a code with what its activations' normalisation took off; x itself is not kept."""
        raw = cls(*code)
        raw.inputs = inputs._replace(x=inputs.mean)
        return raw

    def _replace(self, **fields: Tensor) -> RawCode:
        """Return this code with other values or indices, of the same activations."""
        changed = RawCode(*super()._replace(**fields))
        changed.inputs = self.inputs
        return changed

    def at(self, rows: Any) -> RawCode:
        """Return the code of some of the activations: any index of their leading dimensions."""
        chosen = RawCode(*(part[rows] for part in self))
        if self.inputs is not None:
            chosen.inputs = Normalized(*(part[rows] for part in self.inputs))
        return chosen


@dataclass(frozen=True)
class Shape:
    """What an autoencoder is, apart from its weights."""

    d_model: int
    n_latents: int
    k: int
    normalize: str = "unit_norm"
    factor: float = 1.0
    """The constant of normalize = 'dataset'."""
    activation: str = "topk"
    """Kind of the activation; k means what `sae.k` of a recipe says for it."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_latents", "k"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(
                    f"{name} of an SAE is {value!r}; it must be a whole number of at least 1"
                )
        if self.k > self.n_latents:
            raise InputError(
                f"k is {self.k}, more than the {self.n_latents} latents; give a smaller k"
            )
        for name, known in (("normalize", KINDS), ("activation", tuple(activations.KINDS))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                what = "normalisation" if name == "normalize" else name
                raise InputError(f"{what} {value!r} is unknown; there are {', '.join(known)}")
        if (
            type(self.factor) not in (int, float)
            or not _LEAST_FACTOR <= self.factor <= 1 / _LEAST_FACTOR
        ):
            raise InputError(
                f"factor of an SAE is {self.factor!r}; it must be a number from "
                f"{_LEAST_FACTOR:g} to {1 / _LEAST_FACTOR:g}"
            )


class SAE(nn.Module):
    """recon = W_dec^T z + b_pre,  z = ReLU(TopK(W_enc (x - b_pre) + b_enc))         Gao et al.
        2024, eq. 2

    or another activation in the place of TopK, which may have tensors of its own (`keys`).
    `encode`, `decode`, `pre_acts` and `forward` take and give raw activations. Below them is the
    equation itself, on normalised activations: `encode_normalized`, `decode_normalized`,
    `pre_acts_normalized`, and `activate`, `code`, `products` and `decoder`, which training calls.
    `metadata` says what it was trained on; it is saved with the weights and may be empty.
    """

    # those that its activation has, under their names
    threshold: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, shape: Shape, metadata: dict[str, Any] | None = None):
        super().__init__()
        self.shape, self.metadata = shape, dict(metadata or {})
        n, d = shape.n_latents, shape.d_model
        self.W_enc = nn.Parameter(torch.zeros(n, d))
        self.b_enc = nn.Parameter(torch.zeros(n))
        self.W_dec = nn.Parameter(torch.zeros(n, d))
        self.b_pre = nn.Parameter(torch.zeros(d))
        self.activation = activations.in_use(shape.activation)
        for name in self.activation.own:
            start = torch.zeros(self.activation.shape(name, n))
            self.register_buffer(
                name, start
            ) if self.activation.running else self.register_parameter(name, nn.Parameter(start))

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of all its tensors."""
        return (*KEYS, *self.activation.own)

    def empty(self) -> SAE:
        """Return another of the same shape, metadata and kind, on the CPU, with weights of zero."""
        return SAE(self.shape, self.metadata)

    def count(self, latents: Tensor) -> int:
        """Return how many latents these are, with those of other slices where this is one of
        several."""
        return len(latents)

    @property
    def k(self) -> int:
        return self.shape.k

    @property
    def input_norm(self) -> float:
        """The norm of a typical input: 1 with unit_norm, sqrt(d_model) else."""
        return input_rms(self.shape.normalize, self.shape.d_model) * self.shape.d_model**0.5

    # ---- for users: raw activations

    def normalize(self, raw: Tensor) -> Normalized:
        """Normalise raw activations [..., d], remembering what `restore` needs."""
        if not isinstance(raw, Tensor) or not raw.ndim or raw.is_complex():
            what = (
                f"{raw.dtype} {list(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
            )
            raise InputError(
                f"activations are a tensor of real numbers [..., {self.shape.d_model}], got {what}"
            )
        if raw.shape[-1] != self.shape.d_model:
            raise InputError(
                f"this SAE is for activations of width d_model = {self.shape.d_model}, got "
                f"{raw.shape[-1]} "
                f"(shape {list(raw.shape)}); is it the right model and site?"
            )
        return normalize(raw.to(self.W_enc.dtype), self.shape.normalize, self.shape.factor)

    def pre_acts(self, raw: Tensor) -> Tensor:
        """Return the pre-activations [..., n] of raw activations [..., d], without gradient."""
        x = self.normalize(raw).x
        rows = self.pre_acts_normalized(x.reshape(-1, x.shape[-1]))
        return rows.reshape(*x.shape[:-1], rows.shape[-1])

    def encode(self, raw: Tensor) -> RawCode:
        """Return the code of raw activations [..., d], the largest values first."""
        inputs = self.normalize(raw)
        return RawCode.of(self.encode_normalized(inputs.x), inputs)

    def decode(self, code: Code) -> Tensor:
        """Return the reconstruction [..., d] of raw activations, on their own scale:
        decode(encode(x)) is self(x).

        A normalisation of each activation takes off what a code alone cannot know, so with
        unit_norm, layer_norm and constant_norm the code must be one that `encode` gave, or such a
        code with other values or latents (`code._replace(values=…)`). Raises InputError for any
        other.
        """
        if not isinstance(code, Code):
            raise InputError(
                f"a code is decoded, got {type(code).__name__}; give what `encode` returned, whole "
                "or rows of it: code.at(…)"
            )
        n = self.shape.n_latents
        if code.indices.is_floating_point() or ((code.indices < 0) | (code.indices >= n)).any():
            raise InputError(
                f"a code has latents that do not exist: this SAE has latents 0 to {n - 1}"
            )
        code = code._replace(values=code.values.to(self.W_dec))
        recon = self.decode_normalized(code)
        if self.shape.normalize in PER_ACTIVATION:
            return self._restorer(code).restore(recon)
        return normalize(recon[..., :1], self.shape.normalize, self.shape.factor).restore(recon)

    def _restorer(self, code: Code) -> Normalized:
        inputs = code.inputs if isinstance(code, RawCode) else None
        if inputs is None:
            raise InputError(
                "this code does not say what was taken off its activations, and "
                f"{self.shape.normalize} "
                "takes off a mean or a scale of each: decode a code that `encode` returned (to "
                "change it: "
                "code._replace(values=…)), or use decode_normalized(code), which is on the scale "
                "of the "
                "normalised activations"
            )
        if inputs.scale.shape[:-1] != code.values.shape[:-1]:
            raise InputError(
                f"this code is of shape {list(code.values.shape)}, but it was made from "
                f"activations {list(inputs.scale.shape[:-1])}; slice it with code.at(…)"
            )
        return inputs

    def forward(self, raw: Tensor) -> Tensor:
        """Return the reconstruction of raw activations [..., d], on their own scale."""
        inputs = self.normalize(raw)
        return inputs.restore(self.decode_normalized(self.encode_normalized(inputs.x)))

    def encode_normalized(self, x: Tensor) -> Code:
        """Return the code of normalised activations [..., d], the largest values first."""
        code = self.activate(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))
        values, order = code.values.sort(dim=-1, descending=True, stable=True)
        shape = (*x.shape[:-1], code.values.shape[-1])
        return Code(values.reshape(shape), code.indices.gather(-1, order).reshape(shape))

    # ---- the equation: normalised activations

    def activate(self, x: Tensor) -> Code:
        """Return the code of x[b, d] as the activation in use gives it: of TopK as wide as k, else
        as the largest number of active latents."""
        if self.shape.activation == "topk":
            return self.code(x, self.pre_acts_normalized(x))
        with torch.no_grad():
            products = self.products(x)
            indices, real = activations.listed(self.activation.active(self, products))
        chosen = kernels.selected(x, self.b_pre, self.W_enc, None, indices, products)
        return Code(
            self.activation.values(self, activations.SparsePreActs(chosen, indices, real)), indices
        )

    def products(self, x: Tensor) -> Tensor:
        """Return W_enc (x - b_pre) as [b, n], with gradient: what the other activations begin
        with."""
        return (x - self.b_pre) @ self.W_enc.t()

    @torch.no_grad()
    def pre_acts_normalized(self, x: Tensor) -> Tensor:
        """Return W_enc (x - b_pre) + b_enc as [b, n]. Only the choice needs it, so it carries no
        gradient."""
        return torch.addmm(self.b_enc, x - self.b_pre, self.W_enc.t())

    def code(
        self, x: Tensor, pre_acts: Tensor, k: int | None = None, among: Tensor | None = None
    ) -> Code:
        """Choose the k largest pre-activations, of the latents `among` if given, without gradient;
        value them by ReLU, with it.

        k: the SAE's own if not given; fewer are chosen where `among` holds fewer.
        """
        k = self.shape.k if k is None else k
        if among is None:
            indices = kernels.topk(pre_acts, k)
        else:
            indices = among[kernels.topk(pre_acts[:, among], min(k, len(among)))]
        values = kernels.selected(x, self.b_pre, self.W_enc, self.b_enc, indices, pre_acts)
        return Code(torch.relu(values), indices)

    def decoder(self, code: Code) -> Tensor:
        """Return W_dec^T z, without bias: what AuxK needs, where a bias would count twice."""
        *lead, k = code.values.shape
        values, indices = (part.reshape(math.prod(lead), k) for part in code)
        return kernels.gather_sum(values, indices, self.W_dec).reshape(*lead, self.shape.d_model)

    def decode_normalized(self, code: Code) -> Tensor:
        """Return the reconstruction of normalised activations, [..., d]."""
        return self.decoder(code) + self.b_pre

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Give every decoder row norm 1, in place. A zero row stays zero."""
        norms = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norms > 0, norms, 1.0))

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in asdict(self.shape).items())
