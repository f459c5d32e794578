"""Batches of activations read back from shards."""

from __future__ import annotations

import threading
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ksparse.data.base import ActivationBatch, Cursor, check_cursor
from ksparse.data.permutation import permutation
from ksparse.data.shards import Shards
from ksparse.data.tensors import Tensors, is_index
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import NonFiniteError


def open_shards(folder: Path | str) -> Shards | Tensors:
    """Open what `acts.shards` names, here or in an object store: shards that ksparse wrote, or an
    index of tensors, of which the training rows are taken."""
    return Tensors(folder) if is_index(folder) else Shards(folder)


class ShardStream:
    """An `ActivationStream` of activations on disk: a new permutation of all rows each epoch."""

    def __init__(
        self,
        shards: Shards | Tensors,
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        mesh: Mesh = SINGLE_PROCESS,
    ):
        self.shards, self.d_model = shards, shards.d_model
        self.batch, self.seed, self.device, self.mesh = batch, seed, device, mesh
        self.cancel = threading.Event()
        self._same_context_fraction: float | None = None

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        """Yield batches forever, from the cursor on.

        Raises:
            NonFiniteError: An activation is NaN or infinite.
            CorruptError: The cursor is of another kind of stream.
        """
        check_cursor(cursor or {"step": 0}, "step")
        step = cursor["step"] if cursor else 0
        while True:
            rows = self.rows(step)
            contexts = self.shards.contexts(rows)
            self._same_context_fraction = _count_same_context(rows, contexts) / len(rows)
            rows = rows[self.mesh.batch_range(len(rows))]
            x = self.shards.read(rows).to(self.device)
            documents = torch.from_numpy(self.shards.documents(rows))
            bad = ~torch.isfinite(x).all(1)
            if bad.any():
                first = self.shards.describe(int(rows[int(bad.nonzero()[0])]))
                raise NonFiniteError(
                    f"{int(bad.sum())} activations of {self.shards.folder} are NaN or infinite, "
                    f"the first in {first}"
                )
            yield ActivationBatch(x, documents, {"step": step + 1})
            step += 1

    def rows(self, step: int) -> np.ndarray:
        """Return the row numbers [b] of one batch: a function of seed and step alone."""
        index = np.arange(step * self.batch, (step + 1) * self.batch)
        n = self.shards.rows
        epochs = range(index[0] // n, index[-1] // n + 1)
        return np.concatenate(
            [permutation(index[index // n == epoch] % n, n, (self.seed, epoch)) for epoch in epochs]
        )

    def sample(self, rows: int) -> Tensor:
        """Return up to `rows` raw activations [rows, d] without moving any cursor."""
        n = self.shards.rows
        order = permutation(np.arange(min(rows, n)), n, (self.seed, 0))
        return self.shards.read(order).to(self.device)

    def document_names(self, documents: Tensor) -> list[str]:
        """Return the names of documents, for messages."""
        return self.shards.document_names(documents.unique().tolist())

    def same_context_fraction(self) -> float | None:
        """Return the fraction of rows whose predecessor in the same context is in the same batch,
        for the last batch."""
        return self._same_context_fraction


def _count_same_context(rows: np.ndarray, contexts: np.ndarray) -> int:
    """Count the rows whose predecessor in the text, in the same context, is in the same batch."""
    order = np.argsort(rows)
    rows, contexts = rows[order], contexts[order]
    return int(((rows[1:] - rows[:-1] == 1) & (contexts[1:] == contexts[:-1])).sum())
