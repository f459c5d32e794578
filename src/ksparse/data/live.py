"""Batches of activations computed by an LM as they are needed, shuffled in a buffer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ksparse.config import ActsConfig
from ksparse.data.base import ActivationBatch, Cursor, StreamCancelled, check_cursor
from ksparse.data.batch_size import choose_lm_batch
from ksparse.data.contexts import Context, Corpus, TextCursor
from ksparse.data.permutation import permutation
from ksparse.distributed import SINGLE_PROCESS, Mesh
from ksparse.errors import InputError, NonFiniteError
from ksparse.lm.model import LM
from ksparse.lm.tokens import TokenBatch
from ksparse.progress import report

_MAX_EMPTY_CONTEXTS = 10_000
"""Contexts in a row of which nothing is kept, before the text is given up."""


COMPUTING = "computing activations"
"""What the filling of a buffer is called in progress reports."""


class BufferStart(NamedTuple):
    """Where a buffer begins: a context, and how many of its kept activations come before."""

    place: TextCursor
    skip: int


class ShuffleBuffer(NamedTuple):
    """Kept activations of a stretch of text, in the order of the text."""

    x: tuple[Tensor, ...]
    """[rows, d] in the precision of `acts.store`, one for each site."""
    documents: Tensor
    """[rows] index of each row's document."""
    contexts: Tensor
    """[rows] number of each row's context in the buffer."""
    next: BufferStart
    """Where the next buffer begins."""
    positions: Tensor | None = None
    """[rows] position of each row in its context, where whole contexts are shuffled."""
    read: Sequence[Context] = ()
    """The contexts of the buffer, where whole contexts are shuffled."""


