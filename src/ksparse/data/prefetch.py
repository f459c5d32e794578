"""TODO ksparse.data.prefetch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from contextlib import suppress

from torch import Tensor

from ksparse.data.base import ActivationBatch, ActivationStream, Cursor, StreamCancelled


class Prefetcher:
    """Another stream whose batches a thread makes while those before are used: at most `depth` of
    them wait, each as it would have been.

    What goes wrong in the thread is raised where the batch is asked for. The thread ends when the
    iterator is closed, or with its error.
    """

    def __init__(self, stream: ActivationStream, depth: int):
        self.stream, self.depth, self.d_model, self.halt = (
            stream,
            depth,
            stream.d_model,
            stream.halt,
        )
        self._same_context_fraction: float | None = None

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        ready: queue.Queue[tuple[ActivationBatch, float | None] | BaseException] = queue.Queue(
            self.depth
        )
        thread = threading.Thread(
            target=self._fill, args=(ready, cursor), name="ksparse-stream", daemon=True
        )
        self.halt.clear()
        thread.start()
        try:
            while True:
                made = ready.get()
                if isinstance(made, BaseException):
                    raise made
                batch, self._same_context_fraction = made
                yield batch
        finally:
            self.halt.set()
            while thread.is_alive():
                with suppress(queue.Empty):
                    ready.get(timeout=0.01)  # makes room for what the thread is about to leave
            thread.join()
            self.halt.clear()

    def _fill(self, ready: queue.Queue, cursor: Cursor | None) -> None:
        try:
            for batch in self.stream.batches(cursor):
                ready.put((batch, self.stream.same_context_fraction()))
                if self.halt.is_set():
                    return
        except StreamCancelled:
            pass
        except BaseException as error:  # whatever it is, whoever asks for the batch is to have it
            ready.put(error)

    def sample(self, rows: int) -> Tensor:
        return self.stream.sample(rows)

    def document_names(self, documents: Tensor) -> list[str]:
        return self.stream.document_names(documents)

    def same_context_fraction(self) -> float | None:
        """Return that of the block of the batch that was given out last."""
        return self._same_context_fraction
