"""TODO ksparse.data.sharded."""

from __future__ import annotations

import threading
from collections.abc import Generator

import numpy as np
import torch
from torch import Tensor

from ksparse.data.base import ActivationBatch, Cursor, _check_cursor
from ksparse.data.live import _neighbours_in
from ksparse.data.permutation import permutation
from ksparse.data.shards import Shards
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import NonFiniteError


class ShardStream:
    """Activations read back from disk."""

    def __init__(
        self,
        shards: Shards,
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        mesh: Mesh = SINGLE_PROCESS,
    ):
        self.shards, self.batch, self.seed, self.device, self.mesh = (
            shards,
            batch,
            seed,
            device,
            mesh,
        )
        self.d_model = shards.d_model
        self._same_context_fraction: float | None = None
        self.halt = threading.Event()

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        _check_cursor(cursor or {"step": 0}, "step")
        step = cursor["step"] if cursor else 0
        while True:
            rows = self.rows(step)
            contexts = self.shards.contexts(rows)
            self._same_context_fraction = _neighbours_in(rows, contexts) / len(rows)
            rows = rows[self.mesh.batch_range(len(rows))]
            x = self.shards.read(rows).to(self.device)
            documents = torch.from_numpy(self.shards.documents(rows))
            bad = ~torch.isfinite(x).all(1)
            if bad.any():
                raise NonFiniteError(
                    f"{int(bad.sum())} activations of {self.shards.folder} are NaN or infinite, "
                    "the first in "
                    f"document {self.document_names(documents[bad.cpu()][:1])[0]!r}"
                )
            yield ActivationBatch(x, documents, {"step": step + 1})
            step += 1

    def rows(self, step: int) -> np.ndarray:
        """Return the rows [b] of one batch: a function of seed and step alone."""
        index = np.arange(step * self.batch, (step + 1) * self.batch)
        n = self.shards.rows
        epochs = range(index[0] // n, index[-1] // n + 1)
        return np.concatenate(
            [permutation(index[index // n == epoch] % n, n, (self.seed, epoch)) for epoch in epochs]
        )

    def sample(self, rows: int) -> Tensor:
        n = self.shards.rows
        return self.shards.read(permutation(np.arange(min(rows, n)), n, (self.seed, 0))).to(
            self.device
        )

    def document_names(self, documents: Tensor) -> list[str]:
        return [self.shards.names[i] for i in documents.unique().tolist()]

    def same_context_fraction(self) -> float | None:
        return self._same_context_fraction
