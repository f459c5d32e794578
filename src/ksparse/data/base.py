"""What all activation streams share: shuffled batches, and a cursor to resume from exactly.

A stream yields batches of raw activations forever. Each batch carries the cursor of the stream
after it; `batches(cursor)` continues from there with the same bits. Nothing else is saved.

- `LiveStream` computes activations from text, a shuffle buffer of `mix` kept activations at a time.
  A buffer's order is a permutation that is a function of (seed, buffer number). The cursor says
  where the buffer's text begins and how many of its batches are used; to resume, the buffer is
  computed again. Every kept activation of the text is used exactly once an epoch: a context that
  crosses the end of a buffer is computed in both.
- `ShardStream` reads activations from disk. Batch s holds activations s·b … s·b + b - 1 of a
  permutation of all rows, a new one each epoch.
- `Prefetcher` computes either of them in a thread, with the same batches and cursors.

With several processes the order of the data is the same. For live activations each process runs
the LM on its share of a buffer's contexts, the buffer is put together, and each takes its part of
every batch. From shards each process reads only its part.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ksparse.errors import CorruptError
from ksparse.lm.tokens import TokenBatch

Cursor = dict[str, Any]
"""Position in a stream, as JSON."""


class ActivationBatch(NamedTuple):
    """One batch, or with several processes this process's rows of it."""

    x: Tensor
    """[b, d] raw activations in float32."""
    documents: Tensor
    """[b] index of the document of each."""
    cursor: Cursor
    """Where the stream continues after this batch."""
    contexts: TokenBatch | None = None
    """The contexts that the activations are of, where the stream shuffles whole contexts: row i of
    x is position i of `contexts.keep`. A context that crosses the end of a batch is in both, each
    time with the positions of that batch."""
    others: tuple[Tensor, ...] = ()
    """[b, d] the same rows at each further site, where the stream reads several."""

    def at(self, number: int) -> ActivationBatch:
        """Return the batch at one of the stream's sites, by its number."""
        return self if number == 0 else self._replace(x=self.others[number - 1], others=())


class ActivationStream(Protocol):
    """What training reads batches of activations from."""

    d_model: int
    cancel: threading.Event
    """Set by another thread to abandon the batch being computed, which raises StreamCancelled."""

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        """Yield batches forever, from the cursor on; close the generator when done."""

    def sample(self, rows: int) -> Tensor:
        """Return up to `rows` raw activations [rows, d] without moving any cursor."""

    def document_names(self, documents: Tensor) -> list[str]:
        """Return the names of documents, for messages."""

    def same_context_fraction(self) -> float | None:
        """Return the fraction of neighbouring tokens of a context that are in the same batch, in
        the newest buffer or batch; None before the first one."""


class StreamCancelled(Exception):
    """The batch being computed was abandoned, because nothing waits for it any more."""


def check_cursor(cursor: Cursor, key: str) -> None:
    """Raise CorruptError for the cursor of another kind of stream, which lacks `key`."""
    if key not in cursor:
        raise CorruptError(
            f"the checkpoint's cursor has {', '.join(cursor)[:80]} and no {key!r}: "
            "it is not of these activations; use an older checkpoint"
        )
