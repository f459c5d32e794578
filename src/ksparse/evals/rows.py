"""Held-out rows of activations that anybody made, in the place of held-out text.

They have no LM, tokens or positions. What asks only for activations and codes (`Metric.needs_text`
is False) works on them as on text; each row is a context of one position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksparse.config import ActsConfig
from ksparse.config.evaluation import EvalConfig
from ksparse.data.tensors import Tensors
from ksparse.errors import InputError, NonFiniteError
from ksparse.evals.batches import Memo, SAEBatch
from ksparse.evals.statistics import count_of
from ksparse.lm.tokens import TokenBatch
from ksparse.sae import serialization
from ksparse.sae.model import SAE

BATCH = 4_096
"""Rows read at a time."""


class RowBatch(Memo):
    """A batch of rows."""

    def __init__(self, table: Tensors, rows: np.ndarray, device: torch.device):
        super().__init__()
        self._table, self._rows, self._device = table, rows, device

    @property
    def numbers(self) -> Tensor:
        """The number of each row among all rows of the data, [m]."""
        return torch.from_numpy(self._table.chosen[self._rows]).to(self._device)

    @cached_property
    def keep(self) -> Tensor:
        """All rows: a mask [m, 1]."""
        return torch.ones(len(self._rows), 1, dtype=torch.bool, device=self._device)

    @cached_property
    def contexts(self) -> TokenBatch:
        """Each row as a context of one position, of the token 0."""
        tokens = torch.zeros(len(self._rows), 1, dtype=torch.long, device=self._device)
        return TokenBatch(tokens, self.keep, self.keep, self.documents[:, None])

    @cached_property
    def documents(self) -> Tensor:
        """The document of each row, [m]."""
        return torch.from_numpy(self._table.documents(self._rows)).to(self._device)

    @cached_property
    def x(self) -> Tensor:
        """The raw activations, [m, d]."""
        x = self._table.read(self._rows).to(self._device)
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            first = self._table.describe(int(self._rows[int(bad.nonzero()[0])]))
            raise NonFiniteError(f"an activation is NaN or infinite: {first}")
        return x

    def add(self, batch: SAEBatch) -> None:
        """Do nothing: there is no LM whose losses SAEs could share."""


class HeldOutRows(Memo):
    """The held-out rows of indexed tensors. `start_pass` reads them.

    Args:
        acts: what the SAE was trained on; `shards` is the folder.
        options: the split, and how many rows to read.
        device: where to put them.
        digest: what `metadata.policy.tensors` of the SAE says.
        loss: a function of edited activations to evaluate with, for which documents are read whole.

    Raises:
        InputError: the folder has another content than when the SAE was trained, or no such rows.
        CorruptError: a file is not what it was when it was indexed.
    """

    has_text = False
    vocab = 1
    """Token ids: all rows have the token 0."""
    context = 1
    """Positions of a context."""
    lm = None

    def __init__(
        self,
        acts: ActsConfig,
        options: EvalConfig,
        device: torch.device,
        digest: str,
        loss: Callable[[Tensor, Any], Any] | None = None,
    ):
        super().__init__()
        self.loss = loss
        self.acts, self.options, self.device = acts, options, device
        self.table = Tensors(acts.shards, options.split)
        self.d_model = self.table.d_model
        if self.table.policy["tensors"] != digest:
            raise InputError(
                f"{acts.shards} was indexed again with other files or content since this SAE was "
                "trained: rows held out now may have been trained on; bring the old ones back"
            )

    def policy(self) -> dict[str, Any]:
        """Return what decides which activations are used."""
        return self.table.policy

    def start_pass(self) -> RowPass:
        """Return a new pass over the rows."""
        return RowPass(self)

    def mean_row(self) -> Tensor:
        """Return the mean [d] of the rows that a pass reads."""
        total, count = torch.zeros(self.d_model, dtype=torch.float64), 0
        for batch in RowPass(self):
            total, count = total + batch.x.cpu().double().sum(0), count + len(batch.x)
        return (total / count).float().to(self.device)

    def nothing(self) -> InputError:
        """Return the error for a split without rows."""
        return InputError(f"{self.acts.shards} has no {self.options.split} rows")


class RowPass:
    """One pass over rows, and how much of them has been read so far.

    With fewer than all rows, those read are spread evenly over the files. Where the data has a
    `loss`, whole documents are read, spread evenly in the order in which they first occur.

    Attributes:
        tokens: rows read.
        documents: the documents they are of.
    """

    def __init__(self, data: HeldOutRows):
        self.data, self.tokens = data, 0
        self.documents: set[int] = set()

    def __iter__(self) -> Iterator[RowBatch]:
        data = self.data
        for rows in self._single_rows() if data.loss is None else self._whole_documents():
            batch = RowBatch(data.table, rows, data.device)
            self.tokens += len(batch.documents)
            self.documents |= set(batch.documents.tolist())
            yield batch

    def _single_rows(self) -> Iterator[np.ndarray]:
        """Yield batches of rows, spread evenly."""
        table = self.data.table
        wanted = min(self.data.options.tokens, table.rows)
        rows = _spread(table.rows, wanted)
        for number in range(math.ceil(len(rows) / BATCH)):
            yield rows[number * BATCH : (number + 1) * BATCH]

    def _whole_documents(self) -> Iterator[np.ndarray]:
        """Yield batches of whole documents, at least one in each, of about `options.tokens` rows in
        all."""
        table = self.data.table
        documents = table.documents(np.arange(table.rows))
        _, first, inverse, sizes = np.unique(
            documents, return_index=True, return_inverse=True, return_counts=True
        )
        by_document = np.split(np.argsort(inverse, kind="stable"), np.cumsum(sizes)[:-1])
        in_order = np.argsort(first)
        share = min(1.0, self.data.options.tokens / table.rows)
        chosen = in_order[_spread(len(in_order), math.ceil(share * len(in_order)))]
        batch: list[np.ndarray] = []
        for document in chosen:
            if batch and sum(map(len, batch)) + sizes[document] > BATCH:
                yield np.concatenate(batch)
                batch = []
            batch.append(by_document[document])
        yield np.concatenate(batch)

    def notes(self) -> list[str]:
        """Return remarks on the rows that were read."""
        notes = ["of activations without an LM or text: rows that were held out of training"]
        if self.data.table.manifest["documents"] == "block":
            notes.append(
                "nothing says which document a row is of: 64 rows in a row count as one, for what "
                "is held out and for standard errors"
            )
        if len(self.documents) < 10:
            few = count_of(len(self.documents), "documents")
            notes.append(f"only {few}: the standard errors are rough")
        return notes


def _spread(count: int, wanted: int) -> np.ndarray:
    """Return `wanted` of the numbers below `count`, spread evenly and rising."""
    return np.unique(np.linspace(0, count - 1, wanted).round().astype(np.int64))


def open_rows(
    saes: dict[str, SAE],
    options: EvalConfig,
    device: str,
    loss: Callable[[Tensor, Any], Any] | None = None,
) -> HeldOutRows:
    """Return the held-out rows that SAEs have in common.

    Raises:
        InputError: they were trained on different activations; otherwise as `HeldOutRows`.
    """
    if options.text:
        raise InputError(
            "--text was given, and these SAEs were trained on activations alone; name their LM: "
            "ksparse eval SAE --lm NAME --site SITE --text FILE --out DIR"
        )
    (label, first), *others = saes.items()
    acts = serialization.acts_of(first.metadata, named=False)
    digest = (first.metadata.get("policy") or {}).get("tensors")
    for other, sae in others:
        if (sae.metadata.get("policy") or {}).get("tensors") != digest:
            raise InputError(
                f"{label} and {other} were trained on different activations; evaluate them one by "
                "one"
            )
    return HeldOutRows(dataclasses.replace(acts), options, torch.device(device), str(digest), loss)


def check_without_text(names: Sequence[str], needs_text: dict[str, bool]) -> None:
    """Raise InputError for an evaluation that needs an LM or text."""
    needing = [name for name in names if needs_text[name]]
    if needing:
        able = ", ".join(name for name, needs in needs_text.items() if not needs)
        raise InputError(
            f"{', '.join(needing)} {'needs' if len(needing) == 1 else 'need'} an LM and text, and "
            "this SAE was trained on activations alone; on its held-out rows there are "
            f"{able}. With an LM: ksparse eval SAE --lm NAME --site SITE --text FILE --out DIR"
        )
