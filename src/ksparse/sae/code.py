"""Sparse codes: which latents of each token are active, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse.sae.normalization import Normalized


class Code(NamedTuple):
    """A sparse code: the activations values[..., k] >= 0 of the latents indices[..., k]. A value of
    0 is no activation.

    Example:
        >>> import torch
        >>> from ksparse import Code
        >>> code = Code(torch.tensor([[2.0, 0.5]]), torch.tensor([[3, 0]]))
        >>> code.dense(n_latents=5)
        tensor([[0.5000, 0.0000, 0.0000, 2.0000, 0.0000]])
    """

    values: Tensor
    indices: Tensor

    def dense(self, n_latents: int) -> Tensor:
        """Return [..., n_latents], zero where nothing is active."""
        zeros = self.values.new_zeros(*self.values.shape[:-1], n_latents)
        return zeros.scatter_add(-1, self.indices, self.values)

    def pad_to(self, width: int) -> Code:
        """Return the same code padded to `width` entries per token, with values of 0."""
        more = width - self.values.shape[-1]
        return Code(*(nn.functional.pad(part, (0, more)) for part in self)) if more else self

    @staticmethod
    def concat(codes: Sequence[Code]) -> Code:
        """Concatenate codes [.., k] of several widths along the first dimension, padded to the
        widest."""
        width = max(code.values.shape[-1] for code in codes)
        return Code(*(torch.cat(parts) for parts in zip(*(code.pad_to(width) for code in codes))))


class RawCode(Code):
    """A code of raw activations, with the mean and scale that normalisation removed from them."""

    inputs: Normalized | None = None

    @classmethod
    def of(cls, code: Code, inputs: Normalized) -> RawCode:
        """Return a code with what normalisation removed; the activations themselves are not
        kept."""
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
