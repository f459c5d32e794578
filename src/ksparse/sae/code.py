"""Sparse codes: which latents of each token are active, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksparse import display, html
from ksparse.errors import InputError
from ksparse.sae.normalization import Normalized

_NAMED = 3  # latents named beside a token of a coloured text


class Peak(NamedTuple):
    """Where a latent is largest in a code."""

    latent: int
    value: float
    row: int
    """The activation's number; its leading dimensions are counted as one."""
    token: str | None
    """The token, of codes of texts."""


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

    def dense(self, n_latents: int | None = None) -> Tensor:
        """Return [..., n_latents], zero where nothing is active.

        Args:
            n_latents: number of latents; a code that `encode` returned knows it.
        """
        if n_latents is None:
            n_latents = getattr(self, "n_latents", None)
        if n_latents is None:
            raise InputError(
                "this code does not know how many latents its SAE has; give code.dense(n_latents)"
            )
        zeros = self.values.new_zeros(*self.values.shape[:-1], n_latents)
        return zeros.scatter_add(-1, self.indices, self.values)

    def top(self, n: int = 10) -> list[Peak]:
        """Return the n latents that are largest anywhere in the code, the largest first, each with
        its largest value and where that is.

        Example:
            >>> import torch
            >>> from ksparse import Code
            >>> Code(torch.tensor([[2.0, 0.5]]), torch.tensor([[3, 0]])).top(1)
            [Peak(latent=3, value=2.0, row=0, token=None)]
        """
        values, indices = (part.detach().flatten().cpu() for part in (self.values, self.indices))
        width = max(1, self.values.shape[-1])
        tokens, peaks = getattr(self, "tokens", None), dict[int, Peak]()
        for place in values.argsort(descending=True, stable=True).tolist():
            if len(peaks) >= n or not values[place] > 0:
                break
            latent, row = int(indices[place]), place // width
            token = None if tokens is None else tokens[row]
            peaks.setdefault(latent, Peak(latent, float(values[place]), row, token))
        return list(peaks.values())

    def to_frame(self) -> Any:
        """Return a pandas DataFrame with a row for each active latent of each activation.

        Columns: `row` (the activation's number), `latent`, `value`; of codes of texts also
        `document` (the text's number) and `token`.

        Raises:
            InputError: pandas is not installed.
        """
        values, indices = (
            part.detach().reshape(-1, part.shape[-1]).cpu() for part in (self.values, self.indices)
        )
        row, place = (values > 0).nonzero(as_tuple=True)
        columns: dict[str, Any] = {
            "row": row.numpy(),
            "latent": indices[row, place].numpy(),
            "value": values[row, place].float().numpy(),
        }
        tokens, documents = getattr(self, "tokens", None), getattr(self, "documents", None)
        if tokens is not None and documents is not None:
            columns |= {
                "document": documents.cpu()[row].numpy(),
                "token": [tokens[i] for i in row.tolist()],
            }
        return display.to_frame(columns)

    def __repr__(self) -> str:
        lead = " × ".join(f"{size:,}" for size in self.values.shape[:-1]) or "1"
        l0 = (self.values > 0).sum(-1).double().mean().item() if self.values.numel() else 0.0
        n = getattr(self, "n_latents", None)
        of = "" if n is None else f" of {n:,}"
        what = "tokens" if getattr(self, "tokens", None) is not None else "activations"
        width = self.values.shape[-1]
        return f"{type(self).__name__}({lead} {what} × {width:,} latents{of}, L0 {l0:.1f})"

    def _repr_html_(self) -> str:
        words = {
            f"latent {peak.latent}": f"{peak.value:.3g} at activation {peak.row}"
            for peak in self.top()
        }
        return html.table(repr(self), words)

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
    n_latents: int | None = None
    """Number of latents of the SAE."""

    @classmethod
    def of(cls, code: Code, inputs: Normalized, n_latents: int | None = None) -> RawCode:
        """Return a code with what normalisation removed; the activations themselves are not
        kept."""
        raw = cls(*code)
        raw.inputs, raw.n_latents = inputs._replace(x=inputs.mean), n_latents
        return raw

    def _replace(self, **fields: Tensor) -> RawCode:
        """Return this code with other values or indices, of the same activations."""
        changed = type(self)(*super()._replace(**fields))
        changed.__dict__.update(self.__dict__)
        return changed

    def at(self, rows: Any) -> RawCode:
        """Return the code of some of the activations: any index of their leading dimensions."""
        chosen = type(self)(*(part[rows] for part in self))
        chosen.__dict__.update(self.__dict__)
        if self.inputs is not None:
            chosen.inputs = Normalized(*(part[rows] for part in self.inputs))
        return chosen


class TextCode(RawCode):
    """The code of texts, with a row for each of their tokens: values[rows, k], indices[rows, k].

    Rows of a kind that the SAE was not trained on, such as the first token where the LM has no BOS,
    have no active latent.
    """

    tokens: list[str]
    """The token of each row."""
    documents: Tensor
    """The number of the text of each row, [rows]."""

    def at(self, rows: Any) -> TextCode:
        """Return the code of some rows: any index of the first dimension."""
        chosen = super().at(rows)
        assert isinstance(chosen, TextCode)
        places = torch.arange(len(self.tokens))[rows]
        chosen.tokens = [self.tokens[place] for place in places.flatten().tolist()]
        chosen.documents = self.documents[rows]
        return chosen

    def of_latent(self, latent: int) -> Tensor:
        """Return the activations [rows] of a latent, 0 where it is not active."""
        return (self.values * (self.indices == latent)).sum(-1).detach()

    def _repr_html_(self) -> str:
        values, indices = (
            part.detach().reshape(-1, part.shape[-1]).cpu() for part in (self.values, self.indices)
        )
        most = float(values.max()) if values.numel() else 0.0
        marks = []
        for row_values, row_indices in zip(values[:, :_NAMED].tolist(), indices.tolist()):
            pairs = [(i, v) for v, i in zip(row_values, row_indices) if v > 0]
            note = ", ".join(f"latent {i}: {v:.3g}" for i, v in pairs)
            marks.append((pairs[0][0], pairs[0][1] / most, note) if pairs else (-1, 0.0, ""))
        rows = self.documents.flatten().tolist()
        texts = "".join(
            html.tokens(
                [token for token, row in zip(self.tokens, rows) if row == document],
                [mark for mark, row in zip(marks, rows) if row == document],
            )
            for document in dict.fromkeys(rows)
        )
        return html.table(repr(self), {}) + texts
