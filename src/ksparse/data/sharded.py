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
    """An `ActivationStream` of activations on disk: a new permutation of all rows each epoch.

    With a window, the files come in a new order each epoch, and rows are permuted within windows:
    as many files as have at least so many rows.

    Args:
        shards: the activations.
        batch: activations in a batch.
        seed: of the order.
        device: where to put them.
        mesh: the processes that share the stream.
        window: rows that are permuted together, at least; 0: all.
    """

    def __init__(
        self,
        shards: Shards | Tensors,
        *,
        batch: int,
        seed: int,
        device: torch.device | str = "cpu",
        mesh: Mesh = SINGLE_PROCESS,
        window: int = 0,
    ):
        self.window = window
        self._windows: tuple[int, list[np.ndarray]] = -1, []
        self._used = (-1, -1)
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
            self._look_ahead(step * self.batch)
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
            [self._order(index[index // n == epoch] % n, epoch) for epoch in epochs]
        )

    def _order(self, places: np.ndarray, epoch: int) -> np.ndarray:
        """Return the row numbers at places[m] of an epoch."""
        if not self.window:
            return permutation(places, self.shards.rows, (self.seed, epoch))
        counts, rows = self.shards.counts, np.empty(len(places), np.int64)
        first = np.cumsum(counts) - counts  # row of each file
        windows = self._windows_of(epoch)
        ends = np.cumsum([counts[files].sum() for files in windows])
        which = np.searchsorted(ends, places, side="right")
        for number in np.unique(which).tolist():
            files, at = windows[number], np.flatnonzero(which == number)
            sizes = counts[files]
            size = int(sizes.sum())
            local = permutation(
                places[at] - (ends[number] - size), size, (self.seed, epoch, number)
            )
            file = np.searchsorted(np.cumsum(sizes), local, side="right")
            rows[at] = first[files][file] + local - (np.cumsum(sizes) - sizes)[file]
        return rows

    def _windows_of(self, epoch: int) -> list[np.ndarray]:
        """Return the files of each window of an epoch; what is left over belongs to the last."""
        if self._windows[0] != epoch:
            counts = self.shards.counts
            order = permutation(np.arange(len(counts)), len(counts), (self.seed, epoch, -1))
            windows: list[list[int]] = [[]]
            for file in order[counts[order] > 0].tolist():
                if counts[windows[-1]].sum() >= self.window:
                    windows.append([])
                windows[-1].append(file)
            if len(windows) > 1 and counts[windows[-1]].sum() < self.window:
                windows[-2:] = [windows[-2] + windows[-1]]
            self._windows = epoch, [np.array(files) for files in windows]
        return self._windows[1]

    def _look_ahead(self, place: int) -> None:
        """At the beginning of a window, prepare the files of the next one."""
        if not self.window:
            return
        epoch, place = divmod(place, self.shards.rows)
        windows, counts = self._windows_of(epoch), self.shards.counts
        ends = np.cumsum([counts[files].sum() for files in windows])
        number = int(np.searchsorted(ends, place, side="right"))
        if self._used != (epoch, number):
            self._used = epoch, number
            after = (windows[number + 1 :] or self._windows_of(epoch + 1))[0]
            self.shards.use(windows[number].tolist(), after.tolist())

    def sample(self, rows: int) -> Tensor:
        """Return up to `rows` raw activations [rows, d] without moving any cursor."""
        places = np.arange(min(rows, self.shards.rows))
        return self.shards.read(self._order(places, 0)).to(self.device)

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