class LiveStream:
    """An `ActivationStream` of an LM's activations on a text, computed a buffer at a time.

    Args:
        lm: the LM.
        corpus: the text.
        batch: activations in a batch.
        seed: of the order in a buffer.
        mesh: the processes that share the stream.
        what: what to call the filling of a buffer in progress reports.
        whole_contexts: shuffle contexts in place of single activations, and hand them out too.
        others: the same LM at further sites. One pass reads all of them; each has a buffer of its
            own, in the same order.
    """

    def __init__(
        self,
        lm: LM,
        corpus: Corpus,
        *,
        batch: int,
        seed: int,
        mesh: Mesh = SINGLE_PROCESS,
        what: str = COMPUTING,
        whole_contexts: bool = False,
        others: Sequence[LM] = (),
    ):
        self.whole_contexts = whole_contexts
        self.lms = (lm, *others)
        """The LM at each site."""
        self.lm, self.corpus, self.batch, self.seed, self.mesh = lm, corpus, batch, seed, mesh
        self.d_model = lm.d_model
        self.batches_per_buffer = max(1, corpus.acts.mix // batch)
        """Batches in a buffer."""
        self.what = what
        self.rows_computed = 0
        """Activations computed so far."""
        self.seconds_computing = 0.0
        """Seconds that this took."""
        self.cancel = threading.Event()
        self._lm_batch = corpus.acts.lm_batch
        """Contexts in a pass of the LM; 0 until it is measured."""
        self._same_context_fraction: float | None = None
        self._newest: tuple[BufferStart, ShuffleBuffer] | None = None
        # The contexts from a position on, kept open: to reach it again, all before it is read.
        self._open_text: tuple[TextCursor, Iterator[Context]] | None = None
        self._lock = threading.Lock()  # `sample` may be called while a thread computes

    def batches(self, cursor: Cursor | None = None) -> Generator[ActivationBatch, None, None]:
        """Yield batches forever, from the cursor on.

        Raises:
            NonFiniteError: An activation is NaN or infinite.
            CorruptError: The cursor is of another kind of stream.
            StreamCancelled: `cancel` was set while a buffer was being computed.
        """
        cursor = cursor or {"block": 0, "place": list(TextCursor()), "skip": 0, "batch": 0}
        check_cursor(cursor, "block")
        self._use_lm_batch(cursor.get("lm_batch", self._lm_batch))
        number, done = cursor["block"], cursor["batch"]
        start = BufferStart(TextCursor(*cursor["place"]), cursor["skip"])
        while True:
            buffer = self._buffer(start)
            order = self._order(buffer, number)
            self._same_context_fraction = self._measure_same_context(buffer, order)
            for i in range(done, self.batches_per_buffer):
                chosen = order[i * self.batch : (i + 1) * self.batch]
                chosen = chosen[self.mesh.batch_range(self.batch)]
                after = self._cursor(number, start, i + 1)
                if i + 1 == self.batches_per_buffer:
                    after = self._cursor(number + 1, buffer.next, 0)
                contexts = self._contexts_of(buffer, chosen) if self.whole_contexts else None
                x, *others = (part[chosen].float() for part in buffer.x)
                documents = buffer.documents[chosen]
                yield ActivationBatch(x, documents, after, contexts, tuple(others))
            number, start, done = number + 1, buffer.next, 0
            del buffer  # so that two are never in memory

    def _order(self, buffer: ShuffleBuffer, number: int) -> Tensor:
        """Return the order of a buffer's activations, [rows]; whole contexts stay together."""
        rows = len(buffer.documents)
        if not self.whole_contexts:
            return torch.from_numpy(permutation(np.arange(rows), rows, (self.seed, number)))
        count = len(buffer.read)
        places = torch.from_numpy(permutation(np.arange(count), count, (self.seed, number)))
        return places[buffer.contexts].argsort(stable=True)

    def _contexts_of(self, buffer: ShuffleBuffer, chosen: Tensor) -> TokenBatch:
        """Return the contexts of a batch, `keep` being the positions of its rows."""
        assert buffer.positions is not None
        numbers, rows = buffer.contexts[chosen].unique_consecutive(return_inverse=True)
        contexts = self.corpus.batch([buffer.read[number] for number in numbers.tolist()])
        keep = torch.zeros_like(contexts.keep)
        keep[rows, buffer.positions[chosen]] = True
        return contexts._replace(keep=keep)

    def rows_to_compute(self, cursor: Cursor | None, batches: int) -> int:
        """Return how many activations are computed for the next batches: whole buffers, the one
        that holds the cursor included."""
        used = cursor["batch"] if cursor else 0
        buffers = -(-(used + batches) // self.batches_per_buffer)
        return buffers * self.batches_per_buffer * self.batch

    def sample(self, rows: int, number: int = 0) -> Tensor:
        """Return up to `rows` raw activations [rows, d] of the first buffer, at one of the sites by
        its number, without moving any cursor."""
        x = self._buffer(BufferStart(TextCursor(), 0)).x[number]
        order = permutation(np.arange(min(rows, len(x))), len(x), (self.seed, 0))
        return x[torch.from_numpy(order)].float()

    def document_names(self, documents: Tensor) -> list[str]:
        """Return the names of documents, for messages."""
        return [self.corpus.names.get(i, f"document {i}") for i in documents.unique().tolist()]

    def same_context_fraction(self) -> float | None:
        """Return the fraction of neighbours in a context that are in the same batch, for the newest
        buffer."""
        return self._same_context_fraction

    def _measure_same_context(self, buffer: ShuffleBuffer, order: Tensor) -> float:
        batch_of = torch.empty(len(order), dtype=torch.long)
        batch_of[order] = torch.arange(len(order)) // self.batch
        neighbours = buffer.contexts[1:] == buffer.contexts[:-1]
        same_batch = (batch_of[1:] == batch_of[:-1]) & neighbours
        return same_batch.sum().item() / max(1, neighbours.sum().item())

    def _use_lm_batch(self, contexts: int) -> None:
        """Give the LM as many contexts in a pass as when the cursor was made."""
        with self._lock:
            if contexts != self._lm_batch:
                self._lm_batch, self._newest = contexts, None

    def _cursor(self, number: int, start: BufferStart, batch: int) -> Cursor:
        """Return the cursor after some batches of a buffer; its keys are in checkpoints."""
        cursor = {"block": number, "place": list(start.place), "skip": start.skip, "batch": batch}
        return cursor if self.corpus.acts.lm_batch else cursor | {"lm_batch": self._lm_batch}

    def _buffer(self, start: BufferStart) -> ShuffleBuffer:
        """Return the buffer that begins at `start`; the newest one is kept, since `sample` and
        `batches` often need the same one."""
        with self._lock:
            if self._newest is None or self._newest[0] != start:
                self._newest = None
                self._newest = (start, self._compute(start))
            return self._newest[1]

    def _compute(self, start: BufferStart) -> ShuffleBuffer:
        rows = self.batch * self.batches_per_buffer
        report(self.what, 0, rows)
        if not self._lm_batch:  # all processes take the same
            chosen = choose_lm_batch(self.lm, self.corpus, self.sites)
            self._lm_batch = self.mesh.all_reduce_max_ints("lm_batch", [chosen])[0]
        began = time.monotonic()
        groups, following = self._gather(start, rows)
        dtype = getattr(torch, self.corpus.acts.store)
        x = tuple(torch.empty(rows, lm.d_model, dtype=dtype, device=lm.device) for lm in self.lms)
        documents = torch.empty(rows, dtype=torch.long)
        numbers = torch.empty(rows, dtype=torch.long)
        positions = torch.empty(rows, dtype=torch.long) if self.whole_contexts else None
        ends, filled, contexts_done = [0], 0, 0
        for number, group in enumerate(groups):
            if self.cancel.is_set():
                raise StreamCancelled
            contexts = self.corpus.batch(group)
            keep = contexts.keep
            ids = torch.arange(contexts_done, contexts_done + len(group))[:, None].expand_as(keep)
            contexts_done += len(group)
            first = start.skip if number == 0 else 0
            part = slice(first, first + rows - filled)
            owners = contexts.documents[keep][part]
            at = slice(filled, filled + len(owners))
            documents[at], numbers[at] = owners, ids[keep][part]
            if positions is not None:
                positions[at] = keep.nonzero()[:, 1][part]
            if self._rank_of(number, len(groups)) == self.mesh.rank:
                for into, site, acts in zip(x, self.sites, self._read(contexts)):
                    kept = acts[keep][part]
                    self._check_finite(kept, site, owners)
                    into[at] = kept
            filled += len(owners)
            ends.append(filled)
            report(self.what, filled, rows)
        for part_of_site in x:
            self._broadcast(part_of_site, ends)
        self.rows_computed += rows
        self.seconds_computing += time.monotonic() - began
        read = list(itertools.chain(*groups)) if self.whole_contexts else ()
        return ShuffleBuffer(x, documents, numbers, following, positions, read)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are read."""
        return tuple(lm.options.site for lm in self.lms)

    def _read(self, contexts: TokenBatch) -> list[Tensor]:
        """Return the activations x[b, t, d] of contexts at each site, from one pass."""
        tokens, attention = contexts.tokens, contexts.attention
        if len(self.lms) == 1:
            return [self.lm.acts(tokens, attention)]
        found = self.lm.acts_at(self.sites, tokens, attention)
        return [found[site] for site in self.sites]

    def _gather(self, start: BufferStart, rows: int) -> tuple[list[list[Context]], BufferStart]:
        """Take contexts until `rows` activations are kept; return them grouped for the LM, and
        where the next buffer begins."""
        groups: list[list[Context]] = []
        source, self._open_text = self._contexts_from(start.place), None
        count, empty, following = -start.skip, 0, start
        while count < rows:
            group: list[Context] = []
            while len(group) < self._lm_batch and count < rows:
                context = next(source)
                kept = int(self.corpus.batch([context]).keep.sum())
                empty = 0 if kept else empty + 1
                if empty > _MAX_EMPTY_CONTEXTS:
                    raise InputError(
                        f"text {self.corpus.acts.text!r} has only special tokens and padding: "
                        "nothing is kept"
                    )
                group.append(context)
                count += kept
                if count > rows:
                    following = BufferStart(context.start, kept - (count - rows))
                elif count == rows:
                    following = BufferStart(context.next, 0)
            groups.append(group)
        # A context that crosses the end is read again by the next buffer.
        unfinished = [context] if count > rows else []
        self._open_text = following.place, itertools.chain(unfinished, source)
        return groups, following

    def _contexts_from(self, place: TextCursor) -> Iterator[Context]:
        """Return the contexts from a position on: the open text if it is there."""
        if self._open_text and self._open_text[0] == place:
            return self._open_text[1]
        return self.corpus.contexts(place)

    def _rank_of(self, group: int, groups: int) -> int:
        """Return the process that runs the LM on a group: equal runs of consecutive groups."""
        return group * self.mesh.size // groups

    def _broadcast(self, x: Tensor, ends: list[int]) -> None:
        """Complete the buffer: each process sends the rows of its groups to all others."""
        groups = len(ends) - 1
        for rank in range(self.mesh.size if self.mesh.size > 1 else 0):
            computed = [group for group in range(groups) if self._rank_of(group, groups) == rank]
            if computed:
                rows = x[ends[computed[0]] : ends[computed[-1] + 1]]
                self.mesh.broadcast("block", rows.view(torch.uint8), rank)

    def _check_finite(self, x: Tensor, site: str, documents: Tensor) -> None:
        bad = ~torch.isfinite(x).all(1)
        if bad.any():
            name = self.document_names(documents[bad.cpu()][:1])[0]
            raise NonFiniteError(
                f"{int(bad.sum())} of {len(x)} activations at {site} are NaN or "
                f"infinite, the first in document {name!r}; leave that document out, or try "
                "--acts.lm-dtype float32"
            )


def memory_bytes(acts: ActsConfig, batch: int, d_model: int) -> int:
    """Return the memory that a live stream's buffer takes."""
    rows = max(1, acts.mix // batch) * batch
    return rows * ((4 if acts.store == "float32" else 2) * d_model + 16)
