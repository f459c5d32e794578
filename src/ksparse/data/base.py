"""Batches of raw activations in a mixed order, and a cursor from which to go on exactly.

Live: the text is taken in blocks of `mix` kept activations. A block's activations are computed,
permuted by a permutation that is a function of (seed, block), and dealt out as batches. The cursor
is where the block's text begins and how many batches of it are out: to go on, the block is computed
again. No buffer is saved, none is lost, and every kept activation of the text is used exactly once
an epoch: a context that crosses the end of a block is computed in both.

From shards: batch s holds the activations numbered s·b … s·b + b - 1 of a permutation of all rows,
a new one each epoch.

On a mesh the order of the data is the same. Each process runs the LM on its share of a block's
contexts, the block is put together, and each takes its part of every batch; of shards it reads only
that part.

Ahead: either of them, computed by a thread of its own while training uses what is there. The same
batches with the same cursors.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ksparse.errors import CorruptError

Cursor = dict[str, Any]  # JSON


class ActivationBatch(NamedTuple):
    """Raw activations x[b, d], the document of each [b], and the cursor after them; on a mesh, the
    rows of this process's part."""

    x: Tensor
    documents: Tensor
    cursor: Cursor


class ActivationStream(Protocol):
    """What training reads from."""

    d_model: int
    halt: threading.Event
    """Set by another thread to have the batch that is being made given up, by raising Halted."""

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        """Yield batches for ever, from the cursor on. To be closed when no more are wanted."""

    def sample(self, rows: int) -> Tensor:
        """Return some raw activations [<= rows, d] without moving any cursor."""

    def document_names(self, documents: Tensor) -> list[str]:
        """Name documents, for messages."""

    def same_context_fraction(self) -> float | None:
        """Return the share of neighbours in a context that came into the same batch, in the newest
        block."""


class StreamCancelled(Exception):
    """A batch was given up because nobody waits for it any more."""


def _check_cursor(cursor: Cursor, key: str) -> None:
    """Raise CorruptError for the cursor of another kind of stream."""
    if key not in cursor:
        raise CorruptError(
            f"the checkpoint's cursor has {', '.join(cursor)[:80]} and no {key!r}: "
            "it is not of these activations; use an older checkpoint"
        )
