"""Compute a stream's batches in a thread while training uses the previous ones."""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Generator
from contextlib import suppress
from typing import TypeAlias

from torch import Tensor

from ksparse.data.base import ActivationBatch, ActivationStream, Cursor, StreamCancelled

_Ready: TypeAlias = "queue.Queue[tuple[ActivationBatch, float | None] | BaseException]"
"""Batches with their `same_context_fraction`, or the error that ended the thread."""


class Prefetcher:
    """Another stream, with up to `depth` batches computed ahead by a thread.

    Batches and cursors are those of the stream. An error in the thread is raised where its batch is
    requested. The thread ends when the generator is closed, or with its error.
    """

    def __init__(self, stream: ActivationStream, depth: int):
        self.stream, self.depth = stream, depth
        self.d_model, self.cancel = stream.d_model, stream.cancel
        self._same_context_fraction: float | None = None

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        """Yield the stream's batches, from the cursor on."""
        ready: _Ready = queue.Queue(self.depth)
        thread = threading.Thread(
            # in this context, so that its progress reaches the same observer
            target=contextvars.copy_context().run,
            args=(self._fill, ready, cursor),
            name="ksparse-stream",
            daemon=True,
        )
        self.cancel.clear()
        thread.start()
        try:
            while True:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                batch, self._same_context_fraction = item
                yield batch
        finally:
            self.cancel.set()
            while thread.is_alive():
                with suppress(queue.Empty):
                    ready.get(timeout=0.01)  # makes room for the batch the thread may be putting
            thread.join()
            self.cancel.clear()

    def _fill(self, ready: _Ready, cursor: Cursor | None) -> None:
        try:
            for batch in self.stream.batches(cursor):
                ready.put((batch, self.stream.same_context_fraction()))
                if self.cancel.is_set():
                    return
        except StreamCancelled:
            pass
        except BaseException as error:  # raised where the batch is requested
            ready.put(error)

    def sample(self, rows: int) -> Tensor:
        """Return up to `rows` raw activations [rows, d] without moving any cursor."""
        return self.stream.sample(rows)

    def document_names(self, documents: Tensor) -> list[str]:
        """Return the names of documents, for messages."""
        return self.stream.document_names(documents)

    def same_context_fraction(self) -> float | None:
        """Return the fraction that belongs to the last batch handed out."""
        return self._same_context_fraction
